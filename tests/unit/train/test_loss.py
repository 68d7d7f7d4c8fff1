"""Losses against their formulas, on numbers small enough to follow."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional

from train.config import DistillationSection, LossSection
from train.data.batch import Targets
from train.loss import TrainingLoss, class_weights

GENERATOR = torch.Generator().manual_seed(3)
LOGITS = torch.randn(6, 4, generator=GENERATOR)
LABELS = torch.tensor([0, 1, 2, 3, 3, 3])
MIXED = Targets(LABELS, LABELS.flip(0), torch.tensor([1.0, 0.7, 0.5, 0.2, 0.0, 0.9]))


def value(targets: Targets = Targets(LABELS), counts: tuple[int, ...] = (), **section: object) -> float:  # noqa: B008
    loss, logits = TrainingLoss(LossSection.model_validate(section), 4, counts)(LOGITS, targets)
    assert logits.shape == (6, 4)
    return float(loss)


def test_cross_entropy_with_smoothing() -> None:
    log_probabilities = functional.log_softmax(LOGITS, 1)
    wanted = 0.9 * functional.one_hot(LABELS, 4) + 0.1 / 4
    assert value(label_smoothing=0.1) == pytest.approx(
        float(-(wanted * log_probabilities).sum(1).mean()), rel=1e-5
    )


def test_mixed_labels_are_shares_of_two_losses() -> None:
    own, other = (
        functional.cross_entropy(LOGITS, labels, reduction="none", label_smoothing=0.1)
        for labels in (LABELS, LABELS.flip(0))
    )
    share = MIXED.share
    assert share is not None
    assert value(MIXED, label_smoothing=0.1) == pytest.approx(
        float((share * own + (1 - share) * other).mean())
    )
    assert MIXED.dense(4).sum(1).tolist() == pytest.approx([1] * 6)


def test_bce_sums_classes_and_takes_mixed_labels() -> None:
    wanted = MIXED.dense(4)
    p = LOGITS.sigmoid()
    expected = -(wanted * p.log() + (1 - wanted) * (1 - p).log()).sum() / 6
    assert value(MIXED, kind="bce") == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("kind", ["cross_entropy", "bce"])
def test_class_weights_and_micro_batches(kind: str) -> None:
    """The mean of the halves is the whole, though the halves have classes of other weights."""
    section = LossSection.model_validate({"kind": kind, "class_weights": [1, 2, 3, 10]})
    loss = TrainingLoss(section, 4)
    halves = [loss(LOGITS[part], Targets(LABELS[part]))[0] for part in (slice(3), slice(3, 6))]
    assert float(sum(halves) / 2) == pytest.approx(float(loss(LOGITS, Targets(LABELS))[0]))
    if kind == "cross_entropy":
        each = functional.cross_entropy(LOGITS, LABELS, reduction="none")
        weights = torch.tensor([1.0, 2, 3, 10])[LABELS]
        assert float(loss(LOGITS, Targets(LABELS))[0]) == pytest.approx(float((weights * each).mean()))


def test_balanced_weights_are_inverse_to_counts_with_mean_one() -> None:
    weights = class_weights(LossSection(class_weights="balanced"), 3, (10, 30, 60))
    assert weights is not None
    assert (weights[0] / weights[2]).item() == pytest.approx(6)
    assert float((weights * torch.tensor([10, 30, 60])).sum() / 100) == pytest.approx(1)


def test_wrong_weights_are_a_sentence() -> None:
    with pytest.raises(ValueError, match="2 weights for 3 classes"):
        class_weights(LossSection(class_weights=(1, 2)), 3)
    with pytest.raises(ValueError, match="images of every class"):
        class_weights(LossSection(class_weights="balanced"), 3, (1, 0, 2))


def test_auxiliary_heads_add_their_share() -> None:
    section = LossSection(aux_weight=0.3)
    other = LOGITS.flip(0)
    loss, logits = TrainingLoss(section, 4)((LOGITS, other), Targets(LABELS))
    expected = functional.cross_entropy(LOGITS, LABELS) + 0.3 * functional.cross_entropy(other, LABELS)
    assert float(loss) == pytest.approx(float(expected)) and torch.equal(logits, LOGITS)


def test_distillation_is_its_formula() -> None:
    section = LossSection(distillation=DistillationSection(teacher=Path("x"), weight=0.7, temperature=3))
    teacher = LOGITS.roll(1, 0)
    loss, _ = TrainingLoss(section, 4)(LOGITS, Targets(LABELS), teacher)
    p, q = (teacher / 3).softmax(1), (LOGITS / 3).log_softmax(1)
    divergence = (p * (p.log() - q)).sum() / 6
    expected = 0.3 * functional.cross_entropy(LOGITS, LABELS) + 0.7 * 9 * divergence
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    same, _ = TrainingLoss(section, 4)(LOGITS, Targets(LABELS), LOGITS)
    assert float(same) == pytest.approx(0.3 * float(functional.cross_entropy(LOGITS, LABELS)), rel=1e-5)
