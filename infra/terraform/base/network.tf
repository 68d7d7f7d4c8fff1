# Public subnets without a way in: a NAT gateway costs more than the MLflow server, and no security group has a rule
# that lets anybody in from outside. S3 is reached through a gateway endpoint, which is free.

resource "aws_vpc" "this" {
  #checkov:skip=CKV2_AWS_11: flow logs cost money by the gigabyte, and nobody is let in
  cidr_block           = var.vpc_cidr
  enable_dns_support   = true
  enable_dns_hostnames = true

  tags = { Name = var.name_prefix }
}

# Whoever forgets to name a security group gets one that lets nothing through.
resource "aws_default_security_group" "this" {
  vpc_id = aws_vpc.this.id

  tags = { Name = "${var.name_prefix}-default-closed" }
}

resource "aws_internet_gateway" "this" {
  vpc_id = aws_vpc.this.id

  tags = { Name = var.name_prefix }
}

resource "aws_subnet" "this" {
  for_each = toset(local.zones)

  vpc_id            = aws_vpc.this.id
  availability_zone = each.key
  # By the zone's letter, so that zones that come or go change no other subnet.
  cidr_block              = cidrsubnet(var.vpc_cidr, 4, index(local.zone_letters, substr(each.key, -1, 1)))
  map_public_ip_on_launch = false # launch templates ask for an address themselves

  tags = { Name = "${var.name_prefix}-${each.key}" }
}

resource "aws_route_table" "this" {
  vpc_id = aws_vpc.this.id

  tags = { Name = var.name_prefix }
}

resource "aws_route" "internet" {
  route_table_id         = aws_route_table.this.id
  destination_cidr_block = "0.0.0.0/0"
  gateway_id             = aws_internet_gateway.this.id
}

resource "aws_route_table_association" "this" {
  for_each = aws_subnet.this

  subnet_id      = each.value.id
  route_table_id = aws_route_table.this.id
}

resource "aws_vpc_endpoint" "s3" {
  vpc_id            = aws_vpc.this.id
  service_name      = "com.amazonaws.${var.region}.s3"
  vpc_endpoint_type = "Gateway"
  route_table_ids   = [aws_route_table.this.id]

  tags = { Name = "${var.name_prefix}-s3" }
}
