# What an instance is told at its start: the files of infra/bootstrap, and whose it is.

locals {
  # The topic's, known before there is one, so that a plan already tells if all of this is too long.
  topic_arn = "arn:${local.partition}:sns:${var.region}:${local.account_id}:${local.name}"
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
      topic_arn   = local.topic_arn
      code_key    = var.code_key
      code_sha256 = var.code_sha256
      deadline    = format("%d", var.deadline)
      image       = var.image
      wheels      = var.wheels
      num_nodes   = var.num_nodes
      files       = { for target, name in local.bootstrap_files : target => base64gzip(file("${local.bootstrap}/${name}")) }
    }))
  }
}
