"""The audit of a data set: duplicates within and across splits, constant, tiny and damaged images.

    python -m data_prep stats data/intel --audit

Exact duplicates have the same stored bytes; of near duplicates see `search`. Pairs are joined into clusters.
A cluster with members in both splits comes first: what was trained on says nothing as a test.

Example:
    >>> report = audit(open_data_set("data/intel"), num_workers=2)
    >>> report.counts.num_val_in_train, report.clusters[0].kind
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from data_prep.stats.audit_report import (
    CONSTANT_STD,
    TINY_PIXELS,
    AuditCounts,
    AuditedSample,
    AuditReport,
    Cluster,
    DamagedEntry,
    Thresholds,
)
from data_prep.stats.fingerprints import fingerprint
from data_prep.stats.samples import DamagedSample, DataSet, Split
from data_prep.stats.search import NearDuplicates, count_bits, detail_similarity, find_near_duplicates


def audit(data_set: DataSet, num_workers: int = 0, progress: bool = True) -> AuditReport:
    """Look at every image of a data set. Memory: 0.8 kB an image.

    Raises:
        ValueError: a shard is missing.
        RuntimeError: a worker was killed, or S3 cannot be read.
    """
    parts = []
    damaged = []
    for split in data_set.splits:
        prints, faults = fingerprint(data_set, split, num_workers, progress)
        parts.append(prints)
        damaged += [
            DamagedEntry(**_sample(data_set, split, number).model_dump(), fault=fault)
            for number, fault in faults.items()
        ]
    prints = np.concatenate(parts)
    usable = np.flatnonzero(prints["is_read"])
    is_constant = prints["is_read"] & (prints["std"] < CONSTANT_STD)
    detailed = np.flatnonzero(prints["is_read"] & ~is_constant)
    near = find_near_duplicates(prints["hash"][detailed], prints["thumbnail"][detailed])
    joins = np.concatenate([_equal_pairs(prints, usable), detailed[near.pairs]])
    places = _Places(data_set)
    clusters = [_cluster(places, prints, *group) for group in _components(len(prints), joins)]
    clusters.sort(key=_urgency)
    sides = np.concatenate(
        [np.minimum(samples.index["width"], samples.index["height"]) for samples in data_set.splits.values()]
    )
    constant = [places.sample(position) for position in np.flatnonzero(is_constant).tolist()]
    tiny = [places.sample(position) for position in np.flatnonzero(sides < TINY_PIXELS).tolist()]
    return AuditReport(
        data_set=data_set.location,
        thresholds=Thresholds(),
        counts=_counts(len(prints), clusters, near, len(constant), len(tiny), len(damaged)),
        clusters=tuple(clusters),
        constant=tuple(constant),
        tiny=tuple(tiny),
        damaged=tuple(damaged),
    )


class _Places:
    """Samples of all splits counted through: a position is a sample id plus those of the splits before."""

    def __init__(self, data_set: DataSet) -> None:
        self.data_set = data_set
        self.names = list(data_set.splits)
        self.starts = np.cumsum([0, *(len(samples.index) for samples in data_set.splits.values())])

    def find(self, position: int) -> tuple[Split, int]:
        split = int(np.searchsorted(self.starts, position, side="right")) - 1
        return self.names[split], int(position - self.starts[split])

    def sample(self, position: int) -> AuditedSample:
        return _sample(self.data_set, *self.find(position))


def _sample(data_set: DataSet, split: Split, sample_id: int) -> AuditedSample:
    samples = data_set.splits[split]
    row = samples.index[sample_id]
    label = int(row["label"])
    # A key that is no UTF-8 came through as lone surrogates, which no JSON file can hold.
    key = samples.keys[sample_id].encode("utf-8", "backslashreplace").decode()
    return AuditedSample(
        split=split,
        sample_id=sample_id,
        key=key,
        label=label,
        class_title=data_set.class_titles[label],
        width=int(row["width"]),
        height=int(row["height"]),
    )


def _equal_pairs(prints: np.ndarray, usable: np.ndarray) -> np.ndarray:
    """Positions with the same stored bytes, each joined to the next, int64 (pairs, 2)."""
    order = usable[np.argsort(prints["digest"][usable], kind="stable")]
    is_same = prints["digest"][order[1:]] == prints["digest"][order[:-1]]
    return np.stack([order[:-1][is_same], order[1:][is_same]], axis=1)


def _components(num_images: int, joins: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """The connected groups: positions of the members, sorted, and the joins between them, (joins, 2)."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    if not len(joins):
        return []
    graph = coo_array((np.ones(len(joins), bool), (joins[:, 0], joins[:, 1])), shape=(num_images, num_images))
    group_of = connected_components(graph, directed=False)[1]
    joins = joins[np.argsort(group_of[joins[:, 0]], kind="stable")]
    starts = np.flatnonzero(np.diff(group_of[joins[:, 0]])) + 1
    return [(np.unique(part), part) for part in np.split(joins, starts)]


def _cluster(places: _Places, prints: np.ndarray, members: np.ndarray, pairs: np.ndarray) -> Cluster:
    samples = tuple(places.sample(position) for position in members.tolist())
    distances = count_bits(prints["hash"][pairs[:, 0]] ^ prints["hash"][pairs[:, 1]])
    kind = _kind(places.data_set, prints[members], samples)
    similarity = 1.0 if kind != "near" else float(detail_similarity(prints["thumbnail"], pairs).min())
    return Cluster(
        kind=kind,
        crosses_splits=len({sample.split for sample in samples}) > 1,
        has_conflicting_labels=len({sample.label for sample in samples}) > 1,
        min_similarity=round(similarity, 4),
        max_hash_distance=int(distances.max()),
        samples=samples,
    )


def _kind(
    data_set: DataSet, prints: np.ndarray, samples: Sequence[AuditedSample]
) -> Literal["bytes", "pixels", "near"]:
    import simplejpeg

    if (prints["digest"] == prints["digest"][0]).all():
        return "bytes"
    if (prints["thumbnail"] != prints["thumbnail"][0]).any():
        return "near"
    try:  # only these few are decoded in full
        images = (simplejpeg.decode_jpeg(data_set.read(sample.split, sample.sample_id)) for sample in samples)
        first = next(images)
        is_same = all(image.shape == first.shape and (image == first).all() for image in images)
    except DamagedSample:
        return "near"
    return "pixels" if is_same else "near"


def _urgency(cluster: Cluster) -> tuple:
    order = ("bytes", "pixels", "near").index(cluster.kind)
    first = cluster.samples[0]
    serious = (not cluster.crosses_splits, not cluster.has_conflicting_labels)
    return (*serious, order, -cluster.min_similarity, first.split, first.sample_id)


def _counts(
    num_images: int,
    clusters: Sequence[Cluster],
    near: NearDuplicates,
    num_constant: int,
    num_tiny: int,
    num_damaged: int,
) -> AuditCounts:
    leaked = conflicting = 0
    for cluster in clusters:
        trained = {sample.label for sample in cluster.samples if sample.split == "train"}
        held_out = [sample.label for sample in cluster.samples if sample.split == "val"]
        leaked += len(held_out) if trained else 0
        conflicting += sum(bool(trained - {label}) for label in held_out)
    clustered = sum(len(cluster.samples) for cluster in clusters)
    num_near = sum(cluster.kind == "near" for cluster in clusters)
    return AuditCounts(
        num_images=num_images,
        num_val_in_train=leaked,
        num_val_in_train_conflicting=conflicting,
        num_clusters=len(clusters),
        num_exact_clusters=len(clusters) - num_near,
        num_near_clusters=num_near,
        num_conflicting_clusters=sum(cluster.has_conflicting_labels for cluster in clusters),
        num_clustered_images=clustered,
        num_redundant=clustered - len(clusters),
        num_constant=num_constant,
        num_tiny=num_tiny,
        num_damaged=num_damaged,
        num_candidate_pairs=near.num_candidates,
        num_not_compared=near.num_cut,
    )
