"""Which weights `sparsec.torch.prune` takes, the zeros it makes, and that the compiler finds them."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsec.compiler.frontend import read
from sparsec.ir import BlockPattern, SparsecError, UsageError, parse_pattern
from sparsec.passes.prune import prune_by_norm

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from sparsec.torch import PSP, Iterative, Magnitude, OneShot, PruneConfig, finalize, prune  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
PATTERNS = ("group:4", "group:16", "block:8x3", "block:1x1", "unstructured", "nm:2:4")
patterns, shares = st.sampled_from(PATTERNS), st.sampled_from((0.0, 0.3, 0.5, 0.9, 1.0))
sizes = st.integers(1, 21)
few = settings(max_examples=25, deadline=None, derandomize=True, database=None)


def pruned(module: Any, pattern: str = "group:4", share: float = 0.5, **options: Any) -> Any:
    """`prune` with small layers, too."""
    return prune(module, PruneConfig(pattern=pattern, sparsity=share, least_weights=0, **options))


def matrices(module: Any, *args: Any, dynamo: bool = False) -> list[Any]:
    """What the compiler finds in the exported module: each layer's matrix, and R of recurrent ones."""
    file = io.BytesIO()
    final = finalize(copy.deepcopy(module)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the older exporter, at length
        if dynamo:
            model = torch.onnx.export(final, args, verbose=False).model_proto
        else:
            torch.onnx.export(final, args, file, dynamo=False)
            model = onnx.load_from_string(file.getvalue())
    found = []
    for layer in read(model).layers:
        found.append(layer.weight)
        if layer.op_type in ("LSTM", "GRU"):
            recurrence = onnx_ir.convenience.get_const_tensor(layer.nodes[0].inputs[2]).numpy()
            found.append(recurrence.reshape(-1, recurrence.shape[-1]))
    return found


def check(module: Any, *args: Any, pattern: str, share: float, dynamo: bool = False) -> None:
    dense = matrices(module, *args, dynamo=dynamo)
    pruned(module, pattern, share)
    sparse = matrices(module, *args, dynamo=dynamo)
    assert len(sparse) == len(dense) > 0
    for before, after in zip(dense, sparse, strict=True):
        np.testing.assert_array_equal(after, prune_by_norm(before, parse_pattern(pattern), share))


# ---- The zeros ----


@few
@given(out=sizes, inputs=sizes, pattern=patterns, share=shares)
def test_dense_layers(out: int, inputs: int, pattern: str, share: float) -> None:
    share = 0.5 if pattern == "nm:2:4" else share
    check(nn.Linear(inputs, out), torch.ones(2, inputs), pattern=pattern, share=share)


@few
@given(
    out=sizes, inputs=sizes, groups=st.integers(1, 3), kernel=st.integers(1, 3), flat=st.booleans(), pattern=patterns
)
def test_convolutions(out: int, inputs: int, groups: int, kernel: int, flat: bool, pattern: str) -> None:
    kind, x = (
        (nn.Conv1d, torch.ones(1, inputs * groups, 5)) if flat else (nn.Conv2d, torch.ones(1, inputs * groups, 5, 4))
    )
    layer = kind(inputs * groups, out * groups, kernel, groups=groups)
    check(layer, x, pattern=pattern, share=0.5)


@few
@given(inputs=sizes, hidden=st.integers(1, 11), lstm=st.booleans(), bias=st.booleans(), pattern=patterns)
def test_recurrent_layers(inputs: int, hidden: int, lstm: bool, bias: bool, pattern: str) -> None:
    """Their gates have another order in ONNX; blocks may reach over gates."""
    layer = (nn.LSTM if lstm else nn.GRU)(inputs, hidden, num_layers=2, bias=bias)
    check(layer, torch.ones(3, 2, inputs), pattern=pattern, share=0.5)


class Everything(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.lstm = nn.Conv1d(6, 20, 3, groups=2), nn.LSTM(20, 9, batch_first=True)
        self.gru, self.linear = nn.GRU(9, 7, batch_first=True), nn.Linear(7, 33)

    def forward(self, x: Any) -> Any:
        y = self.convolution(x).transpose(1, 2)
        return self.linear(self.gru(self.lstm(y)[0])[0])


def test_the_newer_exporter_too() -> None:
    torch.manual_seed(0)
    check(Everything(), torch.ones(2, 6, 8), pattern="group:16", share=0.5, dynamo=True)


def test_both_directions_each_have_their_share() -> None:
    layer = nn.LSTM(12, 8, bidirectional=True)
    pruner = pruned(layer, "group:16", 0.75)
    assert [float((weight.value == 0).double().mean()) for weight in pruner.weights] == [0.75] * 4
    x = torch.randn(3, 2, 12)
    found = matrices(layer, x)
    assert (found[0] == 0).mean() == 0.75


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_types(dtype: Any) -> None:
    layer = nn.Linear(24, 40).to(dtype)
    expected = prune_by_norm(layer.weight.detach().double().numpy(), parse_pattern("group:16"), 0.5)
    pruned(layer, "group:16")
    assert layer.weight.dtype == dtype
    np.testing.assert_array_equal(layer.weight.detach().double().numpy(), expected)


def test_structures_are_what_they_are_called() -> None:
    """Half of a convolution: columns, input channels or positions of the kernel, those of largest norm."""
    weight = nn.Conv2d(10, 12, 3).weight.detach()
    axes = {"columns": (0,), "channels": (0, 2, 3), "kernels": (0, 1)}
    for name, over in axes.items():
        layer = nn.Conv2d(10, 12, 3)
        layer.weight.data.copy_(weight)
        pruned(layer, name, 0.5)
        norms = weight.double().square().sum(over, keepdim=True)
        kept = norms >= norms.flatten().sort(descending=True).values[(norms.numel() + 1) // 2 - 1]
        assert torch.equal(layer.weight, torch.where(kept, weight, 0)), name


@few
@given(out=sizes, inputs=st.integers(2, 21), share=shares)
def test_columns_of_dense_layers(out: int, inputs: int, share: float) -> None:
    layer = nn.Linear(inputs, out)
    expected = prune_by_norm(layer.weight.detach().numpy(), BlockPattern(out, 1), share)
    for name in ("columns", "channels"):
        other = copy.deepcopy(layer)
        pruned(other, name, share)
        np.testing.assert_array_equal(other.weight.detach().numpy(), expected)


# ---- Which weights ----


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.inner, self.head = nn.Embedding(8, 8), nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.head.weight = self.embedding.weight


CANNOT = [
    (Tied(), "head.weight", "it is tied to embedding.weight, which would get the same zeros"),
    (Tied(), "embedding.weight", "Embedding is none of Linear, Conv1d, Conv2d, LSTM, GRU and MultiheadAttention"),
    (nn.Conv3d(2, 2, 3), "0.weight", "Conv3d is none of Linear"),
    (nn.ConvTranspose2d(2, 2, 3), "0.weight", "ConvTranspose2d is none of Linear"),
    (nn.LazyLinear(8), "0.weight", "it has no values yet: run the model once first"),
    (nn.Linear(8, 8, device="meta"), "0.weight", "it has no values yet"),
    (nn.Linear(8, 8, dtype=torch.complex64), "0.weight", "it has 64 weights of type torch.complex64"),
    (nn.utils.weight_norm(nn.Linear(8, 8)), "0.weight", "computed from other parameters (such as weight_norm makes"),
    (nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), "0.weight", "it is parametrized already: take that off"),
]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*initializing zero-element")
@pytest.mark.parametrize(("module", "name", "reason"), CANNOT, ids=[case[2][:30] for case in CANNOT])
def test_what_cannot_be_pruned_says_why(module: Any, name: str, reason: str) -> None:
    model = module if isinstance(module, Tied) else nn.Sequential(module, nn.Linear(8, 8))
    pruner = pruned(model)
    assert reason in pruner.skipped[name]
    assert len(pruner.weights) == 1
    assert f"{name}: dense, " in str(pruner)
    assert f"{pruner.weights[0].name}: 50.0% zeros, group:4" in str(pruner)
    with pytest.raises(UsageError, match=rf"layer_sparsity: '{name}' cannot be pruned"):
        prune(model, PruneConfig(layer_sparsity=((name, 0.5),)))


def test_attention_and_a_module_used_twice() -> None:
    shared = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
    model = nn.Sequential(shared, shared)
    pruner = pruned(model)
    names = ["self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"]
    assert [weight.name for weight in pruner.weights] == [f"0.{name}" for name in names]
    assert pruner.sparsity == 0.5
    # In inference PyTorch takes another way through such layers.
    x = torch.randn(2, 5, 16)
    expected = finalize(copy.deepcopy(model)).eval()(x)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), expected)


def test_exceptions_by_name() -> None:
    model = nn.ModuleDict({"lstm": nn.LSTM(16, 16), "first": nn.Linear(16, 16), "second": nn.Linear(16, 16)})
    exceptions = (("lstm", 0.25), ("lstm.weight_hh*", 0.75), ("first", 0.0))
    pruner = prune(
        model, PruneConfig(sparsity=0.5, layer_sparsity=exceptions, pattern="unstructured", least_weights=999)
    )
    assert {weight.name: float((weight.value == 0).double().mean()) for weight in pruner.weights} == {
        "lstm.weight_ih_l0": 0.25,
        "lstm.weight_hh_l0": 0.75,
    }
    assert pruner.skipped == {
        "first.weight": "as was asked for",
        "second.weight": "256 weights, below least_weights=999",
    }
    only = prune(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), PruneConfig(layer_sparsity=(("1", 0.5),)))
    assert [weight.name for weight in only.weights] == ["1.weight"]
    assert only.skipped == {"0.weight": "not named in layer_sparsity"}


# ---- Errors ----


def test_nothing_to_prune() -> None:
    words = r"nothing of this Sequential can be pruned \(0.weight: Embedding is none of .*; 1.weight: 16 weights, below"
    with pytest.raises(SparsecError, match=words):
        prune(nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4)), PruneConfig(sparsity=0.5))
    with pytest.raises(SparsecError, match=r"nothing of this ReLU can be pruned \(it has no weights\)"):
        prune(nn.ReLU(), PruneConfig(sparsity=0.5))


def test_unknown_names() -> None:
    with pytest.raises(UsageError, match=r"'head' fits no weight of the model: there are 0.weight, 1.weight$"):
        prune(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), PruneConfig(layer_sparsity=(("head", 0.5),)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(bad: float) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight.data[2, 3] = bad
    with pytest.raises(SparsecError, match=r"1.weight: a number is NaN or infinite.*did training fail\?"):
        pruned(model)
    assert [name for name, _ in model.named_parameters()] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    model[1].weight.data[2, 3] = 0
    pruner = pruned(model, schedule=OneShot(1))
    model[1].parametrizations.weight.original.data[0, 0] = bad
    with pytest.raises(SparsecError, match=r"1.weight: a number is NaN or infinite"):
        pruner.step()


def test_after_finalize() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    pruner = pruned(model)
    expected = model[0].weight.detach().clone()
    assert finalize(model) is model
    assert type(model[0]) is nn.Linear
    assert torch.equal(model[0].weight, expected)
    assert pruner.sparsity == 0.5
    with pytest.raises(SparsecError, match=r"0.weight: its zeros are final already; to prune it again call prune\(\)"):
        pruner.step()


BAD = [
    ({}, "say how many zeros: sparsity, such as 0.9, or layer_sparsity"),
    ({"sparsity": 1.5}, "less than or equal to 1"),
    ({"sparsity": 0.5, "pattern": "blocks"}, "'blocks' is not a pattern for training: expected block:RxC .* layers"),
    ({"sparsity": 0.5, "pattern": "structured"}, "'structured' is not a pattern for training"),
    ({"sparsity": 0.5, "pattern": "layers"}, r"pattern 'layers' needs method=PSP\(\)"),
    ({"sparsity": 0.5, "speed": 1}, "Extra inputs are not permitted"),
    ({"method": PSP(), "layer_sparsity": (("a", 0.5),)}, "PSP without sparsity finds it for every layer"),
    ({"method": PSP(), "schedule": OneShot(5)}, "PSP without sparsity drops what is below epsilon at every step"),
    ({"method": PSP(), "sparsity": 0.5}, "PSP has to learn before it is chosen what stays: give OneShot a step"),
    (
        {"method": PSP(), "sparsity": 0.5, "schedule": Iterative(2, 5)},
        "PSP lets blocks come back, which Iterative rules out",
    ),
    ({"pattern": "nm:2:4", "sparsity": 0.9}, "pattern 'nm:2:4' has 0.5 zeros, no more and no less; got 0.9"),
    ({"method": PSP(), "pattern": "nm:2:4"}, "pattern 'nm:2:4' has no blocks that PSP could give a parameter"),
]


@pytest.mark.parametrize(("options", "words"), BAD, ids=[case[1][:30] for case in BAD])
def test_bad_configurations(options: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PruneConfig(**options)


def test_without_pytorch_the_extra_is_named() -> None:
    code = "import sys; sys.modules['torch'] = None; import sparsec; sparsec.CompileConfig(); import sparsec.torch"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT / ".typing", capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr.strip().endswith(
        "ImportError: sparsec.torch needs PyTorch, which cannot be imported (import of torch halted; None in "
        "sys.modules): pip install 'sparsec[torch]'"
    )


# ---- What must not get lost ----


@pytest.mark.parametrize("method", [Magnitude(), PSP(1e-2)])
@pytest.mark.parametrize(("pattern", "skipped"), [("kernels", {"0.weight", "1.weight"}), ("channels", {"2.weight"})])
def test_a_weight_that_is_one_structure_stays_dense(pattern: str, skipped: set[str], method: Any) -> None:
    model = nn.Sequential(nn.Linear(16, 8), nn.Conv2d(8, 12, 1), nn.Conv2d(12, 12, 3, groups=12), nn.Conv2d(12, 4, 3))
    pruner = pruned(model, pattern, 0.9, method=method, schedule=OneShot(1))
    pruner.step()
    assert set(pruner.skipped) == skipped
    assert all(pattern in reason for reason in pruner.skipped.values())
    assert all(bool((weight.value != 0).any()) for weight in pruner.weights)


def test_parametrizations_of_others_stay() -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Any) -> Any:
            return 2 * weight

    model = nn.Sequential(nn.Linear(16, 8))
    pruned(model)
    nn.utils.parametrize.register_parametrization(model[0], "weight", Doubled())
    before = model[0].weight.detach().clone()
    finalize(model)
    assert torch.equal(model[0].weight, before)
    assert [type(one) for one in model[0].parametrizations.weight] == [Doubled]


def test_two_configurations_on_one_model() -> None:
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 8))
    first = pruned(model, schedule=Iterative(2, 2), layer_sparsity=(("1", 0.0),))
    second = pruned(model, "nm:2:4", layer_sparsity=(("0", 0.0),))
    for _ in range(4):
        first.step()
    assert first.sparsity == second.sparsity == 0.5


def test_what_has_no_values_yet_cannot_be_gone_back_to() -> None:
    model = nn.Sequential(nn.Linear(16, 8), nn.LazyLinear(8))
    with pytest.raises(UsageError, match=r"'1.weight' has no values yet .*: run the model once first"):
        pruned(model, schedule=Iterative(2, 2))
    assert not nn.utils.parametrize.is_parametrized(model[0])


def test_what_is_no_model_or_no_configuration() -> None:
    for model, options in ((nn.Linear(4, 4), {"sparsity": 0.5}), ("model.pt", PruneConfig(sparsity=0.5))):
        with pytest.raises(UsageError, match=r"expected a torch\.nn\.Module and a PruneConfig, got"):
            prune(model, options)  # type: ignore[arg-type]


def test_more_matrices_than_a_layer_has() -> None:
    class LowRank(nn.Linear):
        def __init__(self) -> None:
            super().__init__(16, 8)
            self.a, self.b = nn.Parameter(torch.ones(8, 2)), nn.Parameter(torch.ones(2, 16))

    skipped = pruned(nn.Sequential(LowRank())).skipped
    assert list(skipped) == ["0.a", "0.b"] and "it is no weight of Linear" in skipped["0.a"]
