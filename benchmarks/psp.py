"""Learned structures against norms: ResNet-20 on CIFAR-10, columns and channels, removed while it is trained.

    python benchmarks/psp.py train [--pattern channels] [--sparsity .3,.5,.7] [--method psp,norm] [--epochs N]
    python benchmarks/psp.py tables

Both methods start from the trained model, whose BatchNorms are folded, and get the same epochs of the same batches
(10,000 training images as lossy JPEG, crops and flips), optimizer, and schedule, along which the share of zeros grows
in the first half. `norm` drops the same share of each layer, those of least norm (Hartenstein et al. 2020); `psp`
learns a parameter for each structure and drops those that are smallest in all layers together (Schindler et al. 2020).
What is scored is the exported model in ONNX Runtime, on the 5,000 test images, after the last epoch.

* `columns` w[:, i, h, w] of all convolutions but the first: zeros, which no dense operator gets faster by.
* `channels` w[:, i] of the second convolution of each block, which alone reads the first one's outputs: these are then
  left out of the model (`pattern="structured"`), and dense ONNX Runtime is timed against the model as it came.

`dense` is the same training without zeros: what epochs on these images bring or cost by themselves.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parent / "accuracy"))
from structured import BATCHES, runner, timed
from tasks import TASKS, cifar, found, prepare_cifar

from sparsec import CompileConfig
from sparsec.compiler.context import Silent, make_context
from sparsec.compiler.decide import STEADY
from sparsec.compiler.frontend import read
from sparsec.compiler.removal import Removal
from sparsec.torch import PSP, Gradual, Magnitude, PruneConfig, finalize, prune

RESULTS = Path(__file__).parent / "results" / "psp.json"
TASK = TASKS["resnet20"]
# Without 70 % of the channels, by norms, one epoch leaves 39.4 with this step size, 27.8 with 1e-3, 30.4 with 1e-4; two
# of stochastic gradient descent (1e-3, momentum .9; 3e-3 diverges, as there is no BatchNorm) leave 43.3.
BATCH, RATE, CLIP = 64, 3e-4, 5.0
# Of the structure parameters in each step, and how much larger their step size is. At the same point 1e-4 and 1 leave
# 41.7, 1e-4 and 3 40.3, 1e-3 and 3 45.3, 1e-3 and 10 48.4: one seed each, chosen by the same test images.
DECAY, FASTER = 1e-3, 10.0
LAYERS = {
    "columns": (("conv1", 0.0), ("linear", 0.0)),
    "channels": (("*", 0.0), ("*.conv2", None)),
}
Row = dict[str, Any]


class Block(nn.Module):
    """Two convolutions and a shortcut, where the size halves without weights (He et al. 2015, option A)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.stride = outputs // inputs
        self.conv1 = nn.Conv2d(inputs, outputs, 3, self.stride, 1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv2(functional.relu(self.conv1(x)))
        if self.stride > 1:
            more = (y.shape[1] - x.shape[1]) // 2
            x = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, more, more))
        return functional.relu(x + y)


class ResNet20(nn.Module):
    """The network of `resnet20_cifar10.onnx`, with its weights: [n, 3, 32, 32] -> [n, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1)
        widths = [16, 16, 16, 16, 32, 32, 32, 64, 64, 64]
        self.blocks = nn.Sequential(*(Block(*pair) for pair in pairwise(widths)))
        self.linear = nn.Linear(64, 10)
        arrays = [onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(found(TASK.path)).graph.initializer]
        (*others,) = self.conv1.parameters(), *(block.parameters() for block in self.blocks)
        order = [*self.linear.parameters(), *(p for group in others for p in group)]
        with torch.no_grad():
            for parameter, array in zip(order, arrays, strict=True):
                parameter.copy_(torch.from_numpy(array.copy()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.blocks(functional.relu(self.conv1(x))).mean((2, 3)))


def augmented(images: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Mirrored or not, and moved by up to 4 pixels: [n, 3, 32, 32]."""
    flips = torch.rand(len(images), generator=rng) < 0.5
    images = torch.where(flips[:, None, None, None], images.flip(3), images)
    padded = functional.pad(images, (4, 4, 4, 4))
    moves = torch.randint(0, 9, (len(images), 2), generator=rng)
    moved = [image[:, y : y + 32, x : x + 32] for image, (y, x) in zip(padded, moves.tolist(), strict=True)]
    # The layout of the model: a step takes a third less than with that of the images.
    return torch.stack(moved).contiguous(memory_format=torch.channels_last)


def trained(pattern: str, sparsity: float, method: str, epochs: int, seed: int) -> ResNet20:
    """The model with its zeros after training."""
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    train = cifar("cifar10_jpg_train_1000perclass.zip")
    images, labels = torch.from_numpy(prepare_cifar(train.raw)), torch.from_numpy(train.labels)
    model, steps = ResNet20().to(memory_format=torch.channels_last), epochs * (len(labels) // BATCH)
    pruner = None
    if method != "dense":
        names = tuple((name, sparsity if share is None else share) for name, share in LAYERS[pattern])
        config = PruneConfig(
            sparsity=sparsity,
            layer_sparsity=names,
            pattern=pattern,
            schedule=Gradual(steps=steps // 2),
            method=PSP(decay=DECAY) if method == "psp" else Magnitude(),
            least_weights=0,
        )
        pruner = prune(model, config)
    named = list(model.named_parameters())
    structures = [value for name, value in named if name.endswith(".nu")]
    others = [value for name, value in named if not name.endswith(".nu")]
    groups = [{"params": others, "lr": RATE}, {"params": structures, "lr": FASTER * RATE}]
    optimizer = torch.optim.Adam([group for group in groups if group["params"]])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        order = torch.randperm(len(labels), generator=rng)
        for batch in order[: len(labels) // BATCH * BATCH].split(BATCH):
            loss = functional.cross_entropy(model(augmented(images[batch], rng)), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            schedule.step()
            if pruner is not None:
                pruner.step()
    return model


def scored(model: ResNet20, pattern: str) -> Row:
    """Accuracy of the exported model; where channels are left out, of what is left, and its times."""
    axes = {"input": {0: "batch"}, "logits": {0: "batch"}}
    names = {"input_names": ["input"], "output_names": ["logits"], "dynamic_axes": axes}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        torch.onnx.export(finalize(model).eval(), (torch.zeros(2, 3, 32, 32),), file, dynamo=False, **names)
        program = read(file)
        if pattern != "channels":
            return {"metric": TASK.score(runner(program.model))}
        config = CompileConfig(pattern="structured", batch=BATCHES)
        removal = Removal(program, make_context(config, Path(folder), Silent()))
        smaller = removal.without_dead(removal.least(removal.live()))
        row = {"metric": TASK.score(runner(smaller.program.model)), "gone": removal.weights().gone(smaller.kept)}
        return row | timed(program, smaller, Path(folder))


def point(pattern: str, sparsity: float, method: str, epochs: int, seed: int) -> Row:
    start = time.perf_counter()
    model = trained(pattern, sparsity, method, epochs, seed)
    row: Row = {"pattern": pattern, "sparsity": sparsity, "method": method, "epochs": epochs, "seed": seed}
    row |= scored(model, pattern)
    # Of the convolutions that have any.
    zeros = {n: float((m.weight == 0).double().mean()) for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    row["zeros"] = {name: round(share, 3) for name, share in zeros.items() if share}
    row["seconds"] = round(time.perf_counter() - start, 1)
    row["load"] = round(os.getloadavg()[1], 1)
    return row


def tables(rows: list[Row]) -> str:
    """Markdown: mean and standard deviation over the seeds."""
    text = [
        "| pattern | removed | by | epochs | top-1, mean and deviation | batch 1 | batch 16 |",
        "|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["pattern"], row["sparsity"], row["method"], row["epochs"]), []).append(row)
    for (pattern, sparsity, method, epochs), group in sorted(groups.items()):
        metric = np.array([100 * row["metric"] for row in group])
        spread = f" ± {metric.std(ddof=1):.1f} ({len(group)})" if len(group) > 1 else ""
        speeds = [_speed([row[b] for row in group if b in row]) for b in ("batch 1", "batch 16")]
        text.append(
            f"| {pattern} | {sparsity:.0%} | {method} | {epochs} | {metric.mean():.1f}{spread} | {' | '.join(speeds)} |"
        )
    return "\n".join(text)


def _speed(found: list[list[float]]) -> str:
    """The median of those whose quartiles are as near as decisions ask: others say how busy the machine was."""
    steady = [median for median, low, high in found if high < STEADY * low]
    return f"{np.median(steady):.2f}x" if steady else "unsteady" if found else "-"


def store(path: Path, rows: list[Row]) -> list[Row]:
    """Add rows to the file; they take the places of older ones of the same."""
    keys = ("pattern", "sparsity", "method", "epochs", "seed")
    old = json.loads(path.read_text())["rows"] if path.exists() else []
    new = {tuple(row[key] for key in keys) for row in rows}
    kept = [row for row in old if tuple(row[key] for key in keys) not in new]
    versions = {"sparsec": version("sparsec"), "onnxruntime": onnxruntime.__version__, "torch": torch.__version__}
    data = {"date": date.today().isoformat(), "versions": versions, "rows": [*kept, *rows]}
    path.write_text(json.dumps(data, indent=1) + "\n")
    return [*kept, *rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("train", "tables"))
    parser.add_argument("--pattern", default="channels,columns")
    parser.add_argument("--sparsity", default="0.3,0.5,0.7")
    parser.add_argument("--method", default="psp,norm")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="0: PyTorch's choice")
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    rows = store(options.json, [])
    if options.what == "train":
        for seed in range(options.seeds):
            for pattern in options.pattern.split(","):
                for sparsity in map(float, options.sparsity.split(",")):
                    for method in options.method.split(","):
                        rows = store(options.json, [point(pattern, sparsity, method, options.epochs, seed)])
                        print(rows[-1], flush=True)
    print(tables(rows))


if __name__ == "__main__":
    main()
