"""The teacher's sampling trajectories: rolled out once, stored, read back while training."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rapm.errors import UserError
from rapm.io import load_tensors, save_tensors, sha256, under_prefix, with_prefix, write_json
from rapm.objective import Conditioning, Denoiser
from rapm.progress import track
from rapm.prompts import Prompt
from rapm.schedule import Grid, Schedule
from rapm.versions import versions

MANIFEST, CONDITIONING = "manifest.json", "conditioning.safetensors"


def guided(denoiser: Denoiser, unconditional: Conditioning, guidance_scale: float) -> Denoiser:
    """Classifier-free guidance: uncond + scale (cond - uncond), both in one pass; scale 1 asks for
    no second half.

    ``unconditional`` is one prompt, [1, ...] each; what it does not name (a picture's size) is the
    same for both.
    """
    if guidance_scale == 1:
        return denoiser

    def both(z: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        merged = {
            k: torch.cat([unconditional.get(k, v).to(v).expand_as(v), v])
            for k, v in conditioning.items()
        }
        without, with_ = denoiser(torch.cat([z, z]), torch.cat([t, t]), merged).chunk(2)
        return without + guidance_scale * (with_ - without)

    return both


@torch.no_grad()
def rollout(
    denoiser: Denoiser,
    schedule: Schedule,
    grid: Grid,
    z: Tensor,
    conditioning: Conditioning,
    slots: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The teacher's trajectory from noise on, M fine DDIM steps a slot.

    Args:
        denoiser: the teacher, guided.
        z: noise z~_N, float32 [B, C, H, W].
        conditioning: of the B prompts.
        slots: the first k of the N; None is all.

    Returns:
        coarse positions, float32 [B, k + 1, C, H, W], the noise last, and nudged positions, float32
        [B, k, C, H, W], the first slot's last. With k = N they are z~_n at [:, n] and what starts
        slot n at [:, n]; with less, count from the end.
    """
    coarse, nudged = [z], []
    for k, (t, s) in enumerate(
        pairwise(grid.fine[: (grid.slots if slots is None else slots) * grid.fine_steps + 1])
    ):
        z = schedule.step(z, denoiser(z, torch.full((len(z),), t), conditioning), t, s)
        within = k % grid.fine_steps + 1
        if within == grid.delta:
            nudged.append(z)
        if within == grid.fine_steps:
            coarse.append(z)
    return torch.stack(coarse[::-1], 1), torch.stack(nudged[::-1], 1) if nudged else z.new_empty(
        len(z), 0, *z.shape[1:]
    )


def picture_noise(seed: int, shape: Sequence[int]) -> Tensor:
    """The noise picture ``seed`` starts from; no trajectory of any seed starts from the same."""
    return noise(seed, -1, shape)


def noise(seed: int, index: int, shape: Sequence[int]) -> Tensor:
    """The noise trajectory ``index`` of ``seed`` starts from, float32; drawn on the CPU, alone, so
    that no batch matters."""
    digest = hashlib.sha256(f"rapm noise {seed} {index}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randn(*shape, generator=generator)


def noise_of(trajectory: int, prompts: Sequence[Prompt], seed: int) -> tuple[int, int]:
    """Seed and index of the noise of trajectory k, with n prompts: (seed, k), or (own, -2 - k // n)
    if its prompt has its own.

    Indices below -1 are kept for those prompts: where ``own`` is ``seed``, their noise is still
    that of no other trajectory and of no picture. Two prompts with the same seed of their own do
    start from the same noise, as they were told to.
    """
    pass_, prompt = divmod(trajectory, len(prompts))
    own = prompts[prompt].seed
    return (seed, trajectory) if own is None else (own, -2 - pass_)


@dataclass(frozen=True)
class Trajectory:
    """One stored trajectory; positions float32 on the CPU.

    Attributes:
        coarse, nudged: as :func:`rollout` returns them, [k + 1, C, H, W] and [k, C, H, W].
        conditioning: of its prompt, without a batch axis.
        prompt: its text.
        seed, index: its noise is ``noise(seed, index)``.
    """

    coarse: Tensor
    nudged: Tensor
    conditioning: Conditioning
    prompt: str
    seed: int
    index: int


class TrajectoryStore:
    """A folder of trajectories: shards, prompts, and a manifest that comes last. Open it with
    :meth:`open`.

    Attributes:
        unconditional: conditioning that the teacher's guidance leads away from, [1, ...].
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest
        self.shard_size: int = manifest["shard_size"]
        self._shards: dict[int, Any] = {}
        self._prompts = stored_prompts(folder)
        tensors = load_tensors(folder / CONDITIONING)
        self._of_prompt, self._of_size = (
            under_prefix("prompt", tensors),
            under_prefix("size", tensors),
        )
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
                f"there is no finished trajectory store in {folder}; make one with 'rapm "
                f"trajectories'"
            )
        for name, digest in manifest["files"].items():
            if not (folder / name).is_file():
                raise UserError(
                    f"trajectory store {folder} is damaged: {name} is missing; delete {MANIFEST}, "
                    "then run 'rapm trajectories' again to fill the gap"
                )
            if sha256(folder / name) != digest:
                raise UserError(
                    f"trajectory store {folder} is damaged: {name} is not what was written; delete "
                    f"that file and "
                    f"{MANIFEST}, then run 'rapm trajectories' again to fill the gap"
                )
        return cls(folder, manifest)

    def __len__(self) -> int:
        return self.manifest["count"]

    def __getitem__(self, index: int) -> Trajectory:
        if not 0 <= index < len(self):
            raise IndexError(f"trajectory {index} of {len(self)}")
        shard, row = divmod(index, self.shard_size)
        if shard not in self._shards:
            self._shards[shard] = safe_open(self.folder / shard_name(shard), "pt")
        file = self._shards[shard]
        prompt, size = (
            index % len(self._prompts),
            size_index(index, len(self._prompts), self.manifest["sizes"]),
        )
        noise_seed, noise_index = noise_of(index, self._prompts, self.manifest["seed"])
        of_prompt, of_size = self._of_prompt.items(), self._of_size.items()
        return Trajectory(
            coarse=file.get_tensor(f"coarse.{row}"),
            nudged=file.get_tensor(f"nudged.{row}"),
            conditioning={key: value[prompt] for key, value in of_prompt}
            | {key: value[size] for key, value in of_size},
            prompt=self._prompts[prompt].text,
            seed=noise_seed,
            index=noise_index,
        )


def stored_prompts(folder: Path) -> list[Prompt]:
    """The prompts of a finished store, in their order; [] when there is none."""
    file = folder / "prompts.json"
    return (
        [Prompt(**each) for each in json.loads(file.read_text(encoding="utf-8"))]
        if file.is_file()
        else []
    )


def size_index(index: int, prompts: int, sizes: int) -> int:
    """Which size a trajectory has: in turn, one further each time the prompts begin again, so that
    each prompt sees all."""
    return (index % prompts + index // prompts) % sizes


def shard_name(shard: int) -> str:
    return f"shard-{shard:05d}.safetensors"


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a finished store, or None.

    Raises:
        UserError: it is there and cannot be read.
    """
    file = folder / MANIFEST
    if not file.is_file():
        return None
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        manifest = None
    if (
        not isinstance(manifest, dict)
        or not {"files", "fingerprint", "facts", "shard_size", "count", "seed", "sizes"}
        <= manifest.keys()
    ):
        raise UserError(
            f"{file} is damaged or of another version; delete it and run 'rapm trajectories' "
            f"again: finished shards are kept"
        )
    return manifest


def check_facts(folder: Path, facts: dict[str, Any], *, complete: bool = False) -> bool:
    """Whether there is a finished store. ``facts`` may be some of those it was made from;
    ``complete`` says that they are all, by which shards of an unfinished one are told too.

    Raises:
        UserError: it was made from other facts.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        if complete:
            for shard in folder.glob("shard-*.safetensors"):
                _finished_shard(shard, fingerprint(facts))
        return False
    made = manifest["facts"]
    changed = [name for name in facts if made.get(name) != facts[name]]
    if changed == ["rapm"]:
        raise UserError(
            f"{folder} holds trajectories made with rapm {made.get('rapm')}, this is "
            f"{facts['rapm']}; go on with that version, "
            "choose another folder or delete it"
        )
    if changed:
        raise UserError(
            f"{folder} holds trajectories made with another {', '.join(changed)}; choose another "
            f"folder or delete it"
        )
    return True


def fingerprint(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def make_store(
    folder: Path,
    denoiser: Denoiser,
    schedule: Schedule,
    grid: Grid,
    *,
    slots: int,
    prompts: Sequence[Prompt],
    conditioning: Conditioning,
    unconditional: Conditioning,
    sizes: Sequence[tuple[Sequence[int], Conditioning]],
    count: int,
    seed: int,
    batch_size: int,
    shard_size: int,
    facts: dict[str, Any],
    device: str,
) -> TrajectoryStore:
    """Rolls trajectories out and stores them; goes on where an earlier call was stopped before the
    manifest was written.

    Args:
        folder: the store's; made when it is not there.
        denoiser: the teacher, guided.
        slots: how many of the grid's are rolled out, from the noise on.
        prompts: trajectory k has prompt k modulo their number, and the noise that :func:`noise_of`
            says.
        conditioning: of the prompts, [n, ...].
        unconditional: what the teacher was guided away from, [1, ...]; kept for training.
        sizes: of the pictures: each a latent's shape (C, H, W), and what of the conditioning
            depends on it, [1, ...].
        batch_size: trajectories of one size side by side.
        shard_size: trajectories a file.
        facts: everything the trajectories depend on, as JSON; two stores with equal facts hold the
            same trajectories.

    Raises:
        UserError: the folder holds trajectories made from other facts, or a position is not a
            number.
    """
    mark = fingerprint(facts)
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, count, shard_size)
    done = [_finished_shard(folder / shard_name(shard), mark) for shard in range(len(starts))]
    with track(range(count), "trajectories", initial=sum(shard_size for d in done if d)) as bar:
        for shard, start in enumerate(starts):
            if done[shard]:
                continue
            tensors = {}
            rows = range(start, min(start + shard_size, count))
            for size, (shape, of_size) in enumerate(sizes):
                own = [k for k in rows if size_index(k, len(prompts), len(sizes)) == size]
                for batch in (
                    own[first : first + batch_size] for first in range(0, len(own), batch_size)
                ):
                    z = torch.stack([noise(*noise_of(k, prompts, seed), shape) for k in batch]).to(
                        device
                    )
                    of_prompt = {
                        name: value[[k % len(prompts) for k in batch]]
                        for name, value in conditioning.items()
                    }
                    repeated = {
                        name: value.expand(len(batch), *value.shape[1:])
                        for name, value in of_size.items()
                    }
                    coarse, nudged = rollout(
                        denoiser, schedule, grid, z, of_prompt | repeated, slots
                    )
                    if not coarse.isfinite().all():
                        raise UserError(
                            f"trajectories {batch[0]} to {batch[-1]} are not finite; nothing of "
                            f"them was stored: the teacher's "
                            "weights are damaged, or too large for float16 (take precision "
                            "bfloat16 or float32)"
                        )
                    for row, k in enumerate(batch):
                        tensors[f"coarse.{k - start}"], tensors[f"nudged.{k - start}"] = (
                            coarse[row].cpu(),
                            nudged[row].cpu(),
                        )
                    bar.update(len(batch))
            save_tensors(folder / shard_name(shard), tensors, {"fingerprint": mark})
    write_json(folder / "prompts.json", [asdict(prompt) for prompt in prompts])
    of_size = {name: torch.cat([own[name] for _, own in sizes]) for name in sizes[0][1]}
    known = (
        with_prefix("prompt", conditioning)
        | with_prefix("size", of_size)
        | with_prefix("unconditional", unconditional)
    )
    save_tensors(folder / CONDITIONING, known, {"fingerprint": mark})
    names = [*(shard_name(shard) for shard in range(len(starts))), "prompts.json", CONDITIONING]
    manifest = {
        "fingerprint": mark,
        "facts": facts,
        "count": count,
        "shard_size": shard_size,
        "seed": seed,
        "sizes": len(sizes),
        "versions": versions(),  # told, not compared
        "files": {name: sha256(folder / name) for name in names},
    }
    write_json(folder / MANIFEST, manifest)
    return TrajectoryStore(folder, manifest)


def _finished_shard(file: Path, mark: str) -> bool:
    """Whether a shard of an unfinished store is whole.

    Raises:
        UserError: it belongs to other facts.
    """
    if not file.is_file():
        return False
    try:
        with safe_open(file, "pt") as shard:
            found = (shard.metadata() or {}).get("fingerprint")
    except SafetensorError:
        return False
    if found != mark:
        raise UserError(
            f"{file.parent} holds trajectories made with other settings; choose another folder or "
            f"delete it"
        )
    return True
