"""Small pipelines of rectified flow, of the published kinds' own classes, with random weights."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    ChromaPipeline,
    ChromaTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import pre_tokenizers
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2TokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from conftest import SMALL_VAE, text_config
from rapm.toy import TEACHER

FLOW = ("sd3", "z_image", "flux2", "flux", "chroma")  # the rows of the test table
T5_TOKENS = 32  # The fewer, the faster. Published tokenizers say 512.


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
        **SMALL_VAE,
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


def make_flow_pipeline(kind: str) -> Any:
    """Latents 4 x 8 x 8 of pictures 16 x 16; of FLUX and its kin packed to 16 x 4 x 4."""
    made = {"sd3": make_sd3, "z_image": make_z_image, "flux2": make_flux2}
    return (made | {"flux": make_flux, "chroma": make_chroma})[kind]()


def qwen_tokenizer() -> Any:
    """A letter is a token; a chat is told as Qwen's is."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: k for k, token in enumerate([*letters, *marks])}
    tokenizer = Qwen2TokenizerFast(vocab=vocabulary, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": marks[1:]})
    tokenizer.model_max_length = 160
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
    )
    return tokenizer


def make_qwen(tokenizer: Any, layers: int, kind: Any = Qwen3Model) -> Any:
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=2048,
    )
    return kind(config).eval()


def make_flux2() -> Flux2KleinPipeline:
    """The scheduler says that its shift depends on the picture's size."""
    torch.manual_seed(1)
    tokenizer = qwen_tokenizer()
    vae = AutoencoderKLFlux2(**SMALL_VAE).eval()
    vae.bn.running_mean += 0.1 * torch.arange(16)
    vae.bn.running_var += 0.2 * torch.arange(16)
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=72,
        timestep_guidance_channels=16,
        axes_dims_rope=(2, 2, 2, 2),
        guidance_embeds=False,
    ).eval()
    return Flux2KleinPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae,
        text_encoder=make_qwen(tokenizer, 27, Qwen3ForCausalLM),
        tokenizer=tokenizer,
    )


def make_z_image() -> ZImagePipeline:
    """A shift of 6, as the base model's."""
    torch.manual_seed(1)
    tokenizer = qwen_tokenizer()
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=16,
        n_layers=3,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=24,
        axes_dims=[4, 2, 2],
        axes_lens=[600, 300, 300],
    ).eval()
    return ZImagePipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=make_flow_vae(),
        text_encoder=make_qwen(tokenizer, 3),
        tokenizer=tokenizer,
    )


def make_sd3(max_tokens: int = T5_TOKENS) -> StableDiffusion3Pipeline:
    """A shift of 3.

    Args:
        max_tokens: where the T5 tokenizer ends; published ones say 512.
    """
    torch.manual_seed(1)
    vae, tokenizer = make_flow_vae(), CLIPTokenizer.from_pretrained(TEACHER / "tokenizer")
    t5 = t5_tokenizer(max_tokens)

    def clip(act: str) -> CLIPTextModelWithProjection:
        return CLIPTextModelWithProjection(text_config(tokenizer, 16, 3, act)).eval()

    return StableDiffusion3Pipeline(
        transformer=make_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=clip("quick_gelu"),
        tokenizer=tokenizer,
        text_encoder_2=clip("gelu"),
        tokenizer_2=tokenizer,
        text_encoder_3=make_t5(t5),
        tokenizer_3=t5,
    )


def make_t5(tokenizer: Any) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(tokenizer), d_model=40, d_kv=8, d_ff=32, num_layers=2, num_heads=2,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    encoder = T5EncoderModel(config).eval()
    for p in encoder.parameters():  # as drawn, what it gives is hundreds of times as long
        p.data *= 0.3
    return encoder


STREAMS: dict[str, Any] = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 40,
    "axes_dims_rope": (4, 2, 2),
}


def make_flux() -> FluxPipeline:
    """The scheduler says that its shift depends on the picture's size."""
    torch.manual_seed(1)
    tokenizer, t5 = CLIPTokenizer.from_pretrained(TEACHER / "tokenizer"), t5_tokenizer(T5_TOKENS)
    return FluxPipeline(
        transformer=FluxTransformer2DModel(
            **STREAMS, pooled_projection_dim=16, guidance_embeds=True
        ).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=make_flow_vae(),
        text_encoder=CLIPTextModel(text_config(tokenizer, 16, 2, "quick_gelu")).eval(),
        tokenizer=tokenizer,
        text_encoder_2=make_t5(t5),
        tokenizer_2=t5,
    )


def make_chroma() -> ChromaPipeline:
    """Sigmas are spaced otherwise where nobody names them."""
    torch.manual_seed(1)
    t5 = t5_tokenizer(T5_TOKENS)
    transformer = ChromaTransformer2DModel(
        **STREAMS, approximator_num_channels=16, approximator_hidden_dim=16, approximator_layers=2
    )
    return ChromaPipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_exponential_sigmas=True),
        vae=make_flow_vae(),
        text_encoder=make_t5(t5),
        tokenizer=t5,
    )
