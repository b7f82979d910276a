"""The one walk over timesteps, :func:`ddim`; guidance, sampling and seeded noise.

Rollout, sampling, training and tests all walk by :func:`ddim`. Torch only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rapm.schedule import END, Schedule, trailing_timesteps

Conditioning = Mapping[str, Tensor]
"""Network inputs that describe the prompt, each [B, ...]."""
Denoiser = Callable[[Tensor, Tensor, Conditioning], Tensor]
"""``(z [B, C, H, W], t [B], conditioning) -> prediction [B, C, H, W]``; float32 in and out."""

SchedulerName = Literal["ddim", "euler", "lcm"]


class Step(NamedTuple):
    """One step of a walk: from position ``z`` at t, by ``prediction``, to position ``end`` at s."""

    z: Tensor
    prediction: Tensor
    end: Tensor


def ddim(
    denoiser: Denoiser,
    schedule: Schedule,
    z: Tensor,
    timesteps: Sequence[int | Tensor],
    conditioning: Conditioning,
) -> Iterator[Step]:
    """Deterministic DDIM (arXiv 2010.02502, eta = 0) from position to position.

    Args:
        denoiser: called once a step.
        z: position at ``timesteps[0]``, float32 [B, C, H, W].
        timesteps: from high to low, the last may be ``END``; each an int, or int [B] where rows
            stand at different places.
        conditioning: of the B rows.

    Yields:
        The steps in their order::

            for step in ddim(teacher, schedule, z, [999, 749, 499, 249, END], prompts):
                z = step.end
    """
    for t, s in pairwise(timesteps):
        t = torch.as_tensor(t).expand(len(z))
        prediction = denoiser(z, t, conditioning)
        end = schedule.step(z, prediction, t, s)
        yield Step(z, prediction, end)
        z = end


def guided(denoiser: Denoiser, unconditional: Conditioning, guidance_scale: float) -> Denoiser:
    """Classifier-free guidance: uncond + scale (cond - uncond), both in one pass.

    Args:
        unconditional: one prompt, [1, ...] each; what it does not name (a picture's size) is the
            same for both. {} is of a network that is told the scale, and needs no second half.
        guidance_scale: 1 is none, and asks for no second half.
    """
    if guidance_scale == 1 or not unconditional:
        return denoiser

    def both(z: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        merged = {
            name: torch.cat([unconditional.get(name, value).to(value).expand_as(value), value])
            for name, value in conditioning.items()
        }
        without, with_ = denoiser(torch.cat([z, z]), torch.cat([t, t]), merged).chunk(2)
        return without + guidance_scale * (with_ - without)

    return both


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    schedule: Schedule,
    z: Tensor,
    conditioning: Conditioning,
    num_steps: int,
    scheduler: SchedulerName = "ddim",
    seeds: Sequence[int] = (),
) -> Tensor:
    """From noise z to the end in ``num_steps`` trailing steps. All [B, C, H, W], float32.

    Args:
        scheduler: ``ddim``; ``euler``, the same steps but for the last, which ends where no noise
            is left; or ``lcm``, which predicts the clean latent and adds noise again (arXiv
            2310.04378, algorithm 3).
        seeds: of the B pictures; ``lcm`` draws its noise by them.
    """
    timesteps = trailing_timesteps(num_steps, schedule.num_train_timesteps)
    schedule = schedule if scheduler == "ddim" else schedule.ending_clean()
    for k, (t, s) in enumerate(pairwise(timesteps)):
        if scheduler != "lcm":
            z = next(ddim(denoiser, schedule, z, (t, s), conditioning)).end
            continue
        z = next(ddim(denoiser, schedule, z, (t, END), conditioning)).end
        if s != END:
            own = [seeded(f"consistency sampling {seed} {k}") for seed in seeds]
            noise = torch.stack([torch.randn(z.shape[1:], generator=g) for g in own])
            z = schedule.add_noise(z, END, s, noise.to(z.device))
    return z


def repeat(conditioning: Conditioning, times: int) -> Conditioning:
    """Repeats a batch of prompts ``times`` over, batch after batch."""
    return {
        name: value.repeat(times, *([1] * (value.ndim - 1))) for name, value in conditioning.items()
    }


def seeded(purpose: str) -> torch.Generator:
    """A generator on the CPU whose numbers are a function of what they are for."""
    digest = hashlib.sha256(purpose.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def noise(seed: int, index: int, shape: Sequence[int]) -> Tensor:
    """The noise trajectory ``index`` of ``seed`` starts from, float32.

    Drawn on the CPU, alone, so that no batch matters.
    """
    return torch.randn(*shape, generator=seeded(f"rapm noise {seed} {index}"))


def picture_noise(seed: int, shape: Sequence[int]) -> Tensor:
    """The noise picture ``seed`` starts from; no trajectory of any seed starts from the same."""
    return noise(seed, -1, shape)
