# Optional MLflow server: SQLite on a volume of its own, copied to S3 every hour; artifacts in S3. Nobody reaches it but
# through Session Manager, and the clusters that let themselves in (`mlflow_security_group_id`).

locals {
  mlflow_port = 5000

  mlflow_files = {
    "/usr/local/sbin/sprint-mlflow-setup"              = "sprint-mlflow-setup"
    "/usr/local/sbin/sprint-mlflow-backup"             = "sprint-mlflow-backup"
    "/etc/systemd/system/sprint-mlflow-setup.service"  = "sprint-mlflow-setup.service"
    "/etc/systemd/system/sprint-mlflow.service"        = "sprint-mlflow.service"
    "/etc/systemd/system/sprint-mlflow-backup.service" = "sprint-mlflow-backup.service"
    "/etc/systemd/system/sprint-mlflow-backup.timer"   = "sprint-mlflow-backup.timer"
  }

  mlflow_user_data = !var.enable_mlflow ? "" : templatefile("${path.module}/mlflow/user_data.yaml.tftpl", {
    bucket         = aws_s3_bucket.this.bucket
    region         = var.region
    volume_id      = aws_ebs_volume.mlflow[0].id
    mlflow_version = var.mlflow_version
    port           = local.mlflow_port
    files          = { for target, name in local.mlflow_files : target => filebase64("${path.module}/mlflow/${name}") }
  })
}

data "aws_ssm_parameter" "mlflow_ami" {
  count = var.enable_mlflow && var.mlflow_ami_id == "" ? 1 : 0

  name = "/aws/service/ami-amazon-linux-latest/al2023-ami-kernel-default-arm64"
}

data "aws_iam_policy_document" "mlflow" {
  source_policy_documents = [data.aws_iam_policy_document.session_manager.json]

  # Without a condition on the prefix, as for training instances: the set-up asks whether there is a copy of the database.
  statement {
    sid       = "List"
    actions   = ["s3:ListBucket"]
    resources = [aws_s3_bucket.this.arn]
  }

  statement {
    sid = "ReadAndWrite"
    actions = [
      "s3:AbortMultipartUpload",
      "s3:DeleteObject",
      "s3:GetObject",
      "s3:ListMultipartUploadParts",
      "s3:PutObject",
    ]
    resources = ["${aws_s3_bucket.this.arn}/mlflow/*"]
  }
}

resource "aws_iam_role" "mlflow" {
  count = var.enable_mlflow ? 1 : 0

  name                 = "${var.name_prefix}-mlflow-${var.region}"
  description          = "The MLflow server: its part of the bucket, and Session Manager."
  assume_role_policy   = data.aws_iam_policy_document.ec2.json
  max_session_duration = 3600
}

resource "aws_iam_role_policy" "mlflow" {
  count = var.enable_mlflow ? 1 : 0

  name   = "bucket-and-session-manager"
  role   = aws_iam_role.mlflow[0].id
  policy = data.aws_iam_policy_document.mlflow.json
}

resource "aws_iam_instance_profile" "mlflow" {
  count = var.enable_mlflow ? 1 : 0

  name = aws_iam_role.mlflow[0].name
  role = aws_iam_role.mlflow[0].name
}

resource "aws_security_group" "mlflow" {
  count = var.enable_mlflow ? 1 : 0

  name_prefix = "${var.name_prefix}-mlflow-"
  description = "MLflow server: clusters let themselves in, one rule each"
  vpc_id      = aws_vpc.this.id

  tags = { Name = "${var.name_prefix}-mlflow" }

  lifecycle {
    create_before_destroy = true
  }
}

resource "aws_vpc_security_group_egress_rule" "mlflow" {
  count = var.enable_mlflow ? 1 : 0

  security_group_id = aws_security_group.mlflow[0].id
  description       = "Packages, S3, Session Manager"
  ip_protocol       = "tcp"
  from_port         = 443
  to_port           = 443
  cidr_ipv4         = "0.0.0.0/0"
}

resource "aws_ebs_volume" "mlflow" {
  #checkov:skip=CKV_AWS_189: encrypted with the account's own key for EBS; another one costs a dollar a month
  count = var.enable_mlflow ? 1 : 0

  availability_zone = local.zones[0]
  size              = var.mlflow_volume_gib
  type              = "gp3"
  encrypted         = true

  tags = { Name = "${var.name_prefix}-mlflow" }
}

resource "aws_instance" "mlflow" {
  #checkov:skip=CKV_AWS_88: its only way out; a NAT gateway costs more than the server, and nobody is let in
  #checkov:skip=CKV_AWS_126: figures by the minute cost money, and a server that fails starts again
  count = var.enable_mlflow ? 1 : 0

  ami                                  = var.mlflow_ami_id != "" ? var.mlflow_ami_id : data.aws_ssm_parameter.mlflow_ami[0].insecure_value
  instance_type                        = var.mlflow_instance_type
  subnet_id                            = aws_subnet.this[local.zones[0]].id
  vpc_security_group_ids               = [aws_security_group.mlflow[0].id]
  iam_instance_profile                 = aws_iam_instance_profile.mlflow[0].name
  associate_public_ip_address          = true # its way out; nothing is let in
  ebs_optimized                        = true
  instance_initiated_shutdown_behavior = "stop"

  user_data_base64            = base64gzip(local.mlflow_user_data)
  user_data_replace_on_change = true # the volume and what is in S3 stay

  metadata_options {
    http_endpoint               = "enabled"
    http_tokens                 = "required"
    http_put_response_hop_limit = 1
  }

  root_block_device {
    volume_type = "gp3"
    volume_size = 12
    encrypted   = true
  }

  tags = { Name = "${var.name_prefix}-mlflow" }

  lifecycle {
    # A new image of Amazon's is no reason to replace a server that works.
    ignore_changes = [ami]
  }
}

resource "aws_volume_attachment" "mlflow" {
  count = var.enable_mlflow ? 1 : 0

  device_name                    = "/dev/sdf"
  volume_id                      = aws_ebs_volume.mlflow[0].id
  instance_id                    = aws_instance.mlflow[0].id
  stop_instance_before_detaching = true
}
