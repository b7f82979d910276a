"""Teachers with a known solution: data distributions so simple that the probability-flow ODE need
not be integrated.

Each is a ``Denoiser``: ``(z [B, C, H, W], t [B], conditioning) -> epsilon [B, C, H, W]``, exact,
    float64 inside. The prompt is
``conditioning["mean"]``, broadcastable over z, where the data of every coordinate lie. Coordinates
are independent, so that the ODE falls apart into one-dimensional ones.

The prediction is eps = -sigma_t grad log p_t(z) (arXiv 2011.13456, eq. 13 for the ODE it enters),
and p_t is known, since z_t = alpha_t x0 + sigma_t eps adds one Gaussian to another.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rapm.sampling import Conditioning
from rapm.schedule import Schedule


def alpha_sigma(schedule: Schedule, t: Tensor | int, like: Tensor) -> tuple[Tensor, Tensor]:
    """alpha_t and sigma_t in float64, broadcastable over ``like`` [B, C, H, W]; t is an int or int
    [B]."""
    rows = torch.as_tensor(t) + 1
    shape = -1, *[1] * (like.ndim - 1)
    return schedule.alphas[rows].reshape(shape), schedule.sigmas[rows].reshape(shape)


@dataclass(frozen=True)
class Gaussian:
    """x0 ~ N(mean, std^2) in each coordinate, so that z_t ~ N(alpha_t mean, alpha_t^2 std^2 +
    sigma_t^2).

    With guidance it stays closed-form: eps is linear in the mean, hence guiding means extrapolating
    the mean.
    """

    schedule: Schedule
    std: float = 0.5

    def __call__(self, z: Tensor, t: Tensor | int, conditioning: Conditioning) -> Tensor:
        """eps = sigma_t (z - alpha_t mean) / (alpha_t^2 std^2 + sigma_t^2). Returns [B, C, H, W] in
        the dtype of z."""
        a, s = alpha_sigma(self.schedule, t, z)
        return (
            s * (z.double() - a * conditioning["mean"]) / (a.square() * self.std**2 + s.square())
        ).to(z.dtype)

    def solve(
        self, z: Tensor, t: Tensor | int, s: Tensor | int, conditioning: Conditioning
    ) -> Tensor:
        """Where the ODE carries z from timestep t to s: the same number of standard deviations from
        the mean.

        arXiv 2311.10892 derives it. Returns float64 [B, C, H, W].
        """
        (at, st), (as_, ss) = alpha_sigma(self.schedule, t, z), alpha_sigma(self.schedule, s, z)
        width_t = (at.square() * self.std**2 + st.square()).sqrt()
        width_s = (as_.square() * self.std**2 + ss.square()).sqrt()
        return as_ * conditioning["mean"] + width_s / width_t * (
            z.double() - at * conditioning["mean"]
        )


@dataclass(frozen=True)
class Mixture:
    """x0 ~ sum_k weights_k N(mean + offsets_k, std^2) in each coordinate: the simplest teacher with
    curved trajectories."""

    schedule: Schedule
    weights: tuple[float, ...] = (0.3, 0.7)
    offsets: tuple[float, ...] = (-1.0, 0.5)
    std: float = 0.3

    def _components(
        self, z: Tensor, t: Tensor | int, conditioning: Conditioning
    ) -> tuple[Tensor, Tensor, Tensor]:
        """p_t = sum_k w_k N(centre_k, width^2): w [K, 1, 1, 1, 1], centre [K, B, C, H, W], width
        [B, 1, 1, 1]."""
        a, s = alpha_sigma(self.schedule, t, z)
        weights, offsets = (
            torch.tensor(x, dtype=torch.float64).reshape(-1, 1, 1, 1, 1)
            for x in (self.weights, self.offsets)
        )
        return (
            weights,
            a * (conditioning["mean"] + offsets),
            (a.square() * self.std**2 + s.square()).sqrt(),
        )

    def __call__(self, z: Tensor, t: Tensor | int, conditioning: Conditioning) -> Tensor:
        """eps = sigma_t sum_k P(k | z) (z - centre_k) / width^2. Returns [B, C, H, W] in the dtype
        of z."""
        weights, centre, width = self._components(z, t, conditioning)
        distance = (z.double() - centre) / width
        posterior = (weights.log() - distance.square() / 2).softmax(0)
        return (alpha_sigma(self.schedule, t, z)[1] / width * (posterior * distance).sum(0)).to(
            z.dtype
        )

    def cdf(self, z: Tensor, t: Tensor | int, conditioning: Conditioning) -> Tensor:
        """F_t(z) = sum_k w_k Phi((z - centre_k) / width). Returns float64 [B, C, H, W]."""
        weights, centre, width = self._components(z, t, conditioning)
        return (weights * torch.special.ndtr((z.double() - centre) / width)).sum(0)

    def solve(
        self, z: Tensor, t: Tensor | int, s: Tensor | int, conditioning: Conditioning
    ) -> Tensor:
        """Where the ODE carries z from timestep t to s: F_s^-1(F_t(z)), by bisection.

        The ODE keeps the marginals p_t (arXiv 2011.13456, sec. 4.3), and in one dimension
        trajectories cannot overtake each other; so a position keeps its quantile. Returns float64
        [B, C, H, W].
        """
        quantile = self.cdf(z, t, conditioning)
        low, high = torch.full_like(quantile, -20.0), torch.full_like(quantile, 20.0)
        for _ in range(60):
            middle = (low + high) / 2
            below = self.cdf(middle, s, conditioning) < quantile
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2
