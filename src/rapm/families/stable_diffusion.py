"""Stable Diffusion 1.x and 2.x, and the embedded teacher, which is one of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

from rapm.errors import UserError
from rapm.families import Family
from rapm.objective import Conditioning

UNET_LORA_TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
)


def unet_taps(network: nn.Module) -> list[str]:
    """Every down block and the middle block. The forward stops there: critics never pay for the way up."""
    blocks: Any = network.down_blocks
    return [*(f"down_blocks.{i}" for i in range(len(blocks))), "mid_block"]


def _call(network: nn.Module, z: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
    return network(z, t, conditioning["prompt_embeds"], return_dict=False)[0]


@torch.no_grad()
def _encode(pipeline: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
    rows = []
    for start in range(0, len(prompts), 64):
        batch = list(prompts[start : start + 64])
        embeds, _ = pipeline.encode_prompt(batch, pipeline.device, 1, do_classifier_free_guidance=False)
        rows.append(embeds.float().cpu())
    return {"prompt_embeds": torch.cat(rows)}


@torch.no_grad()
def decode_with_vae(pipeline: Any, z: Tensor) -> Tensor:
    vae = pipeline.vae
    pixels = z.shape[-2] * z.shape[-1] * pipeline.vae_scale_factor**2
    images = [
        vae.decode(batch.to(vae.device, vae.dtype) / vae.config.scaling_factor, return_dict=False)[0].float().cpu()
        for batch in z.split(max(1, (1 << 18) // pixels))  # a quarter of a megapixel at a time: a VAE's activations are large
    ]
    return torch.cat(images).clamp(-1, 1)


def latent_shape_of_unet(pipeline: Any, height: int | None, width: int | None) -> tuple[int, int, int]:
    """A size must be a multiple of what the VAE and the UNet's downsampling take together.

    Raises:
        UserError: it is not.
    """
    factor, config = pipeline.vae_scale_factor, pipeline.unet.config
    unit = factor * 2 ** (len(config.block_out_channels) - 1)
    for name, pixels in (("height", height), ("width", width)):
        if pixels and pixels % unit:
            raise UserError(f"trajectories.{name} = {pixels}: this teacher's pictures have sides that are multiples of {unit}")
    size = config.sample_size
    return config.in_channels, (height // factor if height else size), (width // factor if width else size)


def _save_lora(folder: Path, state: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    layers: Any = state
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers, unet_lora_adapter_metadata=metadata)


FAMILY = Family(
    pipeline=StableDiffusionPipeline,
    network="unet",
    lora_targets=UNET_LORA_TARGETS,
    taps=unet_taps,
    call=_call,
    encode=_encode,
    decode=decode_with_vae,
    latent_shape=latent_shape_of_unet,
    save_lora=_save_lora,
)
