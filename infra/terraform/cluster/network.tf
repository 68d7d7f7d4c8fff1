# Nobody comes in from outside. Several nodes talk to each other, and to nobody else.

locals {
  # torchrun's rendezvous; torch and NCCL take ports that the kernel chooses (net.ipv4.ip_local_port_range).
  node_ports = var.num_nodes > 1 && !var.enable_efa ? { rendezvous = [29400, 29400], nccl = [32768, 60999] } : {}
  efa_rules  = var.enable_efa ? { efa = true } : {}
}

resource "aws_security_group" "this" {
  name_prefix = "${local.name}-"
  description = "Instances of ${var.deployment}"
  vpc_id      = var.vpc_id

  tags = { Name = local.name }

  lifecycle {
    create_before_destroy = true
  }
}

resource "aws_vpc_security_group_egress_rule" "internet" {
  for_each = { https = 443, http = 80 }

  security_group_id = aws_security_group.this.id
  description       = each.key == "https" ? "AWS, package indexes" : "Package archives of Ubuntu, which are signed"
  ip_protocol       = "tcp"
  from_port         = each.value
  to_port           = each.value
  cidr_ipv4         = "0.0.0.0/0"
}

resource "aws_vpc_security_group_ingress_rule" "nodes" {
  for_each = local.node_ports

  security_group_id            = aws_security_group.this.id
  description                  = "Between nodes: ${each.key}"
  ip_protocol                  = "tcp"
  from_port                    = each.value[0]
  to_port                      = each.value[1]
  referenced_security_group_id = aws_security_group.this.id
}

resource "aws_vpc_security_group_egress_rule" "nodes" {
  for_each = local.node_ports

  security_group_id            = aws_security_group.this.id
  description                  = "Between nodes: ${each.key}"
  ip_protocol                  = "tcp"
  from_port                    = each.value[0]
  to_port                      = each.value[1]
  referenced_security_group_id = aws_security_group.this.id
}

# EFA does not work with less than everything, both ways, within the group.
resource "aws_vpc_security_group_ingress_rule" "efa" {
  for_each = local.efa_rules

  security_group_id            = aws_security_group.this.id
  description                  = "Between nodes: EFA"
  ip_protocol                  = "-1"
  referenced_security_group_id = aws_security_group.this.id
}

resource "aws_vpc_security_group_egress_rule" "efa" {
  for_each = local.efa_rules

  security_group_id            = aws_security_group.this.id
  description                  = "Between nodes: EFA"
  ip_protocol                  = "-1"
  referenced_security_group_id = aws_security_group.this.id
}

resource "aws_vpc_security_group_egress_rule" "mlflow" {
  count = var.mlflow_security_group_id == "" ? 0 : 1

  security_group_id            = aws_security_group.this.id
  description                  = "MLflow server"
  ip_protocol                  = "tcp"
  from_port                    = 5000
  to_port                      = 5000
  referenced_security_group_id = var.mlflow_security_group_id
}

resource "aws_vpc_security_group_ingress_rule" "mlflow" {
  count = var.mlflow_security_group_id == "" ? 0 : 1

  security_group_id            = var.mlflow_security_group_id
  description                  = "Instances of ${var.deployment}"
  ip_protocol                  = "tcp"
  from_port                    = 5000
  to_port                      = 5000
  referenced_security_group_id = aws_security_group.this.id
}
