"""FLUX.1 dev: rectified flow by a transformer of double and single blocks. Guidance was distilled
into it: it is an input. A cell of z is a patch of 2 x 2 of the VAE's latents."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor, nn

from rapm.models import Configs, Family
from rapm.models.flow import (
    PATCH,
    as_patches,
    decode_packed,
    packed_shape,
    patches_to_map,
    places,
    stream_feature_layers,
    stream_map,
    t5_embeddings,
    text_tokens,
)
from rapm.models.stable_diffusion import SERVED_VAE, finite, in_batches
from rapm.sampling import Conditioning

MAX_TOKENS = 512  # of T5, as the pipeline has it
SIZE = 1024  # pixels a side: no config says it
LORA_TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    *("proj_mlp", "proj_out"),  # of single blocks; and the network's last layer
)


def _call(network: nn.Module, z: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
    prompts = conditioning["prompt_embeds"]
    patches = network(
        hidden_states=as_patches(z),
        timestep=t.to(z.dtype) / 1000,
        guidance=conditioning["guidance"],
        pooled_projections=conditioning["pooled_prompt_embeds"],
        encoder_hidden_states=prompts,
        img_ids=places(z, axes=3),
        txt_ids=torch.zeros(prompts.shape[1], 3, device=z.device),
        return_dict=False,
    )[0]
    return patches_to_map(patches, z, patch=1)


@torch.no_grad()
def _encode(pipeline: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
    embeds, pooled = [], []
    tokens = text_tokens(pipeline.tokenizer_2.model_max_length, MAX_TOKENS)
    for batch in in_batches(prompts):
        found = pipeline.encode_prompt(batch, None, pipeline.device, max_sequence_length=tokens)
        embeds.append(found[0].float().cpu())
        pooled.append(found[1].float().cpu())
    found = {"prompt_embeds": torch.cat(embeds), "pooled_prompt_embeds": torch.cat(pooled)}
    return {name: finite(x, "the text encoders' embeddings") for name, x in found.items()}


def _conditioning(configs: Configs) -> dict[str, tuple[int, ...]]:
    network, pooled = configs("transformer"), configs("text_encoder")["hidden_size"]
    if (takes := network["pooled_projection_dim"]) != pooled:
        raise ValueError(f"its pooled_projection_dim is {takes}, its text encoder gives {pooled}")
    return t5_embeddings(configs, "2", MAX_TOKENS) | {"pooled_prompt_embeds": (pooled,)}


def _shift(scheduler: Mapping[str, Any], patches: int) -> float:
    """By the number of patches, as the pipeline has it."""
    names = {"base_image_seq_len": 256, "max_image_seq_len": 4096}
    known = names | {"base_shift": 0.5, "max_shift": 1.15}
    return math.exp(calculate_shift(patches, *(scheduler.get(n, own) for n, own in known.items())))


FAMILY = Family(
    pipeline=FluxPipeline,
    network="transformer",
    text_parts=("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2"),
    single_file=(),
    lora_targets=LORA_TARGETS,
    lora_names=lambda network: (),
    feature_layers=stream_feature_layers,
    feature_map=stream_map,
    call=_call,
    served={
        "transformer": {
            "_class_name": ("FluxTransformer2DModel",),
            "patch_size": (1,),
            "guidance_embeds": (True,),  # false of schnell, which takes 4 steps itself
        },
        "vae": SERVED_VAE,
        "text_encoder": {"_class_name": ("CLIPTextModel",)},
        "text_encoder_2": {"_class_name": ("T5EncoderModel",)},
    },
    encode=_encode,
    unconditional=lambda pipeline, negative: {},
    of_picture=lambda width, height, scale: {"guidance": torch.tensor([scale])},
    conditioning=_conditioning,
    latent_shape=lambda configs, size: packed_shape(configs, size or (SIZE, SIZE)),
    decode=decode_packed,
    flow=True,
    guidance_is_input=True,
    max_tokens=MAX_TOKENS,
    base_model=lambda configs: ("flux1", "flux-1-dev"),
    packing=PATCH,
    shift=_shift,
)
