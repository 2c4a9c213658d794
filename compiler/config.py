"""What a user can ask for, as data."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from enum import Enum
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from ..codegen.tune import Fleet, parse_fleet
from ..ir import UsageError, parse_pattern
from ..ir.values import Floats, Int8, Values, parse_values
from ..passes.solve import AUTO, METHODS
from .calibration.metrics import Drop, parse_drop
from .calibration.ranges import METHODS as RANGES
from .healing import CPU, Limit, parse_device, parse_limit

# Layers with fewer weights than this are too small for a sparse operator to pay.
TINY_WEIGHTS = 16_384
# Samples of calibration data that say enough of the layers.
SAMPLES = 256
# The pattern that leaves whole channels out of the model, instead of zeros in it.
STRUCTURED = "structured"
# The pattern where "auto" finds no better one: one vector of outputs; two inputs deep where products are of bfloat16,
# four where they are of integers.
PATTERN, PAIR_PATTERN, INTEGER_PATTERN = "group:16", "block:16x2", "block:16x4"
# Options that are texts with a grammar, and what reads them.
PARSED: dict[str, Callable[[str], object]] = {
    "max_drop": parse_drop,
    "heal": parse_limit,
    "heal_on": parse_device,
    "tune_on": parse_fleet,
}


class Tune(str, Enum):
    """How long to search for a kernel's schedule, a distinct problem."""

    OFF = "off"  # the schedule that fits most machines, without measuring
    QUICK = "quick"  # at most 2 seconds
    THOROUGH = "thorough"  # at most 30 seconds


class CompileConfig(BaseModel):
    """Options of `sparsec.compile`; every one is also an option of the command line.

    Attributes:
        sparsity: share of zeros that pruning aims at, 0 to 1: in each layer, or with `calib` over all of them, where
            the error is least. None changes no weight: the zeros that are there are compiled.
        layer_sparsity: exceptions by layer name or glob, in order; the last that matches counts. A layer that is named
            here is pruned even where the defaults would leave it (the model's last layer, tiny ones).
        pattern: the shape of sparsity that pruning makes: "block:RxC" or "group:g"; with `calib` several, separated by
            commas, of which each layer gets one. "auto" is `PATTERN`, `PAIR_PATTERN` or `INTEGER_PATTERN`; with
            `speedup` or `max_drop` the narrowest that this machine runs nearly as fast as the fastest. Zeros that are
            already there keep their own shape. "structured", by itself: no zeros, but channels left out of the model;
            `sparsity` is then the share of the weights that goes, of the layers that can get smaller. Where that is
            None or 0, and there is no budget, only channels go that make no difference, and no weight changes.
        values: what the weights of sparse operators are stored as: "fp32", "bf16", "fp16", "int8", "int8:G",
            "codebook16" or "codebook256"; with `speedup` or `max_drop` several, separated by commas, of which each
            layer gets one. Layers of 16-bit models keep their type. Weights of layers that stay dense are stored in a
            codebook only where it holds them exactly.
        activations: with int8 values, in patterns with a multiple of 4 inputs a block: "float" multiplies X as it is,
            "static" rounds it to 8 bits by scales from `calib`, "dynamic" by a scale for each row; products are then of
            integers. "auto" is "static" with `calib`, else "float". With bf16 values, in patterns with an even number
            of inputs a block: "bf16" rounds X, too, for products of bfloat16.
        ranges: how static scales follow from `calib`: "mse" (least squared error), "minmax", "percentile" or "entropy".
        dense_baseline: what a sparse layer has to beat: "fp32" for the layer as it came, "int8" for what ONNX Runtime's
            static quantisation makes of it, "best" for the faster of the two. With the latter two the report also has
            the whole model quantised so.
        target: "auto" (this machine's GPUs where ONNX Runtime has its CUDA provider, else its CPU), "cpu", "cpu:NAME"
            with LLVM's name of one, "cuda", or "cuda:ARCH" with one or more architectures, such as "cuda:sm_80+sm_90".
        batch: batch sizes that must all get faster. Empty: the model's own, or 1 where it is dynamic.
        dims: sizes of the model's other dynamic dimensions, by name; 128 where nothing is said.
        tune: how long to search for schedules.
        tune_on: "tracker:HOST:PORT/KEY" of machines with the target's GPUs, on which schedules are measured where this
            machine has none (see `sparsec serve`). Dense layers are then still predicted, and reports say so.
        tf32: let sparse float32 layers use TF32 tensor cores on GPUs, as ONNX Runtime's dense layers do unless told
            otherwise: faster in large batches, relative errors of 1e-3.
        prune_all: prune layers that stay dense too, as zeros in their dense weights.
        survey: where the model is dense and no sparsity is asked for, measure what pruning would bring.
        seed: of random inputs.
        threads: intra-op threads that the model will run with. 0: all cores that this process may use.
        inputs: an .npz of inputs by name, used instead of random ones for checking and timing.
        calib: calibration data (see `sparsec.compiler.calibration.open_samples`): the weights that stay are then fitted
            to the layers' outputs on it, and the last fifth is held back to measure what became of the model's.
        samples: how many samples to take: None for 256, with `heal` for all; weights are solved for 256 of them.
        labels: an .npy or array of one label a sample of `calib`; not needed where the data has an array "labels".
        eval_data, eval_labels: data like `calib` to measure the metric on, instead of the last fifth of `calib`.
        metric: "top1", "top5", "mse", "cosine", "spearman", "perplexity", "FILE.py:FUNCTION" or a function; None for
            one that suits labels and outputs. Without labels the dense model's outputs are the reference.
        speedup: how much faster the whole model must get, at every batch size: with the least error.
        max_drop: how much worse the metric may get, "1%" of the dense model's or "0.01": as fast as that allows.
        heal: train the kept weights, biases and norms by PyTorch to do what the dense model does, for a time ("5m",
            "90s", "1h") or a number of steps ("500"), on all samples of `calib` but those that are held back.
        heal_on: device that PyTorch trains on: "cpu", "cuda" or "cuda:N".
        permute: with `calib`, reorder channels before blocks are cut, where the weights around can follow.
        pick: number of the frontier's point to make, instead of what the budget chooses; 0 is the dense model.
        solutions: folder in which solved weights are kept, so that another budget or point needs no second solving.
        method: of choosing and fitting weights: "auto" or one of `sparsec.passes.solve.METHODS`.
        cache: folder of the tuning database. None: the user's cache folder.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    sparsity: Annotated[float, Field(ge=0, le=1)] | None = None
    layer_sparsity: tuple[tuple[str, Annotated[float, Field(ge=0, le=1)]], ...] = ()
    pattern: str = AUTO
    values: str = "fp32"
    activations: Literal["auto", "float", "static", "dynamic", "bf16"] = "auto"
    ranges: str = "mse"
    dense_baseline: Literal["fp32", "int8", "best"] = "fp32"
    target: str = "auto"
    batch: tuple[Annotated[int, Field(ge=1)], ...] = ()
    dims: dict[str, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)
    tune: Tune = Tune.QUICK
    tune_on: str | None = None
    tf32: bool = False
    prune_all: bool = False
    survey: bool = True
    seed: int = 0
    threads: Annotated[int, Field(ge=0)] = 0
    inputs: Path | None = None
    calib: Any = None
    samples: Annotated[int, Field(ge=1)] | None = None
    method: str = "auto"
    labels: Any = None
    eval_data: Any = None
    eval_labels: Any = None
    metric: Any = None
    speedup: Annotated[float, Field(gt=1)] | None = None
    max_drop: str | None = None
    heal: str | None = None
    heal_on: str = CPU
    permute: bool = True
    pick: Annotated[int, Field(ge=0)] | None = None
    solutions: Path | None = None
    cache: Path | None = None

    @field_validator("pattern")
    @classmethod
    def _known_pattern(cls, text: str) -> str:
        if text.strip().lower() in (AUTO, STRUCTURED):
            return text.strip().lower()
        try:
            return ",".join(str(parse_pattern(part.strip())) for part in text.split(","))
        except UsageError as error:
            raise ValueError(str(error)) from error

    @field_validator("values")
    @classmethod
    def _known_values(cls, text: str) -> str:
        try:
            return ",".join(dict.fromkeys(str(parse_values(part)) for part in text.split(",")))
        except UsageError as error:
            raise ValueError(str(error)) from error

    @field_validator("ranges")
    @classmethod
    def _known_ranges(cls, name: str) -> str:
        if name not in RANGES:
            raise ValueError(f"'{name}' is no way to find ranges: expected {', '.join(RANGES)}")
        return name

    @field_validator(*PARSED)
    @classmethod
    def _readable(cls, text: str | None, info: ValidationInfo) -> str | None:
        assert info.field_name is not None
        try:
            return None if text is None else str(PARSED[info.field_name](text))
        except UsageError as error:
            raise ValueError(str(error)) from error

    @field_validator("method")
    @classmethod
    def _known_method(cls, name: str) -> str:
        if name not in (AUTO, *METHODS):
            raise ValueError(f"'{name}' is no method of pruning: expected auto, {', '.join(METHODS)}")
        return name

    @property
    def patterns(self) -> tuple[str, ...]:
        """One or more; a default as long as "auto" has not been decided."""
        if self.pattern != AUTO:
            return tuple(self.pattern.split(","))
        if self.multiplies_integers:
            return (INTEGER_PATTERN,)
        return (PAIR_PATTERN if self.activations == "bf16" else PATTERN,)

    @property
    def structured(self) -> bool:
        """Whether channels are left out."""
        return self.pattern == STRUCTURED

    @property
    def multiplies_integers(self) -> bool:
        """Whether products are of integers where the pattern allows."""
        return Int8() in self.kinds and self.activation_format != "float"

    @property
    def kinds(self) -> tuple[Values, ...]:
        """`values`, read: one or more."""
        return tuple(parse_values(part) for part in self.values.split(","))

    @property
    def activation_format(self) -> str:
        """How integer products are given X: "float" for none, "static" or "dynamic"."""
        if self.activations != "auto":
            return self.activations
        return "static" if self.calib is not None else "float"

    @property
    def quantizes(self) -> bool:
        """Whether weights are stored in fewer bits than they came with."""
        return self.kinds != (Floats(),)

    @property
    def budgeted(self) -> bool:
        """Whether speed or accuracy is the target, not a share of zeros."""
        return self.speedup is not None or self.max_drop is not None

    @property
    def drop_limit(self) -> Drop | None:
        """`max_drop`, read."""
        return None if self.max_drop is None else parse_drop(self.max_drop)

    @property
    def heal_limit(self) -> Limit | None:
        """`heal`, read."""
        return None if self.heal is None else parse_limit(self.heal)

    @property
    def fleet(self) -> Fleet | None:
        """`tune_on`, read."""
        return None if self.tune_on is None else parse_fleet(self.tune_on)

    @property
    def most_samples(self) -> int:
        """`samples`, or what stands for None."""
        return self.samples or (SAMPLES if self.heal is None else sys.maxsize)

    @property
    def prunes(self) -> bool:
        """Whether any weight may be changed."""
        return self.sparsity is not None or bool(self.layer_sparsity) or self.budgeted

    def wanted_sparsity(self, layer: str) -> tuple[float | None, bool]:
        """The sparsity asked for `layer`, and whether it was asked for by name."""
        for name, sparsity in reversed(self.layer_sparsity):
            if fnmatchcase(layer, name):
                return sparsity, True
        return self.sparsity, False

    @property
    def thread_count(self) -> int:
        """Threads to run with, at least 1."""
        if self.threads:
            return self.threads
        if hasattr(os, "sched_getaffinity"):
            return len(os.sched_getaffinity(0))
        return os.cpu_count() or 1
