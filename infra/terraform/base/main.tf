data "aws_caller_identity" "current" {}

data "aws_partition" "current" {}

data "aws_availability_zones" "all" {
  #checkov:skip=CKV_AWS_394: a new zone adds a subnet and changes no other, since addresses go by the zone's letter
  # In whatever state: a zone in trouble is no reason to remove its subnet. Neither local nor wavelength zones.
  filter {
    name   = "opt-in-status"
    values = ["opt-in-not-required"]
  }
}

locals {
  account_id   = data.aws_caller_identity.current.account_id
  partition    = data.aws_partition.current.partition
  zones        = length(var.availability_zones) > 0 ? var.availability_zones : sort(data.aws_availability_zones.all.names)
  zone_letters = split("", "abcdefghijklmnop")
  # Known from account and region alone, so that a lost state is found again; the account's number keeps others from taking it.
  bucket = var.bucket_name != "" ? var.bucket_name : "${var.name_prefix}-${local.account_id}-${var.region}"

  tags = merge(var.tags, {
    Project    = "imagenet-sprint"
    Deployment = "base"
    ManagedBy  = "terraform"
  })
}
