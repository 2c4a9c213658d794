"""Which options go with `structured`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...ir import UsageError
from ...passes.solve import AUTO

if TYPE_CHECKING:
    from ..config import CompileConfig


def check_structured(config: CompileConfig) -> None:
    """Refuse what goes with zeros in weights only.

    Raises:
        UsageError: an option has no meaning where channels are left out.
    """
    for name, share in config.layer_sparsity:
        if share:
            raise UsageError(
                f"--sparsity {name}={share:g}: with --pattern structured {name}=0 keeps a layer's outputs, "
                "other shares are for the whole model"
            )
    for option, given in (
        (f"--values {config.values}", config.quantizes),
        (f"--method {config.method}", config.method != AUTO),
        ("--prune-all", config.prune_all),
    ):
        if given:
            raise UsageError(f"{option} is for weights with zeros; --pattern structured leaves whole channels out")
    if config.heal is not None and not config.sparsity and not config.budgeted:
        raise UsageError(
            "--heal: channels that make no difference leave nothing to train; add --sparsity, such as 0.3, or a budget"
        )
