# The one bucket: data, checkpoints, code, logs, reports, Terraform's states, MLflow's artifacts.

resource "aws_s3_bucket" "this" {
  #checkov:skip=CKV_AWS_18: an access log is a line, and a second bucket, for each range of each shard
  #checkov:skip=CKV_AWS_144: a copy in another region doubles the price of data that can be made again
  #checkov:skip=CKV_AWS_145: encrypted with S3's own keys; KMS asks for money by the request
  #checkov:skip=CKV2_AWS_62: nobody waits for events of the bucket
  bucket        = local.bucket
  force_destroy = var.delete_bucket_contents
}

resource "aws_s3_bucket_ownership_controls" "this" {
  bucket = aws_s3_bucket.this.id

  rule {
    object_ownership = "BucketOwnerEnforced" # ACLs count for nothing
  }
}

resource "aws_s3_bucket_public_access_block" "this" {
  bucket = aws_s3_bucket.this.id

  block_public_acls       = true
  block_public_policy     = true
  ignore_public_acls      = true
  restrict_public_buckets = true
}

resource "aws_s3_bucket_server_side_encryption_configuration" "this" {
  bucket = aws_s3_bucket.this.id

  rule {
    # S3's own keys: a key in KMS costs a dollar a month and a request for each range of each shard.
    apply_server_side_encryption_by_default {
      sse_algorithm = "AES256"
    }
  }
}

resource "aws_s3_bucket_versioning" "this" {
  bucket = aws_s3_bucket.this.id

  versioning_configuration {
    status = "Enabled"
  }
}

data "aws_iam_policy_document" "bucket" {
  statement {
    sid       = "TlsOnly"
    effect    = "Deny"
    actions   = ["s3:*"]
    resources = [aws_s3_bucket.this.arn, "${aws_s3_bucket.this.arn}/*"]

    principals {
      type        = "*"
      identifiers = ["*"]
    }

    condition {
      test     = "Bool"
      variable = "aws:SecureTransport"
      values   = ["false"]
    }
  }

  statement {
    sid       = "NoOldTls"
    effect    = "Deny"
    actions   = ["s3:*"]
    resources = [aws_s3_bucket.this.arn, "${aws_s3_bucket.this.arn}/*"]

    principals {
      type        = "*"
      identifiers = ["*"]
    }

    condition {
      test     = "NumericLessThan"
      variable = "s3:TlsVersion"
      values   = ["1.2"]
    }
  }
}

resource "aws_s3_bucket_policy" "this" {
  count = var.enable_tls_only ? 1 : 0

  bucket = aws_s3_bucket.this.id
  policy = data.aws_iam_policy_document.bucket.json

  depends_on = [aws_s3_bucket_public_access_block.this]
}

locals {
  # Prefix → days for which versions that were overwritten or deleted are kept. A run replaces its checkpoints every
  # few minutes, so these would soon cost more than all else.
  old_version_days = {
    runs    = var.checkpoint_days
    data    = var.checkpoint_days
    jobs    = var.checkpoint_days
    code    = var.checkpoint_days
    wheels  = var.checkpoint_days
    reports = var.checkpoint_days
    logs    = var.checkpoint_days
    infra   = max(90, var.checkpoint_days)
    mlflow  = max(30, var.checkpoint_days)
  }
}

resource "aws_s3_bucket_lifecycle_configuration" "this" {
  count = var.enable_lifecycle ? 1 : 0

  bucket = aws_s3_bucket.this.id

  rule {
    id     = "incomplete-uploads"
    status = "Enabled"

    filter {}

    abort_incomplete_multipart_upload {
      days_after_initiation = 2
    }
  }

  dynamic "rule" {
    for_each = local.old_version_days

    content {
      id     = "old-versions-${rule.key}"
      status = "Enabled"

      filter {
        prefix = "${rule.key}/"
      }

      noncurrent_version_expiration {
        noncurrent_days = rule.value
      }

      # Logs go by age, and S3 takes either an age or the removal of markers in one rule.
      expiration {
        days                         = rule.key == "logs" ? var.log_days : null
        expired_object_delete_marker = rule.key == "logs" ? null : true
      }
    }
  }

  depends_on = [aws_s3_bucket_versioning.this]
}
