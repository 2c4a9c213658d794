"""A perceptron, Adam, distillation and gradual group pruning in plain numpy: what `train_digits` needs."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from ..ir import parse_pattern

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Array = NDArray[np.float32]

PATTERN = parse_pattern("group:16")
GROUP = 16


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a network is trained.

    Attributes:
        epochs: length of the training.
        rate: Adam's step size at the start; it falls to zero along half a cosine.
        batch: images a step.
        decay: decoupled weight decay (Loshchilov & Hutter 2019), as a share of the step size.
        shift: images are moved by up to this many pixels, at most 1, along each axis.
        sparsity: share of zeros, at least, in the weight of every layer but the last; 0 prunes nothing.
        pruned_by: share of the epochs after which that sparsity is reached.
        taught: share of the target that is the teacher's, where there is one.
        temperature: of the teacher's softmax (Hinton et al. 2015, "Distilling the knowledge in a neural network").
    """

    epochs: int
    rate: float
    batch: int = 64
    decay: float = 0.1
    shift: float = 0.5
    sparsity: float = 0.0
    pruned_by: float = 0.3
    taught: float = 0.8
    temperature: float = 2.0


class Network:
    """Dense layers with Relu between: `weights[i]` [out, in] and `biases[i]` [out], float32."""

    def __init__(self, weights: Sequence[Array], biases: Sequence[Array]) -> None:
        self.weights, self.biases = list(weights), list(biases)

    @classmethod
    def random(cls, widths: Sequence[int], rng: np.random.Generator) -> Network:
        """Normal weights of variance 2/in (He et al. 2015), biases of zero."""
        weights = [
            rng.standard_normal((outputs, inputs), dtype=np.float32) * np.float32((2.0 / inputs) ** 0.5)
            for inputs, outputs in pairwise(widths)
        ]
        return cls(weights, [np.zeros(outputs, dtype=np.float32) for outputs in widths[1:]])

    def copy(self) -> Network:
        """The same network in arrays of its own."""
        return Network([weight.copy() for weight in self.weights], [bias.copy() for bias in self.biases])

    def logits(self, x: Array) -> Array:
        """[images, in] -> [images, out], float32."""
        return self._activations(x)[-1]

    def gradients(self, x: Array, targets: Array) -> list[Array]:
        """Of the mean cross-entropy with `targets` [images, out], for every weight and then every bias."""
        *inputs, logits = self._activations(x)
        # Step 1. At the logits.
        delta = (softmax(logits) - targets) / np.float32(len(x))
        # Step 2. Back through the layers. An input of zero is a closed Relu (the pixels' own delta is not used).
        weights: list[Array] = []
        biases: list[Array] = []
        for weight, layer_input in zip(reversed(self.weights), reversed(inputs), strict=True):
            weights.append(delta.T @ layer_input)
            biases.append(delta.sum(axis=0))
            delta = (delta @ weight) * (layer_input > 0)
        return weights[::-1] + biases[::-1]

    def _activations(self, x: Array) -> list[Array]:
        """The input of every layer, then the logits."""
        activations = [x]
        for weight, bias in zip(self.weights, self.biases, strict=True):
            hidden = x if len(activations) == 1 else np.maximum(x, 0, out=x)
            x = hidden @ weight.T + bias
            activations.append(x)
        return activations


class Adam:
    """Adam (Kingma & Ba 2015) with decoupled weight decay on matrices; updates `parameters` in place."""

    def __init__(self, parameters: Sequence[Array], decay: float) -> None:
        self._parameters, self._decay, self._steps = parameters, decay, 0
        self._moments = [(np.zeros_like(value), np.zeros_like(value)) for value in parameters]

    def step(self, gradients: Sequence[Array], rate: float) -> None:
        """One update with this step size."""
        self._steps += 1
        size = np.float32(rate * (1 - 0.999**self._steps) ** 0.5 / (1 - 0.9**self._steps))
        for value, gradient, (mean, square) in zip(self._parameters, gradients, self._moments, strict=True):
            mean += np.float32(0.1) * (gradient - mean)
            square += np.float32(0.001) * (gradient * gradient - square)
            if value.ndim == 2:
                value *= np.float32(1 - rate * self._decay)
            value -= size * mean / (np.sqrt(square) + np.float32(1e-8))


def softmax(logits: Array) -> Array:
    """Shares of one over the last axis."""
    powers: Array = np.exp(logits - logits.max(axis=-1, keepdims=True))
    powers /= powers.sum(axis=-1, keepdims=True)
    return powers


def train(
    network: Network, x: Array, labels: NDArray[np.int64], recipe: Recipe, seed: int, teacher: Network | None = None
) -> None:
    """Train `network` in place on pixels [images, 64] float32 with labels [images] int64, and what a teacher says."""
    one_hot = np.eye(len(network.biases[-1]), dtype=np.float32)[labels]
    rng = np.random.default_rng(seed)
    adam = Adam([*network.weights, *network.biases], recipe.decay)
    steps = len(x) // recipe.batch
    for epoch in range(recipe.epochs):
        images, order = shifted(x, recipe.shift, rng), rng.permutation(len(x))
        targets = one_hot if teacher is None else _mixed(one_hot, teacher.logits(images), recipe)
        masks = group_masks(network, _sparsity(recipe, epoch))
        for step in range(steps):
            chosen = order[step * recipe.batch : (step + 1) * recipe.batch]
            done = (epoch + step / steps) / recipe.epochs
            rate = recipe.rate * (1 + np.cos(np.pi * done)) / 2
            adam.step(network.gradients(images[chosen], targets[chosen]), rate)
            for weight, mask in zip(network.weights, masks, strict=False):  # the last layer has no mask
                weight *= mask


def group_masks(network: Network, sparsity: float) -> list[NDArray[np.bool_]]:
    """For every layer but the last, the mask [out, in] of the groups with the largest L2 norms; [] at sparsity 0."""
    if sparsity <= 0:
        return []
    masks = []
    for weight in network.weights[:-1]:
        groups = weight.size // GROUP
        # Rounded down to whole groups, so that at least `sparsity` of the weights are zero.
        density = int((1 - sparsity) * groups) / groups
        masks.append(PATTERN.project(np.square(weight, dtype=np.float64), density))
    return masks


def shifted(x: Array, most: float, rng: np.random.Generator) -> Array:
    """Images [n, 64] of 8x8 pixels, each moved by up to `most` <= 1 pixels along both axes, linearly interpolated."""
    images = x.reshape(-1, 8, 8)
    for axis in (1, 2):
        amount = rng.uniform(-most, most, size=(len(x), 1, 1)).astype(np.float32)
        pad = [(0, 0), (0, 0), (0, 0)]
        pad[axis] = (1, 1)
        padded = np.pad(images, pad)
        before, after = (padded.take(range(first, first + 8), axis) for first in (0, 2))
        images = images * (1 - abs(amount)) + before * np.maximum(amount, 0) + after * np.maximum(-amount, 0)
    return images.reshape(-1, 64)


def _mixed(one_hot: Array, logits: Array, recipe: Recipe) -> Array:
    """What the labels and the teacher say, as one target [images, out]."""
    said = softmax(logits / np.float32(recipe.temperature))
    mixed: Array = one_hot + np.float32(recipe.taught) * (said - one_hot)
    return mixed


def _sparsity(recipe: Recipe, epoch: int) -> float:
    """Zhu & Gupta 2017, "To prune, or not to prune": rises by a cubic, steeply at first."""
    done = min(1.0, (epoch + 1) / (recipe.pruned_by * recipe.epochs))
    return recipe.sparsity * (1 - (1 - done) ** 3)
