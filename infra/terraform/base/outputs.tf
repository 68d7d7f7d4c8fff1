output "bucket" {
  description = "Name of the bucket."
  value       = aws_s3_bucket.this.bucket
}

output "region" {
  description = "Region of everything."
  value       = var.region
}

output "account_id" {
  description = "Number of the account."
  value       = local.account_id
}

output "vpc_id" {
  description = "The network."
  value       = aws_vpc.this.id
}

output "subnet_ids" {
  description = "Availability zone → subnet."
  value       = { for zone, subnet in aws_subnet.this : zone => subnet.id }
}

output "role_name" {
  description = "Role of training instances."
  value       = aws_iam_role.instance.name
}

output "instance_profile_name" {
  description = "Instance profile of training instances."
  value       = aws_iam_instance_profile.instance.name
}

output "mlflow_uri" {
  description = "The MLflow server as clusters reach it; \"\" where there is none."
  value       = var.enable_mlflow ? "http://${aws_instance.mlflow[0].private_ip}:${local.mlflow_port}" : ""
}

output "mlflow_instance_id" {
  description = "The MLflow server's instance, for a port-forward; \"\" where there is none."
  value       = var.enable_mlflow ? aws_instance.mlflow[0].id : ""
}

output "mlflow_security_group_id" {
  description = "Security group that a cluster asks to be let in; \"\" where there is no server."
  value       = var.enable_mlflow ? aws_security_group.mlflow[0].id : ""
}

output "data_volume_id" {
  description = "The data volume; \"\" where there is none."
  value       = var.data_volume_gib > 0 ? aws_ebs_volume.data[0].id : ""
}

output "data_snapshot_id" {
  description = "The data volume's snapshot; \"\" where there is none."
  value       = var.enable_data_snapshot ? aws_ebs_snapshot.data[0].id : ""
}
