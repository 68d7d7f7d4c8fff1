"""What an audit found: `audit.json` and `audit.csv`, and the same in sentences.

Example:
    >>> report = AuditReport.model_validate_json(Path("data/intel/card/audit.json").read_text())
    >>> [sample.key for sample in report.clusters[0].samples]
"""

from __future__ import annotations

import csv
import io
from typing import Literal

from pydantic import BaseModel, ConfigDict

from data_prep.stats.samples import Split
from data_prep.stats.search import MAX_HASH_DISTANCE, MAX_RESIDUE, MIN_SIMILARITY

CONSTANT_STD = 2.0  # grey levels of 255: below, nobody sees anything in an image
TINY_PIXELS = 32  # of the shorter side


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class AuditedSample(_Model):
    """A sample of the report. `class_title` is what people call its class."""

    split: Split
    sample_id: int
    key: str
    label: int
    class_title: str
    width: int  # pixels
    height: int


class DamagedEntry(AuditedSample):
    fault: str


class Cluster(_Model):
    """Samples that show the same picture.

    Attributes:
        kind: "bytes" where all are stored alike, "pixels" where they decode to the same, or "near".
        min_similarity: of the pairs that join it, 1 for the same picture, see `search.detail_similarity`.
        max_hash_distance: of these pairs, bits of 64.
    """

    kind: Literal["bytes", "pixels", "near"]
    crosses_splits: bool
    has_conflicting_labels: bool
    min_similarity: float
    max_hash_distance: int
    samples: tuple[AuditedSample, ...]


class Thresholds(_Model):
    max_hash_distance: int = MAX_HASH_DISTANCE
    min_similarity: float = MIN_SIMILARITY
    max_residue: float = MAX_RESIDUE  # grey levels of 255
    constant_std: float = CONSTANT_STD
    tiny_pixels: int = TINY_PIXELS


class AuditCounts(_Model):
    """Figures of an audit, in images or clusters.

    Attributes:
        num_val_in_train: images of val whose cluster has an image of train, too.
        num_val_in_train_conflicting: of these, those that carry another label than one of them.
        num_redundant: images that could be left out without losing a picture.
        num_not_compared: images in a crowd of equal hashes too large to compare all of them.
    """

    num_images: int
    num_val_in_train: int
    num_val_in_train_conflicting: int
    num_clusters: int
    num_exact_clusters: int
    num_near_clusters: int
    num_conflicting_clusters: int
    num_clustered_images: int
    num_redundant: int
    num_constant: int
    num_tiny: int
    num_damaged: int
    num_candidate_pairs: int
    num_not_compared: int


class AuditReport(_Model):
    """The contents of `audit.json`; clusters that cross splits or conflict come first."""

    version: Literal[1] = 1
    data_set: str
    thresholds: Thresholds
    counts: AuditCounts
    clusters: tuple[Cluster, ...]
    constant: tuple[AuditedSample, ...]
    tiny: tuple[AuditedSample, ...]
    damaged: tuple[DamagedEntry, ...]


def audit_csv(report: AuditReport) -> str:
    """One line a clustered sample, for a spreadsheet or a script that leaves samples out."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["cluster", "kind", "split", "sample_id", "label", "class", "key"])
    for number, cluster in enumerate(report.clusters):
        for sample in cluster.samples:
            place = (sample.split, sample.sample_id, sample.label, sample.class_title, sample.key)
            writer.writerow([number, cluster.kind, *place])
    return text.getvalue()


def summary_lines(report: AuditReport) -> list[str]:
    """What the audit found, a sentence a line, the most urgent first."""
    counts = report.counts
    lines = []
    if counts.num_damaged:
        lines.append(f"{_images(counts.num_damaged)} cannot be read (run python -m data_prep verify)")
    if {
        sample.split for cluster in report.clusters for sample in cluster.samples
    } and counts.num_val_in_train:
        conflict = counts.num_val_in_train_conflicting
        verb = "is" if counts.num_val_in_train == 1 else "are"
        note = f" ({conflict:,} with another label)" if conflict else ""
        lines.append(f"{_images(counts.num_val_in_train)} of val {verb} also in train{note}")
    if counts.num_clusters:
        exact, near = counts.num_exact_clusters, counts.num_near_clusters
        lines.append(
            f"{_images(counts.num_clustered_images)} in {counts.num_clusters:,} groups of duplicates "
            f"({exact:,} exact, {near:,} near); {counts.num_redundant:,} could be left out"
        )
    if counts.num_conflicting_clusters:
        groups = "group has" if counts.num_conflicting_clusters == 1 else "groups have"
        lines.append(f"{counts.num_conflicting_clusters:,} {groups} conflicting labels")
    if counts.num_constant:
        lines.append(f"{_images(counts.num_constant)} of a single colour")
    if counts.num_tiny:
        lines.append(f"{_images(counts.num_tiny)} with a side below {report.thresholds.tiny_pixels} pixels")
    if counts.num_not_compared:
        lines.append(f"{_images(counts.num_not_compared)} too alike to be compared one with each other")
    return lines or [f"nothing to complain about among {_images(counts.num_images)}"]


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count:,} images"
