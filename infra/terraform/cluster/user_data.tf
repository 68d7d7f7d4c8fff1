# What an instance is told at its start: the files of infra/bootstrap, and whose it is.

locals {
  bootstrap = "${path.module}/../../bootstrap"

  # Scripts have no dot in their names; units are called *.service and *.timer.
  bootstrap_files = merge(
    { for name in fileset(local.bootstrap, "*") : "/usr/local/sbin/${name}" => name if !strcontains(name, ".") },
    { for name in fileset(local.bootstrap, "*.{service,timer}") : "/etc/systemd/system/${name}" => name },
  )

  user_data = {
    for market, group in local.group_names : market => base64gzip(templatefile("${local.bootstrap}/user_data.yaml.tftpl", {
      deployment  = var.deployment
      bucket      = var.bucket
      region      = var.region
      groups      = values(local.group_names)
      group       = group
      market      = market
      topic_arn   = aws_sns_topic.this.arn
      code_key    = var.code_key
      code_sha256 = var.code_sha256
      deadline    = format("%d", var.deadline)
      image       = var.image
      wheels      = var.wheels
      files       = { for target, name in local.bootstrap_files : target => base64gzip(file("${local.bootstrap}/${name}")) }
    }))
  }
}
