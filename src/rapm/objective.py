"""The RAPM objective (arXiv 2503.20744): positions, distances, hinge losses. Tensors and callables
only.

docs/method.md writes the equations out; the names here are the names there. Everything of one slot
is independent of the other slots but for where the student stands, so slots are handled in groups
of any size ("slot batch"): the starts of a group are found without gradients, then one graph serves
the group. With a group of one, no pass is spent on starts at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from rapm.schedule import Grid, Schedule

Conditioning = Mapping[str, Tensor]  # network inputs that describe the prompt, each [B, ...]
Denoiser = Callable[
    [Tensor, Tensor, Conditioning], Tensor
]  # (z [B, C, H, W], t [B], conditioning) -> prediction [B, C, H, W]


# ---- positions


@dataclass(frozen=True)
class Positions:
    """Positions of a batch of B trajectories in a group of k slots, all [k B, C, H, W], slot by
    slot from high to low noise.

    Attributes:
        slots: the k slot numbers n.
        start: z_{n+1}, the student's own position, detached.
        relative: z^_n, the frozen student's step from the teacher's nudged position.
        absolute: z~_n, the teacher's own position.
        conditioning: the prompts, repeated for each slot.
    """

    slots: Sequence[int]
    start: Tensor
    relative: Tensor
    absolute: Tensor
    conditioning: Conditioning

    def of(self, slots: Sequence[int], rows: slice = slice(None)) -> Positions:
        """Those of some of the slots, and of some of the batch's rows."""
        places, batch = [self.slots.index(n) for n in slots], len(self.start) // len(self.slots)

        def part(x: Tensor) -> Tensor:
            return x.unflatten(0, (-1, batch))[places][:, rows].flatten(0, 1)

        prompts = {name: part(value) for name, value in self.conditioning.items()}
        return Positions(slots, part(self.start), part(self.relative), part(self.absolute), prompts)


def repeat(conditioning: Conditioning, times: int) -> Conditioning:
    """Repeats a batch of prompts ``times`` over, batch after batch."""
    return {
        name: value.repeat(times, *([1] * (value.ndim - 1))) for name, value in conditioning.items()
    }


def _per_row(values: Sequence[int], batch: int) -> Tensor:
    return torch.tensor(values).repeat_interleave(batch)


def student_step(
    denoiser: Denoiser,
    schedule: Schedule,
    grid: Grid,
    slots: Sequence[int],
    z: Tensor,
    conditioning: Conditioning,
) -> Tensor:
    """z_n^phi = DDIM(student, z_{n+1}, t_{n+1} -> t_n) for the k slots of a group; z is [k B, C, H,
    W]."""
    batch = len(z) // len(slots)
    t = _per_row([grid.coarse(n + 1) for n in slots], batch)
    s = _per_row([grid.coarse(n) for n in slots], batch)
    return schedule.step(z, denoiser(z, t, conditioning), t, s)


def slot_groups(num_slots: int, slot_batch: int) -> Iterator[list[int]]:
    """Slots N - 1 ... 0 in groups of at most ``slot_batch``."""
    order = list(range(num_slots - 1, -1, -1))
    for first in range(0, num_slots, slot_batch):
        yield order[first : first + slot_batch]


@torch.no_grad()
def starts(
    denoiser: Denoiser,
    schedule: Schedule,
    grid: Grid,
    slots: Sequence[int],
    known: Sequence[Tensor],
    conditioning: Conditioning,
) -> Tensor:
    """z_{n+1}, where the student stands at the head of each slot of a group, [k B, C, H, W].

    Args:
        denoiser: the student.
        slots: k neighbouring slots, from high to low.
        known: of the first slots of the group, at least of one, [B, C, H, W] each.
        conditioning: of the B prompts.
    """
    found = list(known)
    for n in slots[len(found) - 1 : -1]:
        found.append(student_step(denoiser, schedule, grid, [n], found[-1], conditioning))
    return torch.cat(found)


@torch.no_grad()
def positions(
    denoiser: Denoiser,
    schedule: Schedule,
    grid: Grid,
    slots: Sequence[int],
    z: Tensor,
    coarse: Tensor,
    nudged: Tensor,
    conditioning: Conditioning,
    *,
    relative: bool = True,
) -> Positions:
    """Finds where the student starts in each slot of a group, and what it is to be compared with
    there.

    Args:
        denoiser: the student.
        slots: k neighbouring slots, from high to low.
        z: the student's own position at the head of the group, [B, C, H, W].
        coarse: the teacher's positions z~_n, [B, N + 1, C, H, W], indexed by n.
        nudged: the teacher's nudged positions, [B, N, C, H, W], indexed by the slot they start.
        conditioning: of the B prompts.
        relative: without it the frozen student's pass is saved and ``Positions.relative`` holds the
            nudged positions.
    """
    batch, repeated = len(z), repeat(conditioning, len(slots))
    known, target = [z], torch.cat([nudged[:, n] for n in slots])
    t, s = (
        _per_row([grid.nudged(n) for n in slots], batch),
        _per_row([grid.coarse(n) for n in slots], batch),
    )
    if relative:
        # With delta = M in slot 0 the nudged position is the end itself: no timestep is left to ask
        # the network for, and none is needed, since a step of no length leads nowhere.
        ask = t.clamp(min=0)
        # The group's second start waits for nothing either: one pass finds it (the first rows) and
        # the relative positions.
        first = batch if len(slots) > 1 else 0
        at = torch.cat([_per_row([grid.coarse(slots[0] + 1)], first), ask])
        to = torch.cat([_per_row([grid.coarse(slots[0])], first), s])
        both = torch.cat([z[:first], target])
        prompts = {
            name: torch.cat([value[:first], repeated[name]]) for name, value in conditioning.items()
        }
        moved = schedule.step(both, denoiser(both, at, prompts), at, to)
        target = torch.where((t == s)[:, None, None, None].to(z.device), target, moved[first:])
        if first:
            known.append(moved[:first])
    start = starts(denoiser, schedule, grid, slots, known, conditioning)
    return Positions(slots, start, target, torch.cat([coarse[:, n] for n in slots]), repeated)


@torch.no_grad()
def follow(
    teacher: Denoiser,
    schedule: Schedule,
    grid: Grid,
    slots: Sequence[int],
    start: Tensor,
    conditioning: Conditioning,
    *,
    nudged: bool = False,
) -> tuple[Tensor, Tensor]:
    """Where the teacher gets from where the student stands: by fine steps down to t_n, for the k
    slots of a group.

    Args:
        teacher: guided.
        start: z_{n+1}, [k B, C, H, W].
        nudged: ``start`` lies delta fine steps lower already (:func:`relay`), and M - delta are
            left.

    Returns:
        The nudged positions, after delta of those steps, and the positions at t_n, both [k B, C, H,
        W].
    """
    batch, z, after = len(start) // len(slots), start, start
    fine = grid.fine
    for k in range(grid.delta if nudged else 0, grid.fine_steps):
        t, s = (
            _per_row([fine[(grid.slots - n - 1) * grid.fine_steps + k + i] for n in slots], batch)
            for i in (0, 1)
        )
        z = schedule.step(z, teacher(z, t, conditioning), t, s)
        if k + 1 == grid.delta:
            after = z
    return after, z


def relayed_step(
    denoiser: Denoiser,
    schedule: Schedule,
    grid: Grid,
    slot: int,
    z: Tensor,
    conditioning: Conditioning,
) -> tuple[Tensor, Tensor]:
    """One prediction from z: the nudged position that the student's step passes, and its end
    z_n^phi, all [B, C, H, W]."""
    t, nudged, end = (
        _per_row([at], len(z))
        for at in (grid.coarse(slot + 1), grid.nudged(slot), grid.coarse(slot))
    )
    prediction = denoiser(z, t, conditioning)
    return schedule.step(z, prediction, t, nudged), schedule.step(z, prediction, t, end)


@torch.no_grad()
def relay(
    denoiser: Denoiser,
    schedule: Schedule,
    grid: Grid,
    slots: Sequence[int],
    z: Tensor,
    conditioning: Conditioning,
) -> tuple[Tensor, Tensor]:
    """Where the student stands at the head of each slot of a group, and the nudged positions that
    its own step passes.

    Args:
        denoiser: the student.
        slots: k neighbouring slots, from high to low.
        z: the student's own position at the head of the group, [B, C, H, W].
        conditioning: of the B prompts.

    Returns:
        z_{n+1} and z^Delta_{n+1}, both [k B, C, H, W].
    """
    start, nudged = [], []
    for n in slots:
        start.append(z)
        passed, z = relayed_step(denoiser, schedule, grid, n, z, conditioning)
        nudged.append(passed)
    return torch.cat(start), torch.cat(nudged)


@torch.no_grad()
def from_nudged(
    denoiser: Denoiser,
    schedule: Schedule,
    grid: Grid,
    slots: Sequence[int],
    nudged: Tensor,
    conditioning: Conditioning,
) -> Tensor:
    """z^_n: the student's single step from the nudged position to t_n, for the k slots of a
    group."""
    batch = len(nudged) // len(slots)
    t, s = (
        _per_row([grid.nudged(n) for n in slots], batch),
        _per_row([grid.coarse(n) for n in slots], batch),
    )
    moved = schedule.step(nudged, denoiser(nudged, t.clamp(min=0), conditioning), t.clamp(min=0), s)
    # With delta = M the nudged position is the end itself: a step of no length leads nowhere.
    return torch.where((t == s)[:, None, None, None].to(nudged.device), nudged, moved)


# ---- distances


def pseudo_huber(a: Tensor, b: Tensor, c: float = 1e-3) -> Tensor:
    """d(a, b) = mean of sqrt((a - b)^2 + c^2) - c over everything but the batch. Returns [B]."""
    return (((a - b).square() + c * c).sqrt() - c).flatten(1).mean(1)


def squared(a: Tensor, b: Tensor) -> Tensor:
    """Mean of (a - b)^2 over everything but the batch. Returns [B]."""
    return (a - b).square().flatten(1).mean(1)


# ---- adversarial losses


def hinge_critic(real: Sequence[Tensor], fake: Sequence[Tensor]) -> Tensor:
    """Mean of relu(1 - real) + relu(1 + fake) over a map, mean over heads; 2 is chance.

    Each head's logits are [B, 1, h, w]. Returns [B].
    """
    return torch.stack(
        [
            (F.relu(1 - r) + F.relu(1 + f)).flatten(1).mean(1)
            for r, f in zip(real, fake, strict=True)
        ]
    ).mean(0)


def hinge_student(fake: Sequence[Tensor]) -> Tensor:
    """Mean of relu(1 - fake) over a map, mean over heads: PCM's form, which stops pushing where the
    critic is fooled.

    Each head's logits are [B, 1, h, w]. Returns [B].
    """
    return torch.stack([F.relu(1 - f).flatten(1).mean(1) for f in fake]).mean(0)


def relativistic(real: Sequence[Tensor], fake: Sequence[Tensor]) -> Tensor:
    """softplus(fake - real) of each head's mean logits, mean over heads; log 2 is chance (arXiv
    1807.00734).

    The critic's loss; with real and fake exchanged, the student's. It asks which of the two is the
    teacher's, not whether one
    alone is: real and fake of one trajectory under one noise differ in nothing else.

    Each head's logits are [B, 1, h, w]. Returns [B].
    """
    return torch.stack(
        [F.softplus((f - r).flatten(1).mean(1)) for r, f in zip(real, fake, strict=True)]
    ).mean(0)


def margin(real: Sequence[Tensor], fake: Sequence[Tensor]) -> Tensor:
    """Mean of real - fake logits over a map, mean over heads: 0 when a critic stands at chance.
    Returns [B]."""
    return torch.stack([(r - f).flatten(1).mean(1) for r, f in zip(real, fake, strict=True)]).mean(
        0
    )


def as_long_as(gradient: Tensor, like: Tensor) -> Tensor:
    """``gradient`` with the norm of ``like``, row by row; both [B, C, H, W].

    Zeros stay zeros: norms below 1e-12 count as 1e-12.

    What weighs the adversarial gradient against the distance's by length, whatever the critic's
    temper (the idea of VQGAN's adaptive weight, arXiv 2012.09841, equation 7, at the student's
    position instead of a decoder's last layer).
    """
    have, want = (x.flatten(1).norm(dim=1)[:, None, None, None] for x in (gradient, like))
    return gradient * (want / have.clamp(min=1e-12))


@dataclass(frozen=True)
class Renoising:
    """What a critic is shown: at which timestep, and under which noise, for each slot (first axis n
    = 0 ... N - 1).

    Attributes:
        timesteps: tau, int [N, B], in [t_n, t_{n+1}) (the end counts as timestep 0).
        real, fake: noise, [N, B, C, H, W].
    """

    timesteps: Tensor
    real: Tensor
    fake: Tensor

    @classmethod
    def draw(
        cls,
        grid: Grid,
        shape: Sequence[int],
        generator: torch.Generator,
        *,
        shared: bool,
        power: float,
    ) -> Renoising:
        """Draws for all N slots at once, row by row, so that neither slot groups nor the batch
        change what is drawn.

        Args:
            shape: (B, C, H, W).
            generator: on the CPU.
            shared: real and fake get the same noise.
            power: k in tau = t_n + (t_{n+1} - t_n) u^k, u uniform in [0, 1); 1 is uniform, more
                keeps closer to t_n.
        """
        lows = torch.tensor([max(grid.coarse(n), 0) for n in range(grid.slots)])
        highs = torch.tensor([grid.coarse(n + 1) for n in range(grid.slots)])
        timesteps, noise = [], []
        for _ in range(shape[0]):
            u = torch.rand(grid.slots, generator=generator, dtype=torch.float64)
            timesteps.append((lows + (highs - lows) * u**power).long())
            noise.append(torch.randn(2, grid.slots, *shape[1:], generator=generator))
        real, fake = torch.stack(noise, 2)
        return cls(torch.stack(timesteps, 1), real, real if shared else fake)

    def of(self, slots: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Timesteps [k B] (on the CPU, where tables are), real and fake noise [k B, C, H, W] of a
        group of slots."""
        index = list(slots)
        real, fake = (x[index].flatten(0, 1).to(device) for x in (self.real, self.fake))
        return self.timesteps[index].flatten(), real, fake


def shown_to_critic(
    schedule: Schedule, grid: Grid, slots: Sequence[int], z: Tensor, t: Tensor, noise: Tensor
) -> Tensor:
    """Takes positions at t_n [k B, C, H, W] up to the noise level of t [k B]."""
    start = _per_row([grid.coarse(n) for n in slots], len(z) // len(slots))
    return schedule.renoise(z, start, t, noise)
