# What an instance may do beyond base's role: end its own deployment, and say so.

locals {
  # An image in a registry of ECR: account, region, repository. Others are public.
  ecr = try(regex("^([0-9]{12})\\.dkr\\.ecr\\.([a-z0-9-]+)\\.amazonaws\\.com/([^:@]+)", var.image), null)

  source_buckets = distinct([for source in var.source_prefixes : split("/", source)[0]])
}

data "aws_iam_policy_document" "this" {
  statement {
    sid       = "EndTheDeployment"
    actions   = ["autoscaling:SetDesiredCapacity", "autoscaling:SuspendProcesses"]
    resources = [for group in aws_autoscaling_group.this : group.arn]
  }

  statement {
    sid       = "Tell"
    actions   = ["sns:Publish"]
    resources = [aws_sns_topic.this.arn]
  }

  dynamic "statement" {
    for_each = var.allow_data_write ? [true] : []

    content {
      sid = "WriteData"
      actions = [
        "s3:AbortMultipartUpload",
        "s3:DeleteObject",
        "s3:ListMultipartUploadParts",
        "s3:PutObject",
      ]
      resources = ["arn:${local.partition}:s3:::${var.bucket}/data/*"]
    }
  }

  dynamic "statement" {
    for_each = length(var.source_prefixes) > 0 ? [true] : []

    content {
      sid       = "ReadSources"
      actions   = ["s3:GetObject"]
      resources = [for source in var.source_prefixes : "arn:${local.partition}:s3:::${source}*"]
    }
  }

  dynamic "statement" {
    for_each = local.source_buckets

    content {
      sid       = "ListSource${statement.key}"
      actions   = ["s3:ListBucket"]
      resources = ["arn:${local.partition}:s3:::${statement.value}"]

      condition {
        test     = "StringLike"
        variable = "s3:prefix"
        values = [
          for source in var.source_prefixes : "${join("/", slice(split("/", source), 1, length(split("/", source))))}*"
          if split("/", source)[0] == statement.value
        ]
      }
    }
  }

  dynamic "statement" {
    for_each = local.ecr == null ? [] : [local.ecr]

    content {
      sid       = "PullImage"
      actions   = ["ecr:BatchGetImage", "ecr:GetDownloadUrlForLayer"]
      resources = ["arn:${local.partition}:ecr:${statement.value[1]}:${statement.value[0]}:repository/${statement.value[2]}"]
    }
  }

  dynamic "statement" {
    for_each = local.ecr == null ? [] : [true]

    content {
      sid       = "LogInToRegistry"
      actions   = ["ecr:GetAuthorizationToken"]
      resources = ["*"] # has no resource level
    }
  }
}

resource "aws_iam_role_policy" "this" {
  name   = "${local.name}-${var.region}"
  role   = var.role_name
  policy = data.aws_iam_policy_document.this.json
}
