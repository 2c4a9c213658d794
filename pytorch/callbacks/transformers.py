"""For the Trainer of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from ...ir import SparsecError
from .loop import Loop

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from ..pruner import Pruner

# In the folder of each checkpoint.
STATE = "sparsec.pt"


class PruneCallback(TrainerCallback):
    """`Trainer(..., callbacks=[PruneCallback(prune(model, config))])`: counts the optimizer's steps.

    Checkpoints have the pruner's state in a file of their own, from which training that is resumed goes on. Where
    weights are set back the optimizer's state is cleared, and the learning rate's schedule goes back to that step.
    """

    def __init__(self, pruner: Pruner) -> None:
        self._loop = Loop(pruner)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Raises SparsecError where training is resumed and the checkpoint has no state of the pruner."""
        if not state.global_step:
            self._loop.begin([given["optimizer"]], [given["lr_scheduler"]])
            return
        file = _folder(args, state) / STATE
        if not file.is_file():
            raise SparsecError(
                f"PruneCallback: training goes on at step {state.global_step}, but there is no '{file}': resume from a "
                "checkpoint in output_dir that was written with this callback"
            )
        self._loop.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        self._loop.step([given["optimizer"]], [given["lr_scheduler"]])

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        if state.is_world_process_zero:
            torch.save(self._loop.state_dict(), _folder(args, state) / STATE)


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
