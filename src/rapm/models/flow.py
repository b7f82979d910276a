"""What families of rectified flow share: transformers over patches of 2 x 2, and their latents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

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


def decode_shifted(pipeline: Any, z: Tensor) -> Tensor:
    """Decodes latents that the VAE's shift was taken off."""
    config = pipeline.vae.config  # decoding divides by the factor
    return decode_with_vae(pipeline, z + (config.shift_factor or 0.0) * config.scaling_factor)
