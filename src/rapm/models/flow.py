"""What families of rectified flow share: transformers over patches of 2 x 2, and their latents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle

from rapm.models import Configs
from rapm.models.stable_diffusion import decode_with_vae

PATCH = 2


def block_feature_layers(blocks: Sequence[str]) -> list[str]:
    """Of all blocks those at a quarter, a half and three quarters of the depth."""
    depths = {max(len(blocks) * k // 4 - 1, 0) for k in (1, 2, 3)}
    return [blocks[depth] for depth in sorted(depths)]


def patches_to_map(patches: Tensor, z: Tensor, patch: int = PATCH) -> Tensor:
    """The first patches of a sequence, [B, h w or more, C], as a map [B, C, h, w]."""
    height, width = z.shape[-2] // patch, z.shape[-1] // patch
    return patches[:, : height * width].transpose(1, 2).unflatten(2, (height, width))


def latent_sides(configs: Configs, size: tuple[int, int]) -> tuple[int, int]:
    """(h, w) of a picture of (width, height) pixels.

    Raises:
        ValueError: a side is no multiple of what the VAE and a patch take together.
    """
    factor = 2 ** (len(configs("vae")["block_out_channels"]) - 1)
    width, height = size
    if width % (PATCH * factor) or height % (PATCH * factor):
        raise ValueError(
            f"this teacher's pictures have sides that are multiples of {PATCH * factor} pixels, "
            f"not {width}x{height}"
        )
    return height // factor, width // factor


def text_tokens(told: Any, most: int) -> int:
    """How many tokens of a prompt a pipeline reads that cuts it at ``most``; the tokenizer may have
    a shorter end of its own."""
    return min(int(told or most), most)


def decode_shifted(pipeline: Any, z: Tensor) -> Tensor:
    """Decodes latents that the VAE's shift was taken off."""
    config = pipeline.vae.config  # decoding divides by the factor
    return decode_with_vae(pipeline, z + (config.shift_factor or 0.0) * config.scaling_factor)


def t5_embeddings(configs: Configs, of: str, most: int) -> dict[str, tuple[int, ...]]:
    """What a T5 gives of a prompt.

    Args:
        of: the end of its parts' names: "" or "2".
        most: tokens at which the pipeline cuts prompts.

    Raises:
        ValueError: the network takes something else.
    """
    ending = of and f"_{of}"
    width, takes = configs(f"text_encoder{ending}")["d_model"], configs("transformer")
    if (takes := takes["joint_attention_dim"]) != width:
        raise ValueError(f"its joint_attention_dim is {takes}, its text encoder gives {width}")
    told = configs(f"tokenizer{ending}").get("model_max_length")
    return {"prompt_embeds": (text_tokens(told, most), width)}


# ---- FLUX and its kin: a cell of z is a patch, and blocks of two streams come before single ones


def stream_feature_layers(network: Any) -> list[str]:
    """Of a network of double and single blocks."""
    double, single = len(network.transformer_blocks), len(network.single_transformer_blocks)
    names = [f"transformer_blocks.{k}" for k in range(double)]
    return block_feature_layers(names + [f"single_transformer_blocks.{k}" for k in range(single)])


def stream_map(output: Any, z: Tensor) -> Tensor:
    """Text and picture are apart, or the text is before the picture."""
    patches = output[1] if isinstance(output, tuple) else output
    return patches_to_map(patches[:, -z.shape[-2] * z.shape[-1] :], z, patch=1)


def as_patches(z: Tensor) -> Tensor:
    """z [B, C, h, w] as a sequence [B, h w, C]."""
    return z.flatten(2).transpose(1, 2)


def places(z: Tensor, axes: int) -> Tensor:
    """[h w, axes]: where each patch is; its row is on axis 1, its column on axis 2."""
    height, width = z.shape[-2:]
    found = torch.zeros(height, width, axes, device=z.device)
    found[..., 1] = torch.arange(height, device=z.device)[:, None]
    found[..., 2] = torch.arange(width, device=z.device)
    return found.flatten(0, 1)


def packed_shape(configs: Configs, size: tuple[int, int]) -> tuple[int, int, int]:
    """(C, h, w) of a picture of (width, height) pixels."""
    height, width = latent_sides(configs, size)
    return configs("transformer")["in_channels"], height // PATCH, width // PATCH


def decode_packed(pipeline: Any, z: Tensor) -> Tensor:
    """Decodes latents whose cells are patches, and that the VAE's shift was taken off."""
    return decode_shifted(pipeline, pixel_shuffle(z, PATCH))
