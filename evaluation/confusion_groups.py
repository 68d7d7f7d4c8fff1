"""Groups of classes that a model takes for each other, found in its confusion matrix.

order = cluster_order(matrix)                          # neighbours are taken for each other
confused_groups(matrix, limit=8)                       # [ConfusedGroup(labels=(555, 569, 864), …), …]
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform

MAX_GROUP_CLASSES = 8  # names that fit in a line or two
MAX_CLUSTERED_CLASSES = 5000  # the distances of 5,000 classes are 100 MB


@dataclass(frozen=True)
class ConfusedGroup:
    """`count` samples of these classes were predicted as another class of the group, `fraction` of all."""

    labels: tuple[int, ...]
    count: int
    fraction: float


@dataclass(frozen=True)
class BothWays:
    """Two classes: how many samples of the first were taken for the second, and of the second for the first.

    The first is the one that is mistaken more often.
    """

    first: int
    second: int
    count: int
    count_back: int


def cluster_order(matrix: NDArray[np.int64]) -> NDArray[np.int64]:
    """Labels in an order in which classes that are taken for each other are neighbours, int64 (classes,).

    matrix: counts, int64 (classes, classes). Average linkage on 1 − the mean of both directions' shares;
    classes without any confusion come as the tree leaves them. Fewer than three classes and more than 5,000
    keep their order.
    """
    if not _can_cluster(matrix):
        return np.arange(len(matrix))
    return leaves_list(_tree(matrix)).astype(np.int64)


def confused_groups(
    matrix: NDArray[np.int64], limit: int, max_classes: int = MAX_GROUP_CLASSES
) -> list[ConfusedGroup]:
    """The `limit` groups of at least three classes with the most confusions inside, most first.

    A group is a branch of the tree of `cluster_order` with at most max_classes classes, as large as they
    come, so that no class is in two groups. None of fewer than three classes or more than 5,000.
    """
    num_classes = len(matrix)
    if not _can_cluster(matrix):
        return []
    members: list[tuple[int, ...]] = [(label,) for label in range(num_classes)]
    is_whole = [True] * num_classes  # no larger branch takes it in
    for left, right, height, _ in _tree(matrix):
        merged = members[int(left)] + members[int(right)]
        fits = len(merged) <= max_classes and height < 1  # at 1, nothing ties the two together
        members.append(merged if fits else (0,) * (max_classes + 1))
        is_whole.append(fits)
        if fits:
            is_whole[int(left)] = is_whole[int(right)] = False
    groups = []
    for labels, whole in zip(members, is_whole, strict=True):
        if whole and len(labels) >= 3:
            inside = matrix[np.ix_(labels, labels)]
            count = int(inside.sum() - np.trace(inside))
            fraction = count / max(1, int(matrix[list(labels)].sum()))
            groups.append(ConfusedGroup(tuple(sorted(labels)), count, fraction))
    groups = [group for group in groups if group.count]
    return sorted(groups, key=lambda group: (-group.count, group.labels))[:limit]


def confused_both_ways(matrix: NDArray[np.int64], limit: int) -> list[BothWays]:
    """The `limit` pairs of classes with the most confusions in both directions together, most first.

    Of equally common pairs the one with the lower labels comes first.
    """
    both = np.triu(matrix + matrix.T, k=1)
    rows, columns = np.nonzero(both)
    order = np.lexsort((columns, rows, -both[rows, columns]))[:limit]
    pairs = []
    for a, b in zip(rows[order].tolist(), columns[order].tolist(), strict=True):
        first, second = (a, b) if matrix[a, b] >= matrix[b, a] else (b, a)
        pairs.append(BothWays(first, second, int(matrix[first, second]), int(matrix[second, first])))
    return pairs


def _can_cluster(matrix: NDArray[np.int64]) -> bool:
    has_errors = int(matrix.sum()) > int(np.trace(matrix))
    return 3 <= len(matrix) <= MAX_CLUSTERED_CLASSES and has_errors


def _similarity(matrix: NDArray[np.int64]) -> NDArray[np.float64]:
    """Mean of both directions' shares, 0 on the diagonal, (classes, classes)."""
    shares = matrix / np.maximum(matrix.sum(axis=1), 1)[:, None]
    similarity = (shares + shares.T) / 2
    np.fill_diagonal(similarity, 0)
    return similarity


def _tree(matrix: NDArray[np.int64]) -> NDArray[np.float64]:
    similarity = _similarity(matrix)
    distance = 1 - similarity / similarity.max()
    np.fill_diagonal(distance, 0)
    return linkage(squareform(distance, checks=False), method="average")
