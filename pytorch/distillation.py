"""Learning from the dense model."""

from __future__ import annotations

import torch
from torch.nn import functional

from ..ir import UsageError


def distillation_loss(
    logits: torch.Tensor,
    teacher: torch.Tensor,
    labels: torch.Tensor | None = None,
    temperature: float = 2.0,
    weight: float = 0.5,
) -> torch.Tensor:
    """T^2 KL(softmax(teacher / T), softmax(logits / T)), mixed with cross-entropy (Hinton et al. 2015).

    Args:
        logits: of the model that learns, [..., classes].
        teacher: of the dense model on the same inputs, [..., classes]; no gradient goes there.
        labels: classes [...], int64, or None.
        temperature: T; the higher, the more counts what the teacher says of wrong classes.
        weight: of the teacher, 0 to 1; the labels have the rest. Without labels it is 1.

    Returns:
        The mean over samples, a scalar.

    Raises:
        UsageError: the temperature is not above 0.
    """
    if not temperature > 0:
        raise UsageError(f"distillation_loss: expected a temperature above 0, got {temperature}")
    classes = logits.shape[-1]
    flat, taught = logits.reshape(-1, classes), teacher.detach().reshape(-1, classes)
    divergence = functional.kl_div(
        functional.log_softmax(flat / temperature, -1),
        functional.log_softmax(taught / temperature, -1),
        reduction="batchmean",
        log_target=True,
    )
    loss = divergence * temperature**2
    return loss if labels is None else weight * loss + (1 - weight) * functional.cross_entropy(flat, labels.reshape(-1))
