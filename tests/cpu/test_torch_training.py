"""Training with masks: schedules, checkpoints, copies, compilation, mixed precision, several processes."""

from __future__ import annotations

import copy
import io
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsec.ir import SparsecError, UsageError

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402

from sparsec.torch import (  # noqa: E402
    PSP,
    Gradual,
    Iterative,
    Magnitude,
    OneShot,
    PruneConfig,
    distillation_loss,
    finalize,
    prune,
)

if TYPE_CHECKING:
    from pathlib import Path

few = settings(max_examples=50, deadline=None, derandomize=True, database=None)


def network(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 8))


def config(**options: Any) -> PruneConfig:
    return PruneConfig(**{"pattern": "group:4", "sparsity": 0.5, "least_weights": 0, **options})


def batch(number: int) -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(16, 12, generator=generator), torch.randint(8, (16,), generator=generator)


def train(model: Any, optimizer: Any, pruner: Any, steps: range) -> list[int]:
    """The steps after which weights were set back."""
    rewound = []
    for step in steps:
        x, labels = batch(step)
        optimizer.zero_grad()
        functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
        if pruner.step():
            rewound.append(pruner.steps)
    return rewound


def zeros(model: Any) -> float:
    return float((model[0].weight == 0).double().mean())


def same(one: Any, other: Any) -> bool:
    return list(one) == list(other) and all(torch.equal(value, other[name]) for name, value in one.items())


# ---- Schedules ----


@few
@given(step=st.integers(0, 30), final=st.floats(0, 1))
def test_one_shot(step: int, final: float) -> None:
    schedule = OneShot(step)
    assert [schedule.sparsity(at, final) for at in range(40)] == [final if at == step else None for at in range(40)]


@few
@given(steps=st.integers(1, 200), begin=st.integers(0, 20), updates=st.integers(1, 300), final=st.floats(0, 1))
def test_gradual_is_a_cubic_that_ends_at_the_final_share(steps: int, begin: int, updates: int, final: float) -> None:
    schedule = Gradual(steps, begin, updates)
    shares = {at: share for at in range(begin + steps + 20) if (share := schedule.sparsity(at, final)) is not None}
    assert len(shares) == min(steps, updates)
    assert max(shares) == schedule.last == begin + steps
    assert shares[schedule.last] == final
    for at, share in shares.items():
        assert share == pytest.approx(final - final * (1 - (at - begin) / steps) ** 3)
    assert sorted(shares.values()) == list(shares.values())


@few
@given(rounds=st.integers(1, 6), steps=st.integers(1, 9), final=st.floats(0, 1))
def test_iterative_keeps_the_same_share_of_what_is_left_each_round(rounds: int, steps: int, final: float) -> None:
    schedule = Iterative(rounds, steps)
    wanted = [schedule.sparsity(at, final) for at in range(rounds * steps + 9)]
    chosen = [share for share in wanted if share is not None]
    assert [at for at, share in enumerate(wanted) if share is not None] == [r * steps for r in range(1, rounds + 1)]
    assert chosen[-1] == pytest.approx(final)
    left = 1 - np.array([0, *chosen])
    np.testing.assert_allclose(left[1:], left[:-1] * (1 - final) ** (1 / rounds), atol=1e-12)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: OneShot(2.5), "OneShot: expected step as a whole number, got 2.5"),  # type: ignore[arg-type]
        (lambda: Gradual("10"), "Gradual: expected steps as a whole number, got '10'"),  # type: ignore[arg-type]
        (lambda: PSP(decay="a"), "PSP: expected numbers for decay and epsilon, got 'a'"),  # type: ignore[arg-type]
        (lambda: OneShot(-1), "OneShot: expected step of at least 0, got -1"),
        (lambda: Gradual(0), "Gradual: expected steps of at least 1, got 0"),
        (lambda: Gradual(5, updates=0), "Gradual: expected updates of at least 1, got 0"),
        (lambda: Gradual(5, begin=-2), "Gradual: expected begin of at least 0, got -2"),
        (lambda: Iterative(0, 5), "Iterative: expected rounds of at least 1, got 0"),
        (lambda: Iterative(2, 5, rewind=5), "rewind=5 must lie inside the first round of steps=5 steps"),
        (lambda: PSP(decay=1.0), "expected 0 <= decay < 1 and epsilon >= 0, got 1.0 and 0.1"),
        (lambda: PSP(penalty="l3"), "'l3' is no penalty: expected l2 or l1"),
    ],
)
def test_bad_numbers(make: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        make()


def test_gradual_training_ends_at_the_share_and_keeps_what_is_zero() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)  # made before prune()
    pruner = prune(model, config(schedule=Gradual(6, begin=2)))
    seen = []
    for step in range(10):
        assert train(model, optimizer, pruner, range(step, step + 1)) == []
        seen.append(pruner.sparsity)
    assert seen[:2] == [0, 0]
    assert seen[2:7] == sorted(set(seen[2:7]))
    assert seen[7:] == [0.5, 0.5, 0.5]


@pytest.mark.parametrize(("schedule", "back"), [(Gradual(2), True), (Iterative(2, 1, rewind=None), False)])
def test_weights_come_back_under_gradual_pruning_only(schedule: Any, back: bool) -> None:
    model = network()
    pruner = prune(model, config(schedule=schedule))
    pruner.step()
    (first, _) = pruner.weights
    gone = ~first.mask.mask
    assert gone.any()
    first.original[~gone] /= 1e6
    pruner.step()
    assert bool(first.mask.mask[gone].any()) is back
    assert zeros(model) == 0.5


@pytest.mark.parametrize("rewind", [0, 3, None])
def test_rewinding_sets_everything_back_bit_by_bit(rewind: int | None) -> None:
    model = network()
    pruner = prune(model, config(schedule=Iterative(2, 5, rewind=rewind), sparsity=0.75))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    states = {0: copy.deepcopy(model.state_dict())}
    rewound = []
    for step in range(12):
        before = copy.deepcopy(model.state_dict())
        rewound += train(model, optimizer, pruner, range(step, step + 1))
        states[pruner.steps] = copy.deepcopy(model.state_dict())
        assert not same(before, model.state_dict())
    assert rewound == ([] if rewind is None else [5, 10])
    for at in rewound:
        old, new = states[rewind or 0], states[at]
        assert {name for name in old if not torch.equal(old[name], new[name])} == {
            f"{layer}.parametrizations.weight.0.mask" for layer in (0, 3)
        }
    assert zeros(model) == 0.75
    masks = [states[at]["0.parametrizations.weight.0.mask"] for at in (0, 5, 10)]
    assert [float((~mask).double().mean()) for mask in masks] == [0, 0.5, 0.75]
    assert not (masks[2] & ~masks[1]).any(), "what was zero came back"


# ---- The model as PyTorch sees it ----


@pytest.mark.parametrize(
    "options",
    [
        {"schedule": Gradual(8)},
        {"schedule": Iterative(2, 4, rewind=1)},
        {"schedule": Gradual(8), "method": PSP(1e-2)},
        {"sparsity": None, "method": PSP(0.05, epsilon=0.7)},
    ],
    ids=["gradual", "rewinding", "psp", "psp with epsilon"],
)
def test_a_checkpoint_goes_on_where_it_was_written(options: Any) -> None:
    def begun() -> tuple[Any, Any, Any]:
        model = network()
        pruner = prune(model, config(**options))
        return model, torch.optim.Adam(model.parameters(), 0.01), pruner

    model, optimizer, pruner = begun()
    train(model, optimizer, pruner, range(3))
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), pruner.state_dict()], file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other, other_optimizer, other_pruner = begun()
    for part, state in zip((other, other_optimizer, other_pruner), saved, strict=True):
        part.load_state_dict(state)
    x, _ = batch(99)
    assert torch.equal(model.eval()(x), other.eval()(x))
    model.train(), other.train()
    train(model, optimizer, pruner, range(3, 10))
    train(other, other_optimizer, other_pruner, range(3, 10))
    assert same(model.state_dict(), other.state_dict())
    assert pruner.sparsity == other_pruner.sparsity > 0


def test_an_optimizer_made_before_still_trains_the_same_parameters() -> None:
    model = network()
    ids = {id(parameter) for parameter in model.parameters()}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    pruner = prune(model, config())
    assert {id(parameter) for parameter in model.parameters()} == ids
    before = model[0].weight.detach().clone()
    train(model, optimizer, pruner, range(2))
    after = model[0].weight.detach()
    assert torch.equal(after == 0, before == 0)
    assert (after != before)[before != 0].double().mean() > 0.5
    finalize(model)
    assert {id(parameter) for parameter in model.parameters()} == ids
    assert torch.equal(model[0].weight, after)


@pytest.mark.parametrize("kind", ["linear", "lstm"])
def test_copies_are_their_own(kind: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 24) if kind == "linear" else nn.LSTM(12, 24))
    pruner = prune(model, config(schedule=OneShot(1)))
    x = torch.randn(3, 2, 12)
    model.double().float()  # LSTM and GRU make lists of weights then
    other = copy.deepcopy(model)
    out = [y if kind == "linear" else y[0] for y in (model(x), other(x))]
    assert torch.equal(*out)
    out[0].sum().backward()  # the results of a run must not hinder a copy
    assert copy.deepcopy(model) is not None
    pruner.step()
    assert zeros_of(model) == 0.5
    assert zeros_of(other) == 0
    finalize(other)
    assert zeros_of(model) == 0.5 == pruner.sparsity
    assert model(x) is not None
    finalize(model)
    for module in (model, other):
        assert type(module[0]) in (nn.Linear, nn.LSTM)
        assert copy.deepcopy(module)(x) is not None


def zeros_of(model: Any) -> float:
    name = "weight" if isinstance(model[0], nn.Linear) else "weight_hh_l0"
    return float((getattr(model[0], name) == 0).double().mean())


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_masks_that_change_later_count_in_a_compiled_model(backend: str) -> None:
    torch.manual_seed(0)
    for model, x in ((network().eval(), batch(0)[0]), (nn.GRU(12, 24), torch.randn(3, 2, 12))):
        pruner = prune(model, config(schedule=OneShot(1)))
        compiled = torch.compile(model, backend=backend)
        dense = flat(compiled(x))
        pruner.step()
        sparse = flat(compiled(x))
        torch.testing.assert_close(sparse, flat(model(x)))
        assert not torch.equal(sparse, dense)
        sparse.sum().backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        assert all(gradient is not None for gradient in gradients)


def flat(y: Any) -> Any:
    return y[0] if isinstance(y, tuple) else y


@pytest.mark.parametrize("method", ["magnitude", "psp"])
def test_mixed_precision(method: str) -> None:
    model = network()
    options = {"method": PSP(1e-3)} if method == "psp" else {}
    pruner = prune(model, config(schedule=Gradual(4), **options))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(6):
        x, labels = batch(step)
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        assert y.dtype == torch.bfloat16
        optimizer.zero_grad()
        functional.cross_entropy(y.float(), labels).backward()
        optimizer.step()
        pruner.step()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert pruner.sparsity == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_of_half_precision(dtype: Any) -> None:
    model = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.LSTM(24, 8)).to(dtype)
    pruner = prune(model, config(schedule=OneShot(1)))
    model.float().to(dtype)
    x = torch.randn(3, 2, 12, dtype=dtype)
    pruner.step()
    y = flat(model(x))
    y.sum().backward()
    assert y.dtype == dtype
    assert model[0].parametrizations.weight[0].mask.dtype == torch.bool
    assert not model[0].parametrizations.weight.original.grad[model[0].weight == 0].any()
    assert pruner.sparsity == 0.5


# ---- Several processes ----


METHODS = {"mask": Magnitude(), "kept": PSP(1e-2)}  # by the buffer that says what stays


def process(rank: int, count: int, folder: str) -> None:
    """Train on this process's part of each batch; without normalisation over the batch, so that parts add up."""
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=count)
    for buffer, method in METHODS.items():
        torch.manual_seed(rank)  # DistributedDataParallel makes weights equal
        model = nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 8))
        model.load_state_dict(torch.load(f"{folder}/start.pt"))
        pruner = prune(model, config(schedule=Gradual(6, updates=3), method=method))
        parallel = nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.SGD(parallel.parameters(), 0.1)
        for step in range(8):
            x, labels = (part.chunk(count)[rank] for part in batch(step))
            optimizer.zero_grad()
            functional.cross_entropy(parallel(x), labels).backward()
            optimizer.step()
            pruner.step()
        torch.save(model.state_dict(), f"{folder}/{buffer}-{count}-{rank}.pt")
    # Made with other numbers in each process, and not loaded: what is gone back to is what all have begun with.
    torch.manual_seed(rank)
    model = nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 8))
    pruner = prune(model, config(schedule=Iterative(2, 2)))
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(parallel.parameters(), 0.1)
    for _ in range(6):
        optimizer.zero_grad()
        parallel(torch.ones(4, 12)).square().sum().backward()
        optimizer.step()
        pruner.step()
    torch.save(model.state_dict(), f"{folder}/rewound-{count}-{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    start = nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 8))
    torch.save(start.state_dict(), tmp_path / "start.pt")
    torch.multiprocessing.spawn(process, (2, str(tmp_path)), nprocs=2)
    (tmp_path / "store").unlink(missing_ok=True)
    process(0, 1, str(tmp_path))
    for buffer in METHODS:
        two, other, one = (torch.load(tmp_path / f"{buffer}-{name}.pt") for name in ("2-0", "2-1", "1-0"))
        assert same(two, other)
        for name, value in one.items():
            # Sums in another order, through 8 steps.
            torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5)
        assert not one[f"0.parametrizations.weight.0.{buffer}"].all()
    assert same(*(torch.load(tmp_path / f"rewound-2-{rank}.pt") for rank in (0, 1)))


# ---- Distillation ----


def test_distillation_is_the_formula_and_the_teacher_gets_no_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, teacher = (torch.randn(2, 5, 7, generator=generator, requires_grad=True) for _ in range(2))
    labels = torch.randint(7, (2, 5), generator=generator)
    p, q = ((rows.double() / 3).softmax(-1) for rows in (teacher, logits))
    divergence = 9 * (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(distillation_loss(logits, teacher, temperature=3), divergence.float())
    entropy = -logits.double().log_softmax(-1).gather(-1, labels[..., None]).mean()
    loss = distillation_loss(logits, teacher, labels, temperature=3, weight=0.25)
    torch.testing.assert_close(loss, (0.25 * divergence + 0.75 * entropy).float())
    loss.backward()
    assert teacher.grad is None
    assert logits.grad is not None
    assert float(distillation_loss(teacher, teacher).detach()) == pytest.approx(0, abs=1e-6)


def test_a_state_of_another_schedule_is_refused() -> None:
    other = prune(network(), config()).state_dict()
    pruner = prune(network(), config(schedule=Iterative(2, 3)))
    with pytest.raises(SparsecError, match=r"no value of .* to go back to: was it saved with another schedule"):
        pruner.load_state_dict(other)
    with pytest.raises(SparsecError, match=r"expected what Pruner.state_dict\(\) returns, got nothing"):
        pruner.load_state_dict({})


def test_buffers_that_grow_are_not_gone_back_to() -> None:
    model = network()
    model.register_buffer("seen", torch.zeros(0))
    pruner = prune(model, config(schedule=Iterative(1, 2)))
    model.seen = torch.ones(3)
    assert [pruner.step(), pruner.step()] == [False, True]
    assert torch.equal(model.seen, torch.ones(3))
