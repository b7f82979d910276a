"""The teacher's rollout, and the making of a trajectory store out of it, by any number of
processes on any hosts that share the folder."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from rapm.errors import UserError
from rapm.io import (
    complete_or_absent,
    save_checked,
    save_tensors,
    sha256,
    sweep,
    with_prefix,
    write_json,
)
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
    read_manifest,
    shard_name,
    size_index,
)
from rapm.versions import versions

Roll = Callable[[Tensor, Conditioning], tuple[Tensor, Tensor]]
"""``(noise [B, C, H, W] on the CPU, conditioning) -> absolute, intermediate positions``."""
POLL = 2.0  # seconds between two looks at what other processes make


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
    folder: Path,
    contents: Contents,
    roll: Roll | None,
    *,
    batch_size: int,
    share: tuple[int, int] = (0, 1),
) -> TrajectoryStore | None:
    """Rolls trajectories out and stores them; goes on where an earlier call was stopped.

    Other processes may do the same in the same folder meanwhile. A shard is made by the one that
    claims it first, and each of them waits until all are there.

    Args:
        folder: the store's; made when it is not there.
        roll: None where no positions are stored.
        batch_size: trajectories of one size side by side.
        share: (i, n): of n parts the i-th alone, counted from 0. The others are made elsewhere.

    Returns:
        The store; None where shards of other parts are missing.

    Raises:
        UserError: the folder holds trajectories made from other facts, or a position is not a
            number.
    """
    mark = fingerprint(contents.facts)
    folder.mkdir(parents=True, exist_ok=True)
    names = [PROMPTS, CONDITIONING]
    if roll:
        shards = _make_shards(folder, contents, roll, batch_size, mark, share)
        elsewhere = [name for k, name in enumerate(shards) if k % share[1] != share[0]]
        if not all(is_finished_shard(folder / name, mark) for name in elsewhere):
            return None
        names += shards
    while not read_manifest(folder):
        with _claimed(folder / MANIFEST) as mine:
            if mine and not read_manifest(folder):
                _finish(folder, contents, names, mark, positions=roll is not None)
            elif not mine:
                time.sleep(POLL)
    for claim in folder.glob(".*.lock"):  # whoever leaves last leaves none
        with suppress(OSError):  # Windows deletes nothing that is open
            claim.unlink()
    return TrajectoryStore.open(folder)


def merge(folder: Path, other: Path, facts: Mapping[str, Any]) -> int:
    """Copies the finished shards of another folder that are missing in this one. Returns how many.

    Raises:
        UserError: one of them was made from other facts.
    """
    mark, number = fingerprint(facts), 0
    for shard in sorted(other.glob("shard-*.safetensors")):
        there, here = is_finished_shard(shard, mark), folder / shard.name
        if there and not is_finished_shard(here, mark):
            with complete_or_absent(here) as temporary:
                shutil.copyfile(shard, temporary)
            number += 1
    return number


def _finish(
    folder: Path, contents: Contents, names: Sequence[str], mark: str, *, positions: bool
) -> None:
    """Writes what belongs to all shards, the manifest last."""
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
        "shard_size": contents.shard_size if positions else 0,
        "seed": contents.seed,
        "shapes": [list(shape) for shape, _ in contents.sizes],
        "versions": versions(),  # told, not compared
        "files": {name: sha256(folder / name) for name in names},
    }
    sweep(folder)
    write_json(folder / MANIFEST, manifest)


@contextmanager
def _claimed(file: Path) -> Iterator[bool]:
    """Whether a file is this process's to make. The system lets go of a claim however the process
    ends that has it."""
    lock = FileLock(file.with_name(f".{file.name}.lock"), timeout=0)
    try:
        lock.acquire()
    except Timeout:
        yield False
        return
    except (OSError, NotImplementedError) as error:
        raise UserError(
            f"{file.parent} cannot be locked ({error}); a run needs a file system with locks"
        ) from None
    try:
        yield True
    finally:
        lock.release()


def _make_shards(
    folder: Path,
    contents: Contents,
    roll: Roll,
    batch_size: int,
    mark: str,
    share: tuple[int, int],
) -> list[str]:
    """Writes the shards of its share that nobody else makes; returns all names. Shards of the share
    that others have claimed are waited for."""
    size, count, (part, parts) = contents.shard_size, contents.count, share
    names = [shard_name(shard) for shard in range(-(-count // size))]
    rows = {k: range(k * size, min((k + 1) * size, count)) for k in range(len(names))}
    waiting = [k for k in rows if k % parts == part]
    missing = [k for k in waiting if not is_finished_shard(folder / names[k], mark)]
    done = sum(len(rows[k]) for k in waiting if k not in missing)
    total = sum(len(rows[k]) for k in waiting)
    with track(None, "trajectories", total=total, initial=done) as bar:
        while missing:
            for shard in list(missing):
                file = folder / names[shard]
                with _claimed(file) as mine:
                    if is_finished_shard(file, mark):  # by another process
                        bar.update(len(rows[shard]))
                    elif mine:
                        tensors = _shard(contents, roll, rows[shard], batch_size, bar.update)
                        save_checked(file, tensors, {"fingerprint": mark})
                    else:
                        continue
                missing.remove(shard)
            if missing:
                time.sleep(POLL)
    return names


def _shard(
    contents: Contents,
    roll: Roll,
    rows: range,
    batch_size: int,
    shown: Callable[[int], object],
) -> dict[str, Tensor]:
    """What a shard of these trajectories holds."""
    tensors: dict[str, Tensor] = {}
    prompts, sizes = len(contents.prompts), len(contents.sizes)
    for of_size in range(sizes):
        own = [k for k in rows if size_index(k, prompts, sizes) == of_size]
        for first in range(0, len(own), batch_size):
            batch = own[first : first + batch_size]
            for k, absolute, intermediate in _roll_out(contents, roll, batch, of_size):
                tensors[f"absolute.{k - rows.start}"] = absolute
                tensors[f"intermediate.{k - rows.start}"] = intermediate
            shown(len(batch))
    return tensors


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
