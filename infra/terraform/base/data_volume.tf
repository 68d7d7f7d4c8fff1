# Optional: prepared data on a disk, for instance types without NVMe of their own. S3 is the cheaper and faster way for
# all others.

resource "aws_ebs_volume" "data" {
  #checkov:skip=CKV_AWS_189: encrypted with the account's own key for EBS; another one costs a dollar a month
  count = var.data_volume_gib > 0 ? 1 : 0

  availability_zone = local.zones[0]
  size              = var.data_volume_gib
  type              = "gp3"
  encrypted         = true

  tags = { Name = "${var.name_prefix}-data" }
}

resource "aws_ebs_snapshot" "data" {
  count = var.enable_data_snapshot ? 1 : 0

  volume_id   = aws_ebs_volume.data[0].id
  description = "Prepared data"

  tags = { Name = "${var.name_prefix}-data" }
}
