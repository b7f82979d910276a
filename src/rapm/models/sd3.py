"""Stable Diffusion 3 and 3.5 (arXiv 2403.03206): rectified flow by a transformer over patches of
2 x 2, which text and picture go through side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor, nn

from rapm.models import Configs, Family
from rapm.models.flow import (
    PATCH,
    block_feature_layers,
    decode_shifted,
    latent_sides,
    patches_to_map,
    t5_embeddings,
    text_tokens,
)
from rapm.models.stable_diffusion import SERVED_VAE, finite, in_batches
from rapm.sampling import Conditioning

T5_TOKENS = 256  # at most, as the pipeline has it
LORA_TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"),
    *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    *("ff_context.net.0.proj", "ff_context.net.2"),
)


def _call(network: nn.Module, z: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
    return network(
        hidden_states=z,
        timestep=t,
        encoder_hidden_states=conditioning["prompt_embeds"],
        pooled_projections=conditioning["pooled_prompt_embeds"],
        return_dict=False,
    )[0]


@torch.no_grad()
def _encode(pipeline: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
    embeds, pooled = [], []
    for batch in in_batches(prompts):
        found = pipeline.encode_prompt(
            *(batch, None, None),
            device=pipeline.device,
            do_classifier_free_guidance=False,
            max_sequence_length=text_tokens(pipeline.tokenizer_3.model_max_length, T5_TOKENS),
        )
        embeds.append(found[0].float().cpu())
        pooled.append(found[2].float().cpu())
    found = {"prompt_embeds": torch.cat(embeds), "pooled_prompt_embeds": torch.cat(pooled)}
    return {name: finite(x, "the text encoders' embeddings") for name, x in found.items()}


def _conditioning(configs: Configs) -> dict[str, tuple[int, ...]]:
    network, clip = configs("transformer"), [configs("text_encoder"), configs("text_encoder_2")]
    tokens, width = t5_embeddings(configs, "3", T5_TOKENS)["prompt_embeds"]
    pooled, takes = sum(c["projection_dim"] for c in clip), network["pooled_projection_dim"]
    if takes != pooled:
        raise ValueError(f"its pooled_projection_dim is {takes}, its encoders give {pooled}")
    tokens += min(c["max_position_embeddings"] for c in clip)
    return {"prompt_embeds": (tokens, width), "pooled_prompt_embeds": (pooled,)}


def _latent_shape(configs: Configs, size: tuple[int, int] | None) -> tuple[int, int, int]:
    """A side is a multiple of what the VAE and a patch take together, and no larger than the
    positions that the network knows.

    Raises:
        ValueError: it is not.
    """
    network = configs("transformer")
    channels, own, most = (network[n] for n in ("in_channels", "sample_size", "pos_embed_max_size"))
    if size is None:
        if type(own) is not int or not 0 < own < 4096:
            raise ValueError(f"its sample_size is {own!r}")
        return channels, own, own
    height, width = latent_sides(configs, size)
    if max(height, width) > PATCH * most:
        largest = size[0] // width * PATCH * most
        raise ValueError(f"this teacher's pictures have sides of {largest} pixels at most")
    return channels, height, width


def _base_model(configs: Configs) -> tuple[str, str]:
    network = configs("transformer")
    if not network.get("qk_norm"):
        return "sd3", "stable-diffusion-3-medium"
    is_medium = bool(network.get("dual_attention_layers"))
    return "sd3", f"stable-diffusion-3.5-{'medium' if is_medium else 'large'}"


FAMILY = Family(
    pipeline=StableDiffusion3Pipeline,
    network="transformer",
    text_parts=(
        *("tokenizer", "tokenizer_2", "tokenizer_3"),
        *("text_encoder", "text_encoder_2", "text_encoder_3"),
    ),
    single_file=(),
    lora_targets=LORA_TARGETS,
    lora_names=lambda network: (),
    feature_layers=lambda network: block_feature_layers(
        [f"transformer_blocks.{k}" for k in range(len(network.transformer_blocks))]  # type: ignore
    ),
    feature_map=lambda output, z: patches_to_map(output[1], z),  # text comes first
    call=_call,
    served={
        "transformer": {"_class_name": ("SD3Transformer2DModel",), "patch_size": (PATCH,)},
        "vae": SERVED_VAE,
        "text_encoder": {"_class_name": ("CLIPTextModelWithProjection",)},
        "text_encoder_2": {"_class_name": ("CLIPTextModelWithProjection",)},
        "text_encoder_3": {"_class_name": ("T5EncoderModel",)},
    },
    encode=_encode,
    unconditional=lambda pipeline, negative: _encode(pipeline, [negative]),
    conditioning=_conditioning,
    latent_shape=_latent_shape,
    decode=decode_shifted,
    flow=True,
    max_tokens=T5_TOKENS,
    base_model=_base_model,
)
