"""TinyVGG16 on Fashion-MNIST: its wide dense layers with 90 % zeros in groups of 16, healed without labels, and timed.

    python benchmarks/fashion.py train      # build/fashion/tinyvgg16.onnx by PyTorch, about 20 minutes of one core
    python benchmarks/fashion.py run [--sparsity S,S,...] [--heal TIME|STEPS] [--threads N] [--json FILE]

The network is that of `models/tinyvgg16.py`, VGG-16's configuration D, narrow enough for a CPU. Images of 28x28 pixels
get a border of two; without the last pool, which would leave one pixel of 32x32, the dense layers see 2x2 as they do
of Tiny-ImageNet, half as wide as in Shahhosseini et al. 2020: 1024-2048-2048-10. The two wide ones are pruned.
BatchNorm, which VGG-16 has not, is for training only, and folded by the exporter: after 160 steps of 128 images the
loss was .60 without and .47 with it, and 2,000 held-back training images were told right to 79 and 85 %.

`run` makes one artifact each by norms, without data; solved, by `--calib`; and healed, by `--calib --heal`, which goes
on from there. The data are training images without labels, of which a fifth is held back to choose the best state; the
10,000 test images score the artifacts and are used for nothing else. Times are those of the reports, measured afresh:
each wide layer, both together and the whole model, dense and sparse alternately.

Learned: norms alone lose 7 points at 90 % zeros, solving none that could be told from noise, so healing has nothing
left to do; at 98 % norms leave little more than chance, solving loses a quarter of a point.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from ffn import cpu_name
from torch import nn

import sparsec

sys.path.insert(0, str(Path(__file__).parent / "accuracy"))
from tasks import ASSETS, REPOSITORY, Array, Feeds, found, slices

RESULTS = REPOSITORY / "benchmarks" / "results" / "fashion.json"
MODEL = REPOSITORY / "build" / "fashion" / "tinyvgg16.onnx"
INPUT = "input"

# The network: width and 3x3 convolutions of each stage; width of the dense layers.
STAGES = ((16, 2), (32, 2), (64, 3), (128, 3), (256, 3))
DENSE, CLASSES = 2048, 10
# Its training.
EPOCHS, BATCH, RATE = 5, 128, 1e-3

WIDE = ("/classifier/classifier.0/Gemm", "/classifier/classifier.3/Gemm")
PATTERN = "group:16"
BATCHES = (1, 16)
# Training images that healing may see, and images a run.
CALIBRATION, RUN = 20_000, 50

Row = dict[str, Any]


class TinyVGG16(nn.Module):  # type: ignore[misc]
    """Images [batch, 1, 32, 32] -> logits [batch, 10]; modules have the names and numbers that torchvision's have."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 1
        for outputs, convolutions in STAGES:
            layers += [nn.MaxPool2d(2)] if layers else []
            for _ in range(convolutions):
                layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
                inputs = outputs
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Linear(inputs * 2 * 2, DENSE), nn.ReLU(), nn.Dropout(),
            nn.Linear(DENSE, DENSE), nn.ReLU(), nn.Dropout(),
            nn.Linear(DENSE, CLASSES),
        )  # fmt: skip
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.classifier(self.features(x).flatten(1))
        return logits


def images(part: str) -> Array:
    """[n, 1, 32, 32] float32, 0 to 1, of "train" or "t10k"."""
    pixels = _bytes(f"{part}-images-idx3-ubyte.gz", 16).reshape(-1, 1, 28, 28)
    return np.pad(pixels, ((0, 0), (0, 0), (2, 2), (2, 2))).astype(np.float32) / np.float32(255)


def labels(part: str) -> Array:
    """[n] int64."""
    return _bytes(f"{part}-labels-idx1-ubyte.gz", 8).astype(np.int64)


def _bytes(name: str, header: int) -> Array:
    content = gzip.decompress(found(ASSETS / "datasets" / "fashion_mnist" / name).read_bytes())
    return np.frombuffer(content, np.uint8, offset=header)


def train(path: Path) -> None:
    """Adam and one rise and fall of the step size (Smith & Topin 2018); half of the images are mirrored."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    x, y, model = torch.from_numpy(images("train")), torch.from_numpy(labels("train")), TinyVGG16()
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    steps = len(x) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=EPOCHS * steps, pct_start=0.2)
    for epoch in range(EPOCHS):
        total = 0.0
        for chosen in torch.randperm(len(x))[: steps * BATCH].split(BATCH):
            mirrored = torch.rand(BATCH, 1, 1, 1) < 0.5
            loss = nn.functional.cross_entropy(model(torch.where(mirrored, x[chosen].flip(3), x[chosen])), y[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(f"epoch {epoch + 1} of {EPOCHS}: loss {total / steps:.3f}", flush=True)
    export(model.eval(), path)


def export(model: nn.Module, path: Path) -> None:
    """With a dynamic batch, by the exporter that names nodes after modules."""
    path.parent.mkdir(parents=True, exist_ok=True)
    axes = {INPUT: {0: "batch"}, "output": {0: "batch"}}
    example = torch.zeros(1, 1, 32, 32)
    torch.onnx.export(
        model, (example,), str(path), input_names=[INPUT], output_names=["output"], dynamic_axes=axes, dynamo=False
    )


def accuracy(session: onnxruntime.InferenceSession) -> float:
    """Share of the test images that are told right."""
    x, y = images("t10k"), labels("t10k")
    right = [(session.run(None, {INPUT: x[part]})[0].argmax(1) == y[part]).sum() for part in slices(len(x), 100)]
    return float(sum(right) / len(y))


def data() -> list[Feeds]:
    """Training images, drawn without their labels."""
    x = images("train")
    chosen = np.random.default_rng(0).permutation(len(x))[:CALIBRATION]
    return [{INPUT: x[chosen[part]]} for part in slices(CALIBRATION, RUN)]


def rows(model: Path, sparsity: float, heal: str, threads: int, folder: Path) -> Iterator[Row]:
    """One artifact a method."""
    calib = data()
    methods: dict[str, Row] = {"norms": {}, "solved": {"calib": calib}, "healed": {"calib": calib, "heal": heal}}
    for method, options in methods.items():
        config = sparsec.CompileConfig(
            layer_sparsity=tuple((layer, sparsity) for layer in WIDE),
            pattern=PATTERN,
            batch=BATCHES,
            threads=threads,
            cache=folder / "tuning" / method,  # nothing is replayed
            **options,
        )
        result = sparsec.compile(model, config)
        result.save(folder / method)
        result.close()
        report = json.loads((folder / method / "report.json").read_text())
        row: Row = {"asked": sparsity, "method": method, "metric": accuracy(sparsec.load(folder / method))}
        row |= {"seconds": round(report["seconds"], 1), "load": round(os.getloadavg()[1], 1)}
        row |= {"healing": {"limit": heal, **report["healing"]}} if method == "healed" else {}
        yield row | times(report)


def times(report: Row) -> Row:
    """Of each wide layer, both together, and the model: [dense us, sparse us, speedup, its quartiles] a batch size."""
    wide = [decision for decision in report["decisions"] if decision["layer"] in WIDE]
    result: Row = {"zeros": {one["layer"]: round(one["zeros_after"], 4) for one in wide}}
    for i, batch in enumerate(BATCHES):
        layers = [one["timings"][i] for one in wide]
        dense, sparse = (sum(timing[side] for timing in layers) for side in ("dense_us", "sparse_us"))
        result[f"batch {batch}"] = {
            **{one["layer"]: _numbers(timing) for one, timing in zip(wide, layers, strict=True)},
            "both": [round(dense, 1), round(sparse, 1), round(dense / sparse, 2)],
            "model": _numbers(report["timings"][i]),
        }
    return result


def _numbers(timing: Row) -> list[float]:
    return [
        *(round(timing[name], 1) for name in ("dense_us", "sparse_us")),
        *(round(value, 2) for value in (timing["speedup"], *timing["spread"])),
    ]


def run(model: Path, shares: list[float], heal: str, threads: int, path: Path) -> None:
    """Measure, print and write; rows of the same sparsity and threads in the file are replaced."""
    dense = accuracy(onnxruntime.InferenceSession(found(model), providers=["CPUExecutionProvider"]))
    print(f"dense {dense:.4f}", flush=True)
    measured = []
    for share in shares:
        with tempfile.TemporaryDirectory() as folder:
            for row in rows(model, share, heal, threads, Path(folder)):
                measured.append({"dense": dense, "threads": threads, **row})
                print(json.dumps(measured[-1], indent=1), flush=True)
    old = json.loads(path.read_text())["rows"] if path.exists() else []
    kept = [row for row in old if row["asked"] not in shares or row["threads"] != threads]
    record = {
        "date": date.today().isoformat(), "cpu": cpu_name(),
        "versions": {name: version(name) for name in ("sparsec", "torch")} | {"onnxruntime": onnxruntime.__version__},
        "rows": [*kept, *measured],
    }  # fmt: skip
    path.write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("train", "run"))
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--sparsity", default="0.9")
    parser.add_argument("--heal", default="10m")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.what == "train":
        train(options.model)
    else:
        shares = [float(share) for share in options.sparsity.split(",")]
        run(options.model, shares, options.heal, options.threads, options.json)


if __name__ == "__main__":
    main()
