"""Chroma: FLUX.1's transformer without its pooled text and with real guidance. Of the padding after
a prompt it sees one token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from diffusers import ChromaPipeline
from torch import Tensor, nn

from rapm.models import Configs, flux
from rapm.models.flow import as_patches, patches_to_map, places, t5_embeddings, text_tokens
from rapm.models.flux import MAX_TOKENS
from rapm.models.stable_diffusion import SERVED_VAE, finite, in_batches
from rapm.sampling import Conditioning


def _call(network: nn.Module, z: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
    """With a mask of truth values, as the model was trained. Its pipeline hands on one of numbers,
    which attention adds, so that the padding is seen."""
    prompts, patches = conditioning["prompt_embeds"], as_patches(z)
    of_picture = torch.ones(patches.shape[:2], dtype=torch.bool, device=z.device)
    mask = torch.cat([conditioning["prompt_mask"] > 0, of_picture], 1)
    with _masked_when_checkpointed(network, mask):
        out = network(
            hidden_states=patches,
            timestep=t.to(z.dtype) / 1000,
            encoder_hidden_states=prompts,
            img_ids=places(z, axes=3),
            txt_ids=torch.zeros(prompts.shape[1], 3, device=z.device),
            attention_mask=mask,
            return_dict=False,
        )[0]
    return patches_to_map(out, z, patch=1)


@contextmanager
def _masked_when_checkpointed(network: Any, mask: Tensor) -> Iterator[None]:
    """diffusers 0.42 hands single blocks no mask where it checkpoints them."""
    if not network.gradient_checkpointing:
        yield
        return
    checkpoint, single = network._gradient_checkpointing_func, {*network.single_transformer_blocks}

    def with_mask(block: nn.Module, *given: Any) -> Any:
        return checkpoint(block, *given[:3], mask) if block in single else checkpoint(block, *given)

    network._gradient_checkpointing_func = with_mask
    try:
        yield
    finally:
        network._gradient_checkpointing_func = checkpoint


@torch.no_grad()
def _encode(pipeline: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
    embeds, masks = [], []
    tokens = text_tokens(pipeline.tokenizer.model_max_length, MAX_TOKENS)
    for batch in in_batches(prompts):
        found = pipeline.encode_prompt(
            batch,
            device=pipeline.device,
            do_classifier_free_guidance=False,
            max_sequence_length=tokens,
        )
        embeds.append(found[0].float().cpu())
        masks.append(found[2].float().cpu())
    known = finite(torch.cat(embeds), "the text encoder's embeddings")
    return {"prompt_embeds": known, "prompt_mask": torch.cat(masks)}


def _conditioning(configs: Configs) -> dict[str, tuple[int, ...]]:
    embeds = t5_embeddings(configs, "", MAX_TOKENS)
    return embeds | {"prompt_mask": embeds["prompt_embeds"][:1]}


FAMILY = replace(
    flux.FAMILY,
    pipeline=ChromaPipeline,
    text_parts=("tokenizer", "text_encoder"),
    call=_call,
    served={
        "transformer": {"_class_name": ("ChromaTransformer2DModel",), "patch_size": (1,)},
        "vae": SERVED_VAE,
        "text_encoder": {"_class_name": ("T5EncoderModel",)},
    },
    encode=_encode,
    unconditional=lambda pipeline, negative: _encode(pipeline, [negative]),
    of_picture=lambda width, height, scale: {},
    conditioning=_conditioning,
    guidance_is_input=False,
    base_model=lambda configs: ("chroma", "chroma"),
)
