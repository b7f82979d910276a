"""The teacher's rollout, and the making of a trajectory store out of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rapm.errors import UserError
from rapm.io import save_checked, save_tensors, sha256, with_prefix, write_json
from rapm.progress import track
from rapm.prompts import Prompt
from rapm.sampling import Conditioning, Denoiser, ddim, noise
from rapm.schedule import Grid, Schedule
from rapm.trajectories import (
    CONDITIONING,
    MANIFEST,
    PROMPTS,
    TrajectoryStore,
    fingerprint,
    is_finished_shard,
    noise_of,
    shard_name,
    size_index,
)
from rapm.versions import versions

Roll = Callable[[Tensor, Conditioning], tuple[Tensor, Tensor]]
"""``(noise [B, C, H, W] on the CPU, conditioning) -> absolute, intermediate positions``."""


@torch.no_grad()
def rollout(
    denoiser: Denoiser, schedule: Schedule, grid: Grid, z: Tensor, conditioning: Conditioning
) -> tuple[Tensor, Tensor]:
    """The teacher's trajectory from noise to the end, M fine steps a slot (RAPM, arXiv 2503.20744).

    The intermediate position is ONE step of length delta. It reuses the prediction that the walk
    makes at the head of the slot, so it costs nothing for any delta.

    Args:
        denoiser: the teacher, guided.
        z: noise z~_N, float32 [B, C, H, W].
        conditioning: of the B prompts.

    Returns:
        Absolute positions z~_n at [:, n], [B, N + 1, C, H, W], and intermediate positions
        z^Delta_{n+1} at [:, n], [B, N, C, H, W]; float32.
    """
    absolute, intermediate = [z], []
    for k, step in enumerate(ddim(denoiser, schedule, z, grid.fine, conditioning)):
        slot, within = grid.slots - 1 - k // grid.fine_steps, k % grid.fine_steps
        if within == 0:
            to = grid.coarse(slot + 1), grid.intermediate(slot)
            intermediate.append(schedule.step(step.z, step.prediction, *to))
        if within == grid.fine_steps - 1:
            absolute.append(step.end)
    return torch.stack(absolute[::-1], 1), torch.stack(intermediate[::-1], 1)


@dataclass(frozen=True)
class Contents:
    """What a store is made from.

    Attributes:
        prompts: trajectory k has prompt k modulo their number, and the noise of :func:`noise_of`.
        conditioning: of the prompts, [n, ...].
        unconditional: what the teacher was guided away from, [1, ...]; kept for training.
        sizes: of the pictures: each a latent's shape (C, H, W), and what of the conditioning
            depends on it, [1, ...].
        count: trajectories.
        shard_size: trajectories a file; 0 where no positions are stored.
        facts: everything the trajectories depend on, as JSON; two stores with equal facts hold the
            same trajectories.
    """

    prompts: Sequence[Prompt]
    conditioning: Conditioning
    unconditional: Conditioning
    sizes: Sequence[tuple[Sequence[int], Conditioning]]
    count: int
    seed: int
    shard_size: int
    facts: Mapping[str, Any]


def make_store(
    folder: Path, contents: Contents, roll: Roll | None, *, batch_size: int
) -> TrajectoryStore:
    """Rolls trajectories out and stores them; goes on where an earlier call was stopped.

    Args:
        folder: the store's; made when it is not there.
        roll: None where no positions are stored.
        batch_size: trajectories of one size side by side.

    Raises:
        UserError: the folder holds trajectories made from other facts, or a position is not a
            number.
    """
    mark = fingerprint(contents.facts)
    folder.mkdir(parents=True, exist_ok=True)
    names = [PROMPTS, CONDITIONING]
    if roll:
        names += _make_shards(folder, contents, roll, batch_size, mark)
    write_json(folder / PROMPTS, [asdict(prompt) for prompt in contents.prompts])
    of_size = {
        name: torch.cat([own[name] for _, own in contents.sizes]) for name in contents.sizes[0][1]
    }
    known = with_prefix("prompt", contents.conditioning) | with_prefix("size", of_size)
    known |= with_prefix("unconditional", contents.unconditional)
    save_tensors(folder / CONDITIONING, known, {"fingerprint": mark})
    manifest = {
        "fingerprint": mark,
        "facts": contents.facts,
        "count": contents.count,
        "shard_size": contents.shard_size if roll else 0,
        "seed": contents.seed,
        "shapes": [list(shape) for shape, _ in contents.sizes],
        "versions": versions(),  # told, not compared
        "files": {name: sha256(folder / name) for name in names},
    }
    write_json(folder / MANIFEST, manifest)
    return TrajectoryStore(folder, manifest)


def _make_shards(
    folder: Path, contents: Contents, roll: Roll, batch_size: int, mark: str
) -> list[str]:
    """Writes the shards that are not there yet; returns all their names."""
    size, count = contents.shard_size, contents.count
    names = [shard_name(shard) for shard in range(-(-count // size))]
    done = [is_finished_shard(folder / name, mark) for name in names]
    with track(range(count), "trajectories", initial=min(count, size * sum(done))) as bar:
        for shard, name in enumerate(names):
            if done[shard]:
                continue
            rows = range(shard * size, min((shard + 1) * size, count))
            tensors: dict[str, Tensor] = {}
            for of_size in range(len(contents.sizes)):
                prompts, sizes = len(contents.prompts), len(contents.sizes)
                own = [k for k in rows if size_index(k, prompts, sizes) == of_size]
                for first in range(0, len(own), batch_size):
                    batch = own[first : first + batch_size]
                    for k, absolute, intermediate in _roll_out(contents, roll, batch, of_size):
                        tensors[f"absolute.{k - rows.start}"] = absolute
                        tensors[f"intermediate.{k - rows.start}"] = intermediate
                    bar.update(len(batch))
            save_checked(folder / name, tensors, {"fingerprint": mark})
    return names


def _roll_out(
    contents: Contents, roll: Roll, batch: Sequence[int], of_size: int
) -> list[tuple[int, Tensor, Tensor]]:
    """Some trajectories of one size: their numbers and positions."""
    shape, conditioning = contents.sizes[of_size]
    z = torch.stack([noise(*noise_of(k, contents.prompts, contents.seed), shape) for k in batch])
    places = [k % len(contents.prompts) for k in batch]
    given = {name: value[places] for name, value in contents.conditioning.items()}
    given |= {n: value.expand(len(batch), *value.shape[1:]) for n, value in conditioning.items()}
    absolute, intermediate = roll(z, given)
    if not absolute.isfinite().all():
        raise UserError(
            f"trajectories {batch[0]} to {batch[-1]} are not finite; nothing of them was stored: "
            "the teacher's weights are damaged, or too large for float16 (take precision bfloat16 "
            "or float32)"
        )
    return list(zip(batch, absolute.cpu(), intermediate.cpu(), strict=True))
