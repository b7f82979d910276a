"""Tiny real teachers, made on the spot: real diffusers and transformers classes at toy sizes,
random weights."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import convert_state_dict_to_kohya
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from rapm.config import Config
from rapm.models import sdxl, stable_diffusion
from rapm.models.stable_diffusion import UNET_LORA_TARGETS, unet_feature_layers
from rapm.network import Backbone
from rapm.schedule import Schedule
from rapm.settings import parse
from rapm.toy import TEACHER

torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(scope="module", autouse=True)
def little_to_look_through() -> None:
    """A network is loaded after a collection, which would look through half a million objects of
    imports and collected tests each time."""
    gc.collect()
    gc.freeze()


SMALL = (
    "sd15",
    "sd21",
    "sdxl",
)  # the rows of the test table: small pipelines of the published kinds' own classes
CROSS_ATTENTION = {"sd15": 16, "sd21": 1024, "sdxl": 40, "tiny": 16}  # 1024 is 2.x


def make_unet(kind: str = "sd15") -> UNet2DConditionModel:
    """``tiny`` has a third of sd15's layers, for whatever trains and asks nothing of them."""
    torch.manual_seed(0)
    if kind == "tiny":
        return UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16,),
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("UpBlock2D",),
            mid_block_type="UNetMidBlock2D",
            layers_per_block=1,
            cross_attention_dim=CROSS_ATTENTION[kind],
            norm_num_groups=8,
            attention_head_dim=2,
        ).eval()
    own: dict[str, Any] = {
        "sd15": {"attention_head_dim": 2},
        "sd21": {"attention_head_dim": (2, 4), "use_linear_projection": True},
        "sdxl": {
            "attention_head_dim": (2, 4),
            "use_linear_projection": True,
            "transformer_layers_per_block": (1, 2),
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 16,
        },
    }
    attends_first = kind != "sdxl"  # SDXL attends in the deeper blocks only
    down = ("CrossAttnDownBlock2D", "DownBlock2D")
    up = ("UpBlock2D", "CrossAttnUpBlock2D")
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=down if attends_first else down[::-1],
        up_block_types=up if attends_first else up[::-1],
        layers_per_block=2
        if kind == "sd21"
        else 1,  # by the second layer an original checkpoint of 2.x is told
        cross_attention_dim=CROSS_ATTENTION[kind],
        norm_num_groups=8,
        **own[kind],
    ).eval()


def make_scheduler(kind: str = "sd15") -> Any:
    """As the published folders have them; for sd15 DDIM with trailing timesteps, so that a pipeline
    can be asked as it is."""
    betas: dict[str, Any] = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
    }
    if kind == "sdxl":
        return EulerDiscreteScheduler(**betas, steps_offset=1, timestep_spacing="leading")
    own = {
        "sd15": {"timestep_spacing": "trailing"},
        "tiny": {"timestep_spacing": "trailing"},
        "sd21": {"prediction_type": "v_prediction", "steps_offset": 1},
    }
    return DDIMScheduler(**betas, clip_sample=False, set_alpha_to_one=False, **own[kind])


# Of a VAE of pictures 16 x 16: latents 4 x 8 x 8.
SMALL_VAE: dict[str, Any] = {
    "block_out_channels": (8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "sample_size": 16,
}


def text_config(tokenizer: Any, hidden: int, layers: int, act: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        hidden_act=act,
        projection_dim=16,
    )


def make_pipeline(kind: str) -> Any:
    """A small pipeline of the published kind's classes: latents 4 x 8 x 8, pictures 16 x 16, random
    weights."""
    torch.manual_seed(1)
    vae = AutoencoderKL(**SMALL_VAE, scaling_factor=0.13025 if kind == "sdxl" else 0.18215)
    tokenizer = CLIPTokenizer.from_pretrained(TEACHER / "tokenizer")

    parts: dict[str, Any] = {
        "vae": vae,
        "tokenizer": tokenizer,
        "unet": make_unet(kind),
        "scheduler": make_scheduler(kind),
    }
    if kind == "sdxl":  # ten layers at least, by which an original checkpoint is told
        second = CLIPTextModelWithProjection(text_config(tokenizer, 24, 10, "gelu"))
        parts |= {
            "text_encoder": CLIPTextModel(text_config(tokenizer, 16, 2, "quick_gelu")),
            "text_encoder_2": second,
        }
        return StableDiffusionXLPipeline(**parts, tokenizer_2=tokenizer, add_watermarker=False)
    text = CLIPTextModel(
        text_config(tokenizer, CROSS_ATTENTION[kind], 2, "gelu" if kind == "sd21" else "quick_gelu")
    )
    left_out: dict[str, Any] = {
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    return StableDiffusionPipeline(**parts, text_encoder=text, **left_out)


@pytest.fixture(scope="session")
def small_teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders by kind, each made when it is first asked for."""

    class Folders(dict[str, Path]):
        def __missing__(self, kind: str) -> Path:
            self[kind] = tmp_path_factory.mktemp(kind)
            make_pipeline(kind).save_pretrained(self[kind])
            return self[kind]

    return Folders()


@pytest.fixture(scope="session")
def tiny_teacher(small_teachers: dict[str, Path]) -> Path:
    return small_teachers["tiny"]


def make_lora(folder: Path, out: Path, form: str, seed: int = 0) -> Path:
    """A LoRA file for network and first text encoder; kohya's with alpha at half the rank."""
    pipeline = DiffusionPipeline.from_pretrained(folder, safety_checker=None)
    targets = (
        ["to_q", "to_k", "to_v", "to_out.0"],
        ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    )
    states = {}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for part, names in zip(("unet", "text_encoder"), targets, strict=True):
            model = getattr(pipeline, part)
            model.add_adapter(
                LoraConfig(r=2, lora_alpha=2, target_modules=names, init_lora_weights=False)
            )
            states[part] = {
                name: 0.3 * value for name, value in get_peft_model_state_dict(model).items()
            }
    if form == "diffusers":
        pipeline.save_lora_weights(
            out, unet_lora_layers=states["unet"], text_encoder_lora_layers=states["text_encoder"]
        )
        return out / "pytorch_lora_weights.safetensors"
    whole = {
        f"{part}.{name}": value for part, state in states.items() for name, value in state.items()
    }
    kohya = {
        name: value.clone().contiguous()
        for name, value in convert_state_dict_to_kohya(whole).items()
    }
    out.mkdir()
    save_file(
        {
            name: torch.tensor(1.0) if name.endswith("alpha") else value
            for name, value in kohya.items()
        },
        out / "k.safetensors",
    )
    return out / "k.safetensors"


CALL = {
    "tiny": stable_diffusion.FAMILY.call,
    "sd15": stable_diffusion.FAMILY.call,
    "sd21": stable_diffusion.FAMILY.call,
    "sdxl": sdxl.FAMILY.call,
}


def make_backbone(
    checkpointing: bool = False, kind: str = "tiny", dtype: torch.dtype = torch.float32
) -> Backbone:
    network = make_unet(kind).to(dtype)
    features = unet_feature_layers(network)
    return Backbone(
        network, CALL[kind], UNET_LORA_TARGETS, features, gradient_checkpointing=checkpointing
    )


def make_conditioning(batch: int, kind: str, generator: torch.Generator) -> dict[str, Tensor]:
    embeds = {"prompt_embeds": torch.randn(batch, 6, CROSS_ATTENTION[kind], generator=generator)}
    if kind != "sdxl":
        return embeds
    pooled = torch.randn(batch, 16, generator=generator)
    time_ids = torch.tensor([[16.0, 16, 0, 0, 16, 16]]).expand(batch, 6)
    return embeds | {"pooled_prompt_embeds": pooled, "time_ids": time_ids}


def shake(parameters: Mapping[str, Tensor], seed: int) -> None:
    """Fresh LoRA is the identity, which would hide mistakes: fill it with noise."""
    generator = torch.Generator().manual_seed(seed)
    for p in parameters.values():
        p.data = 0.1 * torch.randn(p.shape, generator=generator)


@pytest.fixture(scope="session")
def ddim_schedule() -> Schedule:
    """SD's own: scaled linear betas, epsilon."""
    scheduler = make_scheduler()
    return Schedule.of(scheduler.alphas_cumprod, scheduler.final_alpha_cumprod, "epsilon")


@pytest.fixture
def tiny_prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text(
        "a red star on grass\na blue ring on sand\n\none white cross on brick\n", encoding="utf-8"
    )
    return file


@pytest.fixture
def tiny_config(tiny_teacher: Path, tiny_prompts: Path) -> Config:
    """A whole run of RAPM in seconds: 6 trajectories, N = 3, M = 4, 10 iterations."""
    return parse(tiny_table(tiny_teacher, tiny_prompts), "tests")


@pytest.fixture
def tiny_midpoint(tiny_teacher: Path, tiny_prompts: Path) -> Config:
    """The same of midpoint."""
    table = tiny_table(tiny_teacher, tiny_prompts)
    del (
        table["discriminators"],
        table["trajectories"]["fine_steps"],
        table["trajectories"]["shard_size"],
    )
    return parse(table | {"method": "midpoint"}, "tests")


def tiny_table(teacher: Path, prompts: Path) -> dict[str, Any]:
    return {
        "teacher": str(teacher),
        "device": "cpu",
        "trajectories": {
            "prompts": str(prompts),
            "count": 6,
            "slots": 3,
            "fine_steps": 4,
            "guidance_scale": 3.0,
            "shard_size": 4,
            "batch_size": 3,
        },
        "student": {"rank": 4, "learning_rate": 1e-3, "ema": 0.9},
        "discriminators": {"rank": 2, "head_width": 8, "learning_rate": 1e-3},
        "training": {
            "iterations": 10,
            "slot_batch": 3,
            "checkpoint_every": 4,
            "keep_checkpoints": 9,
            "gradient_checkpointing": False,
        },
        "samples": {"count": 0},
    }


def changed(config: Config, **sections: dict[str, Any]) -> Config:
    """A configuration with some settings of some sections changed, unvalidated."""
    own = {name: getattr(config, name).model_copy(update=new) for name, new in sections.items()}
    return config.model_copy(update=own)
