"""What to prune in a PyTorch model, as data."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ..compiler.config import PATTERN, TINY_WEIGHTS
from ..ir import UsageError
from ..ir.patterns import NMPattern
from .methods import PSP, Magnitude, Method
from .schedules import OneShot, Schedule
from .structures import Structure, parse_structure


class PruneConfig(BaseModel):
    """Options of `sparsec.torch.prune`; where `sparsec.CompileConfig` has one of the same name it means the same.

    Attributes:
        sparsity: share of zeros in each layer, 0 to 1. With `PSP` of all layers together, or None where `PSP.epsilon`
            decides.
        layer_sparsity: exceptions by name or glob of a weight ("lstm.weight_hh_l0") or module with all in it ("lstm"),
            in order; the last that matches counts. 0 leaves a layer dense. A layer that is named here is pruned even
            where it is small.
        pattern: "block:RxC", "group:g", "unstructured" or "nm:N:M", for a sparse operator; "columns", "channels",
            "kernels" or "layers" (see `Structure`), which may make the model itself smaller.
        schedule: `OneShot`, `Gradual` or `Iterative`.
        method: of choosing what stays: `Magnitude` or `PSP`.
        least_weights: smaller layers stay dense: as a rule a sparse operator does not pay there.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    sparsity: Annotated[float, Field(ge=0, le=1)] | None = None
    layer_sparsity: tuple[tuple[str, Annotated[float, Field(ge=0, le=1)]], ...] = ()
    pattern: str = PATTERN
    schedule: Schedule = OneShot()
    method: Method = Magnitude()
    least_weights: Annotated[int, Field(ge=0)] = TINY_WEIGHTS

    @field_validator("pattern")
    @classmethod
    def _known_pattern(cls, text: str) -> str:
        try:
            return str(parse_structure(text))
        except UsageError as error:
            raise ValueError(str(error)) from error

    @model_validator(mode="after")
    def _goes_together(self) -> PruneConfig:
        structure: Any = self.structure
        learned = isinstance(self.method, PSP)
        if self.sparsity is None and not self.layer_sparsity and not learned:
            raise ValueError("say how many zeros: sparsity, such as 0.9, or layer_sparsity for some layers")
        if self.sparsity is None and self.layer_sparsity and learned:
            raise ValueError("PSP without sparsity finds it for every layer: leave layer_sparsity out or give sparsity")
        if learned and self.sparsity is None and self.schedule != OneShot():
            raise ValueError("PSP without sparsity drops what is below epsilon at every step: leave the schedule out")
        if learned and self.sparsity is not None and self.schedule.last == 0:
            raise ValueError("PSP has to learn before it is chosen what stays: give OneShot a step, or use Gradual")
        if structure == Structure("layers") and not learned:
            raise ValueError("pattern 'layers' needs method=PSP(): norms of different layers are not on one scale")
        if learned and not self.schedule.regrows:
            raise ValueError("PSP lets blocks come back, which Iterative rules out: use Gradual or OneShot")
        if self.pattern.startswith("nm:") and learned:
            raise ValueError(f"pattern '{self.pattern}' has no blocks that PSP could give a parameter: use Magnitude()")
        if isinstance(structure, NMPattern):
            own = 1 - structure.n / structure.m
            for share in (self.sparsity, *(share for _, share in self.layer_sparsity)):
                if share and abs(share - own) > 1e-6:
                    raise ValueError(
                        f"pattern '{self.pattern}' has {own:.4g} zeros, no more and no less; got {share:g}"
                    )
        return self

    @property
    def structure(self) -> Any:
        """`pattern`, read."""
        return parse_structure(self.pattern)
