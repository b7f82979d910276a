"""Noise schedules, timestep grids and the one ``step`` function.

Conventions, valid in the whole library:

- ``z_t = alpha_t x0 + sigma_t eps``. In DDPM-style teachers alpha_t = sqrt(alpha_bar_t) and sigma_t
  = sqrt(1 - alpha_bar_t); in rectified flow (arXiv 2209.03003) alpha_t = 1 - sigma_t.
- Latents are in the scale the network sees (the VAE's scaling factor is already applied).
- A timestep is an integer, 0 <= t < T (T = 1000 in all known teachers), and sampling runs from high
  to low. ``END = -1`` is the end of sampling; what alpha is there is the scheduler's choice
  (``set_alpha_to_one``). A flow network is fed a time that is no integer: ``times``.
- Slots and coarse timesteps are numbered as in docs/method.md: t_N > ... > t_0 = END, and slot n
  leads from t_{n+1} to t_n.
- Tables are float64, positions and steps float32, whatever the network computes in.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

END = -1
PredictionType = Literal["epsilon", "v_prediction", "sample", "flow"]


def _at(table: Tensor, t: Tensor | int, like: Tensor) -> Tensor:
    """table[t + 1] as float32 that broadcasts over ``like`` [B, ...]."""
    t = torch.as_tensor(t, device="cpu")
    values = table[t + 1].to(like.device, torch.float32)
    return (
        values.reshape(values.shape + (1,) * (like.ndim - values.ndim)) if values.ndim else values
    )


@dataclass(frozen=True)
class Schedule:
    """What a network was trained with. In each table entry t + 1 belongs to timestep t, entry 0 to
    the end of sampling.

    Attributes:
        alphas, sigmas: float64 [T + 1].
        times: float64 [T + 1], what a network is fed as time.
        prediction_type: what the network predicts: diffusers' names, or ``flow``, the velocity eps
            - x0.
        shift: of a flow's timesteps, see :meth:`flow`.
    """

    alphas: Tensor = field(repr=False)
    sigmas: Tensor = field(repr=False)
    times: Tensor = field(repr=False)
    prediction_type: PredictionType = "epsilon"
    shift: float = 1.0

    @classmethod
    def of(
        cls,
        alphas_cumprod: Tensor,
        final_alpha_cumprod: Tensor | float,
        prediction_type: PredictionType,
    ) -> Schedule:
        """From a diffusers scheduler's ``alphas_cumprod`` [T], ``final_alpha_cumprod`` and
        ``config.prediction_type``."""
        final = torch.as_tensor(final_alpha_cumprod, dtype=torch.float64).reshape(1)
        alpha_bar = torch.cat([final, alphas_cumprod.to("cpu", torch.float64)])
        times = torch.arange(-1, len(alpha_bar) - 1, dtype=torch.float64)
        return cls(alpha_bar.sqrt(), (1 - alpha_bar).sqrt(), times, prediction_type)

    @classmethod
    def flow(cls, shift: float, num_train_timesteps: int = 1000) -> Schedule:
        """Rectified flow under a timestep shift (arXiv 2403.03206, eq. 23).

        Timestep k is u = (k + 1) / T before the shift, and sigma = a u / (1 + (a - 1) u) after it.
        So trailing timesteps are what diffusers' FlowMatchEulerDiscreteScheduler has where its
        ``sigmas`` fall evenly from 1 to 1 / N.

        Args:
            shift: a, the scheduler's own, or exp(mu) where it depends on the picture's size.
        """
        u = torch.arange(num_train_timesteps + 1, dtype=torch.float64) / num_train_timesteps
        sigmas = shift * u / (1 + (shift - 1) * u)
        return cls(1 - sigmas, sigmas, num_train_timesteps * sigmas, "flow", shift)

    @property
    def num_train_timesteps(self) -> int:
        return len(self.alphas) - 1

    def ending_clean(self) -> Schedule:
        """The same with no noise left at the end of sampling, as Euler schedulers end."""
        one, none = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        alphas, sigmas = torch.cat([one, self.alphas[1:]]), torch.cat([none, self.sigmas[1:]])
        return replace(self, alphas=alphas, sigmas=sigmas)

    def alpha(self, t: Tensor | int, like: Tensor) -> Tensor:
        """alpha_t, float32, broadcastable over ``like`` [B, ...]; t is an int or int [B], END <= t
        < T."""
        return _at(self.alphas, t, like)

    def sigma(self, t: Tensor | int, like: Tensor) -> Tensor:
        """sigma_t, float32, broadcastable over ``like`` [B, ...]."""
        return _at(self.sigmas, t, like)

    def x0_and_eps(self, z: Tensor, prediction: Tensor, t: Tensor | int) -> tuple[Tensor, Tensor]:
        """Splits a position into the clean latent and the noise that the prediction says it is made
        of. All [B, C, H, W]."""
        a, s = self.alpha(t, z), self.sigma(t, z)
        if self.prediction_type == "epsilon":
            return (z - s * prediction) / a, prediction
        if self.prediction_type == "v_prediction":  # v = alpha eps - sigma x0
            return a * z - s * prediction, s * z + a * prediction
        if self.prediction_type == "flow":  # and alpha + sigma = 1
            return z - s * prediction, z + a * prediction
        return prediction, (z - a * prediction) / s

    def step(self, z: Tensor, prediction: Tensor, t: Tensor | int, s: Tensor | int) -> Tensor:
        """One deterministic DDIM step (arXiv 2010.02502, eq. 12 with eta = 0) from timestep t to
        timestep s; of a flow, one Euler step.

        Args:
            z: position at t, float32 [B, C, H, W].
            prediction: the network's prediction there, of the same shape.
            t: int or int [B], 0 <= t < T.
            s: int or int [B], END <= s < T.

        Returns:
            The position at s, float32 [B, C, H, W].
        """
        x0, eps = self.x0_and_eps(z.float(), prediction.float(), t)
        return self.alpha(s, z) * x0 + self.sigma(s, z) * eps

    def x0_of_step(self, z: Tensor, end: Tensor, t: Tensor | int, s: Tensor | int) -> Tensor:
        """The clean latent that :meth:`step` saw when it led from z at t to ``end`` at s < t."""
        (at, st), (as_, ss) = ((self.alpha(x, z), self.sigma(x, z)) for x in (t, s))
        return (st * end - ss * z) / (as_ * st - at * ss)

    def add_noise(self, z: Tensor, t: Tensor | int, s: Tensor | int, noise: Tensor) -> Tensor:
        """Takes a position at t up to the noise level of s >= t along the forward process (arXiv
        2405.18407, sec. 3.4).

        Given z_t, z_s ~ N(alpha_s / alpha_t z_t, sigma_s^2 - (alpha_s / alpha_t)^2 sigma_t^2).
        """
        ratio = self.alpha(s, z) / self.alpha(t, z)
        variance = self.sigma(s, z).square() - (ratio * self.sigma(t, z)).square()
        return ratio * z + variance.clamp(min=0).sqrt() * noise


@dataclass(frozen=True)
class Grid:
    """The timesteps of a distillation: N slots of M fine steps each, "trailing" spacing as in
    diffusers.

    Attributes:
        slots: N, the student's number of steps.
        fine_steps: M, teacher steps in a slot.
        delta: fine steps from a coarse position down to the intermediate one, 1 <= delta <= M.
        num_train_timesteps: T.

    Raises:
        ValueError: a number is out of range, or N x M exceeds T.
    """

    slots: int = 4
    fine_steps: int = 25
    delta: int = 1
    num_train_timesteps: int = 1000

    def __post_init__(self) -> None:
        if self.slots < 1 or self.fine_steps < 1:
            raise ValueError(
                f"N and M must be at least 1, not N = {self.slots}, M = {self.fine_steps}"
            )
        if self.slots * self.fine_steps > self.num_train_timesteps:
            raise ValueError(
                f"N x M = {self.slots * self.fine_steps} fine steps do not fit into "
                f"{self.num_train_timesteps} timesteps; "
                f"lower M to {self.num_train_timesteps // self.slots} or less"
            )
        if not 1 <= self.delta <= self.fine_steps:
            raise ValueError(
                f"delta must be from 1 to M = {self.fine_steps} fine steps, not {self.delta}"
            )

    @cached_property
    def fine(self) -> list[int]:
        """The N M + 1 timesteps the teacher visits, from T - 1 down to END."""
        return trailing_timesteps(self.slots * self.fine_steps, self.num_train_timesteps)

    def coarse(self, n: int) -> int:
        """t_n for 0 <= n <= N; t_0 = END."""
        return self.fine[(self.slots - n) * self.fine_steps]

    def intermediate(self, n: int) -> int:
        """t_{n+1} - delta, where the intermediate position of slot n lies, for 0 <= n < N."""
        return self.fine[(self.slots - n - 1) * self.fine_steps + self.delta]


def trailing_timesteps(num_steps: int, num_train_timesteps: int = 1000) -> list[int]:
    """The timesteps of ``num_steps`` sampling steps, "trailing" as in diffusers, with END appended:
    999, 749, 499, 249, -1.

    Raises:
        ValueError: fewer than 1 step or more than there are timesteps.
    """
    if not 1 <= num_steps <= num_train_timesteps:
        raise ValueError(
            f"the number of steps must be from 1 to {num_train_timesteps}, not {num_steps}"
        )
    steps = torch.arange(num_steps, dtype=torch.float64)
    return [
        *(num_train_timesteps - steps * num_train_timesteps / num_steps)
        .round()
        .long()
        .sub(1)
        .tolist(),
        END,
    ]
