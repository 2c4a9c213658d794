"""From a PyTorch model to an artifact that computes the same."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import sparsec
from sparsec.compiler import runtime
from sparsec.compiler.config import TINY_WEIGHTS, Tune
from sparsec.ir import SparsecError

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")

from torch import nn  # noqa: E402

from sparsec.torch import PSP, OneShot, PruneConfig, export, finalize, prune  # noqa: E402

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore")  # of PyTorch's exporters, at length
CONFIG = sparsec.CompileConfig(tune=Tune.OFF, threads=1, survey=False)
X = torch.randn(8, 192, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _sparse_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Timings that do not depend on how busy the machine is: sparse is twice as fast as dense."""
    monkeypatch.setattr(
        runtime, "compare", lambda dense, sparse, pairs=7: runtime.Comparison(2.0, 1.0, 2.0, (2.0, 2.0))
    )


class Wrapped(nn.Module):
    """A recurrent layer's output alone."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Any) -> Any:
        return self.layer(x)[0]


def network(masked: bool = True) -> Any:
    """In training, with a norm that has seen data; its last layer is small, so that it stays dense."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(192, 160), nn.BatchNorm1d(160), nn.ReLU(), nn.Dropout(0.5), nn.Linear(160, 160), nn.Linear(160, 10)
    )
    if masked:
        prune(model, PruneConfig(sparsity=0.75))
    for _ in range(3):
        model(2 * X + 1)
    return model


def expected(model: Any, *args: Any) -> Any:
    with torch.no_grad():
        return finalize(copy.deepcopy(model)).eval()(*args).numpy()


def check(out: Path, model: Any, *args: Any) -> None:
    """What the artifact computes is what the module computes, to the rounding of sums of float32."""
    session = sparsec.load(out)
    feeds = {value.name: array.numpy() for value, array in zip(session.get_inputs(), args, strict=True)}
    y = expected(model, *args)
    np.testing.assert_allclose(session.run(None, feeds)[0], y, rtol=1e-5, atol=1e-5 * np.abs(y).max())


def zeros(compiled: Any) -> list[float]:
    """Of each layer; products with zeros are sparse, unless they are tiny."""
    for decision in compiled.report.decisions:
        product = decision.kind == "linear" and decision.shape[0] * decision.shape[1] >= TINY_WEIGHTS
        assert (decision.choice == "sparse") == (product and decision.zeros_after > 0)
    return [round(float(decision.zeros_after), 2) for decision in compiled.report.decisions]


NEWER = {"dynamic_shapes": ({0: torch.export.Dim("n")},)}
OLDER = {"dynamo": False, "input_names": ["x"], "dynamic_axes": {"x": {0: "n"}}}


@pytest.mark.parametrize("options", [NEWER, OLDER], ids=["newer", "older"])
def test_a_module_in_training_with_masks_is_exported_and_not_changed(options: Any, tmp_path: Path) -> None:
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    compiled = export(model, (X,), tmp_path / "out", CONFIG, **options)
    assert zeros(compiled) == [0.75, 0.75, 0]
    for rows in (1, 5, 8):  # the batch is dynamic
        check(tmp_path / "out", model, X[:rows])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert list(model.state_dict()) == list(before)
    assert all(module.training for module in model.modules())
    model(X).sum().backward()  # and goes on
    assert model[0].parametrizations.weight.original.grad is not None


def test_what_is_exported_already(tmp_path: Path) -> None:
    model = network().eval()
    for masked in (torch.export.export(model, (X,)), torch.onnx.export(model, (X,), verbose=False)):
        with pytest.raises(
            SparsecError, match=r"computes its weights with masks .*weight.0.mask'\): call finalize\(\)"
        ):
            export(masked, None, tmp_path / "out", CONFIG)
    finalize(model)
    sources = (torch.export.export(model, (X,)), torch.onnx.export(model, (X,), verbose=False))
    for number, source in enumerate(sources):
        compiled = export(source, None, tmp_path / str(number), CONFIG)
        assert zeros(compiled) == [0.75, 0.75, 0]
        check(tmp_path / str(number), model, X)


@pytest.mark.parametrize("dynamo", [True, False])
def test_what_wraps_a_module_for_training_is_no_part_of_it(dynamo: bool, tmp_path: Path) -> None:
    model = network()
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = torch.compile(nn.parallel.DistributedDataParallel(model), backend="eager")
        compiled = export(wrapped, (X,), tmp_path / "out", CONFIG, dynamo=dynamo)
    finally:
        torch.distributed.destroy_process_group()
    assert zeros(compiled) == [0.75, 0.75, 0]
    check(tmp_path / "out", model, X)


def test_a_part_that_is_compiled_in_place_is_exported_without_its_mask(tmp_path: Path) -> None:
    model = network()
    model[0].compile(backend="eager")
    assert zeros(export(model, (X,), tmp_path / "out", CONFIG)) == [0.75, 0.75, 0]
    check(tmp_path / "out", model, X)


def test_one_part_in_training_is_exported_as_in_inference(tmp_path: Path) -> None:
    model = network(masked=False).eval()
    model[3].train()  # Dropout
    export(model, (X,), tmp_path / "out", CONFIG)
    check(tmp_path / "out", model, X)
    assert model[3].training


MODULES = {
    "encoder": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 256, batch_first=True), 1),
    "lstm": lambda: Wrapped(nn.LSTM(64, 48, num_layers=2, batch_first=True)),
    "gru": lambda: Wrapped(nn.GRU(64, 48, batch_first=True)),
}


@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.parametrize("name", MODULES)
def test_attention_and_recurrent_layers(name: str, dynamo: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = MODULES[name](), torch.randn(2, 6, 64)
    prune(model, PruneConfig(sparsity=0.75, least_weights=0))
    compiled = export(model, (x,), tmp_path / "out", CONFIG, dynamo=dynamo)
    check(tmp_path / "out", model, x)
    assert set(zeros(compiled)) == {0.75}
    assert len(zeros(compiled)) == {"encoder": 4, "lstm": 2, "gru": 1}[name]


def test_learned_structures_are_exported(tmp_path: Path) -> None:
    model = network(masked=False)
    pruner = prune(model, PruneConfig(sparsity=0.5, method=PSP(), schedule=OneShot(1)))
    pruner.step()
    compiled = export(model, (X,), tmp_path / "out", CONFIG)
    assert pruner.sparsity == pytest.approx(0.5, abs=0.01)
    assert sum(zeros(compiled)) == pytest.approx(1, abs=0.05)
    check(tmp_path / "out", model, X)


# ---- Errors: one paragraph, and nothing is written ----


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(192, 192)

    def forward(self, x: Any) -> Any:
        y = self.layer(x)
        return torch.linalg.eig(y.T @ y)[0].real


class Stubborn(nn.Linear):
    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("no copies")


@pytest.mark.parametrize(
    ("model", "args", "options", "words"),
    [
        (Odd(), (X,), {}, r"cannot write Odd as ONNX: .*linalg_eig.*\. Try the other exporter \(dynamo=False\)"),
        (Odd(), (X,), {"dynamo": False}, r"'aten::linalg_eig' to ONNX .*\. Try the other exporter \(dynamo=True\)"),
        (network(), None, {}, r"cannot write Sequential as ONNX: missing a required argument: 'input'"),
        (network(), (X,), {"dynammo": True}, "unexpected keyword argument 'dynammo'"),
        (
            Stubborn(192, 192),
            (X,),
            {},
            r"Stubborn cannot be copied \(no copies\): call finalize\(model\) and model.eval",
        ),
    ],
    ids=["operator", "operator, older", "no inputs", "option", "copy"],
)
def test_what_cannot_be_exported(model: Any, args: Any, options: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(SparsecError, match=words):
        export(model, args, tmp_path / "out", CONFIG, **options)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_ours_is_noticed_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SparsecError, match="exists and was not made by sparsec, so it is not replaced"):
        export(Odd(), (X,), tmp_path, CONFIG)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    export(network(), (X,), tmp_path, CONFIG, force=True)
    check(tmp_path, network(), X)
