"""A plan for programs: every option with its arithmetic, its sources, and which figures were measured."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from infra.plan.estimate import Option
from infra.plan.recommend import Plan, describe
from infra.plan.throughput import decoding_figure, decoding_rate, gpu_figure, gpu_rate
from infra.plan.work import Work


def plan_facts(plan: Plan) -> dict[str, Any]:
    """What `--json` prints."""
    return {
        "region": plan.region,
        "limits": asdict(plan.limits),
        "recipes": [work_facts(work, plan) for work in plan.works],
        "recommended": None if plan.recommended is None else option_facts(plan.recommended),
        "reason": plan.reason,
        "alternatives": {what: option_facts(option) for what, option in plan.alternatives.items()},
        "options": [
            option_facts(option) | {"keeps_limits": plan.limits.kept_by(option)} for option in plan.options
        ],
        "left_out": list(plan.left_out),
        "assumptions": list(plan.assumptions),
        "warnings": list(plan.warnings),
    }


def work_facts(work: Work, plan: Plan) -> dict[str, Any]:
    expected = plan.expected.get(work.name)
    return {
        "name": work.name,
        "recipe": str(work.recipe_path),
        "num_epochs": work.num_epochs,
        "epochs_at_224": work.epochs_at_224,
        "segments": [asdict(segment) for segment in work.segments],
        "image_cost": work.image_cost,
        "image_cost_source": work.network_note,
        "sam_factor": work.sam_factor,
        "validation_images": work.validation_images,
        "global_batch_size": work.global_batch_size,
        "data": asdict(work.data),
        "max_hours": work.max_hours,
        "expected_top1": None if expected is None else asdict(expected),
    }


def option_facts(option: Option) -> dict[str, Any]:
    """One option, the sums and what they are made of."""
    code, name = option.instance.quota(option.market)
    facts: dict[str, Any] = {
        "what": describe(option),
        "recipe": option.work.name,
        "instance_type": option.instance.name,
        "num_nodes": option.num_nodes,
        "market": option.market,
        "gpu": option.instance.gpu,
        "num_gpus": option.num_nodes * option.instance.num_gpus,
        "vcpus": option.vcpus,
        "quota": {"code": code, "name": name, "vcpus": option.vcpus},
        "hours": option.hours,
        "usd": option.usd,
        "worst_case_usd": option.worst_case_usd,
        "training_hours": option.training_hours,
        "training_usd": option.training_usd,
        "fits_ram": option.fits_ram,
        "fits_nvme": option.fits_nvme,
        "bottleneck": option.bottleneck,
        "price": asdict(option.price),
        "on_demand_usd_per_hour": option.on_demand.usd_per_hour,
        "measured": option.measured,
    }
    for case in ("fast", "slow"):
        parts = getattr(option, case)
        facts[case] = {
            "hours": parts.hours,
            **asdict(parts),
            "gpu_images_per_second": gpu_rate(option.instance, case) * option.num_nodes,
            "decoding_images_per_second": decoding_rate(option.instance, case) * option.num_nodes,
            "one_gpu": asdict(gpu_figure(option.instance.gpu, case)),
            "one_core": asdict(decoding_figure(case)),
        }
    return facts
