"""Z-Image (arXiv 2511.22699): rectified flow by a transformer that picture and text go through as
one sequence, the text by a language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ZImagePipeline
from torch import Tensor, nn

from rapm.models import Configs, Family
from rapm.models.flow import (
    PATCH,
    block_feature_layers,
    decode_shifted,
    latent_sides,
    patches_to_map,
    text_tokens,
)
from rapm.models.stable_diffusion import SERVED_VAE, finite, in_batches
from rapm.sampling import Conditioning

MAX_TOKENS = 512  # as the pipeline has it, the chat's own words included
SIZE = 1024  # pixels a side: no config says it


def _call(network: nn.Module, z: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
    """The network's time runs from noise to picture, and so does its velocity."""
    embeds, known = conditioning["prompt_embeds"], conditioning["prompt_mask"] > 0
    prompts = list(embeds)  # on meta nobody knows how long they are
    if not embeds.is_meta:
        prompts = [own[kept] for own, kept in zip(embeds, known, strict=True)]
    out = network(list(z.unsqueeze(2)), (1000 - t) / 1000, prompts, return_dict=False)[0]
    return -torch.stack(out).squeeze(2)


@torch.no_grad()
def _encode(pipeline: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
    rows: list[Tensor] = []
    tokens = text_tokens(pipeline.tokenizer.model_max_length, MAX_TOKENS)
    for batch in in_batches(prompts, 8):
        rows += pipeline.encode_prompt(batch, pipeline.device, False, max_sequence_length=tokens)[0]
    finite(torch.cat(rows), "the text encoder's embeddings")
    padded = torch.zeros(len(rows), tokens, rows[0].shape[1])
    mask = torch.zeros(len(rows), tokens)
    for k, row in enumerate(rows):
        padded[k, : len(row)], mask[k, : len(row)] = row.float().cpu(), 1
    return {"prompt_embeds": padded, "prompt_mask": mask}


def _conditioning(configs: Configs) -> dict[str, tuple[int, ...]]:
    width, takes = configs("text_encoder")["hidden_size"], configs("transformer")["cap_feat_dim"]
    if takes != width:
        raise ValueError(f"its cap_feat_dim is {takes}, its text encoder gives {width}")
    tokens = text_tokens(configs("tokenizer").get("model_max_length"), MAX_TOKENS)
    return {"prompt_embeds": (tokens, width), "prompt_mask": (tokens,)}


def _latent_shape(configs: Configs, size: tuple[int, int] | None) -> tuple[int, int, int]:
    return configs("transformer")["in_channels"], *latent_sides(configs, size or (SIZE, SIZE))


FAMILY = Family(
    pipeline=ZImagePipeline,
    network="transformer",
    text_parts=("tokenizer", "text_encoder"),
    single_file=(),
    lora_targets=("to_q", "to_k", "to_v", "to_out.0", "w1", "w2", "w3"),
    lora_names=lambda network: (),
    feature_layers=lambda network: block_feature_layers(
        [f"layers.{k}" for k in range(len(network.layers))]  # type: ignore
    ),
    feature_map=patches_to_map,  # the picture comes first
    call=_call,
    served={
        "transformer": {
            "_class_name": ("ZImageTransformer2DModel",),
            "all_patch_size": ([PATCH],),
            "all_f_patch_size": ([1],),
            "siglip_feat_dim": (None,),
        },
        "vae": SERVED_VAE,
        "text_encoder": {"_class_name": ("Qwen3Model", "Qwen3ForCausalLM")},
    },
    encode=_encode,
    unconditional=lambda pipeline, negative: _encode(pipeline, [negative]),
    conditioning=_conditioning,
    latent_shape=_latent_shape,
    decode=decode_shifted,
    flow=True,
    max_tokens=MAX_TOKENS,
    base_model=lambda configs: ("zimage", "z-image"),
    pipeline_guidance=lambda scale: float(scale - 1),  # cond + scale (cond - uncond), 0 for none
)
