variable "deployment" {
  description = "Name of the deployment; all names of resources come from it."
  type        = string

  validation {
    condition     = can(regex("^[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?$", var.deployment))
    error_message = "deployment takes 1 to 32 small letters, digits and hyphens, no hyphen first or last."
  }
}

variable "region" {
  description = "AWS region, the same as the bucket's."
  type        = string

  validation {
    condition     = can(regex("^[a-z]{2}(-[a-z]+)+-[0-9]$", var.region))
    error_message = "region takes the code of an AWS region, such as us-east-1."
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

# From base

variable "bucket" {
  description = "base's output bucket."
  type        = string

  validation {
    condition     = can(regex("^[a-z0-9][a-z0-9-]{1,61}[a-z0-9]$", var.bucket))
    error_message = "bucket takes the name of the bucket, without s3://."
  }
}

variable "vpc_id" {
  description = "base's output vpc_id."
  type        = string

  validation {
    condition     = startswith(var.vpc_id, "vpc-")
    error_message = "vpc_id takes the id of a network (vpc-…)."
  }
}

variable "subnet_ids" {
  description = "Subnets of base to launch into: all of them finds capacity soonest. Several nodes take one."
  type        = list(string)

  validation {
    condition     = length(var.subnet_ids) > 0 && alltrue([for id in var.subnet_ids : startswith(id, "subnet-")])
    error_message = "subnet_ids takes the ids of one or more subnets (subnet-…)."
  }

  validation {
    condition     = var.num_nodes == 1 || length(var.subnet_ids) == 1
    error_message = "Several nodes train in one availability zone (traffic between zones is slow and costs money): give one of subnet_ids."
  }
}

variable "role_name" {
  description = "base's output role_name."
  type        = string
}

variable "instance_profile_name" {
  description = "base's output instance_profile_name."
  type        = string
}

variable "mlflow_security_group_id" {
  description = "base's output mlflow_security_group_id, to reach the MLflow server; \"\" where there is none."
  type        = string
  default     = ""

  validation {
    condition     = var.mlflow_security_group_id == "" || startswith(var.mlflow_security_group_id, "sg-")
    error_message = "mlflow_security_group_id takes the id of a security group (sg-…), or \"\"."
  }
}

variable "data_snapshot_id" {
  description = "base's output data_snapshot_id: each instance gets a volume made from it at /dev/sdf, mounted read-only at /mnt/data where its file system has the label sprint-data; \"\" for none."
  type        = string
  default     = ""

  validation {
    condition     = var.data_snapshot_id == "" || startswith(var.data_snapshot_id, "snap-")
    error_message = "data_snapshot_id takes the id of a snapshot (snap-…), or \"\"."
  }
}

# Machines

variable "instance_types" {
  description = "Types to launch, the preferred one first. Several find spot capacity sooner; several nodes take one."
  type        = list(string)
  default     = ["g6.12xlarge"]

  validation {
    condition = (
      length(var.instance_types) > 0 && length(var.instance_types) <= 20 &&
      length(distinct(var.instance_types)) == length(var.instance_types) &&
      alltrue([for type in var.instance_types : can(regex("^[a-z][a-z0-9-]*\\.[a-z0-9-]+$", type))])
    )
    error_message = "instance_types takes 1 to 20 types, each once, such as [\"g6.12xlarge\"]."
  }

  validation {
    condition     = var.num_nodes == 1 || length(var.instance_types) == 1
    error_message = "Several nodes have to be equal, or all wait for the slowest: give one of instance_types."
  }
}

variable "num_nodes" {
  description = "Instances that train together."
  type        = number
  default     = 1

  validation {
    condition     = var.num_nodes >= 1 && var.num_nodes <= 64 && floor(var.num_nodes) == var.num_nodes
    error_message = "num_nodes takes 1 to 64."
  }
}

variable "capacity" {
  description = "on-demand, spot, or spot-then-on-demand: spot, and on demand where none came for fallback_minutes."
  type        = string
  default     = "spot-then-on-demand"

  validation {
    condition     = contains(["on-demand", "spot", "spot-then-on-demand"], var.capacity)
    error_message = "capacity takes on-demand, spot or spot-then-on-demand."
  }
}

variable "fallback_minutes" {
  description = "With spot-then-on-demand: minutes without enough spot instances before they are bought on demand."
  type        = number
  default     = 15

  validation {
    condition     = var.fallback_minutes >= 5 && var.fallback_minutes <= 1440 && floor(var.fallback_minutes) == var.fallback_minutes
    error_message = "fallback_minutes takes 5 to 1440: an interrupted instance needs some minutes to be replaced."
  }
}

variable "max_spot_price" {
  description = "Most to pay for a spot instance, in $ an hour, as a string; \"\" is the on-demand price, and what AWS recommends."
  type        = string
  default     = ""

  validation {
    condition     = var.max_spot_price == "" || can(regex("^[0-9]+(\\.[0-9]+)?$", var.max_spot_price))
    error_message = "max_spot_price takes dollars an hour, such as \"2.50\", or \"\"."
  }
}

variable "start" {
  description = "Whether the groups want their instances as soon as they are made. With false they are made empty, and whoever set capacity to num_nodes starts them."
  type        = bool
  default     = true
}

variable "ami_id" {
  description = "Image of the instances; \"\" takes the newest of ami_parameter when the deployment is made, and keeps it."
  type        = string
  default     = ""

  validation {
    condition     = var.ami_id == "" || can(regex("^ami-[0-9a-f]{8,17}$", var.ami_id))
    error_message = "ami_id takes an AMI id (ami-…), or \"\"."
  }
}

variable "ami_parameter" {
  description = "Public parameter that names the newest image: by default AWS's Deep Learning Base AMI (NVIDIA driver, EFA, Docker) on Ubuntu 24.04, x86-64."
  type        = string
  default     = "/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-24.04/latest/ami-id"

  validation {
    condition     = startswith(var.ami_parameter, "/aws/service/")
    error_message = "ami_parameter takes one of AWS's public parameters (/aws/service/…)."
  }
}

variable "root_device_name" {
  description = "The image's root device."
  type        = string
  default     = "/dev/sda1"
}

variable "root_gib" {
  description = "Size of the root volume; holds the data, too, where the type has no NVMe of its own."
  type        = number
  default     = 200

  validation {
    condition     = var.root_gib >= 100 && var.root_gib <= 16384
    error_message = "root_gib takes 100 to 16384 GiB: the image alone takes some 60."
  }
}

variable "root_iops" {
  description = "I/O operations a second of the root volume (3000 are free)."
  type        = number
  default     = 3000

  validation {
    condition     = var.root_iops >= 3000 && var.root_iops <= 16000
    error_message = "root_iops takes 3000 to 16000."
  }
}

variable "root_throughput" {
  description = "MiB/s of the root volume (125 are free)."
  type        = number
  default     = 250

  validation {
    condition     = var.root_throughput >= 125 && var.root_throughput <= 1000
    error_message = "root_throughput takes 125 to 1000 MiB/s."
  }

  validation {
    condition     = var.root_throughput * 4 <= var.root_iops
    error_message = "gp3 gives a quarter of a MiB/s for each operation a second: raise root_iops to 4 × root_throughput."
  }
}

variable "enable_placement_group" {
  description = "Several nodes: close together in one zone."
  type        = bool
  default     = false
}

variable "enable_efa" {
  description = "Several nodes: EFA network interfaces, on types that have them (python -m infra plan says which)."
  type        = bool
  default     = false

  validation {
    condition     = !var.enable_efa || var.num_nodes > 1
    error_message = "EFA connects several nodes: leave enable_efa out, or set num_nodes."
  }

  validation {
    condition     = !(var.enable_efa && var.image != "")
    error_message = "A container does not see EFA, and nodes would talk without it: leave out image, or enable_efa."
  }
}

# Limits

variable "end_time" {
  description = "When the groups are set to nothing, whatever happens: RFC 3339 in UTC, such as 2030-01-31T12:00:00Z."
  type        = string

  validation {
    condition     = can(timeadd(var.end_time, "0s")) && can(regex("^\\d{4}-\\d\\d-\\d\\dT\\d\\d:\\d\\d:\\d\\dZ$", var.end_time))
    error_message = "end_time takes a time in UTC with seconds and Z, such as 2030-01-31T12:00:00Z."
  }
}

variable "deadline" {
  description = "When the instances end by themselves, in seconds since 1970; a little before end_time."
  type        = number

  validation {
    condition     = var.deadline > 0 && floor(var.deadline) == var.deadline
    error_message = "deadline takes whole seconds since 1970."
  }
}

variable "max_hours" {
  description = "Hours from start to end_time, for the texts."
  type        = number
  default     = 24

  validation {
    condition     = var.max_hours > 0 && var.max_hours <= 720
    error_message = "max_hours takes more than 0 and at most 720 hours."
  }
}

variable "max_usd" {
  description = "Budget of the deployment in $; 0 sets no budget alarm."
  type        = number
  default     = 0

  validation {
    condition     = var.max_usd >= 0
    error_message = "max_usd takes dollars, 0 or more."
  }
}

variable "notify_email" {
  description = "Address that is told of interruptions and ends, once it has confirmed; \"\" for none."
  type        = string
  default     = ""

  validation {
    condition     = var.notify_email == "" || can(regex("^[^@\\s]+@[^@\\s]+\\.[^@\\s]+$", var.notify_email))
    error_message = "notify_email takes one e-mail address, or \"\"."
  }
}

variable "enable_budget" {
  description = "A budget alarm at max_usd. It is hours late: end_time is what ends."
  type        = bool
  default     = true
}

variable "enable_asg_notifications" {
  description = "Tell of each launch that fails, too; without spot capacity these can be many."
  type        = bool
  default     = false
}

# What the instances do

variable "code_key" {
  description = "Key of the project's archive in the bucket."
  type        = string

  validation {
    condition     = can(regex("^code/[0-9a-f]{64}\\.tar\\.gz$", var.code_key))
    error_message = "code_key takes code/<SHA-256>.tar.gz."
  }
}

variable "code_sha256" {
  description = "SHA-256 of that archive."
  type        = string

  validation {
    condition     = can(regex("^[0-9a-f]{64}$", var.code_sha256))
    error_message = "code_sha256 takes 64 hexadecimal digits."
  }
}

variable "image" {
  description = "Container image to run in place of an installation; \"\" for none."
  type        = string
  default     = ""

  validation {
    condition     = var.image == "" || can(regex("^[A-Za-z0-9][A-Za-z0-9._/:@-]{0,254}$", var.image))
    error_message = "image takes the name of a container image, or \"\"."
  }
}

variable "wheels" {
  description = "Prefix of wheels in the bucket (wheels/<digest>/); \"\" takes the package index."
  type        = string
  default     = ""

  validation {
    condition     = var.wheels == "" || can(regex("^wheels/[A-Za-z0-9._-]+/$", var.wheels))
    error_message = "wheels takes wheels/<digest>/, or \"\"."
  }
}

variable "allow_data_write" {
  description = "Let the instances write below data/ of the bucket: only for preparing data."
  type        = bool
  default     = false
}

variable "source_prefixes" {
  description = "Only for preparing data: where else to read, as bucket/prefix."
  type        = list(string)
  default     = []

  validation {
    condition     = alltrue([for source in var.source_prefixes : can(regex("^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]/[^*?]*$", source))])
    error_message = "source_prefixes takes bucket/prefix, without s3:// and without * or ?."
  }
}
