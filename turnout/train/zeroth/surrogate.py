"""A function known from its values alone, by a Gaussian process: its gradient, and where that is least certain."""

import dataclasses
import math

import torch
from torch import Tensor

from turnout.errors import ShapeError, UsageError, word

__all__ = ["Features", "Surrogate", "features", "surrogate"]

_WHERE = "turnout.train.zeroth"


@dataclasses.dataclass(frozen=True, eq=False)
class Surrogate:
    """The posterior of a Gaussian process with the squared exponential kernel, and of its derivative.

    mean(x) = m + k(x, X) a, with a = (K + noise I)^-1 (y - m), and
    gradient(x) = sum_n a_n k(x, x_n) (x_n - x) / l^2.

    Args:
        points_ND: what was asked, less ``origin_D``.
        weight_N: a.
        factor_NN: the lower triangle of K + noise I, by Cholesky.
        level: m, the mean of the values.
        origin_D: the mean of the points.
        length: l, of the kernel.

    >>> near = surrogate(torch.zeros(1, 2, dtype=torch.float64), torch.ones(1, dtype=torch.float64), length=1.0)
    >>> near.gradient(torch.ones(2, dtype=torch.float64)).tolist()
    [0.0, 0.0]

    Source: Shu et al., 2023, "Federated Zeroth-Order Optimization using Trajectory-Informed Surrogate Gradients".
    """

    points_ND: Tensor
    weight_N: Tensor
    factor_NN: Tensor
    level: Tensor
    origin_D: Tensor
    length: float

    def mean(self, x_D: Tensor) -> Tensor:
        """The posterior mean of the function."""
        return self.level + _kernel((x_D - self.origin_D)[None], self.points_ND, self.length)[0] @ self.weight_N

    def gradient(self, x_D: Tensor) -> Tensor:
        """(D,) the posterior mean of the gradient, which is the gradient of the posterior mean."""
        here_D = x_D - self.origin_D
        part_N = self.weight_N * _kernel(here_D[None], self.points_ND, self.length)[0]
        return (part_N @ self.points_ND - part_N.sum() * here_D) / self.length**2

    def doubt(self, x_BD: Tensor) -> Tensor:
        """(B,) the trace of the posterior covariance of the gradient, in units of the kernel's own variance.

        D / l^2 - sum_nm (K + noise I)^-1_nm k_n k_m (x_n - x) (x_m - x) / l^4, multiplied out, so that a batch
        is three products.
        """
        here_BD = x_BD - self.origin_D
        k_BN, inner_BN = _kernel(here_BD, self.points_ND, self.length), here_BD @ self.points_ND.T
        inverse_NN = torch.cholesky_inverse(self.factor_NN)
        both_BN = k_BN @ inverse_NN
        known_B = ((k_BN @ (inverse_NN * (self.points_ND @ self.points_ND.T))) * k_BN).sum(1)
        known_B += (both_BN * k_BN).sum(1) * here_BD.square().sum(1) - 2 * (both_BN * k_BN * inner_BN).sum(1)
        return x_BD.shape[1] / self.length**2 - known_B / self.length**4


def surrogate(points_ND: Tensor, values_N: Tensor, *, length: float, noise: float = 1e-6) -> Surrogate:
    """The Gaussian process through what was asked of a function, the mean of the values its prior mean.

    Args:
        points_ND: where it was asked, float64, one or more.
        values_N: what it said, as many.
        length: of the kernel exp(-|x - x'|^2 / 2 l^2), above 0.
        noise: variance of the values over that of the function, above 0.

    Raises:
        ShapeError: other values than points.
        UsageError: a length or noise that is not above 0.

    >>> line = torch.linspace(-1, 1, 9, dtype=torch.float64)[:, None]
    >>> near = surrogate(line, line[:, 0].square(), length=2.0)
    >>> round(near.gradient(torch.tensor([0.3], dtype=torch.float64)).item(), 2)
    0.6

    Source: Shu et al., 2023, "Federated Zeroth-Order Optimization using Trajectory-Informed Surrogate Gradients". Where
    we differ: values are not scaled to 0 to 1, which the mean does not depend on, and the kernel's length is given.
    """
    _check(points_ND, values_N, length, noise, f"{_WHERE}.surrogate")
    origin_D, level = points_ND.mean(0), values_N.mean()
    shifted_ND = points_ND - origin_D
    gram_NN = _kernel(shifted_ND, shifted_ND, length)
    gram_NN.diagonal().add_(noise)
    factor_NN = torch.linalg.cholesky(gram_NN)
    weight_N = torch.cholesky_solve((values_N - level)[:, None], factor_NN)[:, 0]
    return Surrogate(shifted_ND, weight_N, factor_NN, level, origin_D, length)


@dataclasses.dataclass(frozen=True, eq=False)
class Features:
    """Random Fourier features of that kernel: a function becomes M weights, which add up over functions.

    phi(x) = sqrt(2 / M) cos(V x + b), so that phi(x) phi(x') is near exp(-|x - x'|^2 / 2 l^2).

    Args:
        frequency_MD: V, normal with deviation 1 / l.
        phase_M: b, uniform from 0 to 2 pi.

    >>> Features(torch.zeros(1, 2), torch.zeros(1))(torch.ones(1, 2)).square()
    tensor([[2.0000]])

    Source: Rahimi & Recht, 2007, "Random Features for Large-Scale Kernel Machines".
    """

    frequency_MD: Tensor
    phase_M: Tensor

    def __call__(self, x_BD: Tensor) -> Tensor:
        """(B, M) phi, a row a point."""
        return math.sqrt(2 / len(self.phase_M)) * (x_BD @ self.frequency_MD.T + self.phase_M).cos()

    def weights(self, points_ND: Tensor, values_N: Tensor, *, noise: float = 1e-6) -> Tensor:
        """(M,) what ``surrogate`` is in these features: phi(X)^T (phi(X) phi(X)^T + noise I)^-1 (y - m).

        Raises:
            ShapeError: other values than points.
            UsageError: a noise that is not above 0.
        """
        _check(points_ND, values_N, 1.0, noise, f"{_WHERE}.Features.weights")
        phi_NM = self(points_ND)
        gram_NN = phi_NM @ phi_NM.T
        gram_NN.diagonal().add_(noise)
        solved_N1 = torch.cholesky_solve((values_N - values_N.mean())[:, None], torch.linalg.cholesky(gram_NN))
        return phi_NM.T @ solved_N1[:, 0]

    def gradient(self, weight_M: Tensor, x_D: Tensor) -> Tensor:
        """(D,) the gradient at x of the function with these weights."""
        slope_M = -(self.frequency_MD @ x_D + self.phase_M).sin() * weight_M
        return math.sqrt(2 / len(self.phase_M)) * (slope_M @ self.frequency_MD)


def features(dimensions: int, count: int, *, length: float, seed: int = 0) -> Features:
    """So many random features of the kernel of that length; whoever has the seed has the same.

    Args:
        dimensions: D, at least 1.
        count: M, at least 1.
        length: l, above 0.
        seed: of frequencies and phases.

    Raises:
        UsageError: a number out of range.

    >>> phi = features(3, 20_000, length=1.0)
    >>> a, b = phi(torch.tensor([[0.0, 0, 0], [1, 0, 0]], dtype=torch.float64))
    >>> abs(float(a @ b) - math.exp(-0.5)) < 0.02
    True

    Source: Rahimi & Recht, 2007, "Random Features for Large-Scale Kernel Machines".
    """
    if not (dimensions >= 1 and count >= 1 and 0 < length < math.inf):
        got = f"dimensions={dimensions}, count={count}, length={length}"
        fix = "pass count=1000, length=1.0"
        where = f"{_WHERE}.features"
        raise UsageError(word("the features", got=got, allowed="be positive and finite", where=where, fix=fix))
    chance = torch.Generator().manual_seed(seed)
    frequency_MD = torch.randn(count, dimensions, generator=chance, dtype=torch.float64) / length
    return Features(frequency_MD, 2 * math.pi * torch.rand(count, generator=chance, dtype=torch.float64))


def _kernel(x_BD: Tensor, y_ND: Tensor, length: float) -> Tensor:
    squared_BN = x_BD.square().sum(1)[:, None] + y_ND.square().sum(1) - 2 * x_BD @ y_ND.T
    return torch.exp(squared_BN.clamp_min(0) / (-2 * length**2))


def _check(points_ND: Tensor, values_N: Tensor, length: float, noise: float, where: str) -> None:
    if points_ND.dim() != 2 or not len(points_ND) or values_N.shape != points_ND.shape[:1]:
        got, allowed = f"{tuple(points_ND.shape)} and {tuple(values_N.shape)}", "be (N, D) and (N,), N from 1"
        raise ShapeError(word("points and values", got=got, allowed=allowed, where=where, fix="give each its value"))
    if not (0 < length < math.inf and 0 < noise < math.inf):
        got, fix = f"length={length}, noise={noise}", "pass length=1.0, noise=1e-6"
        raise UsageError(word("the kernel", got=got, allowed="be positive and finite", where=where, fix=fix))
