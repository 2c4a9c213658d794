"""Parameterized structured pruning: structure parameters, their gradient and decay, and what they choose."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from sparsec.torch import PSP, Gradual, OneShot, PruneConfig, finalize, prune  # noqa: E402

PATTERNS = ("group:4", "block:8x3", "unstructured", "columns", "channels", "kernels", "layers")


def config(**options: Any) -> PruneConfig:
    """Nothing is dropped before the fifth step."""
    return PruneConfig(
        **{
            "pattern": "group:4",
            "sparsity": 0.5,
            "method": PSP(),
            "schedule": OneShot(5),
            "least_weights": 0,
            **options,
        }
    )


def modules() -> list[tuple[Any, Any]]:
    torch.manual_seed(0)
    return [
        (nn.Linear(10, 13), torch.randn(3, 10)),
        (nn.Conv2d(6, 9, 3, groups=3), torch.randn(2, 6, 5, 5)),
        (nn.Conv1d(4, 5, 3), torch.randn(2, 4, 7)),
        (nn.LSTM(5, 7), torch.randn(4, 2, 5)),
        (nn.GRU(5, 7), torch.randn(4, 2, 5)),
    ]


def output(module: Any, x: Any) -> Any:
    y = module(x)
    return y[0] if isinstance(y, tuple) else y


@pytest.mark.parametrize("pattern", PATTERNS)
def test_at_first_the_function_is_the_same(pattern: str) -> None:
    for module, x in modules():
        if pattern == "kernels" and not isinstance(module, (nn.Conv1d, nn.Conv2d)):
            continue  # has one position
        expected = output(module, x)
        pruner = prune(module, config(pattern=pattern))
        # A weight divided by its block's norm and multiplied again: the rounding of float32.
        torch.testing.assert_close(output(module, x), expected)
        assert pruner.sparsity == 0
        for weight in pruner.weights:
            rows, columns = weight.mask.nu.shape
            assert weight.mask.sizes.sum() == weight.size
            assert (rows, columns) == weight.mask.sizes.shape
            # The root mean square over all weights is 1: blocks begin around it, in every layer.
            mean = (weight.mask.nu.detach().double().square().numpy() * weight.mask.sizes).sum() / weight.size
            assert mean == pytest.approx(1, abs=1e-5)


def test_weights_that_are_zero_already_stay_so_and_make_no_nan() -> None:
    layer = nn.Linear(8, 8)
    layer.weight.data[:4] = 0
    expected = layer.weight.detach().clone()
    prune(layer, config())
    assert not layer.weight[:4].any()
    torch.testing.assert_close(layer.weight, expected)
    layer(torch.ones(1, 8)).sum().backward()
    assert all(bool(torch.isfinite(parameter.grad).all()) for parameter in layer.parameters())
    empty = nn.Linear(8, 8)
    nn.init.zeros_(empty.weight)
    prune(empty, config())
    assert not empty.weight.any()


def test_the_gradient_goes_straight_through_the_threshold() -> None:
    """Of nu: the sum of w * dL/d(w alpha) over its block, whether the block is kept or not. Of w: alpha * that."""
    layer = nn.Linear(6, 8, bias=False)
    (weight,) = prune(layer, config()).weights
    kept = torch.tensor([[True, False, True, False, True, True], [False, True, True, True, False, True]])
    weight.mask.kept.copy_(kept)
    x, target = torch.randn(5, 6), torch.randn(5, 8)
    (layer(x) - target).square().sum().backward()
    w, nu = weight.original, weight.mask.nu.detach()
    alpha = (nu * kept).repeat_interleave(4, 0)
    by_hand = 2 * (x @ (w * alpha).T - target).T @ x  # dL/d(w alpha)
    torch.testing.assert_close(layer.weight.detach(), w * alpha)
    blocks = (by_hand * w).reshape(2, 4, 6).sum(1)
    torch.testing.assert_close(weight.mask.nu.grad, blocks, rtol=1e-4, atol=1e-4)
    original = layer.parametrizations.weight.original
    torch.testing.assert_close(original.grad, by_hand * alpha, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("penalty", ["l2", "l1"])
def test_decay_is_a_step_of_its_own(penalty: Any) -> None:
    layer = nn.Linear(8, 8)
    pruner = prune(layer, config(method=PSP(0.25, penalty)))
    nu = pruner.weights[0].mask.nu
    with torch.no_grad():
        nu[0, :4] = torch.tensor([0.1, -0.1, -2.0, 1.0])
    before = nu.detach().clone()
    others = [parameter.detach().clone() for parameter in layer.parameters() if parameter is not nu]
    pruner.step()
    expected = before * 0.75 if penalty == "l2" else before.sign() * (before.abs() - 0.25).clamp_min(0)
    assert torch.equal(nu.detach(), expected)
    assert all(map(torch.equal, [p for p in layer.parameters() if p is not nu], others))
    for _ in range(4):
        pruner.step()
    last = nu.detach().clone()
    pruner.step()  # the masks are final, so is nu but for the loss
    assert torch.equal(nu.detach(), last)


def trained(model: Any, pruner: Any, steps: int, watch: Any = None) -> list[Any]:
    """A loss that needs the first half of the inputs only."""
    optimizer = torch.optim.SGD(model.parameters(), 0.02)
    generator = torch.Generator().manual_seed(0)
    seen = []
    for _ in range(steps):
        x = torch.randn(32, 16, generator=generator)
        optimizer.zero_grad()
        (model(x) - x[:, :8].repeat(1, 2)).square().sum(1).mean().backward()
        optimizer.step()
        pruner.step()
        seen.append(watch() if watch else None)
    return seen


def test_what_the_loss_does_not_need_falls_below_epsilon() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(16, 16)
    pruner = prune(layer, PruneConfig(method=PSP(0.01, epsilon=0.1), pattern="columns", least_weights=0))
    trained(layer, pruner, 300)
    assert pruner.sparsity == 0.5
    assert (layer.weight[:, 8:] == 0).all()
    assert (layer.weight[:, :8] != 0).any(0).all()
    nu = pruner.weights[0].mask.nu.detach().abs()
    assert nu[0, 8:].max() < 0.1 < nu[0, :8].min()


def test_a_block_may_come_back() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(16, 16)
    pruner = prune(layer, PruneConfig(method=PSP(1e-4, epsilon=0.2), pattern="columns", least_weights=0))
    (weight,) = pruner.weights
    with torch.no_grad():
        weight.mask.nu[0, 0] = 0.15  # the loss needs it
    pruner.step()
    assert not weight.mask.kept[0, 0]
    assert not layer.weight[:, 0].any()
    kept = trained(layer, pruner, 100, lambda: bool(weight.mask.kept[0, 0]))
    assert kept[-1]
    assert layer.weight[:, 0].any()


@pytest.mark.parametrize("pattern", PATTERNS[:-2])  # of dense layers
@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.9])
def test_the_share_is_reached_over_all_layers_together(pattern: str, share: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 40), nn.Tanh(), nn.Linear(40, 16))
    pruner = prune(model, config(pattern=pattern, sparsity=share, method=PSP(1e-2), schedule=Gradual(6)))
    trained(model, pruner, 6)
    largest = max(weight.mask.sizes.max() for weight in pruner.weights) / sum(w.size for w in pruner.weights)
    # One block more or less, and one that stays in each layer.
    assert pruner.sparsity == pytest.approx(share, abs=3 * largest)
    assert all(weight.value.any() for weight in pruner.weights)
    shares = [float((weight.value == 0).double().mean()) for weight in pruner.weights]
    if share == 0.5 and pattern == "unstructured":
        assert shares[0] != shares[1], "layers have shares of their own"
    expected = model(torch.ones(1, 16))
    finalize(model)
    torch.testing.assert_close(model(torch.ones(1, 16)), expected)
    assert {name for name, _ in model.named_parameters()} == {"0.weight", "0.bias", "2.weight", "2.bias"}


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.needed, self.useless = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Any) -> Any:
        return self.needed(x) + self.useless(torch.zeros_like(x))


def test_whole_layers_go() -> None:
    torch.manual_seed(0)
    model = Residual()
    pruner = prune(model, PruneConfig(method=PSP(0.01), pattern="layers", least_weights=0))
    trained(model, pruner, 300)
    assert not model.useless.weight.any()
    assert model.needed.weight.any()


def test_a_structure_parameter_that_is_no_number() -> None:
    layer = nn.Linear(8, 8)
    pruner = prune(layer, config(schedule=OneShot(1)))
    with torch.no_grad():
        pruner.weights[0].mask.nu[0, 0] = float("nan")
    with pytest.raises(Exception, match=r"weight: a number is NaN or infinite, so it cannot be said what stays"):
        pruner.step()


def test_what_a_decay_has_drawn_to_zero_stays_there() -> None:
    """L1 may bring more to zero than was asked for; it does not come back when masks are final."""
    layer = nn.Linear(16, 16)
    pruner = prune(
        layer,
        PruneConfig(
            pattern="block:4x4", sparsity=0.25, least_weights=0, schedule=Gradual(4), method=PSP(0.4, penalty="l1")
        ),
    )
    for _ in range(4):
        pruner.step()
    zeros = pruner.sparsity
    assert zeros > 0.5
    with torch.no_grad():
        pruner.weights[0].mask.nu.add_(1e-3)  # as a gradient would
    pruner.step()
    assert pruner.sparsity == zeros
