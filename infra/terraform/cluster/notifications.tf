# One topic for all that is worth an e-mail. Its messages hold no secrets; EventBridge and alarms cannot write to a topic
# that is encrypted with AWS's own key, and a key of one's own costs a dollar a month.

resource "aws_sns_topic" "this" {
  #checkov:skip=CKV_AWS_26: no secrets are told, and EventBridge cannot use AWS's own key
  name = local.name
}

resource "aws_sns_topic_subscription" "email" {
  count = var.notify_email == "" ? 0 : 1

  topic_arn = aws_sns_topic.this.arn
  protocol  = "email"
  endpoint  = var.notify_email
}

data "aws_iam_policy_document" "topic" {
  # Instances publish by their role's right; these are services that have none.
  statement {
    sid       = "Services"
    actions   = ["sns:Publish"]
    resources = [aws_sns_topic.this.arn]

    principals {
      type        = "Service"
      identifiers = ["budgets.amazonaws.com", "cloudwatch.amazonaws.com"]
    }

    condition {
      test     = "StringEquals"
      variable = "aws:SourceAccount"
      values   = [local.account_id]
    }
  }

  # EventBridge tells a topic no source account: with that condition its messages are lost without a word.
  statement {
    sid       = "Events"
    actions   = ["sns:Publish"]
    resources = [aws_sns_topic.this.arn]

    principals {
      type        = "Service"
      identifiers = ["events.amazonaws.com"]
    }
  }
}

resource "aws_sns_topic_policy" "this" {
  arn    = aws_sns_topic.this.arn
  policy = data.aws_iam_policy_document.topic.json
}

locals {
  events = merge(
    {
      group = {
        description = "Instances of ${var.deployment} that came or went"
        pattern = {
          source      = ["aws.autoscaling"]
          detail-type = ["EC2 Instance Launch Successful", "EC2 Instance Terminate Successful", "EC2 Instance Terminate Unsuccessful"]
          detail      = { AutoScalingGroupName = values(local.group_names) }
        }
        paths = { what = "$.detail-type", instance = "$.detail.EC2InstanceId", group = "$.detail.AutoScalingGroupName", why = "$.detail.Cause" }
        text  = "\"<what>: <instance> in <group>. <why>\""
      }
    },
    # These events name the instance alone, so they come for all spot instances of the region.
    local.uses_spot ? {
      spot = {
        description = "Spot notices of the region"
        pattern = {
          source      = ["aws.ec2"]
          detail-type = ["EC2 Spot Instance Interruption Warning", "EC2 Instance Rebalance Recommendation"]
        }
        paths = { what = "$.detail-type", instance = "$.detail.instance-id" }
        text  = "\"<what>: <instance>. If it is one of ${var.deployment}, the run saves and goes on elsewhere.\""
      }
    } : {},
  )
}

resource "aws_cloudwatch_event_rule" "this" {
  for_each = local.events

  name          = "${local.name}-${each.key}"
  description   = each.value.description
  event_pattern = jsonencode(each.value.pattern)
}

resource "aws_cloudwatch_event_target" "topic" {
  for_each = local.events

  rule      = aws_cloudwatch_event_rule.this[each.key].name
  target_id = "topic"
  arn       = aws_sns_topic.this.arn

  input_transformer {
    input_paths    = each.value.paths
    input_template = each.value.text
  }
}

resource "aws_autoscaling_notification" "this" {
  count = var.enable_asg_notifications ? 1 : 0

  group_names   = [for group in aws_autoscaling_group.this : group.name]
  notifications = ["autoscaling:EC2_INSTANCE_LAUNCH_ERROR", "autoscaling:EC2_INSTANCE_TERMINATE_ERROR"]
  topic_arn     = aws_sns_topic.this.arn
}

# Counts what carries the tag Deployment, once that is activated as a cost allocation tag, and is hours late.
resource "aws_budgets_budget" "this" {
  count = var.enable_budget && var.max_usd > 0 ? 1 : 0

  name         = local.name
  budget_type  = "COST"
  time_unit    = "MONTHLY"
  limit_amount = format("%.2f", var.max_usd)
  limit_unit   = "USD"

  cost_filter {
    name   = "TagKeyValue"
    values = [format("user:Deployment$%s", var.deployment)]
  }

  dynamic "notification" {
    for_each = { 80 = "ACTUAL", 100 = "ACTUAL" }

    content {
      comparison_operator        = "GREATER_THAN"
      threshold                  = notification.key
      threshold_type             = "PERCENTAGE"
      notification_type          = notification.value
      subscriber_sns_topic_arns  = [aws_sns_topic.this.arn]
      subscriber_email_addresses = []
    }
  }

  depends_on = [aws_sns_topic_policy.this]
}
