"""What every step of a compilation needs and none changes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ..codegen.target import CudaTarget, Target, parse_target
from ..codegen.tune import Database, Fleet, Tuner, default_path
from ..ir import UsageError
from .machine import Machine, find_machine, has_gpu

if TYPE_CHECKING:
    from .config import CompileConfig


class Progress(Protocol):
    """What the library tells about its work; it never prints."""

    def start(self, stage: str, total: int | None) -> None:
        """A stage of `total` steps begins (None: unknown)."""

    def advance(self, detail: str = "") -> None:
        """One step is done."""


class Silent:
    """Progress that nobody looks at."""

    def start(self, stage: str, total: int | None) -> None:
        """As `Progress.start`."""

    def advance(self, detail: str = "") -> None:
        """As `Progress.advance`."""


@dataclass(frozen=True)
class Context:
    """The configuration, and what it was turned into.

    Attributes:
        config: what was asked for.
        target: what is compiled for.
        machine: the target, if it is here.
        tuner: finds kernels.
        folder: scratch space.
        progress: is told what happens.
    """

    config: CompileConfig
    target: Target
    machine: Machine | None
    tuner: Tuner
    folder: Path
    progress: Progress


def make_context(config: CompileConfig, folder: Path, progress: Progress) -> Context:
    """The target, the machine and the tuner that `config` asks for; `folder` is scratch space.

    Raises:
        UsageError: there is no such target, or a budget needs times that nothing can tell.
    """
    target = parse_target("cuda" if config.target == "auto" and has_gpu() else config.target)
    machine = find_machine(target, config.thread_count)
    if target.cuda and config.quantizes:
        raise UsageError(
            f"--values {config.values}: sparse operators for GPUs keep the model's own type so far; leave it out, or "
            "compile for a CPU (--target cpu)"
        )
    if config.budgeted and not target.cuda and machine is None:
        raise UsageError(
            f"--speedup and --max-drop need times, and {target} is not this machine: compile there, or give --sparsity"
        )
    fleet = config.fleet
    if fleet is not None:
        target = dataclasses.replace(target, cuda=_with_remote(target, fleet, config))
    path = default_path() if config.cache is None else config.cache / "tuning.sqlite"
    tuner = Tuner(target, config.thread_count, config.tune.value, Database(path), config.tf32, fleet=fleet)
    return Context(config, target, machine, tuner, folder, progress)


def _with_remote(target: Target, fleet: Fleet, config: CompileConfig) -> tuple[CudaTarget, ...]:
    """The target's GPUs, those that are not here as the fleet has them.

    Raises:
        UsageError: there is nothing to measure there.
        SparsecError: the fleet cannot be reached.
    """
    if not target.cuda:
        raise UsageError(f"--tune-on measures kernels for GPUs, and the target is {target}: add --target cuda:sm_90")
    if config.tune.value == "off":
        raise UsageError("--tune-on measures schedules, which --tune off forbids: leave one of them out")
    there = fleet.gpus()
    if not any(gpu.arch in there for gpu in target.cuda):
        raise UsageError(
            f"--tune-on {fleet}: the GPUs there are {', '.join(there) or 'none'}, and the target is {target}"
        )
    return tuple(gpu if gpu.device is not None else there.get(gpu.arch, gpu) for gpu in target.cuda)
