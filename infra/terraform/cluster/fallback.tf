# spot-then-on-demand: where the spot group has fewer instances than it wants for fallback_minutes, the on-demand group
# gets them. An on-demand instance that is up sets the spot group to 0, after which the alarm is quiet.

resource "aws_autoscaling_policy" "fallback" {
  count = local.uses_fallback ? 1 : 0

  name                   = "${local.name}-fallback"
  autoscaling_group_name = aws_autoscaling_group.this["on-demand"].name
  policy_type            = "SimpleScaling"
  adjustment_type        = "ExactCapacity"
  scaling_adjustment     = var.num_nodes
  # An alarm calls every minute for as long as it stands, also just after an instance has ended everything.
  cooldown = 3600
}

resource "aws_cloudwatch_metric_alarm" "fallback" {
  count = local.uses_fallback ? 1 : 0

  alarm_name          = "${local.name}-fallback"
  alarm_description   = "No spot capacity for ${var.deployment} for ${var.fallback_minutes} minutes: on-demand instances are started."
  comparison_operator = "GreaterThanThreshold"
  threshold           = 0
  evaluation_periods  = var.fallback_minutes
  datapoints_to_alarm = ceil(0.8 * var.fallback_minutes) # a minute whose metric got lost does not begin it anew
  treat_missing_data  = "notBreaching"                   # nothing is bought because a metric is late
  alarm_actions       = [aws_autoscaling_policy.fallback[0].arn, aws_sns_topic.this.arn]

  # Wanted and not there: 0 once the group was set to 0, so that the end of a run raises nothing.
  metric_query {
    id          = "missing"
    expression  = "wanted - present"
    label       = "Spot instances wanted and not there"
    return_data = true
  }

  dynamic "metric_query" {
    for_each = { wanted = "GroupDesiredCapacity", present = "GroupInServiceInstances" }

    content {
      id = metric_query.key

      metric {
        namespace   = "AWS/AutoScaling"
        metric_name = metric_query.value
        period      = 60
        stat        = "Average"
        dimensions  = { AutoScalingGroupName = aws_autoscaling_group.this["spot"].name }
      }
    }
  }

  # Only when the reaper stands may anything be raised.
  depends_on = [aws_autoscaling_schedule.reaper]
}
