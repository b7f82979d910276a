"""The teacher's sampling trajectories: a folder of shards, written once, read while training.

Every file is complete or absent, and the manifest comes last, with a fingerprint of all that the
trajectories depend on and a sha256 of every file. A method that needs no positions has a store
without shards: prompts, and noise that is drawn where it is asked for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from rapm.errors import UserError
from rapm.io import (
    Damaged,
    NoFile,
    load_checked,
    load_made,
    load_tensors,
    read,
    sha256,
    under_prefix,
)
from rapm.prompts import Prompt
from rapm.sampling import Conditioning, noise

MANIFEST, CONDITIONING, PROMPTS = "manifest.json", "conditioning.safetensors", "prompts.json"


@dataclass(frozen=True)
class Trajectory:
    """One trajectory; positions float32 on the CPU.

    Attributes:
        absolute: z~_n at [n], [N + 1, C, H, W]; the noise alone, [1, C, H, W], where no positions
            are stored.
        intermediate: z^Delta_{n+1} at [n], [N, C, H, W]; [0, C, H, W] likewise.
        conditioning: of its prompt, without a batch axis.
        prompt: its text.
        seed, index: its noise is ``noise(seed, index)``.
    """

    absolute: Tensor
    intermediate: Tensor
    conditioning: Conditioning
    prompt: str
    seed: int
    index: int


class TrajectoryStore:
    """A folder of trajectories: opened by :meth:`open`, made by :func:`rapm.rollout.make_store`.

    Attributes:
        unconditional: conditioning that the teacher's guidance leads away from, [1, ...].

    Usage::

        store = TrajectoryStore.open(run.trajectories)
        store[0].absolute       # [N + 1, C, H, W]
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest
        self._shards: dict[int, Any] = {}
        self.prompts = stored_prompts(folder)
        tensors = load_tensors(folder / CONDITIONING)
        self.of_prompt, self.of_size = (under_prefix(p, tensors) for p in ("prompt", "size"))
        self.unconditional: Conditioning = under_prefix("unconditional", tensors)

    @classmethod
    def open(cls, folder: Path) -> TrajectoryStore:
        """Opens a finished store and checks every file against the manifest.

        Raises:
            UserError: there is none, it is unfinished, or a file is missing or damaged.
        """
        manifest = read_manifest(folder)
        if manifest is None:
            raise UserError(
                f"there is no finished trajectory store in {folder}; make one with "
                "'rapm trajectories'"
            )
        for name, digest in manifest["files"].items():
            missing = not (folder / name).is_file()
            if missing or sha256(folder / name) != digest:
                what = "is missing; delete" if missing else "is not what was written; delete it and"
                raise UserError(
                    f"trajectory store {folder} is damaged: {name} {what} {MANIFEST}, then run "
                    "'rapm trajectories' again to fill the gap"
                )
        return cls(folder, manifest)

    def __len__(self) -> int:
        return self.manifest["count"]

    def __getitem__(self, index: int) -> Trajectory:
        if not 0 <= index < len(self):
            raise IndexError(f"trajectory {index} of {len(self)}")
        place = index % len(self.prompts)
        size = size_index(index, len(self.prompts), self.num_sizes)
        own = noise_of(index, self.prompts, self.manifest["seed"])
        absolute, intermediate = self._positions(index, size, own)
        prompts = {name: value[place] for name, value in self.of_prompt.items()}
        sizes = {name: value[size] for name, value in self.of_size.items()}
        text = self.prompts[place].text
        return Trajectory(absolute, intermediate, prompts | sizes, text, *own)

    @property
    def num_sizes(self) -> int:
        return len(self.manifest["shapes"])

    def _positions(self, index: int, size: int, own: tuple[int, int]) -> tuple[Tensor, Tensor]:
        if not self.manifest["shard_size"]:
            z = noise(*own, self.manifest["shapes"][size])
            return z[None], z.new_empty(0, *z.shape)
        shard, row = divmod(index, self.manifest["shard_size"])
        if shard not in self._shards:
            self._shards[shard] = safe_open(self.folder / shard_name(shard), "pt")
        file = self._shards[shard]
        return file.get_tensor(f"absolute.{row}"), file.get_tensor(f"intermediate.{row}")


def noise_of(trajectory: int, prompts: Sequence[Prompt], seed: int) -> tuple[int, int]:
    """Seed and index of the noise of trajectory k, with n prompts.

    They are (seed, k), or (own, -2 - k // n) if its prompt has a seed of its own. Indices below -1
    are kept for those prompts: where ``own`` is ``seed``, their noise is still that of no other
    trajectory and of no picture. Two prompts with the same seed of their own do start from the same
    noise, as they were told to.
    """
    again, prompt = divmod(trajectory, len(prompts))
    own = prompts[prompt].seed
    return (seed, trajectory) if own is None else (own, -2 - again)


def size_index(index: int, prompts: int, sizes: int) -> int:
    """Which size a trajectory has: in turn, one further each time the prompts begin again."""
    return (index % prompts + index // prompts) % sizes


def stored_prompts(folder: Path) -> list[Prompt]:
    """The prompts of a finished store, in their order; [] when there is none."""
    try:
        data = read(folder / PROMPTS)
    except NoFile:
        return []
    try:
        prompts = [Prompt(**row) for row in json.loads(data)]
        if not all(isinstance(p.text, str) and type(p.seed) in (int, type(None)) for p in prompts):
            raise ValueError
        return prompts
    except (ValueError, TypeError, RecursionError):
        raise UserError(
            f"{folder / PROMPTS} is damaged; delete {MANIFEST} beside it and run 'rapm "
            "trajectories' again: finished shards are kept"
        ) from None


def shard_name(shard: int) -> str:
    return f"shard-{shard:05d}.safetensors"


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a finished store, or None.

    Raises:
        UserError: it is there and cannot be read.
    """
    file = folder / MANIFEST
    try:
        data = read(file)
    except NoFile:
        return None
    with suppress(ValueError, LookupError, TypeError, AttributeError, RecursionError):
        manifest = json.loads(data)
        if _is_consistent(manifest):
            return manifest
    raise UserError(
        f"{file} is damaged or of another version; delete it and run 'rapm trajectories' again: "
        "finished shards are kept"
    )


def _is_consistent(manifest: Any) -> bool:
    """Whether a manifest has all that it should, and its numbers and files are those of its
    facts."""
    facts, count, size = (manifest[key] for key in ("facts", "count", "shard_size"))
    numbers = {"count": count, "seed": manifest["seed"], "shard_size": size}
    shards = [shard_name(k) for k in range(-(-count // size))] if size else []
    return (
        all(type(number) is int for number in numbers.values())
        and manifest["fingerprint"] == fingerprint(facts)
        and all(facts.get(key, number) == number for key, number in numbers.items() if number)
        and manifest["files"].keys() == {PROMPTS, CONDITIONING, *shards}
        and all(type(side) is int for c, h, w in manifest["shapes"] for side in (c, h, w))
    )


def check_facts(folder: Path, facts: Mapping[str, Any], *, complete: bool = False) -> bool:
    """Whether there is a finished store.

    Args:
        facts: that it must have been made from, all of them or some.
        complete: they are all; then shards of an unfinished store are told by them, too.

    Raises:
        UserError: it was made from other facts.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        for shard in folder.glob("shard-*.safetensors") if complete else ():
            is_finished_shard(shard, fingerprint(facts))
        return False
    made = manifest["facts"]
    names = made | facts if complete else facts
    changed = [name for name in names if made.get(name) != facts.get(name)]
    if changed == ["rapm"]:
        raise UserError(
            f"{folder} holds trajectories made with rapm {made.get('rapm')}, this is "
            f"{facts['rapm']}; go on with that version, choose another folder or delete it"
        )
    if changed:
        raise UserError(
            f"{folder} holds trajectories made with another {', '.join(changed)}; "
            "choose another folder or delete it"
        )
    return True


def fingerprint(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def is_finished_shard(file: Path, mark: str) -> bool:
    """Whether a shard of an unfinished store is whole.

    Raises:
        UserError: it belongs to other facts.
    """
    if not file.is_file():
        return False
    try:
        found = load_made(file).get("fingerprint")
        if found == mark:
            load_checked(file)
    except Damaged:
        return False
    if found != mark:
        raise UserError(
            f"{file.parent} holds trajectories made with other settings; choose another folder or "
            "delete it"
        )
    return True
