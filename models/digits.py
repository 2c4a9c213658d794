"""The digits task of the two trained models: scikit-learn's 1,797 images of 8x8 pixels in 10 classes.

Source: Alpaydin & Kaynak 1998, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Predict = Callable[[NDArray[np.float32]], NDArray[np.float32]]
    Split = tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.float32], NDArray[np.int64]]

TRAINED = Path(__file__).parent / "trained"
DENSE = TRAINED / "digits_dense.onnx"
GROUP16 = TRAINED / "digits_group16.onnx"
HELD_OUT = 450
SPLIT_SEED = 0


def load_split() -> Split:
    """(x_train, y_train, x_test, y_test): 1,347 images to train on and 450 held out, always the same ones.

    Pixels are float32 [images, 64] in 0..1, labels int64 [images] in 0..9. The trained models saw no held-out image.

    Raises:
        ImportError: scikit-learn, which brings the images, is not installed.
    """
    try:
        from sklearn.datasets import load_digits  # type: ignore[import-untyped, unused-ignore]
    except ImportError as error:
        raise ImportError("the digits come with scikit-learn: install it with `pip install 'sparsec[demo]'`") from error
    bunch = load_digits()
    pixels = (bunch.data / 16.0).astype(np.float32)
    labels = bunch.target.astype(np.int64)
    # A bit generator's raw stream is frozen across numpy's versions (NEP 19), a Generator's shuffle is not.
    order = np.argsort(np.random.PCG64(SPLIT_SEED).random_raw(len(labels)), kind="stable")
    test, train = order[:HELD_OUT], order[HELD_OUT:]
    return pixels[train], labels[train], pixels[test], labels[test]


def predictor(session: Any) -> Predict:
    """`session`, with the `run` of onnxruntime's, as a function: pixels [images, 64] -> logits [images, 10]."""

    def predict(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = session.run(["logits"], {"pixels": pixels})[0]
        return logits

    return predict


def accuracy(predict: Predict, pixels: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """Share of images [images, 64] whose largest logit is their label, in 0..1."""
    return float(np.mean(np.argmax(predict(pixels), axis=1) == labels))
