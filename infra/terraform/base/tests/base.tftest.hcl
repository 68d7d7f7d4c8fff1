# What a local AWS cannot do, and what the variables refuse. `terraform test`: no account, nothing is made.

mock_provider "aws" {
  mock_data "aws_caller_identity" {
    defaults = { account_id = "123456789012" }
  }
  mock_data "aws_partition" {
    defaults = { partition = "aws" }
  }
  mock_data "aws_availability_zones" {
    defaults = { names = ["us-east-1b", "us-east-1a", "us-east-1d"] }
  }
  mock_data "aws_iam_policy_document" {
    defaults = { json = "{\"Version\": \"2012-10-17\", \"Statement\": []}" }
  }
  mock_data "aws_ssm_parameter" {
    defaults = { insecure_value = "ami-0123456789abcdef0" }
  }
}

variables {
  region = "us-east-1"
}

run "by_default" {
  command = plan

  assert {
    condition     = aws_s3_bucket.this.bucket == "sprint-123456789012-us-east-1"
    error_message = "The bucket's name does not come from account and region."
  }
  assert {
    condition     = aws_s3_bucket.this.force_destroy == false
    error_message = "A bucket with checkpoints would be deleted."
  }
  assert {
    condition     = length(aws_s3_bucket_policy.this) == 1
    error_message = "Requests without TLS are let in."
  }
  assert {
    condition     = length(aws_instance.mlflow) + length(aws_ebs_volume.mlflow) + length(aws_ebs_volume.data) == 0
    error_message = "Something is made that costs money and that nobody asked for."
  }
  assert {
    condition     = alltrue([for subnet in aws_subnet.this : subnet.map_public_ip_on_launch == false])
    error_message = "Whatever starts in a subnet gets a public address."
  }
  assert {
    condition     = { for zone, subnet in aws_subnet.this : zone => subnet.cidr_block } == { us-east-1a = "10.42.0.0/20", us-east-1b = "10.42.16.0/20", us-east-1d = "10.42.48.0/20" }
    error_message = "A subnet's addresses do not go by its zone's letter."
  }
}

run "old_versions_expire" {
  command = plan

  variables {
    checkpoint_days = 2
  }

  assert {
    condition = {
      for rule in aws_s3_bucket_lifecycle_configuration.this[0].rule :
      rule.id => try(rule.noncurrent_version_expiration[0].noncurrent_days, 0)
      } == {
      incomplete-uploads   = 0
      old-versions-runs    = 2
      old-versions-data    = 2
      old-versions-jobs    = 2
      old-versions-code    = 2
      old-versions-wheels  = 2
      old-versions-reports = 2
      old-versions-logs    = 2
      old-versions-infra   = 90
      old-versions-mlflow  = 30
    }
    error_message = "Old versions are kept for other times than said."
  }
}

run "mlflow_and_data" {
  variables {
    enable_mlflow        = true
    data_volume_gib      = 100
    enable_data_snapshot = true
  }

  assert {
    condition     = aws_instance.mlflow[0].ami == "ami-0123456789abcdef0" && one(aws_instance.mlflow[0].metadata_options).http_tokens == "required"
    error_message = "The server has another image, or IMDSv1."
  }
  assert {
    condition     = aws_ebs_volume.mlflow[0].encrypted && aws_ebs_volume.data[0].encrypted && one(aws_instance.mlflow[0].root_block_device).encrypted
    error_message = "A volume is not encrypted."
  }
  assert {
    condition     = output.mlflow_uri == "http://${aws_instance.mlflow[0].private_ip}:5000" && output.data_snapshot_id == aws_ebs_snapshot.data[0].id
    error_message = "An output names something else."
  }
}

run "without_them_outputs_are_empty" {
  command = plan

  assert {
    condition     = output.mlflow_uri == "" && output.mlflow_instance_id == "" && output.mlflow_security_group_id == "" && output.data_snapshot_id == ""
    error_message = "An output names what is not there."
  }
}

run "refuses" {
  command = plan

  variables {
    name_prefix          = "Sprint"
    bucket_name          = "my.bucket"
    checkpoint_days      = 0
    log_days             = 0.5
    vpc_cidr             = "8.8.0.0/16"
    availability_zones   = ["eu-west-1a"]
    mlflow_instance_type = "t3.small"
    mlflow_version       = ">=3"
    mlflow_volume_gib    = 0
    mlflow_ami_id        = "ubuntu"
    data_volume_gib      = 5
    tags                 = { Project = "another" }
  }

  expect_failures = [
    var.name_prefix,
    var.bucket_name,
    var.checkpoint_days,
    var.log_days,
    var.vpc_cidr,
    var.availability_zones,
    var.mlflow_instance_type,
    var.mlflow_version,
    var.mlflow_volume_gib,
    var.mlflow_ami_id,
    var.data_volume_gib,
    var.tags,
  ]
}

run "refuses_a_snapshot_of_nothing" {
  command = plan

  variables {
    enable_data_snapshot = true
  }

  expect_failures = [var.enable_data_snapshot]
}
