"""Whatever a user may name as a teacher: found, checked and fingerprinted, nothing loaded."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, get_args

from rapm import toy
from rapm.config import Config
from rapm.errors import UserError
from rapm.io import load_metadata
from rapm.models.files import TEXT_BYTES, header_of, reading
from rapm.models.lora import PICKLES, find_lora
from rapm.models.parts import Part, parts_of
from rapm.models.sources import (
    check_checkpoint,
    check_parts,
    family_of,
    from_hub,
    layout_of_checkpoint,
)
from rapm.models.teacher import Teacher, ddim_scheduler
from rapm.schedule import PredictionType, Schedule
from rapm.toy import scenes

RANDOM = "random:"
LAYOUTS = Path(__file__).parent / "layouts"  # published architectures: configs without weights
PUBLISHED = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "random:sd15",
    "stabilityai/stable-diffusion-xl-base-1.0": "random:sdxl",
}
# Of a part's config, what would bring in other files or other weights than those looked at.
_LOADED = {"quantization_config": (None,), "transformers_weights": (None,)}
_PREDICTIONS: dict[PredictionType, str] = {
    "epsilon": "eps",
    "v_prediction": "v",
    "sample": "x0",
}
_IN_YAML = {
    "parameterization": ("scheduler", "prediction_type"),
    "linear_start": ("scheduler", "beta_start"),
    "linear_end": ("scheduler", "beta_end"),
    "timesteps": ("scheduler", "num_train_timesteps"),
    "scale_factor": ("vae", "scaling_factor"),
}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


def resolve_teacher(source: str, *, config: str = "", loras: Sequence[str] = ()) -> Teacher:
    """Finds a teacher.

    Args:
        source: ``toy``; a folder in diffusers' layout; a single .safetensors checkpoint; a hub id,
            ``owner/name`` or ``owner/name@revision``; ``random:sd15`` or ``random:sdxl``.
        config: of a single file: a folder in diffusers' layout whose configs and tokenizers are its
            own too. Without it they are those of the model it descends from, taken from the hub or
            its cache.
        loras: ``FILE`` or ``FILE:STRENGTH`` each.

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
    schedule = _schedule(source, folder)
    teacher = Teacher(source, folder, checkpoint, random, parts, family, schedule, mark, captions)
    _check_claims(teacher, config)
    if checkpoint:
        _check_yaml(teacher, checkpoint.with_suffix(".yaml"))
    _check_configs(teacher)
    if checkpoint:
        check_checkpoint(checkpoint, folder, family)
    for part in own if not checkpoint and not random else ():
        if part.has_weights:
            part.check_weights()
    return teacher


def _check_claims(teacher: Teacher, config: str) -> None:
    """Holds what a single file says of itself against the configs that go with it.

    Raises:
        UserError: they differ.
    """
    source, checkpoint = teacher.source, teacher.checkpoint
    told = header_of(checkpoint) if checkpoint else {}
    # Metadata are easily carried on by merges, so they count where nothing else was said.
    says_v = (
        checkpoint
        and not config
        and load_metadata(checkpoint).get("modelspec.prediction_type", "").startswith("v")
    )
    if any(name.startswith("edm_vpred.") for name in told):
        raise UserError(
            f"teacher '{source}' is sampled by EDM's noise levels (edm_vpred); this version "
            f"distils DDPM-style models"
        )
    if ("v_pred" in told or says_v) and teacher.schedule.prediction_type != "v_prediction":
        raise UserError(
            f"teacher '{source}' says that it predicts v, its configs say "
            f"'{teacher.schedule.prediction_type}'; name a folder "
            "whose scheduler has prediction_type v_prediction with --teacher-config"
        )
    if "ztsnr" in told and not teacher.config("scheduler").get("rescale_betas_zero_snr"):
        raise UserError(
            f"teacher '{source}' says that its noise leaves no signal at the end (ztsnr), its "
            f"configs do not; name a folder "
            "whose scheduler has rescale_betas_zero_snr true with --teacher-config"
        )


def _check_yaml(teacher: Teacher, file: Path) -> None:
    """Holds what the original programs read beside a single file against the configs.

    Raises:
        UserError: they differ.
    """
    if not file.exists():
        return
    if not file.is_file() or file.stat().st_size > TEXT_BYTES:
        raise UserError(f"{file}, beside the teacher, is no regular file, or too large")
    text = re.sub("#.*", "", file.read_text(encoding="utf-8", errors="replace"))
    told = dict(
        re.findall(r"""^[ \t-]*(\w+)[ \t]*:[ \t]*["']?([\w.+-]+)""", text, re.MULTILINE)[::-1]
    )
    if "VScaling" in text:  # as SDXL's say it
        told["parameterization"] = "v"
    for name, (part, field) in _IN_YAML.items():
        own = teacher.config(part).get(field)
        if name == "parameterization":
            own = _PREDICTIONS[teacher.schedule.prediction_type]
        if name in told and own is not None and not _same(told[name], own):
            raise UserError(
                f"teacher '{teacher.source}': {file} beside it says {name} {told[name]}, and the "
                f"{part}'s config another {field}; name a folder in diffusers' layout that says "
                "the same with --teacher-config, or move that file away"
            )


def _same(text: str, value: Any) -> bool:
    try:
        return math.isclose(float(text), float(value))
    except (TypeError, ValueError):
        return text == value


def _check_configs(teacher: Teacher) -> None:
    """Holds configs against what the family's call gives, and against each other.

    Raises:
        UserError: a part needs something else, or parts do not go together.
    """
    source, family, config = teacher.source, teacher.family, teacher.config
    for part, served in family.served.items():
        kind = Part(source, teacher.folder, part).kind().__name__
        given = {**config(part), "_class_name": kind}
        for field, values in {**_LOADED, **served}.items():
            if given.get(field, values[0]) not in values:
                raise UserError(
                    f"teacher '{source}': its {part} has {field} = {given[field]!r}; this version "
                    f"distils teachers with {' or '.join(map(repr, values))} there"
                )
    with reading(source, f"{family.network}'s or text encoders' config"):
        family.conditioning(config)
    network, vae = config(family.network), config("vae")
    channels = network.get("in_channels"), vae.get("latent_channels")
    if None in channels or not vae.get("block_out_channels"):
        raise UserError(
            f"teacher '{source}': the config of its {family.network} or vae is incomplete"
        )
    if channels[0] != channels[1]:
        raise UserError(
            f"teacher '{source}' takes {channels[0]} channels where its VAE gives {channels[1]}: "
            f"an inpainting or editing "
            "model, not a text-to-image one"
        )
    if network.get("out_channels", channels[0]) != channels[0]:
        raise UserError(
            f"teacher '{source}' predicts {network['out_channels']} channels of {channels[0]} (a "
            "variance too?); this version distils teachers that predict the latent's"
        )


def teacher_of(config: Config) -> Teacher:
    """A run's teacher; raises as :func:`resolve_teacher` does."""
    return resolve_teacher(config.teacher, config=config.teacher_config, loras=config.teacher_loras)


def architecture_of(config: Config) -> Teacher:
    """A run's teacher for planning: of the published models the shipped configs are enough."""
    published = PUBLISHED.get(config.teacher.partition("@")[0])
    if not published:
        return teacher_of(config)
    return replace(resolve_teacher(published), source=config.teacher)


def _schedule(source: str, folder: Path) -> Schedule:
    config: Any = Part(source, folder, "scheduler").config()
    if not {"beta_start", "trained_betas"} & {*config}:
        name = config.get("_class_name", "scheduler")
        raise UserError(
            f"teacher '{source}' has a {name}, which has no betas (flow matching?); this version "
            f"distils DDPM-style models"
        )
    with reading(source, "scheduler"):
        timesteps = config.get("num_train_timesteps", 1000)
        if isinstance(timesteps, int) and timesteps > 1 << 20:  # each takes memory
            raise ValueError(f"it has {timesteps:,} timesteps")
        scheduler = ddim_scheduler(config)
        kind, timesteps = scheduler.config["prediction_type"], len(scheduler.alphas_cumprod)
    if kind not in get_args(PredictionType) or timesteps != 1000:
        raise UserError(
            f"teacher '{source}' predicts '{kind}' over {timesteps} timesteps; "
            f"this version distils {', '.join(get_args(PredictionType))} over 1000"
        )
    if kind == "epsilon" and scheduler.config["rescale_betas_zero_snr"]:
        raise UserError(
            f"teacher '{source}' predicts the noise where there is nothing but noise (zero "
            f"terminal SNR with epsilon)"
        )
    return Schedule.of(scheduler.alphas_cumprod, scheduler.final_alpha_cumprod, kind)


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
