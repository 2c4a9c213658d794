"""What calibration knows about a layer's inputs, with the factorisations that the methods share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from ...ir import SparsecError

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Added to the diagonal, as a share of its mean (GPTQ, SparseGPT).
DAMPING = 0.01


@dataclass(frozen=True)
class Statistics:
    """The damped second moment of a layer's inputs. Layers with the same inputs may share one: factors are cached.

    Attributes:
        hessian: [in, in] float64, Xᵀ X / n with damping: symmetric, positive definite.
        damping: what was added to the diagonal.
        dead: [in] bool, inputs that were always zero. In `hessian` they have no neighbours and the mean diagonal.
    """

    hessian: NDArray[np.float64]
    damping: float
    dead: NDArray[np.bool_]

    @classmethod
    def of(cls, hessian: NDArray[np.float64], damping: float = DAMPING) -> Statistics:
        """Damp a second moment Xᵀ X / n [in, in]; one of too few samples thereby gets full rank.

        Raises:
            SparsecError: it is no square matrix, not finite, has a negative diagonal, or all inputs were zero.
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

    @cached_property
    def inverse(self) -> NDArray[np.float64]:
        """The inverse of the damped second moment: [in, in]."""
        inverse = np.linalg.inv(self.hessian)
        return np.asarray((inverse + inverse.T) / 2)

    @cached_property
    def root(self) -> NDArray[np.float64]:
        """Upper triangular R with `hessian` = R Rᵀ: [in, in].

        Row j of R⁻¹ is row j of the Cholesky factor U of the inverse (H⁻¹ = Uᵀ U) which SparseGPT uses: R = U⁻¹, so
        neither an inverse nor a second factorisation is needed.
        """
        return np.ascontiguousarray(np.linalg.cholesky(self.hessian[::-1, ::-1])[::-1, ::-1])

    @cached_property
    def scale(self) -> NDArray[np.float64]:
        """Root mean square of each input, damped: [in]."""
        return np.sqrt(self.diagonal)

    @cached_property
    def eigen(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Eigenvalues [in] and eigenvectors [in, in] (in columns) of `hessian` scaled to a diagonal of ones."""
        values, vectors = np.linalg.eigh(self.hessian / np.outer(self.scale, self.scale))
        return np.asarray(values), np.asarray(vectors)

    def loss(self, change: NDArray[np.float64]) -> float:
        """Squared error of the outputs a sample when weights [out, in] change: tr(Δ H Δᵀ), damping included."""
        return float(np.vdot(change @ self.hessian, change))


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
