"""For the Trainer of Lightning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

try:
    from lightning.pytorch import Callback
except ImportError:  # the same by its older name
    from pytorch_lightning import Callback

from .loop import Loop

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..pruner import Pruner


class PruneCallback(Callback):
    """`Trainer(callbacks=[PruneCallback(prune(module, config))])`: counts the optimizers' steps, as `global_step` does.

    Its state is part of Lightning's checkpoints. Where weights are set back the optimizers' states are cleared, and the
    learning rates' schedules go back to that step.
    """

    def __init__(self, pruner: Pruner) -> None:
        self._loop = Loop(pruner)
        self._seen = 0

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self._seen = trainer.global_step
        self._loop.begin(trainer.optimizers, _schedulers(trainer))

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        # None while gradients are accumulated, several where there are several optimizers.
        for _ in range(trainer.global_step - self._seen):
            self._loop.step(trainer.optimizers, _schedulers(trainer))
        self._seen = trainer.global_step

    def state_dict(self) -> dict[str, Any]:
        return self._loop.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._loop.load_state_dict(state_dict)


def _schedulers(trainer: Any) -> list[Any]:
    return [config.scheduler for config in trainer.lr_scheduler_configs]
