# What a local AWS cannot do (placement groups, EFA, budgets, notifications, the image's parameter), and what the
# variables refuse. `terraform test`: no account, nothing is made.

mock_provider "aws" {
  mock_data "aws_caller_identity" {
    defaults = { account_id = "123456789012" }
  }
  mock_data "aws_partition" {
    defaults = { partition = "aws" }
  }
  mock_data "aws_iam_policy_document" {
    defaults = { json = "{\"Version\": \"2012-10-17\", \"Statement\": []}" }
  }
  mock_data "aws_ssm_parameter" {
    defaults = { insecure_value = "ami-0123456789abcdef0" }
  }
  mock_resource "aws_sns_topic" {
    defaults = { arn = "arn:aws:sns:us-east-1:123456789012:sprint-mine" }
  }
  mock_resource "aws_autoscaling_policy" {
    defaults = { arn = "arn:aws:autoscaling:us-east-1:123456789012:scalingPolicy:1:autoScalingGroupName/sprint-mine-on-demand:policyName/sprint-mine-fallback" }
  }
  mock_resource "aws_launch_template" {
    defaults = { id = "lt-0123456789abcdef0", latest_version = 1 }
  }
}

variables {
  deployment            = "mine"
  region                = "us-east-1"
  bucket                = "sprint-123456789012-us-east-1"
  vpc_id                = "vpc-0123456789abcdef0"
  subnet_ids            = ["subnet-0123456789abcdef0", "subnet-0123456789abcdef1"]
  role_name             = "sprint-instance-us-east-1"
  instance_profile_name = "sprint-instance-us-east-1"
  end_time              = "2030-01-31T12:00:00Z"
  deadline              = 1896090900
  code_key              = "code/0000000000000000000000000000000000000000000000000000000000000000.tar.gz"
  code_sha256           = "0000000000000000000000000000000000000000000000000000000000000000"
}

run "one_node" {
  variables {
    max_usd                  = 50
    notify_email             = "me@example.org"
    enable_asg_notifications = true
  }

  assert {
    condition     = { for market, group in aws_autoscaling_group.this : group.name => [group.desired_capacity, group.min_size, group.max_size] } == { "sprint-mine-spot" = [1, 0, 1], "sprint-mine-on-demand" = [0, 0, 1] }
    error_message = "The groups want something else."
  }
  assert {
    condition     = alltrue([for market, action in aws_autoscaling_schedule.reaper : action.start_time == "2030-01-31T12:00:00Z" && action.min_size == 0 && action.max_size == 0 && action.desired_capacity == 0]) && toset(keys(aws_autoscaling_schedule.reaper)) == toset(keys(aws_autoscaling_group.this))
    error_message = "A group would outlive end_time."
  }
  assert {
    condition     = output.ami_id == "ami-0123456789abcdef0" && alltrue([for template in aws_launch_template.this : template.image_id == "ami-0123456789abcdef0"])
    error_message = "The image is not that of the parameter."
  }
  assert {
    condition     = aws_budgets_budget.this[0].limit_amount == "50.00" && join(" ", one(aws_budgets_budget.this[0].cost_filter).values) == "user:Deployment$mine"
    error_message = "The budget counts something else."
  }
  assert {
    condition     = toset(aws_autoscaling_notification.this[0].group_names) == toset(["sprint-mine-spot", "sprint-mine-on-demand"])
    error_message = "Failed launches of a group are not told."
  }
  assert {
    condition     = aws_sns_topic_subscription.email[0].endpoint == "me@example.org" && toset(keys(aws_cloudwatch_event_rule.this)) == toset(["group", "spot"])
    error_message = "Nobody is told of interruptions and ends."
  }
  assert {
    condition     = length(aws_vpc_security_group_ingress_rule.nodes) + length(aws_vpc_security_group_ingress_rule.efa) + length(aws_vpc_security_group_ingress_rule.mlflow) + length(aws_placement_group.this) == 0
    error_message = "One node lets somebody in, or has a placement group."
  }
}

# The run before made it with one image; a newer one changes nothing until the variable does.
run "the_image_stays" {
  command = plan

  override_data {
    target = data.aws_ssm_parameter.ami[0]
    values = { insecure_value = "ami-0fedcba9876543210" }
  }

  assert {
    condition     = output.ami_id == "ami-0123456789abcdef0"
    error_message = "A running deployment would get another image."
  }
}

run "on_demand" {
  command = plan

  variables {
    capacity = "on-demand"
    ami_id   = "ami-0aaaaaaaaaaaaaaaa"
    start    = false
  }

  assert {
    condition     = keys(aws_autoscaling_group.this) == ["on-demand"] && length(aws_cloudwatch_metric_alarm.fallback) + length(aws_autoscaling_policy.fallback) == 0
    error_message = "There is more than the group on demand."
  }
  assert {
    condition     = one(one(aws_autoscaling_group.this["on-demand"].mixed_instances_policy).instances_distribution).on_demand_percentage_above_base_capacity == 100
    error_message = "Some of it is spot."
  }
  assert {
    condition     = length(data.aws_ssm_parameter.ami) == 0 && length(aws_budgets_budget.this) == 0 && keys(aws_cloudwatch_event_rule.this) == ["group"]
    error_message = "Something is there that these variables leave out."
  }
}

run "spot_alone" {
  command = plan

  variables {
    capacity       = "spot"
    instance_types = ["g6.12xlarge", "g6e.12xlarge"]
    max_spot_price = "2.50"
  }

  assert {
    condition     = keys(aws_autoscaling_group.this) == ["spot"] && length(aws_autoscaling_policy.fallback) == 0
    error_message = "There is more than the spot group."
  }
  assert {
    condition     = one(one(aws_autoscaling_group.this["spot"].mixed_instances_policy).instances_distribution).on_demand_percentage_above_base_capacity == 0 && one(one(aws_autoscaling_group.this["spot"].mixed_instances_policy).instances_distribution).spot_max_price == "2.50"
    error_message = "Some of it is on demand, or the price is not limited."
  }
  assert {
    condition     = [for override in one(one(aws_autoscaling_group.this["spot"].mixed_instances_policy).launch_template).override : override.instance_type] == ["g6.12xlarge", "g6e.12xlarge"]
    error_message = "Other types would be launched."
  }
}

run "several_nodes" {
  command = plan

  variables {
    capacity   = "on-demand"
    num_nodes  = 4
    subnet_ids = ["subnet-0123456789abcdef0"]
  }

  assert {
    condition     = aws_autoscaling_group.this["on-demand"].max_size == 4
    error_message = "The group is not as large as the training."
  }
  assert {
    condition     = { for name, rule in aws_vpc_security_group_ingress_rule.nodes : name => "${rule.ip_protocol} ${rule.from_port}-${rule.to_port}" } == { rendezvous = "tcp 29400-29400", nccl = "tcp 32768-60999" } && alltrue([for rule in aws_vpc_security_group_ingress_rule.nodes : rule.cidr_ipv4 == null])
    error_message = "Nodes let in something other than rendezvous and NCCL."
  }
}

run "several_nodes_with_efa" {
  variables {
    capacity               = "on-demand"
    num_nodes              = 2
    subnet_ids             = ["subnet-0123456789abcdef0"]
    instance_types         = ["p4d.24xlarge"]
    enable_efa             = true
    enable_placement_group = true
    ami_id                 = "ami-0aaaaaaaaaaaaaaaa"
  }

  assert {
    condition     = one(aws_launch_template.this["on-demand"].network_interfaces).interface_type == "efa"
    error_message = "The nodes have no EFA."
  }
  assert {
    condition     = aws_placement_group.this[0].strategy == "cluster" && aws_autoscaling_group.this["on-demand"].placement_group == "sprint-mine"
    error_message = "The nodes are not close together."
  }
  assert {
    condition     = aws_vpc_security_group_ingress_rule.efa["efa"].referenced_security_group_id == aws_security_group.this.id && aws_vpc_security_group_egress_rule.efa["efa"].referenced_security_group_id == aws_security_group.this.id
    error_message = "EFA is open to others than the nodes."
  }
  assert {
    condition     = length(aws_vpc_security_group_ingress_rule.nodes) == 0
    error_message = "There are rules that EFA's rule contains."
  }
}

run "refuses" {
  command = plan

  variables {
    deployment               = "-mine"
    bucket                   = "s3://bucket"
    vpc_id                   = "10.0.0.0/16"
    mlflow_security_group_id = "mlflow"
    data_snapshot_id         = "vol-1"
    num_nodes                = 0
    capacity                 = "cheap"
    fallback_minutes         = 1
    max_spot_price           = "$2"
    ami_id                   = "latest"
    ami_parameter            = "/mine"
    root_gib                 = 20
    root_iops                = 100
    end_time                 = "2030-01-31T12:00:00+02:00"
    deadline                 = 0
    max_hours                = 0
    max_usd                  = -1
    notify_email             = "me"
    code_key                 = "code/latest.tar.gz"
    code_sha256              = "latest"
    image                    = "a b"
    wheels                   = "/wheels"
    source_prefixes          = ["s3://bucket/*"]
    tags                     = { Deployment = "another" }
  }

  expect_failures = [
    var.deployment,
    var.bucket,
    var.vpc_id,
    var.mlflow_security_group_id,
    var.data_snapshot_id,
    var.num_nodes,
    var.capacity,
    var.fallback_minutes,
    var.max_spot_price,
    var.ami_id,
    var.ami_parameter,
    var.root_gib,
    var.root_iops,
    var.end_time,
    var.deadline,
    var.max_hours,
    var.max_usd,
    var.notify_email,
    var.code_key,
    var.code_sha256,
    var.image,
    var.wheels,
    var.source_prefixes,
    var.tags,
  ]
}

run "refuses_nodes_apart" {
  command = plan

  variables {
    num_nodes      = 2
    instance_types = ["g6.12xlarge", "g5.12xlarge"]
  }

  expect_failures = [var.subnet_ids, var.instance_types]
}

run "refuses_what_does_not_fit" {
  command = plan

  variables {
    enable_efa      = true
    root_iops       = 3000
    root_throughput = 1000
  }

  expect_failures = [var.enable_efa, var.root_throughput]
}

run "refuses_efa_in_a_container" {
  command = plan

  variables {
    num_nodes  = 2
    subnet_ids = ["subnet-0123456789abcdef0"]
    enable_efa = true
    image      = "registry.example/imagenet-sprint:1"
  }

  expect_failures = [var.enable_efa]
}

run "refuses_none_and_twice_the_same" {
  command = plan

  variables {
    subnet_ids      = []
    instance_types  = ["g6.12xlarge", "g6.12xlarge"]
    root_iops       = 16000
    root_throughput = 2000
  }

  expect_failures = [var.subnet_ids, var.instance_types, var.root_throughput]
}

run "refuses_a_placement_group_over_zones" {
  command = plan

  variables {
    enable_placement_group = true
  }

  expect_failures = [aws_placement_group.this]
}
