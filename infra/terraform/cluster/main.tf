data "aws_caller_identity" "current" {}

data "aws_partition" "current" {}

locals {
  account_id = data.aws_caller_identity.current.account_id
  partition  = data.aws_partition.current.partition
  name       = "sprint-${var.deployment}"

  tags = merge(var.tags, {
    Project    = "imagenet-sprint"
    Deployment = var.deployment
    ManagedBy  = "terraform"
  })

  uses_spot     = var.capacity != "on-demand"
  uses_fallback = var.capacity == "spot-then-on-demand"

  # Market → instances that it wants when it is made.
  groups = {
    for market, wanted in {
      spot        = local.uses_spot ? var.num_nodes : null
      "on-demand" = var.capacity == "on-demand" ? var.num_nodes : (local.uses_fallback ? 0 : null)
    } : market => var.start ? wanted : 0 if wanted != null
  }
  group_names = { for market in keys(local.groups) : market => "${local.name}-${market}" }
}

# The image is asked for once, when the deployment is made: another one in the middle of a run would be another
# machine. It changes only with the variables.
data "aws_ssm_parameter" "ami" {
  count = var.ami_id == "" ? 1 : 0

  name = var.ami_parameter
}

resource "terraform_data" "ami" {
  input            = var.ami_id != "" ? var.ami_id : data.aws_ssm_parameter.ami[0].insecure_value
  triggers_replace = [var.ami_id, var.ami_parameter]

  lifecycle {
    ignore_changes = [input]
  }
}
