variable "name_prefix" {
  description = "Begins the names of all that lasts."
  type        = string
  default     = "sprint"

  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{0,14}[a-z0-9]$", var.name_prefix))
    error_message = "name_prefix takes 2 to 16 small letters, digits and hyphens, a letter first, no hyphen last."
  }
}

variable "region" {
  description = "AWS region of everything."
  type        = string

  validation {
    condition     = can(regex("^[a-z]{2}(-[a-z]+)+-[0-9]$", var.region))
    error_message = "region takes the code of an AWS region, such as us-east-1."
  }
}

variable "bucket_name" {
  description = "Name of the bucket; \"\" makes <name_prefix>-<account>-<region>."
  type        = string
  default     = ""

  validation {
    condition     = var.bucket_name == "" || can(regex("^[a-z0-9][a-z0-9-]{1,61}[a-z0-9]$", var.bucket_name))
    error_message = "bucket_name takes 3 to 63 small letters, digits and hyphens (dots break TLS), or \"\" to have it made."
  }
}

variable "delete_bucket_contents" {
  description = "Whether destroy deletes a bucket that holds something. Applied before the destroy that it is for."
  type        = bool
  default     = false
}

variable "enable_tls_only" {
  description = "Refuse requests without TLS. Only a local S3 of a test needs false."
  type        = bool
  default     = true
}

variable "enable_lifecycle" {
  description = "Let old versions, logs and unfinished uploads expire. Only a test that cannot wait the minute that AWS's provider waits for it needs false."
  type        = bool
  default     = true
}

variable "checkpoint_days" {
  description = "Days for which overwritten and deleted checkpoints, records and shards can be brought back. They cost as much as present ones."
  type        = number
  default     = 3

  validation {
    condition     = var.checkpoint_days >= 1 && var.checkpoint_days <= 365 && floor(var.checkpoint_days) == var.checkpoint_days
    error_message = "checkpoint_days takes whole days, 1 to 365."
  }
}

variable "log_days" {
  description = "Days after which the logs of instances are deleted."
  type        = number
  default     = 90

  validation {
    condition     = var.log_days >= 1 && var.log_days <= 3650 && floor(var.log_days) == var.log_days
    error_message = "log_days takes whole days, 1 to 3650."
  }
}

variable "vpc_cidr" {
  description = "Addresses of the network: a private IPv4 block of /16 to /20."
  type        = string
  default     = "10.42.0.0/16"

  validation {
    condition = (
      can(cidrhost(var.vpc_cidr, 0)) &&
      can(regex("^(10\\.|192\\.168\\.|172\\.(1[6-9]|2[0-9]|3[01])\\.)[0-9.]+/(1[6-9]|20)$", var.vpc_cidr))
    )
    error_message = "vpc_cidr takes a private IPv4 block of /16 to /20, such as 10.42.0.0/16."
  }
}

variable "availability_zones" {
  description = "Zones with a subnet each; [] takes all of the region. The first one holds the MLflow server and the data volume."
  type        = list(string)
  default     = []

  validation {
    condition = (
      length(distinct(var.availability_zones)) == length(var.availability_zones) &&
      alltrue([for zone in var.availability_zones : can(regex("^${var.region}[a-z]$", zone))])
    )
    error_message = "availability_zones takes zones of the region, each once, such as us-east-1a in us-east-1."
  }
}

variable "enable_mlflow" {
  description = "Run an MLflow server on an instance of its own, which costs money as long as it exists (README.md says how much)."
  type        = bool
  default     = false
}

variable "mlflow_instance_type" {
  description = "An arm64 type with 2 GiB of memory or more."
  type        = string
  default     = "t4g.small"

  validation {
    condition     = can(regex("^[a-z]+[0-9]+g[a-z]*\\.[a-z0-9-]+$", var.mlflow_instance_type)) && !can(regex("\\.(nano|micro)$", var.mlflow_instance_type))
    error_message = "mlflow_instance_type takes an arm64 (Graviton) type with 2 GiB or more, such as t4g.small."
  }
}

variable "mlflow_version" {
  description = "Version of MLflow on the server, the same as in constraints.txt."
  type        = string
  default     = "3.17.2"

  validation {
    condition     = can(regex("^[0-9]+\\.[0-9]+\\.[0-9]+$", var.mlflow_version))
    error_message = "mlflow_version takes an exact version, such as 3.17.2."
  }
}

variable "mlflow_volume_gib" {
  description = "Size of the volume with the server's database."
  type        = number
  default     = 10

  validation {
    condition     = var.mlflow_volume_gib >= 1 && var.mlflow_volume_gib <= 1000
    error_message = "mlflow_volume_gib takes 1 to 1000 GiB."
  }
}

variable "mlflow_ami_id" {
  description = "Image of the MLflow server; \"\" takes the newest Amazon Linux 2023 (arm64) when it is first made, and keeps it."
  type        = string
  default     = ""

  validation {
    condition     = var.mlflow_ami_id == "" || can(regex("^ami-[0-9a-f]{8,17}$", var.mlflow_ami_id))
    error_message = "mlflow_ami_id takes an AMI id (ami-…), or \"\"."
  }
}

variable "data_volume_gib" {
  description = "Size of a gp3 volume for prepared data; 0 makes none."
  type        = number
  default     = 0

  validation {
    condition     = var.data_volume_gib == 0 || (var.data_volume_gib >= 10 && var.data_volume_gib <= 16384)
    error_message = "data_volume_gib takes 10 to 16384 GiB, or 0 for no volume."
  }
}

variable "enable_data_snapshot" {
  description = "Keep a snapshot of the data volume, from which clusters make volumes of their own."
  type        = bool
  default     = false

  validation {
    condition     = !var.enable_data_snapshot || var.data_volume_gib > 0
    error_message = "enable_data_snapshot needs a data volume: set data_volume_gib."
  }
}

variable "tags" {
  description = "More tags on everything."
  type        = map(string)
  default     = {}

  validation {
    condition     = length(setintersection(keys(var.tags), ["Project", "Deployment", "ManagedBy"])) == 0
    error_message = "tags cannot change Project, Deployment or ManagedBy, by which everything is found again."
  }
}
