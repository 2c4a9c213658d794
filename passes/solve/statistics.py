"""What calibration knows about a layer's inputs, with the factorisations that the methods share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from threading import RLock
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

import numpy as np

from ...ir import SparsecError

if TYPE_CHECKING:
    from numpy.typing import NDArray

T = TypeVar("T")

# Added to the diagonal, as a share of its mean (GPTQ, SparseGPT).
DAMPING = 0.01
# Share of the inputs up to which a rank is low: two products with the factor then cost half of one with H.
LOW_RANK = 0.25
# Columns by which the factor grows, and the share of the damping that it may leave unexplained.
FACTOR_COLUMNS = 64
FACTOR_ERROR = 1e-4


class _Once(Generic[T]):
    """A property that one thread computes once for an object, while threads with other objects go on.

    `functools.cached_property` makes them wait before Python 3.12, and since then lets two threads do the same work.
    """

    def __init__(self, compute: Callable[[Any], T]) -> None:
        self.compute, self.__doc__ = compute, compute.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, instance: None, owner: type) -> _Once[T]: ...

    @overload
    def __get__(self, instance: object, owner: type) -> T: ...

    def __get__(self, instance: object | None, owner: type) -> T | _Once[T]:
        if instance is None:
            return self
        known = vars(instance)
        with known.setdefault("_lock", RLock()):
            if self.name not in known:
                known[self.name] = self.compute(instance)
        value: T = known[self.name]
        return value


@dataclass(frozen=True)
class Statistics:
    """The damped second moment of a layer's inputs. Layers with the same inputs may share one, also between threads.

    Attributes:
        hessian: [in, in] float64, Xᵀ X / n with damping: symmetric, positive definite.
        damping: what was added to the diagonal.
        dead: [in] bool, inputs that were always zero. In `hessian` they have no neighbours and the mean diagonal.
    """

    hessian: NDArray[np.float64]
    damping: float
    dead: NDArray[np.bool_]

    @classmethod
    def of(cls, hessian: NDArray[np.float64], damping: float = DAMPING, power: float | None = None) -> Statistics:
        """Damp a second moment Xᵀ X / n [in, in]; one of too few samples thereby gets full rank.

        Args:
            hessian: the second moment.
            damping: what is added to the diagonal, as a share of its mean.
            power: the mean that is damped by where all inputs were zero: only the damping is left, and weights go by
                their norms.

        Raises:
            SparsecError: it is no square matrix, not finite, has a negative diagonal, or all inputs were zero and no
                `power` is given.
        """
        hessian = np.asarray(hessian, dtype=np.float64)
        if hessian.ndim != 2 or hessian.shape[0] != hessian.shape[1]:
            raise SparsecError(f"the second moment of the inputs must be [in, in], not {list(hessian.shape)}")
        diagonal = np.diagonal(hessian)
        if not np.isfinite(hessian).all():
            raise SparsecError(
                "the second moment of the inputs has NaN or infinite values: the calibration data, or what the model "
                "makes of it, overflows; check the data with the dense model"
            )
        if (diagonal < 0).any():
            raise SparsecError("the second moment of the inputs has a negative diagonal, so it is no sum of squares")
        dead = diagonal == 0
        if dead.all() and power is not None:
            ridge = damping * power
            return cls(ridge * np.eye(len(hessian)), ridge, ~dead)
        if dead.all():
            raise SparsecError("all inputs of the layer are zero in the calibration data: nothing can be fitted to it")
        mean = float(diagonal[~dead].mean())
        # Both triangles the same, so that no result depends on which one a routine reads.
        damped = (hessian + hessian.T) / 2
        damped[dead] = damped[:, dead] = 0
        damped[np.diag_indices_from(damped)] += damping * mean
        damped[dead, dead] = mean
        return cls(damped, damping * mean, dead)

    @property
    def diagonal(self) -> NDArray[np.float64]:
        """Of the damped second moment: [in]."""
        return np.diagonal(self.hessian)

    @_Once
    def ridge(self) -> NDArray[np.float64]:
        """What was added to the diagonal: [in]."""
        return np.where(self.dead, self.diagonal, self.damping)

    @_Once
    def factor(self) -> NDArray[np.float64] | None:
        """F [in, rank] with `hessian` = F Fᵀ + diag(`ridge`), None where the rank is not low: `LOW_RANK`.

        A Cholesky factorisation with blocks of random pivots (Chen, Epperly, Tropp and Webber 2022, "RPCholesky"),
        which reads only the columns it takes. It is as exact as `FACTOR_ERROR` of the damping.
        """
        inputs = len(self.dead)
        rng = np.random.default_rng(0)
        left = np.where(self.dead, 0.0, self.diagonal - self.damping)
        found = np.zeros((inputs, 0))
        while left.sum() > FACTOR_ERROR * self.damping:
            # Step 1. Pivots, by what is left of them.
            places = np.flatnonzero(left)
            share = left[places] / left[places].sum()
            pivots = np.sort(rng.choice(places, min(FACTOR_COLUMNS, len(places)), replace=False, p=share))
            # Step 2. Their columns of what is left, and of those the part that is not there twice.
            columns = self.hessian[:, pivots] - found @ found[pivots].T
            columns[pivots, np.arange(len(pivots))] -= self.ridge[pivots]
            values, vectors = np.linalg.eigh(columns[pivots])
            kept = values > max(1e-9 * values[-1], 0.0)
            if not kept.any() or found.shape[1] + np.count_nonzero(kept) > LOW_RANK * inputs:
                return None
            more = columns @ (vectors[:, kept] / np.sqrt(values[kept]))
            found = np.concatenate((found, more), axis=1)
            left = np.maximum(left - np.einsum("ik,ik->i", more, more), 0.0)
        return found

    def times(self, rows: NDArray[np.floating]) -> NDArray[np.floating]:
        """`rows` [k, in] times `hessian`, by its factor where the rank is low; of the dtype of `rows`."""
        if self.factor is None:
            return np.asarray(rows @ self._as(rows.dtype)[0])
        factor, ridge = self._as(rows.dtype)
        product = (rows @ factor) @ factor.T
        product += rows * ridge
        return np.asarray(product)

    def _as(self, dtype: np.dtype[Any]) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
        """The factor, or without one `hessian`, and the ridge, in a dtype."""
        whole = self.hessian if self.factor is None else self.factor
        if dtype == np.float64:
            return whole, self.ridge
        return self._narrow

    @_Once
    def _narrow(self) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
        whole = self.hessian if self.factor is None else self.factor
        return whole.astype(np.float32), self.ridge.astype(np.float32)

    @_Once
    def inverse(self) -> NDArray[np.float64]:
        """The inverse of the damped second moment: [in, in]."""
        inverse = np.linalg.inv(self.hessian)
        return np.asarray((inverse + inverse.T) / 2)

    @_Once
    def root(self) -> NDArray[np.float64]:
        """Upper triangular R with `hessian` = R Rᵀ: [in, in].

        Row j of R⁻¹ is row j of the Cholesky factor U of the inverse (H⁻¹ = Uᵀ U) which SparseGPT uses: R = U⁻¹, so
        neither an inverse nor a second factorisation is needed.
        """
        return np.ascontiguousarray(np.linalg.cholesky(self.hessian[::-1, ::-1])[::-1, ::-1])

    @_Once
    def scale(self) -> NDArray[np.float64]:
        """Root mean square of each input, damped: [in]."""
        return np.sqrt(self.diagonal)

    @_Once
    def eigen(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Eigenvalues [in] and eigenvectors [in, in] (in columns) of `hessian` scaled to a diagonal of ones."""
        values, vectors = np.linalg.eigh(self.hessian / np.outer(self.scale, self.scale))
        return np.asarray(values), np.asarray(vectors)

    def loss(self, change: NDArray[np.float64]) -> float:
        """Squared error of the outputs a sample when weights [out, in] change: tr(Δ H Δᵀ), damping included."""
        return float(np.vdot(self.times(change), change))


def error(weight0: NDArray[np.float32], weight: NDArray[np.float32], hessian: NDArray[np.float64]) -> float:
    """Relative squared error of a layer's outputs: ||X (W - W0)ᵀ||² / ||X W0ᵀ||², without damping.

    Args:
        weight0: [out, in] the dense weight.
        weight: [out, in] what replaces it.
        hessian: [in, in] Xᵀ X / n.

    Returns:
        0 for no error, 1 for outputs of zero; infinite where outputs of zero became others.
    """
    dense = weight0.astype(np.float64)
    change = weight.astype(np.float64) - dense
    lost, power = (max(float(np.vdot(w @ hessian, w)), 0.0) for w in (change, dense))
    return lost / power if power else float("inf") if lost else 0.0
