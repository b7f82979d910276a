"""LoRAs of others: every number of every layer counts, in each naming that is read."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from conftest import SMALL
from ldm import unet_name
from rapm.errors import UserError
from rapm.models import Family
from rapm.models.lora import find_lora, fuse
from rapm.models.resolve import resolve_teacher

STRENGTH = 0.7
PATTERNS = {  # rank and alpha of the k-th layer; None: the file does not say
    "alpha is the rank, ranks differ": lambda k: ((2, 4, 8)[k % 3], None),
    "one rank, alphas differ": lambda k: (4, (1.0, 2.0, 4.0)[k % 3]),
    "half without alpha": lambda k: (4, (1.0, None)[k % 2]),
}
Models = dict[str, Any]  # by part
Layers = dict[str, dict[str, nn.Module]]  # by part, by path


def loaded(folder: Path) -> tuple[Models, Family]:
    teacher = resolve_teacher(str(folder))
    encoders = [part for part in teacher.family.text_parts if part.startswith("text_encoder")]
    parts = [*encoders, "unet"]
    pipeline = teacher.load(parts, torch.float32, "cpu")
    return {part: getattr(pipeline, part) for part in parts}, teacher.family


def fused(models: Models, family: Family, file: Path, strength: float = 1.0) -> Models:
    """The same models with a LoRA file in them."""
    grown = copy.deepcopy(models)
    fuse(find_lora(f"{file}:{strength}"), grown, family, "T")
    return grown


def adapted(models: Models, *, attention_only: bool) -> Layers:
    """What a LoRA goes to: attention's linear layers, or convolutions and the rest besides."""
    kinds = (nn.Linear,) if attention_only else (nn.Linear, nn.Conv2d)
    layers: Layers = {}
    for part, model in models.items():
        wanted = r".*\.(q|k|v|out)_proj" if part != "unet" else r".*attn\d\.to_(q|k|v|out\.0)"
        if not attention_only:
            wanted += r"|.*\.(conv1|conv2|conv_shortcut|proj_in|time_emb_proj|fc1)|.*samplers.*conv"
        layers[part] = {
            path: module
            for path, module in model.named_modules()
            if isinstance(module, kinds) and re.fullmatch(wanted, path)
        }
    return layers


def bare(path: str) -> str:
    return path.removeprefix("text_model.")


def diffusers_name(part: str, path: str, config: Any) -> str:
    return f"{part}.{path}.lora_*"


def old_name(part: str, path: str, config: Any) -> str:
    """Of diffusers before peft: attention processors for the UNet."""
    if part != "unet":
        return f"{part}.text_model.{bare(path)}.lora_linear_layer.*"
    head, last = re.fullmatch(r"(.*attn\d)\.(to_\w+)(?:\.0)?", path).groups()  # type: ignore[union-attr]
    return f"unet.{head}.processor.{last}_lora.*"


def kohya_name(part: str, path: str, config: Any) -> str:
    if part == "unet":
        return "lora_unet_" + path.replace(".", "_") + ".lora_*"
    prefix = {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}[part]
    prefix = prefix if config.get("addition_embed_type") else "lora_te_"
    return prefix + "text_model_" + bare(path).replace(".", "_") + ".lora_*"


def original_name(part: str, path: str, config: Any) -> str:
    """kohya's for SDXL: the UNet's layers as in the original network."""
    renamed = (
        unet_name(f"{path}.weight", config).removesuffix(".weight") if part == "unet" else path
    )
    return kohya_name(part, renamed, config)


NAMINGS: dict[str, tuple[Callable[[str, str, Any], str], tuple[str, str]]] = {
    "diffusers": (diffusers_name, ("A", "B")),
    "diffusers before peft": (old_name, ("down", "up")),
    "kohya": (kohya_name, ("down", "up")),
    "kohya, original layers": (original_name, ("down", "up")),
}


def made(
    layers: Layers, naming: str, pattern: Callable[[int], tuple[int, float | None]], config: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A LoRA file's tensors, and by closed form what each layer's weight is to grow by."""
    name_of, halves = NAMINGS[naming]
    generator = torch.Generator().manual_seed(0)
    tensors, growth = {}, {}
    every = [(part, path, m) for part, own in layers.items() for path, m in own.items()]
    for k, (part, path, module) in enumerate(every):
        weight: Any = module.weight
        rank, alpha = pattern(k)
        down = torch.randn(rank, *weight.shape[1:], generator=generator) * 0.3
        up = torch.randn(len(weight), rank, *[1] * (weight.ndim - 2), generator=generator) * 0.3
        name = name_of(part, path, config)
        for half, value in zip(halves, (down, up), strict=True):
            tensors[f"{name.replace('*', half)}.weight"] = value
        if alpha is not None:
            tensors[re.sub(r"\.lora(_linear_layer)?[._]\*$|_lora\.\*$", "", name) + ".alpha"] = (
                torch.tensor(alpha)
            )
        scale = 1.0 if alpha is None else alpha / rank
        growth[f"{part}.{path}"] = (
            STRENGTH
            * scale
            * torch.einsum("or,ri->oi", up.flatten(1), down.flatten(1)).reshape(weight.shape)
        )
    return tensors, growth


def assert_grown(before: Models, after: Models, growth: dict[str, Tensor]) -> None:
    for part, model in after.items():
        old = before[part].state_dict()
        for name, value in model.state_dict().items():
            expected = old[name] + growth.get(f"{part}.{name.removesuffix('.weight')}", 0)
            assert torch.allclose(value, expected, atol=1e-6), f"{part}.{name}"


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("naming", NAMINGS)
def test_every_layer_grows_by_strength_alpha_over_rank(
    small_teachers: dict[str, Path], tmp_path: Path, kind: str, naming: str
) -> None:
    before, family = loaded(small_teachers[kind])
    layers = adapted(before, attention_only=naming == "diffusers before peft")
    config, file = before["unet"].config, tmp_path / "l.safetensors"
    for pattern in PATTERNS.values():
        tensors, growth = made(layers, naming, pattern, config)
        assert len(growth) > 20
        save_file(tensors, file)
        assert_grown(before, fused(before, family, file, STRENGTH), growth)


def test_a_convolution_of_one_by_one_and_a_linear_layer_take_each_others_loras(
    small_teachers: dict[str, Path], tmp_path: Path
) -> None:
    before, family = loaded(small_teachers["sd15"])
    path = "mid_block.attentions.0.proj_in"
    weight = before["unet"].get_submodule(path).weight
    down, up = torch.randn(2, weight.shape[1]), torch.randn(len(weight), 2)
    name, file = f"lora_unet_{path.replace('.', '_')}", tmp_path / "l.safetensors"
    save_file({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}, file)
    grown = {f"unet.{path}": (up @ down).reshape(weight.shape)}
    assert_grown(before, fused(before, family, file), grown)


def test_what_diffusers_writes_of_alpha_counts(
    small_teachers: dict[str, Path], tmp_path: Path
) -> None:
    before, family = loaded(small_teachers["sd15"])
    layers = {"unet": dict(list(adapted(before, attention_only=True)["unet"].items())[:3])}
    tensors, growth = made(layers, "diffusers", lambda k: (4, None), None)
    first, second, third = growth
    file, own = tmp_path / "l.safetensors", {"unet.r": 4, "unet.lora_alpha": 8}
    for root, rslora in ((4.0, False), (2.0, True)):
        said = own | {"unet.alpha_pattern": {first.removeprefix("unet."): 2}}
        said |= {"unet.use_rslora": rslora}
        save_file(tensors, file, {"format": "pt", "lora_adapter_metadata": json.dumps(said)})
        scales = {first: 2 / root, second: 8 / root, third: 8 / root}
        expected = {name: value * scales[name] for name, value in growth.items()}
        assert_grown(before, fused(before, family, file, STRENGTH), expected)


def test_what_does_not_fit_is_refused_by_name(
    small_teachers: dict[str, Path], tmp_path: Path
) -> None:
    (models, family), file = loaded(small_teachers["sd15"]), tmp_path / "l.safetensors"
    name = "lora_unet_mid_block_attentions_0_proj_in"
    weight = models["unet"].mid_block.attentions[0].proj_in.weight
    down, up = torch.ones(2, weight.shape[1]), torch.ones(len(weight), 2)

    def refused(tensors: dict[str, Tensor]) -> str:
        save_file({name: value.contiguous() for name, value in tensors.items()}, file)
        with pytest.raises(UserError) as error:
            fused(models, family, file)
        return str(error.value).removeprefix(f"LoRA {file} does not fit teacher 'T': ")

    def both(name: str, down: Tensor, up: Tensor) -> dict[str, Tensor]:
        return {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}

    assert (
        refused(both(name, down, up * torch.nan))
        == f"{name} is not finite: the file is damaged, or the strength too large"
    )
    assert refused(both(name, down[:, 1:], up)).startswith(f"{name} has shapes [2, ")
    assert refused(both("lora_unet_conv_nowhere", down, up)) == (
        "1 of its layers found no place in unet, lora_unet_conv_nowhere for one"
    )
    assert refused(both("lora_te2_x", down, up)) == "lora_te2_x belongs to no part of it"
    assert refused({f"{name}.lora_down.weight": down}) == f"of {name} there is one half alone"
    damaged = [{f"{name}.alpha": torch.ones(2)}, {f"{name}.lora_up.weight": up[:, :0]}]
    damaged += [{f"{name}.lora_up.weight": torch.ones(())}]
    for tensors in damaged:
        told = refused({**both(name, down, up), **tensors})
        assert told.startswith("it is damaged (") or "has shapes" in told
    for metadata in ("{", "[]", "[" * 9999, '{"lora_alpha": "a"}', '{"alpha_pattern": {"(": 1}}'):
        save_file(both(name, down, up), file, {"lora_adapter_metadata": metadata})
        with pytest.raises(UserError, match="it is damaged"):
            fused(models, family, file)


def test_what_is_no_lora_is_refused_when_it_is_named(tmp_path: Path) -> None:
    file, name = tmp_path / "l.safetensors", "lora_unet_x"

    def refused(strength: str = "", **tensors: Tensor) -> str:
        save_file({f"{name}.{key}.weight": value for key, value in tensors.items()}, file)
        with pytest.raises(UserError) as error:
            find_lora(f"{file}{strength}")
        return str(error.value).removeprefix(f"LoRA {file}")

    assert refused() == " holds no tensor"
    whole = torch.ones(2, 2, dtype=torch.int8)
    told = ": 'lora_unet_x.lora_down.weight' is of whole or complex numbers; take it in float16, "
    assert refused(lora_down=whole, lora_up=torch.ones(2, 2)) == told + "bfloat16 or float32"
    assert refused(lora_down=whole.cfloat()) == told + "bfloat16 or float32"
    for strength in (":nan", ":inf"):
        told = f": its strength is {strength[1:]}, which is no number"
        assert refused(strength, lora_down=torch.ones(2, 2)) == told
