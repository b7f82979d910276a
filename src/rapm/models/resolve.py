"""Whatever a user may name as a teacher: found, checked and fingerprinted, nothing loaded."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from rapm import toy
from rapm.config import Config
from rapm.errors import UserError
from rapm.models.checks import check_calls, check_claims, check_configs, check_yaml
from rapm.models.lora import PICKLES, find_lora
from rapm.models.parts import Part, parts_of
from rapm.models.schedulers import schedule_of
from rapm.models.sources import (
    check_checkpoint,
    check_parts,
    family_of,
    from_hub,
    layout_of_checkpoint,
)
from rapm.models.teacher import Teacher
from rapm.toy import scenes

RANDOM = "random:"
LAYOUTS = Path(__file__).parent / "layouts"  # published architectures: configs without weights
PUBLISHED = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "random:sd15",
    "stabilityai/stable-diffusion-xl-base-1.0": "random:sdxl",
    "stabilityai/stable-diffusion-3.5-medium": "random:sd35-medium",
    "stabilityai/stable-diffusion-3.5-large": "random:sd35-large",
    "Tongyi-MAI/Z-Image": "random:z-image",
    "black-forest-labs/FLUX.2-klein-base-4B": "random:flux2-klein-base-4b",
    "black-forest-labs/FLUX.2-klein-base-9B": "random:flux2-klein-base-9b",
    "black-forest-labs/FLUX.1-dev": "random:flux1-dev",
    "lodestones/Chroma1-HD": "random:chroma1",
}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


def resolve_teacher(
    source: str,
    *,
    config: str = "",
    loras: Sequence[str] = (),
    size: tuple[int, int] | None = None,
) -> Teacher:
    """Finds a teacher.

    Args:
        source: ``toy``; a folder in diffusers' layout; a single .safetensors checkpoint; a hub id,
            ``owner/name`` or ``owner/name@revision``; ``random:sd15`` or ``random:sdxl``.
        config: of a single file: a folder in diffusers' layout whose configs and tokenizers are its
            own too. Without it they are those of the model it descends from, taken from the hub or
            its cache.
        loras: ``FILE`` or ``FILE:STRENGTH`` each.
        size: of the pictures, (width, height) in pixels, where a flow's shift depends on it; the
            teacher's own when left out.

    Raises:
        UserError: there is no such teacher, or it is of no known family.
    """
    path, checkpoint, random = Path(source), None, source.startswith(RANDOM)
    if source == "toy":
        folder = toy.TEACHER
    elif random:
        folder = LAYOUTS / source.removeprefix(RANDOM)
        if not folder.is_dir():
            known = ", ".join(f"{RANDOM}{layout.name}" for layout in sorted(LAYOUTS.iterdir()))
            raise UserError(f"there is no architecture '{source}'; there are: {known}")
    elif path.suffix.lower() in PICKLES:
        raise UserError(
            f"teacher '{source}' is a pickle, which may run code when it is opened; convert it to "
            f".safetensors first "
            "(on a machine you can spare: torch.load with weights_only=True, then "
            "safetensors.torch.save_file)"
        )
    elif path.suffix.lower() == ".safetensors":
        checkpoint, folder = path, layout_of_checkpoint(path, config)
    elif path.is_dir():
        folder = path
    elif _HUB_ID.fullmatch(source):
        folder = from_hub(*source.partition("@")[::2])
    else:
        raise UserError(
            f"teacher '{source}' is neither 'toy', nor a folder, nor a .safetensors file, nor a "
            f"hub id (owner/name)"
        )
    if config and not checkpoint:
        raise UserError(
            "teacher_config goes with a single .safetensors file only; this teacher brings its own "
            "configs"
        )
    family = family_of(source, folder)
    if not random:
        check_parts(source, folder, family, weights=checkpoint is None)
    parts = tuple(find_lora(text) for text in loras)
    files = [*([checkpoint] if checkpoint else []), *(lora.file for lora in parts)]
    strengths = "".join(f"{lora.strength}," for lora in parts)
    own = parts_of(source, folder, family)
    mark = _fingerprint(own, files, strengths, weights=checkpoint is None)
    captions = scenes.captions if source == "toy" else None

    def patches() -> int:
        shape = family.latent_shape(lambda part: Part(source, folder, part).config(), size)
        return math.prod(shape[1:]) * family.packing**2 // 4

    scheduler = Part(source, folder, "scheduler").config()
    schedule = schedule_of(source, scheduler, family, patches)
    teacher = Teacher(source, folder, checkpoint, random, parts, family, schedule, mark, captions)
    check_claims(teacher, config)
    if checkpoint:
        check_yaml(teacher, checkpoint.with_suffix(".yaml"))
    check_configs(teacher)
    if checkpoint:
        check_checkpoint(checkpoint, folder, family)
    for part in own if not checkpoint and not random else ():
        if part.has_weights:
            part.check_weights()
    if not random:
        check_calls(teacher)
    return teacher


def teacher_of(config: Config) -> Teacher:
    """A run's teacher; raises as :func:`resolve_teacher` does, and for a negative prompt where the
    teacher has none."""
    teacher = resolve_teacher(
        config.teacher,
        config=config.teacher_config,
        loras=config.teacher_loras,
        size=config.trajectories.sizes()[0],
    )
    if teacher.family.guidance_is_input and config.trajectories.negative_prompt:
        raise UserError(
            f"trajectories.negative_prompt: teacher '{teacher.source}' has none, as guidance was "
            "distilled into it"
        )
    return teacher


def architecture_of(config: Config) -> Teacher:
    """A run's teacher for planning: of the published models the shipped configs are enough."""
    published = PUBLISHED.get(config.teacher.partition("@")[0])
    if not published:
        return teacher_of(config)
    teacher = resolve_teacher(published, size=config.trajectories.sizes()[0])
    return replace(teacher, source=config.teacher)


@cache
def _sample(file: Path, size: int, changed: int) -> str:
    """Of 64 KiB out of every 4 MiB: a teacher may weigh gigabytes."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        for offset in range(0, size, 1 << 22):
            stream.seek(offset)
            digest.update(stream.read(1 << 16))
    return digest.hexdigest()


def _fingerprint(parts: Sequence[Part], files: Sequence[Path], extra: str, *, weights: bool) -> str:
    """Of what a trajectory depends on: configs and tokenizers, the folder's weights if it is they
    that are loaded, and the other files that weights come from. What else is in the folder, or
    comes into the hub's cache later, does not count."""
    digest = hashlib.sha256(extra.encode())
    chosen: dict[str, Path] = {}
    for part in parts:
        if part.name == "vae" or not part.path.is_dir():
            continue
        texts = [f for f in part.path.rglob("*") if f.suffix in (".json", ".txt", ".model")]
        texts = [f for f in texts if ".index." not in f.name and f.is_file()]
        loaded = part.weights()[1] if weights and part.has_weights else []
        chosen |= {f.relative_to(part.folder).as_posix(): f for f in (*texts, *loaded)}
    for name, file in [
        *sorted(chosen.items()),
        *((f"file {k}", file) for k, file in enumerate(files)),
    ]:
        status = file.stat()
        digest.update(
            f"{name} {status.st_size} {_sample(file, status.st_size, status.st_mtime_ns)} ".encode()
        )
    return digest.hexdigest()
