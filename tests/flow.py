"""Small pipelines of rectified flow, of the published kinds' own classes, with random weights."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from rapm.toy import TEACHER

FLOW = ("sd3",)  # the rows of the test table


def t5_tokenizer(max_tokens: int) -> Any:
    """Of the toy teacher's words, as T5 has them."""
    known = CLIPTokenizer.from_pretrained(TEACHER / "tokenizer").get_vocab()
    words = sorted(word.removesuffix("</w>") for word in known if word.endswith("</w>"))
    marks = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocabulary = [*marks, *((f"\N{LOWER ONE EIGHTH BLOCK}{word}", -1.0) for word in words)]
    tokenizer = T5TokenizerFast(vocab=vocabulary, extra_ids=0)
    tokenizer.model_max_length = max_tokens
    return tokenizer


def make_flow_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def make_transformer() -> SD3Transformer2DModel:
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=40,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        pos_embed_max_size=12,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    ).eval()


def make_flow_pipeline(kind: str = "sd3", max_tokens: int = 512) -> Any:
    """Latents 4 x 8 x 8, pictures 16 x 16; a shift of 3.

    Args:
        max_tokens: where the T5 tokenizer ends; published ones say 512.
    """
    assert kind in FLOW
    torch.manual_seed(1)
    vae, tokenizer = make_flow_vae(), CLIPTokenizer.from_pretrained(TEACHER / "tokenizer")
    t5 = t5_tokenizer(max_tokens)

    def clip(act: str) -> CLIPTextModelWithProjection:
        config = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            hidden_act=act,
            projection_dim=16,
        )
        return CLIPTextModelWithProjection(config).eval()

    config = T5Config(
        vocab_size=len(t5), d_model=40, d_kv=8, d_ff=32, num_layers=2, num_heads=2,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    encoder = T5EncoderModel(config).eval()
    for p in encoder.parameters():  # as drawn, what it gives is hundreds of times as long
        p.data *= 0.3
    return StableDiffusion3Pipeline(
        transformer=make_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=clip("quick_gelu"),
        tokenizer=tokenizer,
        text_encoder_2=clip("gelu"),
        tokenizer_2=tokenizer,
        text_encoder_3=encoder,
        tokenizer_3=t5,
    )
