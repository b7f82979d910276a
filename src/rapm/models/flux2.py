"""FLUX.2 klein, base models: rectified flow by a transformer of double and single blocks, the text
by three layers of a language model. A cell of z is a patch of 2 x 2 of the VAE's latents."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import Flux2KleinPipeline
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from torch import Tensor, nn

from rapm.models import Configs, Family
from rapm.models.flow import (
    PATCH,
    as_patches,
    packed_shape,
    patches_to_map,
    places,
    stream_feature_layers,
    stream_map,
    text_tokens,
)
from rapm.models.stable_diffusion import decode_in_parts, finite, in_batches
from rapm.sampling import Conditioning

MAX_TOKENS, TEXT_LAYERS = 512, (9, 18, 27)  # as the pipeline has them
SIZE = 1024  # pixels a side: no config says it
STEPS_OF_SHIFT = 50  # The pipeline's shift depends on their number, and one serves all grids here.
LORA_TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    *("ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out"),
    *("attn.to_qkv_mlp_proj", "attn.to_out"),  # of single blocks
)


def _call(network: nn.Module, z: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
    prompts = conditioning["prompt_embeds"]
    of_text = torch.zeros(prompts.shape[1], 4, device=z.device)  # a place in time, picture and text
    of_text[:, 3] = torch.arange(prompts.shape[1], device=z.device)
    patches = network(
        hidden_states=as_patches(z),
        timestep=t.to(z.dtype) / 1000,
        guidance=None,
        encoder_hidden_states=prompts,
        img_ids=places(z, axes=4),
        txt_ids=of_text,
        return_dict=False,
    )[0]
    return patches_to_map(patches, z, patch=1)


@torch.no_grad()
def _encode(pipeline: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
    tokens = text_tokens(pipeline.tokenizer.model_max_length, MAX_TOKENS)
    rows = [
        pipeline.encode_prompt(batch, pipeline.device, max_sequence_length=tokens)[0].float().cpu()
        for batch in in_batches(prompts, 8)
    ]
    return {"prompt_embeds": finite(torch.cat(rows), "the text encoder's embeddings")}


def _conditioning(configs: Configs) -> dict[str, tuple[int, ...]]:
    text, takes = configs("text_encoder"), configs("transformer")["joint_attention_dim"]
    width = len(TEXT_LAYERS) * text["hidden_size"]
    if takes != width:
        raise ValueError(f"its joint_attention_dim is {takes}, its text encoder gives {width}")
    if text["num_hidden_layers"] < max(TEXT_LAYERS):
        raise ValueError(f"its text encoder has {text['num_hidden_layers']} layers")
    tokens = text_tokens(configs("tokenizer").get("model_max_length"), MAX_TOKENS)
    return {"prompt_embeds": (tokens, width)}


def _shift(scheduler: Mapping[str, Any], patches: int) -> float:
    return math.exp(compute_empirical_mu(patches, STEPS_OF_SHIFT))


@torch.no_grad()
def _decode(pipeline: Any, z: Tensor) -> Tensor:
    """Latents were made to have mean 0 and deviation 1 after they were packed."""
    norm, eps = pipeline.vae.bn, pipeline.vae.config.batch_norm_eps
    mean, std = norm.running_mean, (norm.running_var + eps).sqrt()
    mean, std = (x.to(z).view(1, -1, 1, 1) for x in (mean, std))
    return decode_in_parts(pipeline, nn.functional.pixel_shuffle(z * std + mean, PATCH))


FAMILY = Family(
    pipeline=Flux2KleinPipeline,
    network="transformer",
    text_parts=("tokenizer", "text_encoder"),
    single_file=(),
    lora_targets=LORA_TARGETS,
    lora_names=lambda network: (),
    feature_layers=stream_feature_layers,
    feature_map=stream_map,
    call=_call,
    served={
        "pipeline": {"is_distilled": (False, None)},  # which takes no guidance
        "transformer": {
            "_class_name": ("Flux2Transformer2DModel",),
            "patch_size": (1,),
            "guidance_embeds": (False,),
        },
        "vae": {"_class_name": ("AutoencoderKLFlux2",), "out_channels": (3,)},
        "text_encoder": {"_class_name": ("Qwen3ForCausalLM",)},
    },
    encode=_encode,
    unconditional=lambda pipeline, negative: _encode(pipeline, [negative]),
    conditioning=_conditioning,
    latent_shape=lambda configs, size: packed_shape(configs, size or (SIZE, SIZE)),
    decode=_decode,
    flow=True,
    max_tokens=MAX_TOKENS,
    base_model=lambda configs: ("flux2", "flux-2-klein"),
    packing=PATCH,
    shift=_shift,
)
