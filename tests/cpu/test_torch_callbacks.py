"""The pruner in the Trainers of transformers and Lightning: steps, rewinding, checkpoints."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import pytest

from sparsec.ir import SparsecError

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402

from sparsec.torch import Gradual, Iterative, PruneConfig, finalize, prune  # noqa: E402

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore")  # of the Trainers: no logger, few workers
GRADUAL = Gradual(steps=6)
REWINDING = Iterative(rounds=2, steps=4, rewind=1)


class Network(nn.Module):
    """A linear layer that learns to copy; for transformers its output has the loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Any, labels: Any = None) -> Any:
        y = self.layer(x)
        return {"logits": y} if labels is None else {"loss": functional.mse_loss(y, labels), "logits": y}


def begun(schedule: Any) -> tuple[Any, Any]:
    model = Network()
    return model, prune(model, PruneConfig(pattern="group:4", sparsity=0.75, schedule=schedule, least_weights=0))


def samples() -> list[dict[str, Any]]:
    """For ten steps of two times four."""
    x = torch.randn(80, 8, generator=torch.Generator().manual_seed(0))
    return [{"x": row, "labels": row} for row in x]


def same(one: Any, other: Any) -> bool:
    return all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


# ---- transformers ----


def trainer_of_transformers(folder: Path, model: Any, pruner: Any, steps: int, *more: Any, data: Any = None) -> Any:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=0.01,
        lr_scheduler_type="cosine",
        save_steps=5,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        logging_strategy="no",
    )
    callback = importlib.import_module("sparsec.torch.callbacks.transformers").PruneCallback(pruner)
    return transformers.Trainer(model, arguments, train_dataset=data or samples(), callbacks=[callback, *more])


def test_transformers_steps_are_those_of_the_optimizer(tmp_path: Path) -> None:
    model, pruner = begun(GRADUAL)
    trainer_of_transformers(tmp_path, model, pruner, 10).train()
    assert pruner.steps == 10
    assert pruner.sparsity == 0.75


@pytest.mark.parametrize("schedule", [GRADUAL, REWINDING], ids=["gradual", "rewinding"])
def test_transformers_training_goes_on_from_a_checkpoint(schedule: Any, tmp_path: Path) -> None:
    model, pruner = begun(schedule)
    trainer_of_transformers(tmp_path, model, pruner, 10).train()
    assert (tmp_path / "checkpoint-5" / "sparsec.pt").is_file()
    other, other_pruner = begun(schedule)
    trainer_of_transformers(tmp_path, other, other_pruner, 10).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-5")
    )
    assert other_pruner.steps == 10
    assert same(model, other)
    assert other_pruner.sparsity == 0.75


def test_a_model_of_transformers_is_saved_and_loaded(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}

    def begun() -> tuple[Any, Any]:
        torch.manual_seed(0)
        config = transformers.LlamaConfig(vocab_size=50, num_key_value_heads=2, tie_word_embeddings=True, **sizes)
        model = transformers.LlamaForCausalLM(config)
        return model, prune(model, PruneConfig(sparsity=0.75, schedule=REWINDING, least_weights=0))

    words = torch.randint(50, (80, 8), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row} for row in words]
    (model, pruner), (other, other_pruner) = begun(), begun()
    assert len(pruner.weights) == 14
    assert pruner.skipped["lm_head.weight"].startswith("it is tied to model.embed_tokens.weight")
    trainer_of_transformers(tmp_path, model, pruner, 10, data=data).train()
    trainer = trainer_of_transformers(tmp_path, other, other_pruner, 10, data=data)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert same(model, other)
    finalize(model).save_pretrained(tmp_path / "final")
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "final")
    assert same(model, loaded)
    assert (loaded.model.layers[0].mlp.up_proj.weight == 0).double().mean() == 0.75


def test_transformers_rewinding_begins_anew(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model, pruner = begun(REWINDING)
    seen: dict[int, tuple[float, int]] = {}

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            optimizer = given["optimizer"]
            seen[state.global_step] = (optimizer.param_groups[0]["lr"], len(optimizer.state))

    trainer_of_transformers(tmp_path, model, pruner, 10, Watch()).train()
    rates = {step: rate for step, (rate, _) in seen.items()}
    assert rates[1] == rates[4] == rates[8] != rates[2]
    assert rates[2] == rates[5] == rates[9]
    assert rates[3] == rates[6] == rates[10]
    assert [step for step, (_, states) in seen.items() if not states] == [4, 8]


def test_transformers_checkpoints_without_the_pruner_are_refused(tmp_path: Path) -> None:
    model, pruner = begun(GRADUAL)
    trainer_of_transformers(tmp_path, model, pruner, 5).train()
    (tmp_path / "checkpoint-5" / "sparsec.pt").unlink()
    other, other_pruner = begun(GRADUAL)
    trainer = trainer_of_transformers(tmp_path, other, other_pruner, 10)
    with pytest.raises(SparsecError, match=r"goes on at step 5, but there is no '.*checkpoint-5/sparsec.pt'"):
        trainer.train(resume_from_checkpoint=True)


# ---- Lightning, by both of its names ----


def train_by_lightning(
    package: str, folder: Path, schedule: Any, steps: int, checkpoint: Path | None = None
) -> tuple[Any, Any, dict[int, tuple[float, int]]]:
    lightning = pytest.importorskip(package)
    callback = importlib.import_module("sparsec.torch.callbacks.lightning").PruneCallback
    model, pruner = begun(schedule)
    seen: dict[int, tuple[float, int]] = {}

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Any, number: int) -> Any:
            return self.model(**batch)["loss"]

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.Adam(self.parameters(), 0.01)
            cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cosine, "interval": "step"}}

    class Watch(lightning.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            (optimizer,) = trainer.optimizers
            seen[trainer.global_step] = (optimizer.param_groups[0]["lr"], len(optimizer.state))

    kept = importlib.import_module(f"{package}.callbacks").ModelCheckpoint(folder, save_top_k=-1, every_n_train_steps=5)
    trainer = lightning.Trainer(
        max_steps=steps,
        accumulate_grad_batches=2,
        callbacks=[callback(pruner), Watch(), kept],
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    # Epochs of five steps: Lightning goes on at the beginning of one.
    loader = torch.utils.data.DataLoader(samples()[:40], batch_size=4)
    trainer.fit(Module(), loader, ckpt_path=checkpoint and str(checkpoint))
    return model, pruner, seen


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
@pytest.mark.parametrize("schedule", [GRADUAL, REWINDING], ids=["gradual", "rewinding"])
def test_lightning_training_goes_on_from_a_checkpoint(package: str, schedule: Any, tmp_path: Path) -> None:
    model, pruner, _ = train_by_lightning(package, tmp_path, schedule, 10)
    assert pruner.steps == 10
    assert pruner.sparsity == 0.75
    checkpoint = next(tmp_path.glob("*step=5.ckpt"))
    other, other_pruner, _ = train_by_lightning(package, tmp_path / "again", schedule, 10, checkpoint)
    assert other_pruner.steps == 10
    assert same(model, other)


def test_lightning_rewinding_begins_anew(tmp_path: Path) -> None:
    _, _, seen = train_by_lightning("lightning.pytorch", tmp_path, REWINDING, 10)
    rates = {step: rate for step, (rate, _) in seen.items()}
    assert rates[1] == rates[4] == rates[8] != rates[2]
    assert rates[2] == pytest.approx(rates[5]) == pytest.approx(rates[9])
    assert rates[3] == pytest.approx(rates[6]) == pytest.approx(rates[10])
