"""Stable Diffusion XL (arXiv 2307.01952): two text encoders, a pooled embedding, and the picture's
size as conditioning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor, nn

from rapm.models import Configs, Family
from rapm.models.stable_diffusion import (
    SERVED_UNET,
    SERVED_VAE,
    UNET_LORA_TARGETS,
    decode_with_vae,
    finite,
    in_batches,
    prompt_embeds_shape,
    unet_feature_layers,
    unet_latent_shape,
    unet_names,
)
from rapm.network import as_it_is
from rapm.sampling import Conditioning


def _call(network: nn.Module, z: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
    added = {
        "text_embeds": conditioning["pooled_prompt_embeds"],
        "time_ids": conditioning["time_ids"],
    }
    return network(z, t, conditioning["prompt_embeds"], added_cond_kwargs=added, return_dict=False)[
        0
    ]


@torch.no_grad()
def _encode(pipeline: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
    embeds, pooled = [], []
    for batch in in_batches(prompts):
        found = pipeline.encode_prompt(
            batch, device=pipeline.device, do_classifier_free_guidance=False
        )
        embeds.append(found[0].float().cpu())
        pooled.append(found[2].float().cpu())
    found = {"prompt_embeds": torch.cat(embeds), "pooled_prompt_embeds": torch.cat(pooled)}
    return {name: finite(x, "the text encoders' embeddings") for name, x in found.items()}


def _unconditional(pipeline: Any, negative: str) -> dict[str, Tensor]:
    """No negative prompt is zeros where the teacher was trained so, as its pipeline does when none
    is given."""
    encoded = _encode(pipeline, [negative])
    zeros = not negative and pipeline.config.force_zeros_for_empty_prompt
    return {name: torch.zeros_like(value) for name, value in encoded.items()} if zeros else encoded


def _of_size(width: int, height: int) -> dict[str, Tensor]:
    """Original size, crop's corner and target size, (height, width) each: a picture that was never
    scaled nor cropped."""
    return {"time_ids": torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32)}


def _conditioning(configs: Configs) -> dict[str, tuple[int, ...]]:
    unet, pooled = configs("unet"), configs("text_encoder_2")["projection_dim"]
    takes = unet["projection_class_embeddings_input_dim"]
    if takes != (gives := 6 * unet["addition_time_embed_dim"] + pooled):
        raise ValueError(
            f"the network's projection_class_embeddings_input_dim is {takes}, the picture's size "
            f"and the pooled embedding are {gives}"
        )
    embeds = prompt_embeds_shape(configs, ("text_encoder", "text_encoder_2"))
    return embeds | {"pooled_prompt_embeds": (pooled,)}


def _decode(pipeline: Any, z: Tensor) -> Tensor:
    """Some VAEs say how their latents are distributed, and the pipeline of XL undoes it."""
    config = pipeline.vae.config
    mean, std = config.latents_mean, config.latents_std
    if mean is not None and std is not None:
        mean, std = (torch.tensor(x, device=z.device).view(1, -1, 1, 1) for x in (mean, std))
        z = z * std + mean * config.scaling_factor  # which decoding divides by
    return decode_with_vae(pipeline, z)


FAMILY = Family(
    pipeline=StableDiffusionXLPipeline,
    network="unet",
    text_parts=("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2"),
    single_file=("xl_base",),
    lora_targets=UNET_LORA_TARGETS,
    # In the original network's names every program reads all of its layers.
    lora_names=lambda network: unet_names(network)[::-1],
    feature_layers=unet_feature_layers,
    feature_map=as_it_is,
    call=_call,
    served={
        "unet": SERVED_UNET | {"addition_embed_type": ("text_time",)},
        "vae": SERVED_VAE,
        "text_encoder": {"_class_name": ("CLIPTextModel", "CLIPTextModelWithProjection")},
        "text_encoder_2": {"_class_name": ("CLIPTextModelWithProjection",)},
    },
    encode=_encode,
    unconditional=_unconditional,
    of_picture=lambda width, height, scale: _of_size(width, height),
    conditioning=_conditioning,
    latent_shape=unet_latent_shape,
    decode=_decode,
    base_model=lambda configs: ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base"),
)
