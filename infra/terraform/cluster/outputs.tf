output "group_names" {
  description = "Market (spot, on-demand) → Auto Scaling group."
  value       = { for market, group in aws_autoscaling_group.this : market => group.name }
}

output "group_arns" {
  description = "Market → ARN of the Auto Scaling group."
  value       = { for market, group in aws_autoscaling_group.this : market => group.arn }
}

output "topic_arn" {
  description = "Topic of interruptions and ends."
  value       = aws_sns_topic.this.arn
}

output "launch_template_ids" {
  description = "Market → launch template."
  value       = { for market, template in aws_launch_template.this : market => template.id }
}

output "security_group_id" {
  description = "Security group of the instances."
  value       = aws_security_group.this.id
}

output "ami_id" {
  description = "Image of the instances, pinned."
  value       = terraform_data.ami.output
}
