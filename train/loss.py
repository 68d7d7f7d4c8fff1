"""What is minimized: cross-entropy or BCE, with smoothing, class weights, mixed labels and a teacher.

Every loss is a mean over images of a sum over classes, class weights included, so that the mean over
micro-batches is that of the whole batch.

Example:
    >>> loss = TrainingLoss(recipe.loss, num_classes=1000)
    >>> value, logits = loss(model(images), Targets(labels))
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from train.config import DistillationSection, LossSection
from train.data.batch import Targets
from train.models.heads import split_outputs


class TrainingLoss(nn.Module):
    """The loss of one recipe.

    Args:
        class_counts: training images of each class, for `class_weights: balanced`.

    Raises:
        ValueError: not one class weight a class.
    """

    class_weights: torch.Tensor | None

    def __init__(self, config: LossSection, num_classes: int, class_counts: Sequence[int] = ()) -> None:
        super().__init__()
        self._config = config
        self._num_classes = num_classes
        weights = class_weights(config, num_classes, class_counts)
        self.register_buffer("class_weights", weights, persistent=False)

    def forward(
        self, output: object, targets: Targets, teacher_logits: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss, 0-dimensional, and the logits: float32, shape (n, classes).

        Args:
            output: of the model in training: logits, or with those of auxiliary heads.
            teacher_logits: shape (n, classes), where the recipe has a teacher.
        """
        main, auxiliary = split_outputs(output)
        logits = main.float()
        loss = self._of_labels(logits, targets)
        if teacher_logits is not None and self._config.distillation is not None:
            loss = with_teacher(loss, logits, teacher_logits.float(), self._config.distillation)
        for other in auxiliary:
            loss = loss + self._config.aux_weight * self._of_labels(other.float(), targets)
        return loss, logits

    def _of_labels(self, logits: torch.Tensor, targets: Targets) -> torch.Tensor:
        if self._config.kind == "bce":
            return self._bce(logits, targets)
        wanted = targets.labels if targets.share is None else targets.dense(self._num_classes)
        smoothing = self._config.label_smoothing
        if self.class_weights is None:
            return functional.cross_entropy(logits, wanted, label_smoothing=smoothing)
        # Not torch's mean, which divides by the weights of the batch: that of two halves would be another.
        return functional.cross_entropy(
            logits, wanted, self.class_weights, label_smoothing=smoothing, reduction="none"
        ).mean()

    def _bce(self, logits: torch.Tensor, targets: Targets) -> torch.Tensor:
        smoothing = self._config.label_smoothing
        wanted = targets.dense(self._num_classes) * (1 - smoothing) + smoothing / self._num_classes
        each = functional.binary_cross_entropy_with_logits(
            logits, wanted, weight=self.class_weights, reduction="sum"
        )
        return each / len(logits)


def class_weights(
    config: LossSection, num_classes: int, class_counts: Sequence[int] = ()
) -> torch.Tensor | None:
    """Weights of the classes: float32, shape (classes,), or None where all weigh the same.

    Balanced ones are inverse to the images of a class, with mean 1 over all images.

    Raises:
        ValueError: not one weight a class, or a class without images.
    """
    if config.class_weights is None:
        return None
    if config.class_weights == "balanced":
        if len(class_counts) != num_classes or min(class_counts) == 0:
            raise ValueError("loss.class_weights: balanced needs training images of every class")
        counts = torch.tensor(class_counts, dtype=torch.float64)
        return (counts.sum() / (num_classes * counts)).float()
    if len(config.class_weights) != num_classes:
        raise ValueError(
            f"loss.class_weights has {len(config.class_weights)} weights for {num_classes} classes: give one "
            "a class, in the order of the labels, or balanced"
        )
    return torch.tensor(config.class_weights, dtype=torch.float32)


def with_teacher(
    loss: torch.Tensor, logits: torch.Tensor, teacher_logits: torch.Tensor, config: DistillationSection
) -> torch.Tensor:
    """Mix the labels' loss with the divergence from a teacher (Hinton et al., 2015).

    Both distributions are softened by the temperature T; the factor T² keeps gradients at their size.
    """
    warmth = config.temperature
    divergence = functional.kl_div(
        functional.log_softmax(logits / warmth, 1),
        functional.log_softmax(teacher_logits / warmth, 1),
        reduction="batchmean",
        log_target=True,
    )
    return (1 - config.weight) * loss + config.weight * warmth**2 * divergence
