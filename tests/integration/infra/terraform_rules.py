"""What no plan and no state of ours may hold, said of the JSON that `terraform show` gives.

`faults(shown)` names each resource that breaks a rule, one sentence each; an empty list is a clean plan. A
value that is not known before the apply is left to the check of the state.
"""

from __future__ import annotations

import base64
import gzip
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

TAGS = {"Project", "Deployment", "ManagedBy"}
# Actions of ours for which AWS has no resource level; any other on `*` is a fault.
ANY_RESOURCE = {
    "ecr:GetAuthorizationToken",
    "ssm:UpdateInstanceInformation",
    "ssmmessages:CreateControlChannel",
    "ssmmessages:CreateDataChannel",
    "ssmmessages:OpenControlChannel",
    "ssmmessages:OpenDataChannel",
}
# These tell the policy that AWS gave them at first; a topic's own is a resource, aws_sns_topic_policy.
NOT_OURS = ("aws_sns_topic", "aws_vpc_endpoint")
OUT_PORTS = {(80, 80), (443, 443)}  # to anywhere
MAX_USER_DATA_BYTES = 16 << 10
# All that EC2 takes in the description of a security group or of its rules; a local AWS takes anything.
DESCRIPTION = re.compile(r"[a-zA-Z0-9. _:/()#,@\[\]+=&;{}!$*-]{1,255}")


@dataclass(frozen=True)
class Resource:
    address: str
    type: str
    values: dict[str, Any]
    mode: str = "managed"


def resources(shown: dict[str, Any]) -> list[Resource]:
    """Of a plan (those that are there after it) or of a state, data sources too."""
    if "resource_changes" in shown:
        found = [
            Resource(change["address"], change["type"], change["change"]["after"], change["mode"])
            for change in shown["resource_changes"]
            if change["change"]["after"] is not None
        ]
        prior = shown.get("prior_state", {}).get("values", {}).get("root_module", {}).get("resources", [])
        known = {resource.address for resource in found}
        return found + [_of_state(item) for item in prior if item["address"] not in known]
    return [_of_state(item) for item in shown["values"]["root_module"]["resources"]]


def _of_state(item: dict[str, Any]) -> Resource:
    return Resource(item["address"], item["type"], item["values"], item["mode"])


def faults(shown: dict[str, Any]) -> list[str]:
    return [
        f"{resource.address}: {fault}"
        for resource in resources(shown)
        for rule in RULES
        for fault in rule(resource)
    ]


def _statements(resource: Resource) -> Iterator[dict[str, Any]]:
    """Of every policy, in IAM's own words with lists throughout."""
    if resource.type == "aws_iam_policy_document":
        for statement in resource.values.get("statement") or []:
            principals = statement.get("principals") or []
            yield {
                "Effect": statement.get("effect") or "Allow",
                "Action": _listed(statement.get("actions")),
                "NotAction": statement.get("not_actions") or [],
                "NotResource": statement.get("not_resources") or [],
                "Resource": _listed(statement.get("resources")),
                "Principal": [
                    name for principal in principals for name in principal.get("identifiers") or []
                ],
                "Condition": statement.get("condition") or [],
            }
    for key in ("policy", "assume_role_policy"):
        document = resource.values.get(key)
        if isinstance(document, str) and document and resource.type not in NOT_OURS:
            for statement in _listed(json.loads(document).get("Statement", [])):
                principal = statement.get("Principal", [])
                if isinstance(principal, dict):
                    principal = [name for names in principal.values() for name in _listed(names)]
                yield {
                    "Effect": statement["Effect"],
                    "Principal": _listed(principal),
                    "Condition": statement.get("Condition", {}),
                } | {
                    key: _listed(statement.get(key, []))
                    for key in ("Action", "NotAction", "Resource", "NotResource")
                }


def _listed(value: Any) -> list[Any]:
    """Without what is not known before the apply."""
    return [item for item in (value if isinstance(value, list) else [value]) if item is not None]


def policies(resource: Resource) -> Iterator[str]:
    for statement in _statements(resource):
        if statement["Effect"] == "Deny":
            continue
        if statement["NotAction"] or statement["NotResource"]:
            yield "allows all but what it names"
        for action in statement["Action"]:
            if "*" in action:
                yield f"allows the actions {action}"
        for name in statement["Principal"]:
            if "*" in name:
                yield f"allows it to anybody ({name})"
        if "*" in statement["Resource"]:
            for action in sorted(set(statement["Action"]) - ANY_RESOURCE):
                yield f"allows {action} on every resource"
        for name in statement["Resource"]:
            # Of a bucket, a prefix is the least: nothing may be allowed on all of its objects.
            if name.startswith("arn:aws:s3:::") and name.partition("/")[2] == "*":
                yield f"allows it on a whole bucket ({name})"


def metadata_service(resource: Resource) -> Iterator[str]:
    if resource.type not in ("aws_launch_template", "aws_instance"):
        return
    options = (resource.values.get("metadata_options") or [{}])[0]
    if options.get("http_tokens") != "required":
        yield "answers IMDSv1"
    if options.get("http_put_response_hop_limit") != 1:
        yield "lets containers ask the metadata service (hop limit)"


def encryption(resource: Resource) -> Iterator[str]:
    values = resource.values
    if resource.type == "aws_ebs_volume" and not values.get("encrypted"):
        yield "is not encrypted"
    if resource.type == "aws_instance":
        disks = values.get("root_block_device") or [{}]
        if not all(disk.get("encrypted") for disk in disks):
            yield "has a disk that is not encrypted"
    if resource.type == "aws_launch_template":
        disks = [ebs for device in values["block_device_mappings"] for ebs in device["ebs"]]
        for disk in disks:
            if disk.get("encrypted") not in (True, "true"):
                yield "has a disk that is not encrypted"
            if disk.get("delete_on_termination") not in (True, "true"):
                yield "leaves a disk behind"
            if disk.get("volume_type") != "gp3":
                yield "has a disk that is not gp3"
    if resource.type == "aws_s3_bucket_server_side_encryption_configuration":
        rule = values["rule"][0]["apply_server_side_encryption_by_default"][0]
        if rule["sse_algorithm"] not in ("AES256", "aws:kms"):
            yield "does not encrypt"


def bucket(resource: Resource) -> Iterator[str]:
    if resource.type == "aws_s3_bucket_public_access_block":
        names = ("block_public_acls", "block_public_policy", "ignore_public_acls", "restrict_public_buckets")
        for name in names:
            if resource.values.get(name) is not True:
                yield f"{name} is off"
    if resource.type == "aws_s3_bucket_versioning":
        status = resource.values["versioning_configuration"][0]["status"]
        if status != "Enabled":
            yield "keeps no versions"
    if resource.type == "aws_s3_bucket_acl":
        yield "has an ACL"


def network(resource: Resource) -> Iterator[str]:
    values = resource.values
    if resource.type in ("aws_security_group", "aws_default_security_group"):
        if values.get("ingress"):
            yield "has rules for ingress inside the group, where they are not checked"
        if resource.type == "aws_default_security_group" and values.get("egress"):
            yield "lets something out"
    if resource.type == "aws_vpc_security_group_ingress_rule":
        for name in ("cidr_ipv4", "cidr_ipv6", "prefix_list_id"):
            if values.get(name):
                yield f"lets in {values[name]}"
    if resource.type == "aws_vpc_security_group_egress_rule" and values.get("cidr_ipv4"):
        ports = (values.get("from_port"), values.get("to_port"))
        if values["ip_protocol"] != "tcp" or ports not in OUT_PORTS:
            yield f"lets {values['ip_protocol']} {ports} out to {values['cidr_ipv4']}"
    if resource.type == "aws_subnet" and values.get("map_public_ip_on_launch"):
        yield "gives everything a public address"
    described = resource.type.startswith(("aws_security_group", "aws_vpc_security_group"))
    if described and (words := values.get("description")) and not DESCRIPTION.fullmatch(words):
        yield f"has a description that EC2 refuses ({words})"
    if resource.type == "aws_security_group_rule":
        yield "is a rule of the old kind, which is not checked"


def tags(resource: Resource) -> Iterator[str]:
    if resource.mode != "managed":
        return
    if resource.type == "aws_autoscaling_group":
        found = {tag["key"] for tag in resource.values["tag"] if tag["propagate_at_launch"]}
    elif "tags_all" in resource.values:
        found = set(resource.values["tags_all"] or {})
    else:
        return
    if missing := TAGS - found:
        yield f"has no tag {', '.join(sorted(missing))}"
    if resource.type == "aws_launch_template":
        kinds = {
            item["resource_type"]: set(item["tags"] or {}) for item in resource.values["tag_specifications"]
        }
        for kind in ("instance", "volume", "network-interface"):
            if TAGS - kinds.get(kind, set()):
                yield f"launches a {kind} without tags"


def ends(resource: Resource) -> Iterator[str]:
    """That nothing goes on costing money."""
    values = resource.values
    if resource.type == "aws_launch_template":
        if values.get("instance_initiated_shutdown_behavior") != "terminate":
            yield "an instance that shuts down stays"
        if data := values.get("user_data"):
            content = base64.b64decode(data)
            if len(content) > MAX_USER_DATA_BYTES:
                yield f"has {len(content)} bytes of user data"
            if not gzip.decompress(content).startswith(b"#cloud-config\n"):
                yield "has user data that cloud-init does not know"
    if resource.type == "aws_autoscaling_group":
        if values.get("min_size") != 0:
            yield "cannot be set to 0"
        if values.get("wait_for_capacity_timeout") != "0":
            yield "lets an apply wait for capacity"
        if "AZRebalance" not in (values.get("suspended_processes") or []):
            yield "would move a training instance for balance"
        if values.get("capacity_rebalance"):
            yield "would start a second instance beside one that trains"
    if resource.type == "aws_autoscaling_schedule":
        sizes = [values.get(name) for name in ("min_size", "max_size", "desired_capacity")]
        if sizes != [0, 0, 0]:
            yield f"does not end everything: {sizes}"


RULES = (policies, metadata_service, encryption, bucket, network, tags, ends)
