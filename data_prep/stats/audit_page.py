"""The audit's part of the data card: what was found, and pictures of the duplicates."""

from __future__ import annotations

import html
from collections.abc import Sequence
from itertools import groupby

from data_prep.page import data_uri, section
from data_prep.stats.audit_report import AuditedSample, AuditReport, Cluster, summary_lines
from data_prep.stats.contact_sheet import jpeg_bytes, load_picture
from data_prep.stats.samples import DamagedSample, DataSet

MAX_CLUSTERS = 60
MAX_MEMBERS = 6  # shown of a cluster
MAX_OTHERS = 12  # shown of constant, tiny and damaged images each
PICTURE_PIXELS = 160  # of the shorter side
KINDS = {"bytes": "same file", "pixels": "same pixels", "near": "near duplicate"}


def render_audit(data_set: DataSet, report: AuditReport) -> str:
    """The section as HTML."""
    leaks = report.counts.num_val_in_train > 0
    lines = "".join(
        f"<li{' class=urgent' if leaks and 'also in train' in line else ''}>{html.escape(line)}</li>"
        for line in summary_lines(report)
    )
    shown = report.clusters[:MAX_CLUSTERS]
    clusters = "".join(_cluster(data_set, cluster) for cluster in shown)
    parts = [f'<ul class="card findings">{lines}</ul>']
    if shown:
        rest = len(report.clusters) - len(shown)
        more = f" {rest:,} more are in audit.json." if rest else ""
        parts.append(
            f'<h2>Duplicates</h2><p class="note">What crosses splits or disagrees about the label comes '
            f'first.{more}</p><div class="clusters">{clusters}</div>'
        )
    for title, samples in (("Of a single colour", report.constant), ("Tiny", report.tiny)):
        parts.append(_others(data_set, title, samples))
    parts.append(_damaged(report))
    thresholds = report.thresholds
    note = (
        f"Near duplicates agree in {64 - thresholds.max_hash_distance} of the 64 bits of a perceptual hash "
        f"and by {thresholds.min_similarity:.2f} in their fine detail: they survive another size, quality or "
        "brightness, but no mirror image and no crop beyond some 3%."
    )
    return section("Audit", note, "\n".join(part for part in parts if part))


def _cluster(data_set: DataSet, cluster: Cluster) -> str:
    badges = []
    if cluster.crosses_splits:
        badges.append('<span class="urgent">train and val</span>')
    if cluster.has_conflicting_labels:
        badges.append('<span class="urgent">labels differ</span>')
    badges.append(f"<span>{KINDS[cluster.kind]}</span>")
    if cluster.kind == "near":
        badges.append(f"<span>similarity {cluster.min_similarity:.2f}</span>")
    members = _spread(cluster.samples)
    if len(cluster.samples) > len(members):
        badges.append(f"<span>{len(members)} of {len(cluster.samples):,} shown</span>")
    figures = "".join(_member(data_set, sample) for sample in members)
    return (
        f'<div class="card cluster"><p class="badges">{"".join(badges)}</p>'
        f'<div class="members">{figures}</div></div>'
    )


def _spread(samples: Sequence[AuditedSample]) -> list[AuditedSample]:
    """Up to MAX_MEMBERS, of every split and label in turn, so that a conflict is seen in a large cluster."""
    ordered = sorted(samples, key=lambda sample: (sample.split, sample.label, sample.sample_id))
    groups = [list(part) for _, part in groupby(ordered, key=lambda sample: (sample.split, sample.label))]
    in_turn = [group[turn] for turn in range(max(map(len, groups))) for group in groups if turn < len(group)]
    return in_turn[:MAX_MEMBERS]


def _member(data_set: DataSet, sample: AuditedSample) -> str:
    try:
        picture = load_picture(data_set, sample.split, sample.sample_id, PICTURE_PIXELS)
        image = f'<img alt="" src="{data_uri(jpeg_bytes(picture, 80), "jpeg")}">'
    except DamagedSample:
        image = ""
    return (
        f"<figure>{image}<figcaption><b>{html.escape(sample.class_title)}</b>"
        f'<i class="split-{sample.split}">{sample.split}</i> {sample.sample_id}'
        f"<span>{html.escape(sample.key).replace('/', '/<wbr>')}</span></figcaption></figure>"
    )


def _others(data_set: DataSet, title: str, samples: Sequence[AuditedSample]) -> str:
    if not samples:
        return ""
    shown = samples[:MAX_OTHERS]
    more = f" {len(samples) - len(shown):,} more are in audit.json." if len(samples) > len(shown) else ""
    figures = "".join(_member(data_set, sample) for sample in shown)
    return (
        f'<h2>{html.escape(title)}</h2><p class="note">{len(samples):,} in all.{more}</p>'
        f'<div class="card cluster"><div class="members">{figures}</div></div>'
    )


def _damaged(report: AuditReport) -> str:
    if not report.damaged:
        return ""
    lines = "".join(
        f'<li class="urgent">sample {entry.sample_id} of split {entry.split} ({html.escape(entry.key)}) '
        f"{html.escape(entry.fault)}</li>"
        for entry in report.damaged[:MAX_OTHERS]
    )
    return f'<h2>Damaged</h2><ul class="card findings">{lines}</ul>'
