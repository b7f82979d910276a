"""Stable Diffusion 1.x and 2.x, and the embedded teacher, which is one of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

from rapm.errors import UserError
from rapm.models import Configs, Family
from rapm.network import as_it_is
from rapm.sampling import Conditioning

UNET_LORA_TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *(
        "conv1",
        "conv2",
        "conv_shortcut",
        "downsamplers.0.conv",
        "upsamplers.0.conv",
        "time_emb_proj",
    ),
)


_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
    "time_emb_proj": "emb_layers.1",
}


def unet_names(network: nn.Module) -> tuple[dict[str, str], dict[str, str]]:
    """Names of a UNet's layers that LoRA goes to: diffusers' own, and the original network's."""
    unet: Any = network
    blocks = {"mid_block.resnets.0": "middle_block.0", "mid_block.resnets.1": "middle_block.2"}
    blocks["mid_block.attentions.0"] = "middle_block.1"
    number = 1
    for i, block in enumerate(unet.down_blocks):
        for j in range(len(block.resnets)):
            blocks[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{number}.0"
            blocks[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{number}.1"
            number += 1
        blocks[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
        number += 1
    number = 0
    for i, block in enumerate(unet.up_blocks):
        for j in range(len(block.resnets)):
            blocks[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{number}.0"
            blocks[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{number}.1"
            number += 1
        place = 1 + hasattr(block, "attentions")
        blocks[f"up_blocks.{i}.upsamplers.0"] = f"output_blocks.{number - 1}.{place}"
    names = {}
    for path, _ in unet.named_modules():
        start = next((old for old in blocks if path == old or path.startswith(f"{old}.")), None)
        if start is not None:
            rest = path.removeprefix(start).removeprefix(".")
            rest = _RESNET.get(rest, rest) if ".resnets." in start else rest
            names[path] = ".".join(filter(None, (blocks[start], rest)))
    return {path: path for path, _ in unet.named_modules()}, names


# Of a UNet's and a VAE's configs, what calls would have to serve.
SERVED_UNET: dict[str, tuple[Any, ...]] = {
    "_class_name": ("UNet2DConditionModel",),
    "addition_embed_type": (None,),
    "class_embed_type": (None,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "num_class_embeds": (None,),
    "time_cond_proj_dim": (None,),
}
SERVED_VAE: dict[str, tuple[Any, ...]] = {"_class_name": ("AutoencoderKL",), "out_channels": (3,)}


def unet_feature_layers(network: nn.Module) -> list[str]:
    """Every down block and the middle block, as in PCM for SDXL; the forward stops there."""
    unet: Any = network
    middle = [] if unet.mid_block is None else ["mid_block"]  # some distilled ones have none
    return [*(f"down_blocks.{i}" for i in range(len(unet.down_blocks))), *middle]


def unet_latent_shape(configs: Configs, size: tuple[int, int] | None) -> tuple[int, int, int]:
    """A side is a multiple of what the VAE and the UNet's downsampling take together.

    Raises:
        ValueError: it is not, or there is no size of the network's own.
    """
    unet, vae = configs("unet"), configs("vae")
    if size is None:
        own = unet.get("sample_size")
        sides: list[Any] = own if isinstance(own, list) else [own, own]
        if len(sides) != 2 or not all(type(side) is int and 0 < side < 4096 for side in sides):
            raise ValueError(
                f"this teacher does not say how large its pictures are (sample_size is {own!r}); "
                "give a size"
            )
        return unet["in_channels"], sides[0], sides[1]
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    unit = factor * 2 ** (len(unet["block_out_channels"]) - 1)
    width, height = size
    if width % unit or height % unit:
        raise ValueError(
            f"this teacher's pictures have sides that are multiples of {unit} pixels, not "
            f"{width}x{height}"
        )
    return unet["in_channels"], height // factor, width // factor


def prompt_embeds_shape(
    configs: Configs, encoders: Sequence[str] = ("text_encoder",)
) -> dict[str, tuple[int, ...]]:
    """
    Raises:
        ValueError: the network takes another width than the text encoders give together.
    """
    width, takes = sum(configs(part)["hidden_size"] for part in encoders), configs("unet")
    takes = takes["cross_attention_dim"]
    if any(each != width for each in (takes if isinstance(takes, list) else [takes])):
        raise ValueError(
            f"the network's cross_attention_dim is {takes}, the text encoders give {width}"
        )
    return {"prompt_embeds": (configs("text_encoder")["max_position_embeddings"], width)}


def in_batches(prompts: Sequence[str], size: int = 64) -> Iterator[list[str]]:
    for start in range(0, len(prompts), size):
        yield list(prompts[start : start + size])


def finite(values: Tensor, what: str) -> Tensor:
    """
    Raises:
        UserError: ``what`` is not finite.
    """
    if values.isfinite().all():
        return values
    raise UserError(
        f"{what} are not finite: its weights or config are damaged, or they are too large for "
        "float16"
    )


def decode_with_vae(pipeline: Any, z: Tensor) -> Tensor:
    """Latents are divided by the VAE's factor, and nothing else is done to them, as in the
    pipeline of 1.x and 2.x."""
    return decode_in_parts(pipeline, z / pipeline.vae.config.scaling_factor)


@torch.no_grad()
def decode_in_parts(pipeline: Any, z: Tensor) -> Tensor:
    """Latents as the VAE takes them."""
    vae = pipeline.vae
    pixels = z.shape[-2] * z.shape[-1] * pipeline.vae_scale_factor**2
    # A quarter of a megapixel at a time: a VAE's activations are large.
    parts = z.split(max(1, (1 << 18) // pixels))
    images = [
        vae.decode(part.to(vae.device, vae.dtype), return_dict=False)[0].float().cpu()
        for part in parts
    ]
    return finite(torch.cat(images), "the VAE's pictures").clamp(-1, 1)


def _call(network: nn.Module, z: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
    return network(z, t, conditioning["prompt_embeds"], return_dict=False)[0]


@torch.no_grad()
def _encode(pipeline: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
    rows = [
        pipeline.encode_prompt(batch, pipeline.device, 1, False)[0].float().cpu()
        for batch in in_batches(prompts)
    ]
    return {"prompt_embeds": finite(torch.cat(rows), "the text encoder's embeddings")}


def _base_model(configs: Configs) -> tuple[str, str]:
    """2.x projects linearly around attention where 1.x convolves; which 2.x it is, its prediction
    says."""
    if not configs("unet").get("use_linear_projection"):
        return "sd_v1", "stable-diffusion-v1"
    if configs("scheduler").get("prediction_type") == "v_prediction":
        return "sd_v2_v", "stable-diffusion-v2-768-v"
    return "sd_v2", "stable-diffusion-v2-512"


FAMILY = Family(
    pipeline=StableDiffusionPipeline,
    network="unet",
    text_parts=("tokenizer", "text_encoder"),
    single_file=("v1", "v2"),
    lora_targets=UNET_LORA_TARGETS,
    lora_names=unet_names,
    feature_layers=unet_feature_layers,
    feature_map=as_it_is,
    call=_call,
    served={
        "unet": SERVED_UNET,
        "vae": SERVED_VAE,
        "text_encoder": {"_class_name": ("CLIPTextModel",)},
    },
    encode=_encode,
    unconditional=lambda pipeline, negative: _encode(pipeline, [negative]),
    conditioning=prompt_embeds_shape,
    latent_shape=unet_latent_shape,
    decode=decode_with_vae,
    base_model=_base_model,
)
