"""Every family against diffusers' own pipeline of its kind: what prompts become, where a rollout
ends, what a file gives."""

from __future__ import annotations

import inspect
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from conftest import SMALL, make_lora
from ldm import save_single_file
from rapm.config import Config
from rapm.errors import UserError
from rapm.estimate import make_plan
from rapm.models import sources, stable_diffusion
from rapm.models.resolve import architecture_of, resolve_teacher, teacher_of
from rapm.models.teacher import Teacher, load_backbone
from rapm.network import STUDENT, TEACHER, Backbone
from rapm.prompts import token_limit
from rapm.rollout import rollout
from rapm.sampling import guided, noise
from rapm.schedule import Grid
from rapm.toy import TEACHER as TOY
from rapm.toy import scenes

PROMPTS = ["a red star and a blue ring on grass", "one white cross on brick"]
GRID = Grid(slots=2, fine_steps=5)


def open_pipeline(folder: Path) -> Any:
    """diffusers' pipeline as a user would set it up for trailing DDIM."""
    pipeline = DiffusionPipeline.from_pretrained(folder, safety_checker=None)
    own = {"timestep_spacing": "trailing", "set_alpha_to_one": False, "clip_sample": False}
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **own)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def rolled_out(
    teacher: Teacher, size: tuple[int, int] | None = None, negative: str = "", scale: float = 3.0
) -> Tensor:
    """Where this library's rollout ends, [2, C, h, w], from the noise of trajectories 0 and 1."""
    family, shape = teacher.family, teacher.latent_shape(size)
    texts = teacher.load(family.text_parts, torch.float32, "cpu")
    of_size = {k: v.expand(2, *v.shape[1:]) for k, v in teacher.of_picture(size, 1.0).items()}
    backbone = Backbone(
        teacher.load_network(torch.float32, "cpu"), family.call, family.lora_targets
    )
    denoiser = guided(backbone, family.unconditional(texts, negative), scale)
    z = torch.stack([noise(0, k, shape) for k in range(2)])
    prompts = family.encode(texts, PROMPTS) | of_size
    with backbone.adapter(TEACHER):
        absolute, _ = rollout(denoiser, teacher.schedule, GRID, z, prompts)
    return absolute[:, 0]


def drawn(
    pipeline: Any,
    shape: tuple[int, int, int],
    negative: str | None = None,
    scale: float = 3.0,
    **given: Any,
) -> Tensor:
    """Where the pipeline ends, from the same noise."""
    return pipeline(
        PROMPTS,
        negative_prompt=[negative] * 2 if negative else None,
        num_inference_steps=GRID.slots * GRID.fine_steps,
        guidance_scale=scale,
        latents=torch.stack([noise(0, k, shape) for k in range(2)]),
        output_type="latent",
        **given,
    ).images


@pytest.mark.parametrize("kind", SMALL)
def test_encoding_is_the_pipelines(small_teachers: dict[str, Path], kind: str) -> None:
    teacher, pipeline = (
        resolve_teacher(str(small_teachers[kind])),
        open_pipeline(small_teachers[kind]),
    )
    texts = teacher.load(teacher.family.text_parts, torch.float32, "cpu")
    found = [
        teacher.family.encode(texts, PROMPTS),
        *(teacher.family.unconditional(texts, text) for text in ("", "blurry")),
    ]
    given: dict[str, Any] = {
        "device": "cpu",
        "num_images_per_prompt": 1,
        "do_classifier_free_guidance": True,
    }
    for negative, unconditional in ((None, found[1]), ("blurry", found[2])):
        many = [negative] * 2 if negative else None
        expected = pipeline.encode_prompt(PROMPTS, negative_prompt=many, **given)
        names = ["prompt_embeds", "pooled_prompt_embeds"] if kind == "sdxl" else ["prompt_embeds"]
        assert list(found[0]) == list(unconditional) == names
        for k, name in enumerate(names):
            torch.testing.assert_close(found[0][name], expected[2 * k], rtol=0, atol=1e-6)
            torch.testing.assert_close(
                unconditional[name].expand_as(expected[2 * k + 1]),
                expected[2 * k + 1],
                rtol=0,
                atol=1e-6,
            )
    assert (found[1]["prompt_embeds"].abs().max() == 0) == (
        kind == "sdxl"
    )  # force_zeros_for_empty_prompt


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize(
    ("size", "negative", "scale"),
    [((24, 32), "", 3.0), (None, "blurry, a green cross", 3.0), (None, "", 1.0)],
)
def test_rollout_ends_where_the_pipeline_ends(
    small_teachers: dict[str, Path],
    kind: str,
    size: tuple[int, int] | None,
    negative: str,
    scale: float,
) -> None:
    teacher = resolve_teacher(str(small_teachers[kind]))
    width, height = size or teacher.size()
    assert teacher.latent_shape(size) == (4, height // 2, width // 2)
    expected = drawn(
        open_pipeline(small_teachers[kind]),
        teacher.latent_shape(size),
        negative,
        scale,
        height=height,
        width=width,
    )
    assert (rolled_out(teacher, size, negative, scale) - expected).abs().max() < 1e-4


def test_a_size_is_part_of_what_sdxl_sees(small_teachers: dict[str, Path]) -> None:
    assert resolve_teacher(str(small_teachers["sdxl"])).of_picture((24, 32), 1.0)[
        "time_ids"
    ].tolist() == [[32, 24, 0, 0, 32, 24]]
    assert resolve_teacher(str(small_teachers["sd15"])).of_picture((24, 32), 1.0) == {}


@pytest.mark.parametrize("kind", SMALL)
def test_a_single_file_gives_what_its_folder_gives(
    small_teachers: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    folder, file = small_teachers[kind], tmp_path / "model.safetensors"
    save_single_file(DiffusionPipeline.from_pretrained(folder, safety_checker=None), file)
    layout = tmp_path / "layout"  # configs and tokenizers alone: no weight can come from here
    shutil.copytree(folder, layout, ignore=shutil.ignore_patterns("*.safetensors"))
    one, other = resolve_teacher(str(file), config=str(layout)), resolve_teacher(str(folder))
    assert one.family is other.family
    assert one.fingerprint != other.fingerprint
    for part in (
        one.family.network,
        "vae",
        *(name for name in one.family.text_parts if "encoder" in name),
    ):
        found, expected = (
            getattr(t.load([part], torch.float32, "cpu"), part).state_dict() for t in (one, other)
        )
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert torch.equal(rolled_out(one), rolled_out(other))


@pytest.mark.parametrize(
    ("kind", "form"), [("sd15", "diffusers"), ("sd21", "kohya"), ("sdxl", "kohya")]
)
def test_a_fused_lora_equals_the_pipeline_with_that_lora(
    small_teachers: dict[str, Path], tmp_path: Path, kind: str, form: str
) -> None:
    folder = small_teachers[kind]
    file, second = (
        make_lora(folder, tmp_path / "a", form),
        make_lora(folder, tmp_path / "b", "diffusers", seed=1),
    )
    pipeline, plain = open_pipeline(folder), resolve_teacher(str(folder))
    shape = plain.latent_shape(None)
    without = drawn(pipeline, shape)
    pipeline.load_lora_weights(str(file), adapter_name="a")
    pipeline.load_lora_weights(str(second), adapter_name="b")
    pipeline.set_adapters(["a", "b"], [0.7, 1.0])
    expected = drawn(pipeline, shape)
    assert (expected - without).abs().max() > 0.05
    teacher = resolve_teacher(str(folder), loras=[f"{file}:0.7", str(second)])
    assert (
        len(
            {
                teacher.fingerprint,
                plain.fingerprint,
                resolve_teacher(str(folder), loras=[str(file), str(second)]).fingerprint,
            }
        )
        == 3
    )
    assert (rolled_out(teacher) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("kind", SMALL)
def test_feature_layers_are_there_and_have_their_channels(
    small_teachers: dict[str, Path], kind: str
) -> None:
    teacher = resolve_teacher(str(small_teachers[kind]))
    network, family = teacher.load_network(torch.float32, "cpu"), teacher.family
    backbone = Backbone(network, family.call, family.lora_targets, family.feature_layers(network))
    texts = teacher.load(family.text_parts, torch.float32, "cpu")
    conditioning = family.encode(texts, PROMPTS[:1]) | teacher.of_picture((16, 16), 1.0)
    with backbone.adapter(TEACHER), torch.no_grad():
        maps = backbone.features(torch.randn(1, 4, 8, 8), torch.tensor([500]), conditioning)
    assert [tuple(x.shape[1:]) for x in maps] == [(16, 4, 4), (32, 4, 4), (32, 4, 4)]


@pytest.mark.parametrize(
    ("source", "modules", "parameters", "network"),
    [("random:sd15", 278, 1_050_816, 859_520_964), ("random:sdxl", 788, 3_074_240, 2_567_463_684)],
)
def test_the_published_architectures(
    source: str, modules: int, parameters: int, network: int
) -> None:
    """On the meta device: the published numbers of parameters, and those of a rank-1 LoRA on all 14
    target names."""
    teacher = resolve_teacher(source)
    body = Backbone(
        teacher.load_network(torch.float32, "meta"),
        teacher.family.call,
        teacher.family.lora_targets,
    )
    assert sum(p.numel() for p in body.network.parameters()) == network
    body.add_adapter(STUDENT, 1, teacher.family.lora_targets, 0)
    own = body.parameters(STUDENT)
    assert len(teacher.family.lora_targets) == 14
    assert (len(own), sum(p.numel() for p in own.values())) == (2 * modules, parameters)
    assert (
        sum(p.numel() for p in teacher.load(["vae"], torch.float32, "meta").vae.parameters())
        == 83_653_863
    )
    assert (
        sum(
            p.numel()
            for p in teacher.load(["text_encoder"], torch.float32, "meta").text_encoder.parameters()
        )
        == 123_060_480
    )


def test_random_weights_are_always_the_same_and_as_precise_as_asked() -> None:
    teacher = resolve_teacher("random:sd15")
    first, again = (
        teacher.load(["tokenizer", "text_encoder"], torch.bfloat16, "cpu") for _ in range(2)
    )
    state = first.text_encoder.state_dict()
    assert {value.dtype for value in state.values() if value.is_floating_point()} == {
        torch.bfloat16
    }
    assert all(
        torch.equal(value, again.text_encoder.state_dict()[name]) for name, value in state.items()
    )
    assert teacher.family.encode(first, PROMPTS)["prompt_embeds"].shape == (2, 24, 768)


@pytest.mark.parametrize("kind", SMALL)
def test_shapes_of_conditioning_are_known_beforehand(
    small_teachers: dict[str, Path], kind: str
) -> None:
    teacher = resolve_teacher(str(small_teachers[kind]))
    texts = teacher.load(teacher.family.text_parts, torch.float32, "cpu")
    found = teacher.family.encode(texts, PROMPTS)
    expected = teacher.family.conditioning(teacher.config)
    assert {name: tuple(value.shape[1:]) for name, value in found.items()} == expected


def test_a_runs_teacher_is_the_one_of_its_settings(
    small_teachers: dict[str, Path], tmp_path: Path
) -> None:
    folder = str(small_teachers["sd15"])
    file = str(make_lora(small_teachers["sd15"], tmp_path / "a", "kohya"))
    config = Config(teacher=folder, teacher_loras=[f"{file}:0.5"])
    teacher = teacher_of(config)
    assert teacher.fingerprint == resolve_teacher(folder, loras=[f"{file}:0.5"]).fingerprint
    assert [(lora.file, lora.strength) for lora in teacher.loras] == [(Path(file), 0.5)]
    assert architecture_of(config).fingerprint == teacher.fingerprint
    assert teacher.captions is None


def test_only_the_toy_brings_captions() -> None:
    teacher = teacher_of(Config())
    assert teacher.source == "toy" and teacher.folder == TOY
    assert teacher.captions is not None
    assert teacher.captions(3, 0, "train") == scenes.captions(3, 0, "train")


def test_published_models_are_planned_without_their_weights() -> None:
    for name, layout in (
        ("stabilityai/stable-diffusion-xl-base-1.0", "sdxl"),
        ("stable-diffusion-v1-5/stable-diffusion-v1-5@main", "sd15"),
    ):
        planned = architecture_of(Config(teacher=name))
        assert (planned.source, planned.folder.name, planned.random) == (name, layout, True)


@pytest.mark.parametrize(("base", "held"), [("same", torch.float32), ("int8", torch.int8)])
def test_what_rollout_and_training_are_given(
    small_teachers: dict[str, Path], base: str, held: torch.dtype
) -> None:
    """The network alone, frozen, its weights held as asked, its layers known."""
    teacher = resolve_teacher(str(small_teachers["sd15"]))
    config = Config.model_validate({"base_precision": base})
    backbone = load_backbone(teacher, config, "cpu")
    assert not any(p.requires_grad for p in backbone.network.parameters())
    assert backbone.network.down_blocks[0].resnets[0].conv1.weight.dtype == held
    assert backbone.network.conv_in.weight.dtype == torch.float32 == backbone.dtype
    assert backbone.network.is_gradient_checkpointing
    texts = teacher.load(teacher.family.text_parts, torch.float32, "cpu")
    prompts = teacher.family.encode(texts, PROMPTS[:1])
    with backbone.adapter(TEACHER), torch.no_grad():
        features = backbone.features(torch.randn(1, 4, 8, 8), torch.tensor([500]), prompts)
    assert len(features) == 3


# ---- mistakes


def refused(source: Path | str, **given: Any) -> str:
    """The one line in which a teacher is refused, found or loaded."""
    with pytest.raises(UserError) as error:
        resolve_teacher(str(source), **given).load_network(torch.float32, "cpu")
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_is_no_checkpoint_is_refused(small_teachers: dict[str, Path], tmp_path: Path) -> None:
    folder, file = small_teachers["sd15"], tmp_path / "model.safetensors"
    vae = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    save_file({f"first_stage_model.{name}": value for name, value in vae.items()}, file)
    assert (
        refused(file)
        == f"teacher '{file}' is no whole checkpoint: there is no denoising network and no text "
        f"encoder in it"
    )
    shutil.copy(make_lora(folder, tmp_path / "lora", "kohya"), file)
    assert refused(file).startswith(
        f"teacher '{file}' is no whole checkpoint: there is no denoising network"
    )
    save_file(
        {
            "double_blocks.0.img_attn.norm.key_norm.scale": torch.zeros(1),
            "img_in.weight": torch.zeros(4, 64),
        },
        file,
    )
    assert refused(file).startswith(f"teacher '{file}' looks like 'flux-")
    joint = "model.diffusion_model.joint_blocks.0.context_block.adaLN_modulation.1.bias"
    save_file({joint: torch.zeros(1)}, file)
    assert refused(file).startswith(f"teacher '{file}' ")
    file.write_bytes(b"\x00" * 100)
    assert refused(file) == f"{file} is damaged, or no safetensors file"
    file.unlink()
    assert refused(file) == f"there is no file {file}"


def test_pickles_are_refused_with_the_way_to_convert(
    small_teachers: dict[str, Path], tmp_path: Path
) -> None:
    for ending in (".ckpt", ".pt", ".pth", ".bin"):
        assert (
            "is a pickle, which may run code when it is opened; convert it to .safetensors first"
            in refused(f"model{ending}")
        )
    lora = f"LoRA {tmp_path / 'a.pt'} is a pickle"
    assert refused(small_teachers["sd15"], loras=[f"{tmp_path / 'a.pt'}:0.5"]).startswith(lora)


def test_a_checkpoint_of_2x_must_be_told_what_it_predicts(
    small_teachers: dict[str, Path], tmp_path: Path
) -> None:
    file = tmp_path / "model.safetensors"
    save_single_file(
        DiffusionPipeline.from_pretrained(small_teachers["sd21"], safety_checker=None), file
    )
    assert "does not say whether it predicts noise or v; name a folder" in refused(file)
    assert f"and the configs in {small_teachers['sdxl']} are of another family" in refused(
        file, config=str(small_teachers["sdxl"])
    )


def test_a_checkpoint_that_says_v_is_believed(
    small_teachers: dict[str, Path], tmp_path: Path
) -> None:
    file = tmp_path / "model.safetensors"
    save_single_file(
        DiffusionPipeline.from_pretrained(small_teachers["sdxl"], safety_checker=None), file
    )
    save_file(load_file(file) | {"v_pred": torch.zeros(0)}, file)
    assert "says that it predicts v, its configs say 'epsilon'" in refused(
        file, config=str(small_teachers["sdxl"])
    )


def test_a_checkpoint_that_says_zero_terminal_snr_is_believed(
    small_teachers: dict[str, Path], tmp_path: Path
) -> None:
    file, layout = tmp_path / "model.safetensors", tmp_path / "layout"
    shutil.copytree(small_teachers["sdxl"], layout)
    save_single_file(DiffusionPipeline.from_pretrained(layout, safety_checker=None), file)
    save_file(load_file(file) | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, file)
    scheduler = layout / "scheduler" / "scheduler_config.json"
    config = json.loads(scheduler.read_text()) | {"prediction_type": "v_prediction"}
    scheduler.write_text(json.dumps(config))
    assert "whose scheduler has rescale_betas_zero_snr true" in refused(file, config=str(layout))
    scheduler.write_text(json.dumps(config | {"rescale_betas_zero_snr": True}))
    assert float(resolve_teacher(str(file), config=str(layout)).schedule.alphas[-1]) ** 2 < 1e-7


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_missing_part_is_named(
    small_teachers: dict[str, Path], tmp_path: Path, part: str
) -> None:
    shutil.copytree(small_teachers["sd15"], tmp_path / "teacher")
    shutil.rmtree(tmp_path / "teacher" / part)
    assert (
        refused(tmp_path / "teacher")
        == f"teacher '{tmp_path / 'teacher'}' is incomplete: it has no {part}"
    )


def test_pickled_weights_in_a_folder_are_not_read(
    small_teachers: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(small_teachers["sd15"], tmp_path / "teacher")
    weights = tmp_path / "teacher" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    assert "its unet has no .safetensors weights, only pickled ones" in refused(
        tmp_path / "teacher"
    )


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_damaged_weights_are_one_line(
    small_teachers: dict[str, Path], tmp_path: Path, part: str
) -> None:
    shutil.copytree(small_teachers["sd15"], tmp_path / "teacher")
    file = next((tmp_path / "teacher" / part).glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:200])
    assert refused(tmp_path / "teacher") == f"{file} is damaged, or no safetensors file"


def test_an_editing_model_is_no_teacher(small_teachers: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(small_teachers["sd15"], tmp_path / "teacher")
    file = tmp_path / "teacher" / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"in_channels": 9}))
    assert "takes 9 channels where its VAE gives 4" in refused(tmp_path / "teacher")


def test_a_flow_scheduler_beside_a_unet_is_refused(
    small_teachers: dict[str, Path], tmp_path: Path
) -> None:
    """DDIMScheduler would take its own default betas without a word."""
    shutil.copytree(small_teachers["sd15"], tmp_path / "teacher")
    FlowMatchEulerDiscreteScheduler().save_pretrained(tmp_path / "teacher" / "scheduler")
    told = "has a FlowMatchEulerDiscreteScheduler; a StableDiffusionPipeline takes a scheduler with"
    assert told in refused(tmp_path / "teacher")


def test_an_empty_tokenizer_or_config_is_named(
    small_teachers: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(small_teachers["sd15"], tmp_path / "a")
    for file in (tmp_path / "a" / "tokenizer").iterdir():
        file.unlink()
    assert refused(tmp_path / "a").endswith("is incomplete: its tokenizer has no vocabulary")
    shutil.copytree(small_teachers["sd15"], tmp_path / "b")
    (tmp_path / "b" / "vae" / "config.json").write_text("{}")
    assert refused(tmp_path / "b").endswith("the config of its unet or vae is incomplete")


def test_a_folder_of_fp16_files_alone(small_teachers: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "teacher"
    shutil.copytree(small_teachers["sd15"], folder)
    for part in ("unet", "text_encoder", "vae"):
        (file,) = (folder / part).glob("*.safetensors")
        file.rename(file.with_suffix(".fp16.safetensors"))
    whole, again = (
        resolve_teacher(str(each)).load_network(torch.float32, "cpu")
        for each in (small_teachers["sd15"], folder)
    )
    assert all(
        torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True)
    )


def test_only_what_is_loaded_tells_teachers_apart(
    small_teachers: dict[str, Path], tmp_path: Path
) -> None:
    """Other programs may bring more files of the same model into the hub's cache."""
    folder, file = tmp_path / "teacher", tmp_path / "model.safetensors"
    shutil.copytree(small_teachers["sd15"], folder)
    save_single_file(DiffusionPipeline.from_pretrained(folder, safety_checker=None), file)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    before = [
        resolve_teacher(str(folder)).fingerprint,
        resolve_teacher(str(file), config=str(folder)).fingerprint,
    ]
    shutil.copy(weights, weights.with_suffix(".fp16.safetensors"))
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"pickled")
    assert [
        resolve_teacher(str(folder)).fingerprint,
        resolve_teacher(str(file), config=str(folder)).fingerprint,
    ] == before
    save_file({name: value + 1 for name, value in load_file(weights).items()}, weights)
    assert resolve_teacher(str(folder)).fingerprint != before[0]
    assert resolve_teacher(str(file), config=str(folder)).fingerprint == before[1]
    weights.unlink()
    assert resolve_teacher(str(folder)).fingerprint not in before


def test_noise_predicted_at_zero_terminal_snr_is_refused(
    small_teachers: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(small_teachers["sd15"], tmp_path / "teacher")
    file = tmp_path / "teacher" / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text()) | {"rescale_betas_zero_snr": True}
    file.write_text(json.dumps(config))
    assert "zero terminal SNR with epsilon" in refused(tmp_path / "teacher")
    file.write_text(json.dumps(config | {"prediction_type": "v_prediction"}))
    teacher = resolve_teacher(str(tmp_path / "teacher"))
    assert float(teacher.schedule.alphas[-1]) ** 2 < 1e-7  # pure noise at the start
    pipeline = open_pipeline(tmp_path / "teacher")
    assert (rolled_out(teacher) - drawn(pipeline, teacher.latent_shape(None))).abs().max() < 1e-4


@pytest.mark.parametrize(("size", "unit"), [((18, 16), 4), ((16, 30), 4)])
def test_an_impossible_size(
    small_teachers: dict[str, Path], size: tuple[int, int], unit: int
) -> None:
    with pytest.raises(
        UserError, match=f"sides that are multiples of {unit} pixels, not {size[0]}x{size[1]}"
    ):
        resolve_teacher(str(small_teachers["sd15"])).latent_shape(size)


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_another_familys_lora_is_refused(
    small_teachers: dict[str, Path], tmp_path: Path, form: str
) -> None:
    file = make_lora(small_teachers["sdxl"], tmp_path / "lora", form)
    line = refused(small_teachers["sd15"], loras=[str(file)])
    assert line.startswith(f"LoRA {file} does not fit teacher '{small_teachers['sd15']}': ")


def test_a_lora_must_be_one(small_teachers: dict[str, Path], tmp_path: Path) -> None:
    teacher = small_teachers["sd15"]
    assert (
        refused(teacher, loras=["none.safetensors"])
        == "there is no LoRA file none.safetensors; write FILE or FILE:STRENGTH"
    )
    assert refused(teacher, loras=["C:a.safetensors"]).startswith(
        "there is no LoRA file C:a.safetensors;"
    )  # no strength
    file = teacher / "vae" / "diffusion_pytorch_model.safetensors"
    assert refused(teacher, loras=[str(file)]).startswith(
        f"LoRA {file} holds 'decoder.conv_in.bias', which is no plain LoRA's"
    )
    plain = load_file(make_lora(teacher, tmp_path / "lora", "kohya"))
    down = next(name for name in plain if name.endswith("lora_down.weight"))
    for kind in (
        "dora_scale",
        "hada_w1_a",
        "lokr_w1",
    ):  # diffusers drops the first of these in silence
        odd = down.replace("lora_down.weight", kind)
        save_file(plain | {odd: torch.ones(1)}, tmp_path / "odd.safetensors")
        assert f"holds '{odd}', which is no plain LoRA's" in refused(
            teacher, loras=[str(tmp_path / "odd.safetensors")]
        )
    save_file(
        {name: value for name, value in plain.items() if name != down},
        tmp_path / "half.safetensors",
    )
    assert not refused(teacher, loras=[str(tmp_path / "half.safetensors")]).endswith(": ")


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def put_in_cache(cache: Path, name: str, revision: str, folder: Path) -> Path:
    """As the hub's own library keeps a download."""
    repository, commit = cache / f"models--{name.replace('/', '--')}", "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / revision).write_text(commit)
    shutil.copytree(folder, repository / "snapshots" / commit)
    return repository / "snapshots" / commit


def test_a_hub_id_works_from_the_cache(small_teachers: dict[str, Path], hub_cache: Path) -> None:
    snapshot = put_in_cache(hub_cache, "someone/model", "main", small_teachers["sdxl"])
    teacher = resolve_teacher("someone/model")
    assert (teacher.folder, teacher.fingerprint) == (
        snapshot,
        resolve_teacher(str(small_teachers["sdxl"])).fingerprint,
    )
    put_in_cache(hub_cache, "someone/other", "v2", small_teachers["sd15"])
    assert (
        resolve_teacher("someone/other@v2").fingerprint
        == resolve_teacher(str(small_teachers["sd15"])).fingerprint
    )
    assert "not in the hub's cache, and cannot be downloaded" in refused("someone/other")


def test_a_hub_id_that_is_not_there_or_half_there(
    small_teachers: dict[str, Path], hub_cache: Path
) -> None:
    assert refused("someone/model").startswith(
        "teacher 'someone/model' is no folder here, not in the hub's cache, and cannot be"
    )
    snapshot = put_in_cache(hub_cache, "someone/model", "main", small_teachers["sd15"])
    next((snapshot / "vae").glob("*.safetensors")).unlink()
    assert refused("someone/model").endswith("is incomplete: its vae has no .safetensors weights")


def test_a_single_file_takes_its_configs_from_the_cache(
    small_teachers: dict[str, Path], hub_cache: Path, tmp_path: Path
) -> None:
    file = tmp_path / "model.safetensors"
    save_single_file(
        DiffusionPipeline.from_pretrained(small_teachers["sdxl"], safety_checker=None), file
    )
    line = refused(file)
    assert (
        "whose configs and tokenizer are those of stabilityai/stable-diffusion-xl-base-1.0; that "
        "is not in the cache" in line
    )
    assert line.endswith(
        "name a folder in diffusers' layout of the same kind with --teacher-config"
    )
    snapshot = put_in_cache(
        hub_cache, "stabilityai/stable-diffusion-xl-base-1.0", "main", small_teachers["sdxl"]
    )
    teacher = resolve_teacher(str(file))
    assert teacher.folder == snapshot
    assert torch.equal(
        rolled_out(teacher), rolled_out(resolve_teacher(str(small_teachers["sdxl"])))
    )

    tensors = load_file(
        file
    )  # what a file says of itself counts beside configs that it did not bring
    save_file(tensors, file, {"modelspec.prediction_type": "epsilon"})
    assert resolve_teacher(str(file)).schedule.prediction_type == "epsilon"
    save_file(tensors, file, {"modelspec.prediction_type": "v"})
    assert "says that it predicts v, its configs say 'epsilon'" in refused(file)
    assert resolve_teacher(str(file), config=str(snapshot)).schedule.prediction_type == "epsilon"
    save_file(tensors | {"edm_vpred.sigma_max": torch.zeros(1)}, file)
    assert "is sampled by EDM's noise levels" in refused(file, config=str(snapshot))


def test_configs_of_which_only_a_part_is_in_the_cache_are_fetched(
    small_teachers: dict[str, Path],
    hub_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file, whole = tmp_path / "model.safetensors", small_teachers["sdxl"]
    save_single_file(DiffusionPipeline.from_pretrained(whole, safety_checker=None), file)
    snapshot = put_in_cache(hub_cache, "stabilityai/stable-diffusion-xl-base-1.0", "main", whole)
    for part in snapshot.iterdir():
        if part.name != "vae":
            shutil.rmtree(part) if part.is_dir() else part.unlink()

    def fetched(repository: str, *, local_files_only: bool = False, **_: object) -> str:
        return str(snapshot if local_files_only else whole)

    monkeypatch.setattr(sources, "snapshot_download", fetched)
    assert resolve_teacher(str(file)).folder == whole


def test_an_unknown_architecture(tmp_path: Path) -> None:
    names = ["chroma1", "flux1-dev", "flux2-klein-base-4b", "flux2-klein-base-9b", "sd15"]
    more = ["sd35-large", "sd35-medium", "sdxl", "z-image"]
    known = ", ".join(f"random:{name}" for name in [*names, *more])
    told = f"there is no architecture 'random:sd9'; there are: {known}"
    assert refused("random:sd9") == told


@pytest.mark.parametrize(
    ("linear", "prediction", "base"),
    [(False, "epsilon", "sd_v1"), (True, "epsilon", "sd_v2"), (True, "v_prediction", "sd_v2_v")],
)
def test_the_base_model_a_lora_names(linear: bool, prediction: str, base: str) -> None:
    configs = {
        "unet": {"use_linear_projection": linear},
        "scheduler": {"prediction_type": prediction},
    }
    assert stable_diffusion.FAMILY.base_model(configs.__getitem__)[0] == base


# ---- what real folders and files hold


def change(file: Path, **new: Any) -> None:
    """Fields of a JSON file; None stays null, ABSENT goes."""
    value = json.loads(file.read_text()) | new
    file.write_text(json.dumps({k: v for k, v in value.items() if v is not ABSENT}))


ABSENT: Any = object()
UNET, VAE, TEXT = "unet/config.json", "vae/config.json", "text_encoder/config.json"
SCHEDULER = "scheduler/scheduler_config.json"


@pytest.mark.parametrize(
    ("kind", "file", "new", "told"),
    [
        ("sd15", UNET, {"time_cond_proj_dim": 256}, "its unet has time_cond_proj_dim = 256"),
        ("sd15", UNET, {"class_embed_type": "timestep"}, "has class_embed_type = 'timestep'"),
        ("sd15", UNET, {"num_class_embeds": 5}, "has num_class_embeds = 5"),
        ("sd15", UNET, {"encoder_hid_dim": 32}, "has encoder_hid_dim = 32"),
        ("sd15", UNET, {"addition_embed_type": "text"}, "has addition_embed_type = 'text'"),
        ("sdxl", UNET, {"addition_embed_type": "image"}, "has addition_embed_type = 'image'"),
        ("sd15", UNET, {"quantization_config": {"a": 1}}, "has quantization_config = {'a': 1}"),
        ("sd15", UNET, {"out_channels": 8}, "predicts 8 channels of 4"),
        ("sd15", UNET, {"cross_attention_dim": 24}, "cross_attention_dim is 24, the text encoders"),
        ("sdxl", TEXT, {"hidden_size": 24}, "cross_attention_dim is 40, the text encoders give 48"),
        ("sdxl", UNET, {"addition_time_embed_dim": 9}, "is 64, the picture's size and the pooled"),
        ("sd15", UNET, {"block_out_channels": "ab"}, "cannot be loaded: its unet: "),
        (
            "sd15",
            UNET,
            {"layers_per_block": 2},
            "its unet has no tensor 'down_blocks.0.attentions.1.",
        ),
        ("sd15", UNET, {"block_out_channels": [24, 32]}, "'conv_in.weight' of shape [16, 4, 3, 3]"),
        ("sd15", VAE, {"out_channels": 4}, "its vae has out_channels = 4"),
        ("sd15", VAE, {"block_out_channels": [10**30]}, "cannot be loaded: its vae: "),
        ("sd15", TEXT, {"hidden_size": "16"}, "cannot be loaded: "),
        ("sd15", SCHEDULER, {"beta_start": "0.1"}, "cannot be loaded: its scheduler: "),
        ("sd15", SCHEDULER, {"beta_schedule": "laplace"}, "laplace is not implemented"),
        ("sd15", SCHEDULER, {"num_train_timesteps": 10**12}, "it has 1,000,000,000,000 timesteps"),
        ("sd15", "model_index.json", {"_class_name": ["a", "B"]}, "is a ['a', 'B']; this version"),
        ("sd15", "model_index.json", {"unet": ["mine", "Net"]}, "its unet is ['mine', 'Net'] by"),
        ("sd15", "model_index.json", {"vae": ["diffusers", "AutoencoderTiny"]}, "its vae has _cl"),
        (
            "sd15",
            "model_index.json",
            {"text_encoder": ["transformers", "CLIPTextModelWithProjection"]},
            "its text_encoder has _class_name = 'CLIPTextModelWithProjection'",
        ),
        ("sd15", "model_index.json", {"tokenizer": ["transformers", "No"]}, "its tokenizer is ['"),
        # What would hang, or show after the rollout.
        ("sd15", UNET, {"layers_per_block": 10**8}, "its unet has layers_per_block = 100000000"),
        ("sdxl", UNET, {"transformer_layers_per_block": [1, 10**8]}, "its unet has transformer_l"),
        ("sd15", VAE, {"layers_per_block": 10**8}, "its vae has layers_per_block = 100000000"),
        ("sd15", TEXT, {"num_hidden_layers": 10**8}, "its text_encoder has num_hidden_layers = 1"),
        ("sd15", UNET, {"norm_eps": "x"}, "its unet: group_norm(): argument 'eps'"),
        ("sd15", UNET, {"freq_shift": "x"}, "cannot be loaded: its unet: unsupported operand"),
        ("sd15", VAE, {"scaling_factor": None}, "its vae has scaling_factor = None, which is no"),
        ("sd15", VAE, {"scaling_factor": 0}, "its vae has scaling_factor = 0, which is no positi"),
        ("sdxl", VAE, {"latents_mean": [1.0], "latents_std": [1.0] * 4}, "latents_mean = [1.0] fo"),
        ("sd15", SCHEDULER, {"beta_start": 0.0, "beta_end": 0.0}, "noise does not grow from step"),
        ("sd15", SCHEDULER, {"beta_end": 5.0}, "noise does not grow from step to step; they are"),
        ("sd15", SCHEDULER, {"beta_start": math.nan}, "noise does not grow from step to step"),
        ("sd15", SCHEDULER, {"trained_betas": [1.0] * 1000}, "noise does not grow from step to"),
    ],
)
def test_a_config_that_no_call_serves_is_refused(
    small_teachers: dict[str, Path],
    tmp_path: Path,
    kind: str,
    file: str,
    new: dict[str, Any],
    told: str,
) -> None:
    shutil.copytree(small_teachers[kind], tmp_path / "t")
    change(tmp_path / "t" / file, **new)
    assert told in refused(tmp_path / "t")


@pytest.mark.parametrize(
    ("file", "new", "told"),
    [
        (TEXT, {"vocab_size": 20}, "its tokenizer: it has 597 tokens, its text_encoder 20"),
        (
            "tokenizer/tokenizer_config.json",
            {"pad_token": None},
            "its tokenizer: it has no token to fill prompts up with",
        ),
    ],
)
def test_a_tokenizer_goes_with_its_encoder(
    small_teachers: dict[str, Path], tmp_path: Path, file: str, new: dict[str, Any], told: str
) -> None:
    shutil.copytree(small_teachers["sd15"], tmp_path / "t")
    change(tmp_path / "t" / file, **new)
    if "vocab_size" in new:
        weights = next((tmp_path / "t" / "text_encoder").glob("*.safetensors"))
        tensors = load_file(weights)
        cut = {k: v[:20].contiguous() if "token_emb" in k else v for k, v in tensors.items()}
        save_file(cut, weights, {"format": "pt"})
    with pytest.raises(UserError) as caught:
        resolve_teacher(str(tmp_path / "t")).load_tokenizers()
    assert told in str(caught.value)


def test_every_field_of_a_network_is_judged() -> None:
    """A field that is new in diffusers may change what a call has to give."""
    served = stable_diffusion.SERVED_UNET.keys() - {"_class_name"}
    inner = """
        sample_size in_channels out_channels center_input_sample flip_sin_to_cos freq_shift
        down_block_types mid_block_type up_block_types only_cross_attention block_out_channels
        layers_per_block downsample_padding mid_block_scale_factor dropout act_fn norm_num_groups
        norm_eps cross_attention_dim transformer_layers_per_block
        reverse_transformer_layers_per_block attention_head_dim num_attention_heads
        dual_cross_attention use_linear_projection addition_time_embed_dim upcast_attention
        resnet_time_scale_shift resnet_skip_time_act resnet_out_scale_factor time_embedding_type
        time_embedding_dim time_embedding_act_fn timestep_post_act conv_in_kernel conv_out_kernel
        projection_class_embeddings_input_dim attention_type class_embeddings_concat
        mid_block_only_cross_attention cross_attention_norm addition_embed_type_num_heads
    """
    fields = set(inspect.signature(UNet2DConditionModel.__init__).parameters) - {"self"}
    assert fields == served | set(inner.split())


def test_sizes_that_a_network_says(small_teachers: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(small_teachers["sd15"], tmp_path / "t")
    change(tmp_path / "t" / UNET, sample_size=[8, 12])
    teacher = resolve_teacher(str(tmp_path / "t"))
    assert (teacher.latent_shape(None), teacher.size()) == ((4, 8, 12), (24, 16))
    for none in (None, ABSENT, "8", [8]):
        change(tmp_path / "t" / UNET, sample_size=none)
        teacher = resolve_teacher(str(tmp_path / "t"))
        assert teacher.latent_shape((16, 24)) == (4, 12, 8)
        with pytest.raises(UserError, match="does not say how large its pictures are"):
            teacher.latent_shape(None)


def test_tokens_end_where_the_shortest_part_ends(
    small_teachers: dict[str, Path], tmp_path: Path
) -> None:
    """The tokenizer says 24 as the encoder does; LongCLIP's say 248."""
    shutil.copytree(small_teachers["sd15"], tmp_path / "t")
    for said, limit in ((ABSENT, 24), (248, 24), (12, 12)):
        change(tmp_path / "t" / "tokenizer" / "tokenizer_config.json", model_max_length=said)
        teacher = resolve_teacher(str(tmp_path / "t"))
        (tokenizer,) = teacher.load_tokenizers()
        assert token_limit([tokenizer]) == limit
        texts = teacher.load(teacher.family.text_parts, torch.float32, "cpu")
        assert teacher.family.encode(texts, ["a " * 99])["prompt_embeds"].shape == (1, limit, 16)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize(
    ("damage", "told"),
    [
        ("cut", "is damaged, or no safetensors file"),
        ("lfs", "is a git-lfs pointer, not the file it stands for; fetch that with: git lfs pull"),
        ("gone", "has no .safetensors weights"),
        ("pipe", "is no regular file"),
        ("less", "has no tensor '"),
        ("more", ".scale_weight', which no layer takes"),
        ("packed", "quantised to integers"),
    ],
)
def test_a_damaged_part_is_named_before_anything_is_loaded(
    small_teachers: dict[str, Path], tmp_path: Path, part: str, damage: str, told: str
) -> None:
    shutil.copytree(small_teachers["sd15"], tmp_path / "t")
    (file,) = (tmp_path / "t" / part).glob("*.safetensors")
    tensors = load_file(file)
    name = max(tensors)
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "lfs":
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    elif damage in ("gone", "pipe"):
        file.unlink()
        file.symlink_to("../gone") if damage == "gone" else os.mkfifo(file)
    elif damage == "less":
        save_file({k: x for k, x in tensors.items() if k != name}, file)
    elif damage == "more":
        save_file(tensors | {name.replace(".weight", ".scale_weight"): torch.ones(1)}, file)
    else:
        save_file(tensors | {name: tensors[name].to(torch.int8)}, file)
    with pytest.raises(UserError) as error:
        resolve_teacher(str(tmp_path / "t"))
    assert told in str(error.value) and part in str(error.value)


def test_old_names_of_attention_find_their_place(
    small_teachers: dict[str, Path], tmp_path: Path
) -> None:
    """As published VAEs and text encoders have them still."""
    shutil.copytree(small_teachers["sd15"], tmp_path / "t")
    (vae,) = (tmp_path / "t" / "vae").glob("*.safetensors")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, value in load_file(vae).items():
        for new, was in old.items():
            name = name.replace(f".{new}.", f".{was}.")
        renamed[name] = value
    assert any(".proj_attn." in name for name in renamed)
    save_file(renamed, vae, {"format": "pt"})
    (text,) = (tmp_path / "t" / "text_encoder").glob("*.safetensors")
    own = {f"text_model.{k.removeprefix('text_model.')}": x for k, x in load_file(text).items()}
    own["text_model.embeddings.position_ids"] = torch.arange(24)[None]
    save_file(own, text, {"format": "pt"})
    found, expected = (resolve_teacher(str(f)) for f in (tmp_path / "t", small_teachers["sd15"]))
    for part in ("vae", "text_encoder"):
        one, other = (
            getattr(t.load([part], torch.float32, "cpu"), part) for t in (found, expected)
        )
        pairs = zip(one.parameters(), other.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_shards_and_variants_that_diffusers_writes(
    small_teachers: dict[str, Path], tmp_path: Path
) -> None:
    folder, pipeline = small_teachers["sd15"], open_pipeline(small_teachers["sd15"])
    whole = resolve_teacher(str(folder)).load(["unet", "text_encoder"], torch.float32, "cpu")
    for variant in (None, "fp16", "bf16"):
        shutil.rmtree(tmp_path / "t", ignore_errors=True)
        shutil.copytree(folder, tmp_path / "t")
        for part in ("unet", "text_encoder"):
            shutil.rmtree(tmp_path / "t" / part)
            model = getattr(pipeline, part)
            model.save_pretrained(tmp_path / "t" / part, variant=variant, max_shard_size="40KB")
            assert len(list((tmp_path / "t" / part).glob("*.safetensors"))) > 1
        own = resolve_teacher(str(tmp_path / "t"))
        found = own.load(["unet", "text_encoder"], torch.float32, "cpu")
        for part in ("unet", "text_encoder"):
            both = (getattr(each, part).state_dict() for each in (found, whole))
            one, other = both
            assert all(torch.equal(one[name], other[name]) for name in other)


@pytest.mark.parametrize("name", ["../unet/a.safetensors", "pytorch_model.bin", "/etc/passwd"])
@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_an_index_names_safetensors_beside_it_alone(
    small_teachers: dict[str, Path], tmp_path: Path, part: str, name: str
) -> None:
    shutil.copytree(small_teachers["sd15"], tmp_path / "t")
    (file,) = (tmp_path / "t" / part).glob("*.safetensors")
    index = file.with_name(f"{file.name}.index.json")
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"conv_in.weight": name}}))
    file.unlink()
    assert f"the index of its {part} names '{name}'; only .safetensors files" in refused(
        tmp_path / "t"
    )


@pytest.mark.parametrize("file", [UNET, "tokenizer/tokenizer_config.json", "model_index.json"])
def test_what_is_no_sensible_file_is_not_read(
    small_teachers: dict[str, Path], tmp_path: Path, file: str
) -> None:
    shutil.copytree(small_teachers["sd15"], tmp_path / "t")
    (tmp_path / "t" / file).write_text('{"a":' * 100_000)
    with pytest.raises(UserError):
        resolve_teacher(str(tmp_path / "t")).load_tokenizers()
    for target in ("/dev/zero", None):
        (tmp_path / "t" / file).unlink()
        (tmp_path / "t" / file).symlink_to(target) if target else os.mkfifo(tmp_path / "t" / file)
        assert refused(tmp_path / "t")
    (tmp_path / "t" / file).unlink()
    with (tmp_path / "t" / file).open("wb") as stream:
        stream.truncate(65 << 20)
    assert refused(tmp_path / "t")


@pytest.mark.parametrize(
    ("part", "key"), [("unet", "conv_out.weight"), ("text_encoder", "final_layer_norm.weight")]
)
def test_weights_that_are_not_finite_are_named(
    small_teachers: dict[str, Path], tmp_path: Path, part: str, key: str
) -> None:
    shutil.copytree(small_teachers["sd15"], tmp_path / "t")
    (file,) = (tmp_path / "t" / part).glob("*.safetensors")
    damaged = {k: x * (torch.nan if k.endswith(key) else 1) for k, x in load_file(file).items()}
    save_file(damaged, file, {"format": "pt"})
    with pytest.raises(UserError, match=f"'{key}' of its {part} is not finite: its weights are da"):
        resolve_teacher(str(tmp_path / "t")).load([part], torch.float32, "cpu")


def test_pictures_that_are_not_finite_are_refused(small_teachers: dict[str, Path]) -> None:
    teacher = resolve_teacher(str(small_teachers["sd15"]))
    pipeline = teacher.load(["vae"], torch.float32, "cpu")
    pipeline.vae.decoder.conv_out.bias.data.fill_(torch.inf)
    with pytest.raises(UserError, match="the VAE's pictures are not finite"):
        teacher.family.decode(pipeline, torch.zeros(1, 4, 8, 8))


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_latents_are_decoded_as_the_pipeline_does(
    small_teachers: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    """Mean and deviation of a VAE's latents count where the pipeline makes use of them."""
    shutil.copytree(small_teachers[kind], tmp_path / "t")
    of_latents = {"latents_mean": [0.1, -0.2, 0.3, 0.5], "latents_std": [0.9, 1.1, 2.0, 0.7]}
    change(tmp_path / "t" / VAE, **of_latents)
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    pictures = []
    for folder in (tmp_path / "t", small_teachers[kind]):
        teacher = resolve_teacher(str(folder))
        found = teacher.family.decode(teacher.load(["vae"], torch.float32, "cpu"), z)
        pictures.append(found)
        given: dict[str, Any] = {"num_inference_steps": 1, "guidance_scale": 1.0}
        pipeline = open_pipeline(folder)
        pipeline.scheduler.step = lambda *args, **kwargs: (z,)
        expected = pipeline(PROMPTS, latents=z, output_type="pt", **given).images
        torch.testing.assert_close(found, expected * 2 - 1, rtol=0, atol=1e-5)
    assert torch.equal(*pictures) == (kind == "sd15")


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('parameterization: "v"', "says parameterization v, and the scheduler's config another"),
        ("linear_start: 0.001", "says linear_start 0.001, and the scheduler's config another beta"),
        ("scale_factor: 0.13025", "says scale_factor 0.13025, and the vae's config another scali"),
        ("# parameterization: v", ""),
        ("parameterization: eps  # v", ""),
        ("linear_start: 8.5e-4", ""),
        ('"parameterization": "v"', "says parameterization v"),
        ("parameterization: !!str v", "says parameterization v"),
        ("of: {params: {parameterization: v}}", "says parameterization v"),
        ("a: &a [1]\n    b: *a", ""),  # YAML that points to itself is walked once
        ("a: [", "is no YAML that can be read"),
    ],
)
def test_the_yaml_beside_a_file_counts(
    small_teachers: dict[str, Path], tmp_path: Path, line: str, told: str
) -> None:
    folder, file = small_teachers["sd15"], tmp_path / "model.safetensors"
    save_single_file(DiffusionPipeline.from_pretrained(folder, safety_checker=None), file)
    text = f"model:\n  target: ldm.models\n  params:\n    {line}\n"
    for encoding in ("utf-8", "utf-16"):
        file.with_suffix(".yaml").write_text(text, encoding)
        if told:
            assert told in refused(file, config=str(folder))
        else:
            assert resolve_teacher(str(file), config=str(folder)).checkpoint == file


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_a_single_files_tensors_all_find_their_place(
    small_teachers: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    folder, file = small_teachers[kind], tmp_path / "model.safetensors"
    save_single_file(DiffusionPipeline.from_pretrained(folder, safety_checker=None), file)
    whole = load_file(file)
    unet, vae = "model.diffusion_model.", "first_stage_model.decoder.conv_out"
    inner = f"{unet}input_blocks.1.0.in_layers.2"
    text = next(k for k in whole if k.startswith("cond") and k.endswith("final_layer_norm.weight"))
    added = {
        f"{inner}.scale_weight": "which no layer takes",
        f"{inner}.weight.absmax": "which no layer takes",
        f"{unet}time_embed.cond_proj.weight": "which no layer takes",
        f"{vae}.weight_scale": "which no layer takes",
        f"{text}_scale": "which no layer takes",
    }
    for name, told in added.items():
        save_file(whole | {name: torch.ones(1)}, file)
        line = refused(file, config=str(folder))
        assert told in line and f"'{name}'" in line
    for change, told in (
        ({f"{inner}.weight": whole[f"{inner}.weight"].to(torch.int8)}, "quantised to integers"),
        ({f"{inner}.weight": torch.ones(3, 3)}, f"'{inner}.weight' of shape [3, 3]"),
    ):
        save_file(whole | change, file)
        assert told in refused(file, config=str(folder))
    save_file({k: x for k, x in whole.items() if not k.startswith(vae)}, file)
    assert "its vae has no tensor 'decoder.conv_out.weight' and 1 more" in refused(
        file, config=str(folder)
    )
    other = {"first_stage_model.loss.logvar": torch.ones(1), "model_ema.decay": torch.ones(1)}
    save_file(whole | other, file)  # which training left there
    assert resolve_teacher(str(file), config=str(folder)).checkpoint == file
    bare = {k.replace(".text_model.", "."): x for k, x in whole.items()}
    if kind == "sdxl":
        save_file({k: x for k, x in whole.items() if ".embedders.1." not in k}, file)
        told = "there is no second text encoder in it"
    else:  # as NovelAI's
        save_file(bare, file)
        told = "its text_encoder: its tensors have names that diffusers does not read"
    assert told in refused(file, config=str(folder))


def test_targets_that_no_layer_has_are_refused_before_the_plan(
    small_teachers: dict[str, Path],
) -> None:
    for section in ("student", "discriminators"):
        for target in ("q_proj", "norm1"):
            config = Config.model_validate(
                {"teacher": str(small_teachers["sd15"]), section: {"targets": [target]}}
            )
            with pytest.raises(UserError, match=f"LoRA target '{target}' is the name of no linear"):
                make_plan(config, teacher_of(config))


def test_a_network_without_a_middle_block(small_teachers: dict[str, Path], tmp_path: Path) -> None:
    """As small distilled ones are."""
    shutil.copytree(small_teachers["sd15"], tmp_path / "t")
    change(tmp_path / "t" / UNET, mid_block_type=None)
    (file,) = (tmp_path / "t" / "unet").glob("*.safetensors")
    kept = {k: x for k, x in load_file(file).items() if not k.startswith("mid_block.")}
    save_file(kept, file, {"format": "pt"})
    teacher = resolve_teacher(str(tmp_path / "t"))
    backbone = load_backbone(teacher, Config.model_validate({}), "cpu")
    prompts = teacher.family.encode(
        teacher.load(teacher.family.text_parts, torch.float32, "cpu"), PROMPTS[:1]
    )
    with backbone.adapter(TEACHER), torch.no_grad():
        assert len(backbone.features(torch.randn(1, 4, 8, 8), torch.tensor([9]), prompts)) == 2
