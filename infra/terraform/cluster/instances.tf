resource "aws_placement_group" "this" {
  count = var.enable_placement_group ? 1 : 0

  name     = local.name
  strategy = "cluster"

  lifecycle {
    precondition {
      condition     = length(var.subnet_ids) == 1
      error_message = "A placement group lies in one availability zone: give one of subnet_ids."
    }
  }
}

resource "aws_launch_template" "this" {
  #checkov:skip=CKV_AWS_88: its only way out; a NAT gateway costs more than it is worth, and nobody is let in
  for_each = local.groups

  name                                 = local.group_names[each.key]
  description                          = "${var.deployment}, ${each.key}, for at most ${var.max_hours} hours"
  image_id                             = terraform_data.ami.output
  instance_type                        = var.instance_types[0]
  instance_initiated_shutdown_behavior = "terminate"
  ebs_optimized                        = true
  update_default_version               = true
  user_data                            = local.user_data[each.key]

  iam_instance_profile {
    name = var.instance_profile_name
  }

  metadata_options {
    http_endpoint               = "enabled"
    http_tokens                 = "required"
    http_put_response_hop_limit = 1
    http_protocol_ipv6          = "disabled"
    instance_metadata_tags      = "disabled"
  }

  network_interfaces {
    device_index                = 0
    interface_type              = var.enable_efa ? "efa" : null
    associate_public_ip_address = true # its way out; nothing is let in
    delete_on_termination       = true
    security_groups             = [aws_security_group.this.id]
  }

  block_device_mappings {
    device_name = var.root_device_name

    ebs {
      volume_type           = "gp3"
      volume_size           = var.root_gib
      iops                  = var.root_iops
      throughput            = var.root_throughput
      encrypted             = true
      delete_on_termination = true
    }
  }

  dynamic "block_device_mappings" {
    for_each = var.data_snapshot_id == "" ? [] : [var.data_snapshot_id]

    content {
      device_name = "/dev/sdf"

      ebs {
        snapshot_id           = block_device_mappings.value
        volume_type           = "gp3"
        iops                  = var.root_iops
        throughput            = var.root_throughput
        encrypted             = true
        delete_on_termination = true
      }
    }
  }

  # default_tags reach the template, not what is launched from it.
  dynamic "tag_specifications" {
    for_each = ["instance", "volume", "network-interface"]

    content {
      resource_type = tag_specifications.value
      tags          = merge(local.tags, { Name = local.group_names[each.key] })
    }
  }

  lifecycle {
    precondition {
      # Three bytes in four of base64.
      condition     = length(local.user_data[each.key]) * 3 / 4 <= 16384
      error_message = "The files of infra/bootstrap take more than the 16 KiB that EC2 allows for user data: shorten them, or fetch some from the bucket."
    }
  }
}

resource "aws_autoscaling_group" "this" {
  for_each = local.groups

  name                = local.group_names[each.key]
  min_size            = 0
  max_size            = var.num_nodes
  desired_capacity    = each.value
  vpc_zone_identifier = var.subnet_ids
  placement_group     = var.enable_placement_group ? aws_placement_group.this[0].name : null
  health_check_type   = "EC2"

  # Whether capacity comes is seen by `python -m infra status`, which says why not; applying does not wait for it.
  wait_for_capacity_timeout = "0"
  # Moving an instance to another zone for balance would stop the run. Applying again takes back what an end suspended.
  suspended_processes = ["AZRebalance"]
  # A replacement before the interruption would be a second machine that trains the same run.
  capacity_rebalance    = false
  protect_from_scale_in = false

  metrics_granularity = "1Minute"
  enabled_metrics     = ["GroupDesiredCapacity", "GroupInServiceInstances"]

  mixed_instances_policy {
    instances_distribution {
      on_demand_base_capacity                  = 0
      on_demand_percentage_above_base_capacity = each.key == "on-demand" ? 100 : 0
      on_demand_allocation_strategy            = "prioritized"
      spot_allocation_strategy                 = "price-capacity-optimized"
      spot_max_price                           = var.max_spot_price
    }

    launch_template {
      launch_template_specification {
        launch_template_id = aws_launch_template.this[each.key].id
        version            = aws_launch_template.this[each.key].latest_version
      }

      dynamic "override" {
        for_each = var.instance_types

        content {
          instance_type = override.value
        }
      }
    }
  }

  dynamic "tag" {
    for_each = merge(local.tags, { Name = local.group_names[each.key] })

    content {
      key                 = tag.key
      value               = tag.value
      propagate_at_launch = true
    }
  }

  timeouts {
    delete = "30m" # destroy ends when the instances have ended: then nothing is billed
  }

  lifecycle {
    # After the start it belongs to the instances, the alarm and the reaper: applying again starts nothing that ended.
    ignore_changes = [desired_capacity]
  }
}

# The reaper, outside the instances: at end_time there are none, and none can come, since the group's maximum is 0.
resource "aws_autoscaling_schedule" "reaper" {
  for_each = local.groups

  scheduled_action_name  = "${local.group_names[each.key]}-reaper"
  autoscaling_group_name = aws_autoscaling_group.this[each.key].name
  start_time             = var.end_time
  min_size               = 0
  max_size               = 0
  desired_capacity       = 0
}
