# The role of training instances. What belongs to one deployment (its groups, its topic) is added by `cluster`.

data "aws_iam_policy_document" "ec2" {
  statement {
    actions = ["sts:AssumeRole"]

    principals {
      type        = "Service"
      identifiers = ["ec2.amazonaws.com"]
    }
  }
}

# Session Manager, and nothing else that Systems Manager can do.
data "aws_iam_policy_document" "session_manager" {
  #checkov:skip=CKV_AWS_111: the channels of Session Manager have no resource level
  #checkov:skip=CKV_AWS_356: the channels of Session Manager have no resource level
  statement {
    sid = "SessionManager"
    actions = [
      "ssm:UpdateInstanceInformation",
      "ssmmessages:CreateControlChannel",
      "ssmmessages:CreateDataChannel",
      "ssmmessages:OpenControlChannel",
      "ssmmessages:OpenDataChannel",
    ]
    resources = ["*"] # the channels have no resource level
  }
}

data "aws_iam_policy_document" "instance" {
  source_policy_documents = [data.aws_iam_policy_document.session_manager.json]

  # Of the whole bucket: with a condition on the prefix, asking for an object that is not there would be "denied" to S3,
  # and what asks (is there an end.json?) would take that for a fault. Names alone are told; what may be read stands below.
  statement {
    sid       = "List"
    actions   = ["s3:ListBucket"]
    resources = [aws_s3_bucket.this.arn]
  }

  # Uploads that a dead process left; S3 has no condition on their prefix.
  statement {
    sid       = "ListUploads"
    actions   = ["s3:ListBucketMultipartUploads"]
    resources = [aws_s3_bucket.this.arn]
  }

  statement {
    sid       = "Read"
    actions   = ["s3:GetObject"]
    resources = [for prefix in ["data", "code", "wheels"] : "${aws_s3_bucket.this.arn}/${prefix}/*"]
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
    resources = [for prefix in ["runs", "jobs", "reports", "logs"] : "${aws_s3_bucket.this.arn}/${prefix}/*"]
  }
}

resource "aws_iam_role" "instance" {
  name                 = "${var.name_prefix}-instance-${var.region}"
  description          = "Training instances: their part of the bucket, and Session Manager."
  assume_role_policy   = data.aws_iam_policy_document.ec2.json
  max_session_duration = 3600
}

resource "aws_iam_role_policy" "instance" {
  name   = "bucket-and-session-manager"
  role   = aws_iam_role.instance.id
  policy = data.aws_iam_policy_document.instance.json
}

resource "aws_iam_instance_profile" "instance" {
  name = aws_iam_role.instance.name
  role = aws_iam_role.instance.name
}
