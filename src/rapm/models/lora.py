"""LoRAs of others, fused into a teacher: W + strength * alpha / rank * up @ down in every layer.

Read are the names of diffusers and peft, of diffusers before peft, and of kohya's sd-scripts. The
last go by diffusers' modules or by the original network's. Every tensor finds its place, or the
file is refused.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rapm.errors import UserError, first_line
from rapm.io import load_metadata, load_tensors
from rapm.memory import is_out_of_memory
from rapm.models import Family
from rapm.models.sources import header_of

PICKLES = (".ckpt", ".pt", ".pth", ".bin")
_HALF = re.compile(r"(.+)[._]lora(?:_linear_layer)?[._](A|B|down|up)(?:\.default)?\.weight")
_ALPHA = re.compile(r"(.+?)(?:[._]lora)?\.alpha")
_KINDS = {"dora": "a DoRA", "magnitude": "a DoRA", "hada": "a LoHa", "lokr": "a LoKr"}
_PAIR = ("down", "up")


@dataclass(frozen=True)
class Lora:
    """A LoRA that is fused into the teacher before anything else."""

    file: Path
    strength: float


def find_lora(text: str, *, pickles: bool = False) -> Lora:
    """``FILE`` or ``FILE:STRENGTH``.

    Args:
        pickles: whether a pickle will do, of which tensors alone are read.

    Raises:
        UserError: there is no such file, or it is no plain LoRA.
    """
    name, _, last = text.rpartition(":")
    try:
        file, strength = (Path(name), float(last)) if name else (Path(text), 1.0)
    except ValueError:  # the colon belongs to the path
        file, strength = Path(text), 1.0
    if file.suffix.lower() in PICKLES and not pickles:
        raise UserError(
            f"LoRA {file} is a pickle, which may run code when it is opened; convert it to "
            f".safetensors first"
        )
    if not file.is_file():
        raise UserError(f"there is no LoRA file {file}; write FILE or FILE:STRENGTH")
    if not math.isfinite(strength):
        raise UserError(f"LoRA {file}: its strength is {strength}, which is no number")
    header = read_lora(file) if file.suffix.lower() in PICKLES else header_of(file)
    if not header:
        raise UserError(f"LoRA {file} holds no tensor")
    for name, value in header.items():
        if _HALF.fullmatch(name) and not value.is_floating_point():
            raise UserError(
                f"LoRA {file}: '{name}' is of whole or complex numbers; take it in float16, "
                "bfloat16 or float32"
            )
        if not (_HALF.fullmatch(name) or _ALPHA.fullmatch(name)):
            kind = next((kind for mark, kind in _KINDS.items() if mark in name), "")
            raise UserError(
                f"LoRA {file} holds '{name}', which is no plain LoRA's"
                + (kind and f" but {kind}'s")
            )
    return Lora(file, strength)


def read_lora(file: Path) -> dict[str, Tensor]:
    """All tensors of a LoRA's file; of a pickle's, which builds nothing else.

    Raises:
        UserError: a pickle is damaged, or holds anything but tensors by name.
    """
    if file.suffix.lower() not in PICKLES:
        return load_tensors(file)
    try:
        told = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # of a file that is anything
        raise UserError(f"LoRA {file} holds no plain tensors: {first_line(error)}") from None
    if not isinstance(told, dict):
        raise UserError(f"LoRA {file} holds no tensors by name")
    if len(told) == 1 and isinstance(inner := next(iter(told.values())), dict):  # "state_dict"
        told = inner
    if not all(isinstance(n, str) and isinstance(v, Tensor) for n, v in told.items()):
        raise UserError(f"LoRA {file} holds something else than tensors by name")
    return {name.removeprefix("base_model.model."): value for name, value in told.items()}


@torch.no_grad()
def fuse(lora: Lora, models: Mapping[str, nn.Module], family: Family, source: str) -> None:
    """Adds a LoRA to the weights of a teacher's parts.

    Args:
        models: the parts that are loaded; what belongs to the others waits for them.
        source: the teacher, as the user gave it.

    Raises:
        UserError: a tensor finds no place, has another shape than its layer, or is not finite.
    """
    refused = f"LoRA {lora.file} does not fit teacher '{source}'"
    try:
        _fuse(lora, models, family, refused)
    except UserError:
        raise
    except Exception as error:  # of tensors and metadata that are anything
        if is_out_of_memory(error):
            raise
        raise UserError(
            f"{refused}: it is damaged ({type(error).__name__}: {first_line(error)})"
        ) from None


def _fuse(lora: Lora, models: Mapping[str, nn.Module], family: Family, refused: str) -> None:
    told = {} if lora.file.suffix.lower() in PICKLES else load_metadata(lora.file)
    described = json.loads(told.get("lora_adapter_metadata", "{}"))
    grouped: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, value in read_lora(lora.file).items():
        layer, half = _split(name)
        grouped[layer][half] = value
    places = {part: _names(part, model, family) for part, model in models.items()}
    for layer, halves in grouped.items():
        part = _part_of(layer, family)
        if part is None:
            raise UserError(f"{refused}: {layer} belongs to no part of it")
        if not halves.keys() >= {*_PAIR}:
            raise UserError(f"{refused}: of {layer} there is one half alone")
        if part not in models:
            continue
        if layer not in places[part]:
            lost = [name for name in grouped if _part_of(name, family) == part]
            lost = [name for name in lost if name not in places[part]]
            raise UserError(
                f"{refused}: {len(lost)} of its layers found no place in {part}, {layer} for one"
            )
        path, module = places[part][layer]
        down, up = (halves[half].to(module.weight.device, torch.float32) for half in _PAIR)
        alpha = halves.get("alpha")
        scale = _scale(described, part, path, len(down)) if alpha is None else alpha / len(down)
        _add(module.weight, lora.strength * float(scale), down, up, f"{refused}: {layer}")


def _split(name: str) -> tuple[str, str]:
    """A tensor's layer, without the old processors' spelling, and which of its three it is."""
    found = _HALF.fullmatch(name)
    layer, half = found.groups() if found else (_ALPHA.sub(r"\1", name), "alpha")
    layer = re.sub(r"\.processor(?=\.)", "", layer)
    if layer.startswith("text_encoder"):
        layer = re.sub(r"\.to_(\w+)$", r".\1_proj", layer)
    return layer, {"A": "down", "B": "up"}.get(half, half)


def _part_of(layer: str, family: Family) -> str | None:
    """Whose layer it is, by its prefix."""
    encoders = [part for part in family.text_parts if part.startswith("text_encoder")]
    for part in (family.network, *encoders):
        if layer.startswith((f"{part}.", *_prefixes(part, family))):
            return part
    return (
        family.network if layer.startswith(("down_blocks.", "mid_block.", "up_blocks.")) else None
    )


def _prefixes(part: str, family: Family) -> tuple[str, ...]:
    """kohya's."""
    if part == family.network:
        return ("lora_unet_",)
    return ("lora_te2_",) if part.endswith("_2") else ("lora_te1_", "lora_te_")


def _names(part: str, model: nn.Module, family: Family) -> dict[str, tuple[str, Any]]:
    """Every name that a file may give a layer of this part: its path in the model, and itself."""
    paths = {p: m for p, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    names: dict[str, tuple[str, Any]] = {}
    forms = family.lora_names(model) if part == family.network else ({p: p for p in paths},)
    for path, module in paths.items():
        bare = path.removeprefix("text_model.")  # which transformers 5 leaves out
        dotted = [f"{part}.{path}", path, f"{part}.{bare}", f"{part}.text_model.{bare}"]
        if path.endswith(".to_out.0"):  # whose number old processors leave out
            dotted += [name.removesuffix(".0") for name in dotted]
        flat = {form[path].replace(".", "_") for form in forms if path in form}
        flat |= {f"text_model_{bare}".replace(".", "_")} if part != family.network else set()
        kohya = (f"{prefix}{name}" for prefix in _prefixes(part, family) for name in flat)
        names |= dict.fromkeys((*dotted, *kohya), (path, module))
    return names


def _scale(described: Mapping[str, Any], part: str, path: str, rank: int) -> float:
    """By the settings that diffusers writes into a file, read as peft does; else 1."""
    own = {key.removeprefix(f"{part}."): value for key, value in described.items()}
    by_layer = own.get("alpha_pattern") or {}
    matching = (a for key, a in by_layer.items() if re.fullmatch(rf"(.*\.)?({key})", path))
    alpha = next(matching, own.get("lora_alpha", rank))
    return alpha / (math.sqrt(rank) if own.get("use_rslora") else rank)


def _add(weight: Tensor, scale: float, down: Tensor, up: Tensor, what: str) -> None:
    """weight += scale * up @ down, of linear and convolution layers alike."""
    fits = up.flatten(1).shape == (len(weight), len(down)) and down[0].numel() == weight[0].numel()
    if not fits or down.shape[1] != weight.shape[1]:
        raise UserError(
            f"{what} has shapes {[*down.shape]} and {[*up.shape]} for a layer of {[*weight.shape]}"
        )
    update = scale * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    if not update.isfinite().all():
        raise UserError(f"{what} is not finite: the file is damaged, or the strength too large")
    weight.copy_(weight.float() + update)
