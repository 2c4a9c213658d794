"""The examples of docs/pytorch.md, as they stand there, with fewer steps."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sparsec
from sparsec.compiler.config import Tune

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")
pytest.importorskip("sklearn")

from sparsec.torch import export, finalize  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
TEXT = ROOT.parent / "shared" / "assets" / "datasets" / "ptb" / "ptb.valid.txt"
SECTIONS = dict(
    re.findall(r"^#+ ([^\n]*)\n(.*?)(?=^##|\Z)", (ROOT / "docs" / "pytorch.md").read_text(), re.MULTILINE | re.DOTALL)
)
pytestmark = pytest.mark.filterwarnings("ignore")  # of PyTorch's exporters


def blocks(section: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", SECTIONS[section], re.MULTILINE | re.DOTALL)


def text() -> str:
    """The Penn Treebank's where it is on this machine, else a synthetic one."""
    if TEXT.exists():
        return TEXT.read_text()
    return " ".join(f"word{number}" for number in np.random.default_rng(0).zipf(1.3, 20_000) % 3000)


@pytest.fixture
def names(tmp_path: Path) -> dict[str, Any]:
    """What the blocks before the first example define, the line with sizes and places being replaced."""
    first, second = blocks("Three examples")
    imports, sizes = first.rstrip().rsplit("\n", 1)
    assert sizes.startswith("steps, out, text = ")
    space: dict[str, Any] = {"steps": 6, "out": tmp_path, "text": text()}
    torch.manual_seed(0)
    exec(f"{imports}\n{second}", space)
    # As the documentation has it, but without searching for schedules.
    quick = sparsec.CompileConfig(tune=Tune.OFF, threads=1, survey=False)
    space["export"] = lambda *arguments, **options: export(*arguments, **{"config": quick, **options})
    return space


EXAMPLES = {"A transformer encoder": "encoder", "A ResNet": "resnet", "A language model with an LSTM": "language"}


@pytest.mark.parametrize("section", EXAMPLES)
def test_examples_end_in_an_artifact_that_computes_the_same(section: str, names: dict[str, Any]) -> None:
    *_, steps = parts = blocks(section)
    assert len(parts) == 2
    assert len(steps.splitlines()) <= 11
    for part in parts:
        exec(part, names)
    pruner, model, x = names["pruner"], names["model"], names["x"]
    wanted = 0.5 if section == "A ResNet" else 0.8
    assert pruner.sparsity == pytest.approx(wanted, abs=0.02)
    assert pruner.steps == names["steps"]
    session = sparsec.load(names["out"] / EXAMPLES[section])
    final = finalize(copy.deepcopy(model)).eval()
    for batch in (x, torch.cat([x, x]), *([x[:3, :5]] if x.ndim == 2 else [])):
        y = final(batch).detach().numpy()
        found = session.run(None, {session.get_inputs()[0].name: batch.numpy()})[0]
        np.testing.assert_allclose(found, y, rtol=1e-5, atol=1e-5 * np.abs(y).max())
    pruned = [decision for decision in names["result"].report.decisions if decision.zeros_after]
    assert len(pruned) == {"encoder": 8, "resnet": 4, "language": 2}[EXAMPLES[section]]


def test_other_pieces_of_code_run(names: dict[str, Any]) -> None:
    for part in blocks("A transformer encoder")[:1] + blocks("What is pruned"):
        exec(part, names)
    names["x"] = names["images"][:8]
    exec(blocks("Distillation")[0], names)
    assert torch.isfinite(names["loss"])
    names["loss"].backward()
