"""What a teacher's configs say, held against each other, against what stands beside them, and
against what will be asked of its parts. No weights are loaded."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.nn.functional import pixel_shuffle

from rapm.errors import UserError
from rapm.io import load_metadata
from rapm.models.files import TEXT_BYTES, header_of, read_json, reading
from rapm.models.parts import Part
from rapm.models.teacher import Teacher
from rapm.schedule import PredictionType

MOST_LAYERS = 1000  # of a kind, in a config; each takes a while to build
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


def check_claims(teacher: Teacher, config: str) -> None:
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


def check_yaml(teacher: Teacher, file: Path) -> None:
    """Holds what the original programs read beside a single file against the configs.

    Raises:
        UserError: they differ.
    """
    if not file.exists():
        return
    if not file.is_file() or file.stat().st_size > TEXT_BYTES:
        raise UserError(f"{file}, beside the teacher, is no regular file, or too large")
    try:
        told = dict(_scalars([yaml.safe_load(file.read_bytes())]))
    except (yaml.YAMLError, UnicodeError, ValueError, RecursionError):
        raise UserError(
            f"{file}, beside the teacher, is no YAML that can be read; move it away if it has "
            "nothing to do with it"
        ) from None
    if any("VScaling" in str(value) for value in told.values()):  # as SDXL's say it
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


def _scalars(
    table: dict[Any, Any] | list[Any], known: set[int] | None = None
) -> Iterator[tuple[str, Any]]:
    """Every key with its value, however deep; the last of equal keys counts."""
    known = set() if known is None else known
    if id(table) in known:  # YAML may point to what was there before
        return
    known.add(id(table))
    for key, value in table.items() if isinstance(table, dict) else enumerate(table):
        if isinstance(value, dict | list):
            yield from _scalars(value, known)
        else:
            yield str(key), value


def _same(told: Any, value: Any) -> bool:
    try:
        return math.isclose(float(told), float(value))
    except (TypeError, ValueError):
        return str(told) == value


def check_configs(teacher: Teacher) -> None:
    """Holds configs against what the family's call gives, and against each other.

    Raises:
        UserError: a part needs something else, or parts do not go together.
    """
    source, family, config = teacher.source, teacher.family, teacher.config
    for part, served in family.served.items():
        if part == "pipeline":
            given: dict[str, Any] = read_json(teacher.folder / "model_index.json")
        else:
            kind = Part(source, teacher.folder, part).kind().__name__
            given = {**config(part), "_class_name": kind}
        for field, values in {**_LOADED, **served}.items():
            if given.get(field, values[0]) not in values:
                raise UserError(
                    f"teacher '{source}': its {part} has {field} = {given[field]!r}; this version "
                    f"distils teachers with {' or '.join(map(repr, values))} there"
                )
    for part in (family.network, *(part for part in family.served if part != "pipeline")):
        _check_counts(source, part, config(part))
    with reading(source, f"{family.network}'s or text encoders' config"):
        family.conditioning(config)
    network, vae = config(family.network), config("vae")
    takes, gives = network.get("in_channels"), vae.get("latent_channels")
    if takes is None or gives is None or not vae.get("block_out_channels"):
        raise UserError(
            f"teacher '{source}': the config of its {family.network} or vae is incomplete"
        )
    _check_latents(source, vae)
    if takes != gives * family.packing**2:
        raise UserError(
            f"teacher '{source}' takes {takes} channels where its VAE gives {gives}: "
            f"an inpainting or editing "
            "model, not a text-to-image one"
        )
    if (network.get("out_channels") or takes) != takes:
        raise UserError(
            f"teacher '{source}' predicts {network['out_channels']} channels of {takes} (a "
            "variance too?); this version distils teachers that predict the latent's"
        )


def _check_counts(source: str, part: str, config: Mapping[str, Any]) -> None:
    """Numbers of layers that nobody has, and that would be built one after the other."""
    for name, value in config.items():
        if "layers" in name and any(number > MOST_LAYERS for number in _numbers(value)):
            raise UserError(
                f"teacher '{source}': its {part} has {name} = {value!r}; the config is damaged"
            )


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, list):
        for each in value:
            yield from _numbers(each)
    elif isinstance(value, int | float):
        yield value


def _check_latents(source: str, vae: Mapping[str, Any]) -> None:
    """How latents are scaled."""
    factor = vae.get("scaling_factor", 1.0)
    if not isinstance(factor, int | float) or not 0 < factor < math.inf:
        raise UserError(
            f"teacher '{source}': its vae has scaling_factor = {factor!r}, which is no positive "
            "number"
        )
    for name in ("latents_mean", "latents_std"):
        values = vae.get(name)
        if values is not None and len([*_numbers(values)]) != vae["latent_channels"]:
            raise UserError(
                f"teacher '{source}': its vae has {name} = {values!r} for "
                f"{vae['latent_channels']} channels"
            )


def check_calls(teacher: Teacher) -> None:
    """Calls every part once, on tensors without contents: configs of odd types, and sizes that do
    not go together, show now and not after the rollout. Once for a config, as with layouts.

    Raises:
        UserError: a call fails.
    """
    parts = (teacher.family.network, "vae", *teacher.family.text_parts)
    parts = [part for part in parts if not part.startswith("tokenizer")]
    files = [teacher.folder / part / "config.json" for part in parts]
    key = (teacher.folder, *(file.stat().st_mtime_ns for file in files if file.is_file()))
    if key not in _CALLED:
        _call_all(teacher)
        _CALLED.add(key)


_CALLED: set[tuple[Any, ...]] = set()


def _call_all(teacher: Teacher) -> None:
    family, source = teacher.family, teacher.source

    def layout(part: str) -> Any:
        return Part(source, teacher.folder, part).layout()

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device="meta")

    with torch.no_grad():
        with reading(source, family.network):
            try:
                size = teacher.size()
            except UserError:  # it has none of its own
                size = (512, 512)
            z = empty(1, *family.latent_shape(teacher.config, size))
            shapes = family.conditioning(teacher.config).items()
            given = {name: empty(1, *shape) for name, shape in shapes}
            given |= {name: x.to("meta") for name, x in family.of_picture(*size, 1.0).items()}
            family.call(layout(family.network), z, torch.empty(1, device="meta"), given)
        with reading(source, "vae"):
            layout("vae").decode(pixel_shuffle(z, family.packing), return_dict=False)
        for part in family.text_parts:
            if part.startswith("text_encoder"):
                with reading(source, part):
                    layout(part)(torch.zeros((1, 8), dtype=torch.int64, device="meta"))
