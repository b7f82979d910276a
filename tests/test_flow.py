"""Flow families against diffusers' own pipelines: prompts, rollout, gradients, files."""

from __future__ import annotations

import copy
import filecmp
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file, save_file
from torch import Tensor

from conftest import changed, shake, tiny_table
from flow import FLOW, T5_TOKENS, make_flow_pipeline, make_sd3
from rapm.config import Config
from rapm.errors import UserError
from rapm.estimate import make_plan
from rapm.export import export_run, exported
from rapm.models.resolve import resolve_teacher, teacher_of
from rapm.models.teacher import Teacher
from rapm.network import STUDENT, TEACHER
from rapm.pipeline import make_trajectories, train_run
from rapm.rollout import rollout
from rapm.run import Run
from rapm.sample import open_sampler
from rapm.sampling import guided, noise, picture_noise
from rapm.schedule import Grid, trailing_timesteps
from rapm.settings import parse

PROMPTS = ["a red star and a blue ring on grass", "one white cross on brick"]
GRID = Grid(slots=2, fine_steps=5)
STREAMED = ("FluxPipeline", "ChromaPipeline")


@pytest.fixture(scope="module")
def flow_teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in FLOW}
    for kind, folder in folders.items():
        make_flow_pipeline(kind).save_pretrained(folder)
    return folders


@pytest.fixture(params=FLOW)
def folder(request: pytest.FixtureRequest, flow_teachers: dict[str, Path]) -> Path:
    return flow_teachers[request.param]


def resolved(folder: Path | str, size: tuple[int, int] = (16, 16)) -> Teacher:
    return resolve_teacher(str(folder), size=size)


def opened(folder: Path) -> Any:
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def texts_of(teacher: Teacher) -> Any:
    return teacher.load(teacher.family.text_parts, torch.float32, "cpu")


def falling(steps: int) -> list[float]:
    """Sigmas before the shift."""
    return [(t + 1) / 1000 for t in trailing_timesteps(steps)[:-1]]


def test_encoding_is_the_pipelines(folder: Path) -> None:
    teacher, pipeline = resolved(folder), opened(folder)
    encoders, family = texts_of(teacher), teacher.family
    prompts = family.encode(encoders, PROMPTS)
    shapes = {name: tuple(value.shape[1:]) for name, value in prompts.items()}
    assert shapes == family.conditioning(teacher.config)
    for negative in ("", "blurry"):
        unconditional = family.unconditional(encoders, negative)
        both = [(prompts, PROMPTS), (unconditional, [negative] * 2)]
        for own, texts in both[: 2 if unconditional else 1]:
            found = encoded(pipeline, texts)
            assert found.keys() == own.keys()
            for name, expected in found.items():
                torch.testing.assert_close(own[name].expand_as(expected), expected)


def encoded(pipeline: Any, texts: list[str]) -> dict[str, Tensor]:
    """By the pipeline itself, under our names."""
    kind = type(pipeline).__name__
    if kind == "Flux2KleinPipeline":
        most = pipeline.tokenizer.model_max_length
        return {"prompt_embeds": pipeline.encode_prompt(texts, max_sequence_length=most)[0]}
    if kind == "FluxPipeline":
        embeds, pooled, _ = pipeline.encode_prompt(texts, max_sequence_length=T5_TOKENS)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
    if kind == "ChromaPipeline":
        embeds, _, mask, *_ = pipeline.encode_prompt(texts, max_sequence_length=T5_TOKENS)
        return {"prompt_embeds": embeds, "prompt_mask": mask}
    if kind == "StableDiffusion3Pipeline":
        most = {"max_sequence_length": T5_TOKENS}
        embeds, _, pooled, _ = pipeline.encode_prompt(texts, None, None, **most)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
    tokens = pipeline.tokenizer.model_max_length
    rows, _ = pipeline.encode_prompt([*texts], max_sequence_length=tokens)  # ragged
    width, lengths = rows[0].shape[1], [len(row) for row in rows]
    padded = torch.stack([torch.cat([row, torch.zeros(tokens - len(row), width)]) for row in rows])
    mask = torch.arange(tokens) < torch.tensor(lengths)[:, None]
    return {"prompt_embeds": padded, "prompt_mask": mask.float()}


def drawn(pipeline: Any, negative: str, scale: float, **given: Any) -> Tensor:
    """Of both prompts by the pipeline."""
    kind = type(pipeline).__name__
    # Lists of their own, as some are written into.
    texts: dict[str, Any] = {"prompt": [*PROMPTS], "negative_prompt": [negative] * 2}
    if kind in ("Flux2KleinPipeline", "FluxPipeline"):  # they have no negative prompts
        del texts["negative_prompt"]
    if kind == "Flux2KleinPipeline":
        texts["negative_prompt_embeds"] = encoded(pipeline, [negative] * 2)["prompt_embeds"]
    if kind == "ChromaPipeline":  # whose own masks are numbers, which attention adds
        texts = {}
        for prefix, own in (("", PROMPTS), ("negative_", [negative] * 2)):
            embeds, mask = encoded(pipeline, own).values()
            texts |= {f"{prefix}prompt_embeds": embeds, f"{prefix}prompt_attention_mask": mask > 0}
    if kind == "ZImagePipeline":
        given["max_sequence_length"] = pipeline.tokenizer.model_max_length
    elif kind != "ChromaPipeline":
        qwen = kind == "Flux2KleinPipeline"
        given["max_sequence_length"] = pipeline.tokenizer.model_max_length if qwen else T5_TOKENS
    return pipeline(**texts, guidance_scale=scale, **given).images


def told(teacher: Teacher, texts: Any, scale: float, size: tuple[int, int]) -> dict[str, Tensor]:
    """Conditioning of both prompts."""
    own = teacher.of_picture(size, scale)
    return dict(teacher.family.encode(texts, PROMPTS)) | {n: x.expand(2) for n, x in own.items()}


@pytest.mark.parametrize(
    ("size", "negative", "scale"), [((16, 16), "", 3.0), ((24, 32), "blur", 4.5), ((16, 16), "", 1)]
)
def test_rollout_ends_where_the_pipeline_ends(
    folder: Path, size: tuple[int, int], negative: str, scale: float
) -> None:
    teacher = resolved(folder, size)
    family, shape = teacher.family, teacher.latent_shape(size)
    texts = texts_of(teacher)
    backbone = teacher.backbone(teacher.load_network(torch.float32, "cpu"))
    denoiser = guided(backbone, family.unconditional(texts, negative), scale)
    z = torch.stack([noise(0, k, shape) for k in range(2)])
    with backbone.adapter(TEACHER):
        conditioning = told(teacher, texts, scale, size)
        absolute, _ = rollout(denoiser, teacher.schedule, GRID, z, conditioning)
    width, height = size
    pipeline = opened(folder)
    pipeline.scheduler = teacher.scheduler()
    given = {"sigmas": falling(10), "latents": z, "width": width, "height": height}
    if type(pipeline).__name__ in STREAMED:
        given["latents"] = z.flatten(2).transpose(1, 2)

    def draw(output_type: str) -> Tensor:
        scaled = family.pipeline_guidance(scale)
        return drawn(pipeline, negative, scaled, output_type=output_type, **given)

    if family.packing == 1:  # else the pipeline gives others than it takes
        expected = draw("latent")
        assert (expected - z).abs().max() > 0.1
        torch.testing.assert_close(absolute[:, 0], expected, rtol=0, atol=1e-4)
    pictures = draw("pt") * 2 - 1
    vae = teacher.load(["vae"], torch.float32, "cpu")
    torch.testing.assert_close(family.decode(vae, absolute[:, 0]), pictures, rtol=0, atol=1e-4)


def test_features_are_maps_of_the_blocks_at_their_depths(folder: Path) -> None:
    """As hooks on a network of its own see them; each place is a patch's."""
    teacher = resolved(folder)
    network = teacher.load_network(torch.float32, "cpu")
    plain, seen = copy.deepcopy(network), []
    backbone = teacher.backbone(network)
    shape = teacher.latent_shape((24, 16))
    z, t = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)), torch.tensor(700)
    prompts = told(teacher, texts_of(teacher), 3.5, (16, 16))
    with backbone.adapter(TEACHER), torch.no_grad():
        maps = backbone.features(z, t.expand(2), prompts)
    for name in teacher.family.feature_layers(plain):
        plain.get_submodule(name).register_forward_hook(lambda *given: seen.append(given[2]))
    with torch.no_grad():
        teacher.family.call(plain, z, 1000 * teacher.schedule.sigma(t, t).expand(2), prompts)
    assert len(maps) == len(seen) >= 2
    for found, output in zip(maps, seen, strict=True):
        patches = output[1] if isinstance(output, tuple) else output
        if isinstance(output, Tensor) and teacher.family.packing == 2:  # the text is before it
            patches = patches[:, -24:]
        assert found.shape == (2, patches.shape[2], 4, 6)
        torch.testing.assert_close(found[:, :, 1, 3], patches[:, 9], rtol=1e-5, atol=1e-5)


RUNS = [*(("rapm", kind) for kind in FLOW), ("midpoint", "sd3")]  # methods know no family


@pytest.fixture(params=RUNS, ids="-".join)
def config(
    request: pytest.FixtureRequest, flow_teachers: dict[str, Path], tiny_prompts: Path
) -> Config:
    method, kind = request.param
    table = tiny_table(flow_teachers[kind], tiny_prompts)
    table["trajectories"]["size"] = "16x16"
    if method == "midpoint":
        del table["discriminators"]
        del table["trajectories"]["fine_steps"], table["trajectories"]["shard_size"]
    return parse(table | {"method": method}, "tests")


def distilled(config: Config, folder: Path) -> Run:
    run = Run.open(folder, config)
    make_trajectories(run)
    assert train_run(run)
    return run


def test_a_run_from_trajectories_to_files(config: Config, tmp_path: Path) -> None:
    """Resumed to the bit; the LoRA moves the pipeline to the student's pictures."""
    config = changed(config, student={"learning_rate": 0.05}, training={"warmup": 0})
    whole = distilled(config, tmp_path / "whole")
    stopped = tmp_path / "stopped"
    shutil.copytree(whole.folder, stopped)
    (stopped / "checkpoints" / "step-00000008.safetensors").unlink()
    (stopped / "checkpoints" / "step-00000010.safetensors").unlink()
    run = Run.open(stopped, config)
    assert train_run(run)
    for name in ("step-00000008.safetensors", "step-00000010.safetensors"):
        assert filecmp.cmp(run.checkpoints / name, whole.checkpoints / name, shallow=False)

    files = export_run(whole, fused=True)  # which is read back, too
    assert exported(whole) == files
    assert not files.kohya.exists()
    sampler, pipeline = open_sampler(whole), opened(Path(config.teacher))
    own = (sampler.images(STUDENT, PROMPTS, [3, 4], num_steps=3) + 1) / 2
    z = torch.stack([picture_noise(seed, sampler.shape) for seed in (3, 4)])

    kind = type(pipeline).__name__
    if kind in STREAMED:
        z = z.flatten(2).transpose(1, 2)
    scale = sampler.teacher.family.pipeline_guidance(sampler.student_guidance)

    def draw() -> Tensor:
        given = {"sigmas": falling(3), "latents": z, "width": 16, "height": 16}
        return drawn(pipeline, "", scale, output_type="pt", **given)

    pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(
        whole.export, subfolder="scheduler"
    )
    before = draw()
    pipeline.load_lora_weights(str(whole.export))
    assert (draw() - own).abs().max() < 1e-3
    assert (before - own).abs().max() > 1e-2
    names = {name.partition(".lora_")[0] for name in load_file(files.diffusers)}
    linear = {
        f"transformer.{name}"
        for name, module in pipeline.transformer.named_modules()
        if re.search(r"\.(attn2?|attention|ff|ff_context|feed_forward|proj_(mlp|out))\b", name)
        if type(module).__name__ == "Linear" and "lora" not in name
    }
    if kind in STREAMED:  # the last layer is called as those of single blocks are
        linear |= {"transformer.proj_out"}
    assert names == {name.removesuffix(".base_layer") for name in linear}
    card = (whole.export / "README.md").read_text("utf-8")
    assert "sigmas=[1.0, 0.667, 0.333]" in card
    assert f"The shift is {pipeline.scheduler.config.shift:.4g}, its" in card
    assert f"guidance_scale={scale})" in card


def test_a_lora_is_fused_into_a_teacher(folder: Path, tmp_path: Path) -> None:
    """As diffusers writes it. What it adds is there to be seen."""
    teacher = resolved(folder)
    backbone = teacher.backbone(teacher.load_network(torch.float32, "cpu"))
    backbone.add_adapter(STUDENT, 2, backbone.lora_targets, 0)
    shake(backbone.parameters(STUDENT), 0)
    state = {f"transformer.{name}": p for name, p in backbone.lora_state(STUDENT).items()}
    save_file(state, tmp_path / "lora.safetensors")
    lora = [f"{tmp_path / 'lora.safetensors'}:1.0"]
    fused = resolve_teacher(str(folder), loras=lora, size=(16, 16))
    other = fused.backbone(fused.load_network(torch.float32, "cpu"))
    shape = teacher.latent_shape((16, 16))
    z = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    given = z, torch.tensor([999, 400]), told(teacher, texts_of(teacher), 3.5, (16, 16))
    with torch.no_grad():
        with backbone.adapter(STUDENT):
            expected = backbone(*given)
        with backbone.adapter(TEACHER):
            assert (backbone(*given) - expected).abs().max() > 1e-3
        with other.adapter(TEACHER):
            torch.testing.assert_close(other(*given), expected, rtol=1e-4, atol=1e-5)


def test_gradients_are_those_of_a_copy_with_one_adapter(folder: Path) -> None:
    """The student's, with discriminators' adapters beside it, with and without checkpointing."""
    teacher = resolved(folder)
    prompts = told(teacher, texts_of(teacher), 3.5, (16, 16))
    shape = teacher.latent_shape((16, 16))
    z = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    found = []
    for others, checkpointing in ((0, False), (2, False), (2, True)):
        network = teacher.load_network(torch.float32, "cpu")
        backbone = teacher.backbone(network, gradient_checkpointing=checkpointing)
        for k, name in enumerate([STUDENT, "a", "b"][: 1 + others]):
            backbone.add_adapter(name, 2, backbone.lora_targets, k)
            shake(backbone.parameters(name), k)
        with backbone.adapter(STUDENT):
            backbone(z, torch.tensor([999, 400]), prompts).square().sum().backward()
        found.append({n: p.grad for n, p in backbone.parameters(STUDENT).items()})
    for other in found[1:]:
        for name, gradient in found[0].items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-4, atol=1e-6)


def test_it_is_planned(config: Config) -> None:
    plan = make_plan(config, resolved(config.teacher))
    assert (plan.calls > 0) == (config.method == "rapm")
    assert plan.memory["training"]["network"] > 0
    teacher = resolved(config.teacher)
    prompt = 4 * sum(map(math.prod, teacher.family.conditioning(teacher.config).values()))
    assert plan.disk["prompts' embeddings, at most"] == 7 * prompt


def test_the_pipeline_may_end_before_the_tokenizer(tmp_path: Path) -> None:
    make_sd3(max_tokens=512).save_pretrained(tmp_path)
    teacher = resolved(tmp_path)
    texts = texts_of(teacher)
    found = teacher.family.encode(texts, PROMPTS)["prompt_embeds"]
    assert tuple(found.shape[1:]) == teacher.family.conditioning(teacher.config)["prompt_embeds"]
    expected = opened(tmp_path).encode_prompt(PROMPTS, None, None, max_sequence_length=256)[0][:2]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert [each.model_max_length for each in teacher.load_tokenizers()] == [24, 24, 256]


@pytest.mark.parametrize(
    ("part", "told", "message"),
    [
        ("scheduler", {"use_dynamic_shifting": True}, "has use_dynamic_shifting = True"),
        ("scheduler", {"_class_name": "DDIMScheduler"}, "a StableDiffusion3Pipeline takes a Flow"),
        ("scheduler", {"shift_terminal": 0.1}, "has shift_terminal = 0.1"),
        ("scheduler", {"shift": 0}, "shift is 0, and not from 0.01 to 100"),
        ("scheduler", {"shift": True}, "shift is True"),
        ("scheduler", {"num_train_timesteps": 500}, "has 500 timesteps"),
        ("transformer", {"joint_attention_dim": 41}, "joint_attention_dim is 41"),
        ("transformer", {"pooled_projection_dim": 31}, "pooled_projection_dim is 31"),
        ("transformer", {"patch_size": 4}, "has patch_size = 4"),
        ("transformer", {"num_layers": 4}, "has no tensor"),
        ("transformer", {"sample_size": "8"}, "its transformer: unsupported operand"),
    ],
)
def test_configs_that_do_not_go_are_one_line(
    flow_teachers: dict[str, Path], tmp_path: Path, part: str, told: dict[str, Any], message: str
) -> None:
    copied = tmp_path / "teacher"
    shutil.copytree(flow_teachers["sd3"], copied)
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    config = json.loads((copied / part / name).read_text())
    (copied / part / name).write_text(json.dumps(config | told))
    with pytest.raises(UserError, match=message) as error:
        resolved(copied)
    assert "\n" not in str(error.value)


def test_guidance_that_is_an_input(flow_teachers: dict[str, Path], tmp_path: Path) -> None:
    """FLUX.1's: no negative prompt, and a network that is told no scale is another model."""
    own = {
        "teacher": str(flow_teachers["flux"]),
        "trajectories": {"negative_prompt": "blur", "size": "16x16"},
    }
    config = Config.model_validate(own)
    with pytest.raises(UserError, match=r"negative_prompt: teacher .* has none"):
        teacher_of(config)
    copied = tmp_path / "schnell"
    shutil.copytree(flow_teachers["flux"], copied)
    file = copied / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"guidance_embeds": False}))
    with pytest.raises(UserError, match="has guidance_embeds = False"):
        resolved(copied)


def test_sizes_that_the_network_does_not_know_are_refused(flow_teachers: dict[str, Path]) -> None:
    for folder in flow_teachers.values():
        teacher = resolved(folder)
        with pytest.raises(UserError, match="multiples of 4 pixels, not 18x16"):
            teacher.latent_shape((18, 16))
        cell = teacher.family.packing
        assert teacher.latent_shape((48, 16)) == (4 * cell**2, 8 // cell, 24 // cell)
    teacher = resolved(flow_teachers["sd3"])
    with pytest.raises(UserError, match="sides of 48 pixels at most"):
        teacher.latent_shape((52, 16))


@pytest.mark.parametrize(
    ("name", "billions", "shift"),
    [
        ("sd35-medium", 2.24, 3.0),
        ("sd35-large", 8.06, 3.0),
        ("z-image", 6.15, 6.0),
        ("flux2-klein-base-4b", 3.88, math.exp(2.0233)),
        ("flux2-klein-base-9b", 9.08, math.exp(2.0233)),
        ("flux1-dev", 11.9, math.exp(1.15)),
        ("chroma1", 8.9, 1.0),
    ],
)
def test_the_published_architectures(name: str, billions: float, shift: float) -> None:
    """Numbers of parameters as published, and the shift at 1024 x 1024."""
    teacher = resolve_teacher(f"random:{name}")
    network = teacher.load_network(torch.bfloat16, "meta")
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(1e9 * billions, rel=2e-3)
    assert teacher.schedule.shift == pytest.approx(shift, rel=1e-4)
    assert teacher.size() == (1024, 1024)
