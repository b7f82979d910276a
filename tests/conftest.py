"""Tiny real teachers, made on the spot: real diffusers and transformers classes at toy sizes, random weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from rapm.config import Config, parse
from rapm.schedule import Schedule
from rapm.toy import TEACHER

torch.set_num_threads(min(2, torch.get_num_threads()))


def make_unet(cross_attention_dim: int = 16) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=cross_attention_dim,
        attention_head_dim=2,
        norm_num_groups=8,
    ).eval()


def make_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        timestep_spacing="trailing",
    )


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A StableDiffusionPipeline folder: latents 4 x 8 x 8, pictures 16 x 16, random weights."""
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(1)
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )
    tokenizer = CLIPTokenizer.from_pretrained(TEACHER / "tokenizer")
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=make_unet(),
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def ddim_schedule() -> Schedule:
    """SD's own: scaled linear betas, epsilon."""
    scheduler = make_scheduler()
    return Schedule.of(scheduler.alphas_cumprod, scheduler.final_alpha_cumprod, "epsilon")


@pytest.fixture
def tiny_prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("a red star on grass\na blue ring on sand\n\none white cross on brick\n", encoding="utf-8")
    return file


@pytest.fixture
def tiny_config(tiny_teacher: Path, tiny_prompts: Path) -> Config:
    """A whole run in seconds: 6 trajectories, N = 3, M = 4, 10 iterations."""
    return parse(
        {
            "teacher": str(tiny_teacher),
            "device": "cpu",
            "trajectories": {
                "prompts": str(tiny_prompts),
                "count": 6,
                "slots": 3,
                "fine_steps": 4,
                "guidance_scale": 3.0,
                "shard_size": 4,
                "batch_size": 3,
            },
            "student": {"rank": 4, "learning_rate": 1e-3, "ema": 0.9},
            "critics": {"rank": 2, "head_width": 8},
            "training": {"iterations": 10, "checkpoint_every": 4, "keep_checkpoints": 9, "gradient_checkpointing": False},
        },
        "tests",
    )
