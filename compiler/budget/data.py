"""The calibration data: what weights are fitted to, and what is judged by."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..calibration import Samples, open_samples
from ..exporter import session_source

if TYPE_CHECKING:
    from ...ir import Program
    from ..context import Context
    from ..machine import Machine

# Share of the calibration data that no weight is fitted to.
HELD_BACK = 0.2


def open_data(program: Program, context: Context, machine: Machine) -> tuple[Samples, Samples]:
    """What weights are fitted to, and what no weight is fitted to.

    Raises:
        SparsecError: the data cannot be read, or does not fit the model.
    """
    config = context.config
    session = machine.open(session_source(program.model, context.folder))
    samples = open_samples(config.calib, session, config.most_samples, config.labels)
    if config.eval_data is None:
        return samples.split(HELD_BACK)
    return samples, open_samples(config.eval_data, session, 2**31, config.eval_labels)
