"""From a trained run to files and pictures that other programs agree with."""

from __future__ import annotations

import gc
import json
import logging
import re
import shutil
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

import rapm
from conftest import SMALL, changed, make_lora
from ldm import unet_name
from rapm import io, settings
from rapm.card import model_card
from rapm.config import Config
from rapm.errors import UserError
from rapm.export import export_run, exported, kohya_state
from rapm.models.resolve import resolve_teacher, teacher_of
from rapm.models.teacher import Teacher
from rapm.network import STUDENT, TEACHER, Backbone
from rapm.pipeline import distill_run, make_trajectories, open_run, train_run
from rapm.run import Run
from rapm.sample import Sampler, open_sampler, sample_run
from rapm.sampling import picture_noise
from rapm.scores import evaluate_toy
from rapm.trajectories import TrajectoryStore, size_index

PROMPTS = ["a red star on grass", "a blue ring and a white cross on sand"]


def make_config(teacher: Path, folder: Path, method: str = "rapm", **given: Any) -> Config:
    (folder / "prompts.txt").write_text("a red star on grass\n", encoding="utf-8")
    trajectories = {
        "prompts": str(folder / "prompts.txt"),
        "count": 4,
        "guidance_scale": 2.0,
        "size": given.pop("size", ""),
    }
    own = {"midpoint": {"weight": [2, 1, 1, 1]}}
    if method == "rapm":
        trajectories["fine_steps"] = 3
        own = {"discriminators": {"adversarial_weight": 0.4, "rank": 1, "head_width": 8}}
    table = {
        "method": method,
        "teacher": str(teacher),
        "device": "cpu",
        "trajectories": trajectories,
        "student": {"rank": 4, "learning_rate": 0.02, "ema": 0.5},
        "training": {
            "iterations": 8,
            "warmup": 0,
            "slot_batch": 4,
            "gradient_checkpointing": False,
        },
        "samples": {"count": 0},
    }
    return Config.model_validate(table | own | given)


def distilled(teacher: Path, folder: Path, *arguments: Any, **given: Any) -> Run:
    """All but the pictures, which take longest."""
    run = open_run(make_config(teacher, folder, *arguments, **given), folder / "run")
    make_trajectories(run)
    assert train_run(run)
    export_run(run)
    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> Run:
    return distilled(tiny_teacher, tmp_path_factory.mktemp("finished"))


@pytest.fixture(scope="module")
def midpoint(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> Run:
    return distilled(tiny_teacher, tmp_path_factory.mktemp("midpoint"), "midpoint")


@pytest.fixture(scope="module")
def students(
    tmp_path_factory: pytest.TempPathFactory, small_teachers: dict[str, Path]
) -> dict[str, Run]:
    """One of each kind; sd21's teacher has a LoRA fused in."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in SMALL}
    lora = make_lora(small_teachers["sd21"], folders["sd21"] / "lora", "kohya")
    given = {"sd21": {"teacher_loras": [f"{lora}:0.7"]}}
    return {
        kind: distilled(small_teachers[kind], folder, **given.get(kind, {}))
        for kind, folder in folders.items()
    }


@pytest.mark.parametrize("kind", SMALL)
def test_the_exported_lora_gives_the_same_pictures_in_diffusers(
    students: dict[str, Run], small_teachers: dict[str, Path], kind: str
) -> None:
    """Of a teacher with a LoRA fused in (sd21) too, where its card says that both are to be
    loaded."""
    run = students[kind]
    sampler = open_sampler(run)
    own = sampler.latents(STUDENT, PROMPTS, [3, 4], num_steps=4)
    pipeline = DiffusionPipeline.from_pretrained(small_teachers[kind], safety_checker=None)
    for lora in sampler.teacher.loras:
        pipeline.load_lora_weights(str(lora.file))
        pipeline.fuse_lora(lora_scale=lora.strength)
        pipeline.unload_lora_weights()
    assert ("- `k.safetensors` at strength 0.7\n" in (run.export / "README.md").read_text()) == (
        kind == "sd21"
    )
    pipeline.scheduler = DDIMScheduler.from_pretrained(run.export, subfolder="scheduler")
    z = torch.stack([picture_noise(seed, (4, 8, 8)) for seed in (3, 4)])

    def draw(output_type: str = "latent") -> torch.Tensor:
        return pipeline(
            PROMPTS, num_inference_steps=4, guidance_scale=1.0, latents=z, output_type=output_type
        ).images

    before = draw()
    pipeline.load_lora_weights(str(run.export))
    assert (draw() - own).abs().max() < 1e-3
    assert (before - own).abs().max() > 1e-2  # the LoRA does something
    images = sampler.images(STUDENT, PROMPTS, [3, 4], 4)
    torch.testing.assert_close(draw("pt") * 2 - 1, images, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("kind", "base", "architecture"),
    [
        ("sd15", "sd_v1", "stable-diffusion-v1"),
        ("sd21", "sd_v2_v", "stable-diffusion-v2-768-v"),
        ("sdxl", "sdxl_base_v1-0", "stable-diffusion-xl-v1-base"),
    ],
)
def test_the_lora_for_comfyui_is_the_same_student(
    students: dict[str, Run], kind: str, base: str, architecture: str
) -> None:
    """ComfyUI adds alpha / rank x up x down to the weight that a key names, and passes over keys
    that name none."""
    run = students[kind]
    file = exported(run).kohya
    assert file.name == "run-4-steps.safetensors"
    with safe_open(file, "pt") as opened:
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        metadata = opened.metadata()
    assert (metadata["ss_base_model_version"], metadata["modelspec.architecture"]) == (
        base,
        f"{architecture}/lora",
    )
    assert metadata["ss_network_dim"] == metadata["ss_network_alpha"] == "4"
    assert metadata["ss_v2"] == str(kind == "sd21")
    assert metadata["modelspec.resolution"] == "16x16"
    card = (run.export / "README.md").read_text(encoding="utf-8")
    for text, told in (
        (card, "| ComfyUI | euler | simple"),
        (metadata["modelspec.usage_hint"], ""),
    ):
        assert "4 steps" in text
        assert told in text
        assert "DDIM in A1111" in text or "never DDIM" in text
    sampler = open_sampler(run)
    network = sampler.teacher.load_network(torch.float32, "cpu")
    for name, module in network.named_modules():
        path = unet_name(f"{name}.x", network.config)[:-2] if kind == "sdxl" else name
        key = f"lora_unet_{path.replace('.', '_')}"
        if f"{key}.alpha" in tensors:
            down, up = tensors.pop(f"{key}.lora_down.weight"), tensors.pop(f"{key}.lora_up.weight")
            change = (
                float(tensors.pop(f"{key}.alpha")) / len(down) * up.flatten(1) @ down.flatten(1)
            )
            module.weight.data += change.view_as(module.weight)
    assert not tensors, "keys that name no layer"
    patched = Backbone(network, sampler.teacher.family.call, ())
    z, t, (conditioning, _) = (
        torch.randn(2, 4, 8, 8),
        torch.tensor([999, 249]),
        sampler.encode(PROMPTS),
    )
    with torch.no_grad():
        with sampler.backbone.adapter(STUDENT):
            wanted = sampler.backbone(z, t, conditioning)
        with patched.adapter(TEACHER):
            torch.testing.assert_close(patched(z, t, conditioning), wanted, rtol=1e-4, atol=1e-4)
        with sampler.backbone.adapter(TEACHER):
            assert (sampler.backbone(z, t, conditioning) - wanted).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("architecture", "layers", "one"),
    [
        ("sd15", 278, "lora_unet_up_blocks_0_upsamplers_0_conv"),
        ("sdxl", 788, "lora_unet_output_blocks_2_2_conv"),  # in diffusers' names A1111 misses it
    ],
)
def test_every_layer_of_the_published_architectures_has_the_name_that_programs_know(
    architecture: str, layers: int, one: str
) -> None:
    """Stable Diffusion 1.x: diffusers' names, as in ComfyUI's ``unet_to_diffusers``. SDXL: the
    original network's, which every program reads."""
    attention = r"proj_(in|out)|transformer_blocks_\d_(attn[12]_to_(q|k|v|out_0)|ff_net_(0_proj|2))"
    resnet = "conv1|conv2|time_emb_proj|conv_shortcut"
    in_block = rf"attentions_\d_({attention})|resnets_\d_({resnet})|(down|up)samplers_0_conv"
    diffusers_form = rf"lora_unet_((down|up)_blocks_\d|mid_block)_({in_block})"
    teacher = resolve_teacher(f"random:{architecture}")
    network = teacher.draw("unet", torch.float32, "meta")
    original = {unet_name(f"{path}.x", network.config)[:-2] for path, _ in network.named_modules()}
    original = {f"lora_unet_{name.replace('.', '_')}" for name in original}
    backbone = Backbone(network, teacher.family.call, teacher.family.lora_targets)
    backbone.add_adapter(STUDENT, 1, backbone.lora_targets, 0)
    kohya = teacher.family.lora_names(network)[0]
    written = kohya_state(backbone.lora_state(STUDENT), kohya)
    names = {name.partition(".")[0] for name in written}
    assert len(names) == layers
    assert len(written) == 3 * layers
    assert one in names
    if architecture == "sdxl":
        assert names <= original
    else:
        assert [name for name in names if not re.fullmatch(diffusers_form, name)] == []


def test_diffusers_takes_the_file_for_comfyui_too(
    students: dict[str, Run], small_teachers: dict[str, Path]
) -> None:
    run = students["sd15"]
    pipeline = DiffusionPipeline.from_pretrained(small_teachers["sd15"], safety_checker=None)
    pipeline.scheduler = DDIMScheduler.from_pretrained(run.export, subfolder="scheduler")
    drawn = []
    for file in (exported(run).diffusers, exported(run).kohya):
        pipeline.load_lora_weights(str(file))
        given = {
            "num_inference_steps": 4,
            "guidance_scale": 1.0,
            "generator": torch.Generator().manual_seed(0),
        }
        drawn.append(pipeline(PROMPTS[0], output_type="latent", **given).images)
        pipeline.unload_lora_weights()
    torch.testing.assert_close(*drawn)


def test_several_sizes_in_one_run(small_teachers: dict[str, Path], tmp_path: Path) -> None:
    """Prompts and sizes both come in turn, and a prompt sees every size; pictures are of the
    first."""
    training = {"iterations": 4, "slot_batch": 4}
    run = distilled(small_teachers["sdxl"], tmp_path, size="16x24,32x16", training=training)
    store = TrajectoryStore.open(run.trajectories)
    shapes = [(5, 4, 12, 8), (5, 4, 8, 16)]
    assert [tuple(store[k].absolute.shape) for k in range(4)] == shapes * 2
    assert [store[k].conditioning["time_ids"].tolist() for k in range(2)] == [
        [24, 16, 0, 0, 24, 16],
        [16, 32, 0, 0, 16, 32],
    ]
    assert [size_index(k, prompts=2, sizes=2) for k in range(8)] == [0, 1, 1, 0, 0, 1, 1, 0]
    for prompts, sizes in ((1, 3), (2, 3), (3, 4), (9, 4)):  # where the dry run looks
        assert {size_index(k, prompts, sizes) for k in range(sizes**2)} == {*range(sizes)}
    assert open_sampler(run).images(STUDENT, PROMPTS, [0, 1], 4).shape == (2, 3, 24, 16)


@pytest.mark.parametrize(
    ("precision", "base", "error", "vae"),
    [
        ("bfloat16", "same", 0.02, torch.bfloat16),
        ("float16", "same", 0.002, torch.float32),  # where SDXL's VAE overflows
        ("float32", "int8", 0.02, torch.float32),
    ],
)
def test_fewer_bits_from_end_to_end(
    tiny_teacher: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    base: str,
    error: float,
    vae: torch.dtype,
) -> None:
    """Positions are float32, near those of a float32 network."""
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    given = ({}, {"precision": precision, "base_precision": base})
    teacher, training = tiny_teacher, {"iterations": 4, "slot_batch": 4}
    whole, fewer = (
        Run.open(tmp_path / name, make_config(teacher, tmp_path, training=training, **own))
        for name, own in zip(("whole", "fewer"), given, strict=True)
    )
    a, b = (make_trajectories(run)[3].absolute for run in (whole, fewer))
    assert b.dtype == torch.float32
    assert 0 < (a - b).norm() / a.norm() < error
    assert train_run(fewer)
    sampler = open_sampler(fewer)
    assert sampler.images(STUDENT, PROMPTS, [0, 1], 4).isfinite().all()
    assert sampler._vae.vae.dtype == vae
    # diffusers' word on float16, of a pipeline that leaves the GPU
    assert "cannot run with" not in caplog.text


def test_teacher_and_prompts_may_move_once_there_are_trajectories(
    finished: Run, tiny_teacher: Path, small_teachers: dict[str, Path], tmp_path: Path
) -> None:
    moved, other = tmp_path / "moved", make_config(small_teachers["sd21"], tmp_path)
    shutil.copytree(tiny_teacher, moved)
    config = make_config(moved, tmp_path)
    shutil.copytree(finished.folder, tmp_path / "run")
    run = open_run(config, tmp_path / "run")
    export_run(run)
    there, here = (load_file(exported(each).diffusers) for each in (finished, run))
    assert there.keys() == here.keys() and all(
        torch.equal(there[name], here[name]) for name in there
    )
    with pytest.raises(UserError, match="made with another teacher"):
        open_run(other, run.folder)
    with pytest.raises(UserError, match="made with another teacher"):
        open_sampler(Run(run.folder, other))
    shutil.rmtree(run.trajectories)
    with pytest.raises(UserError, match=r"holds a run with other settings \(teacher: "):
        open_run(config, run.folder)


def test_one_network_at_a_time(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU that holds one network holds no second one; chance collections, which would hide one
    that is left, are off."""
    load, networks, left = Teacher.load, [], []

    def watched(self: Teacher, parts: Sequence[str], *rest: Any) -> Any:
        if parts == [self.family.network]:
            left.append(sum(reference() is not None for reference in networks))
        pipeline = load(self, parts, *rest)
        if parts == [self.family.network]:
            networks.append(weakref.ref(pipeline.unet))
        return pipeline

    monkeypatch.setattr(Teacher, "load", watched)
    gc.disable()
    try:
        own = {"training": {"iterations": 2, "warmup": 0}, "samples": {"count": 1}}
        run = open_run(make_config(tiny_teacher, tmp_path, **own), tmp_path / "run")
        make_trajectories(run)
        train_run(run)
        export_run(run)
        sample_run(run, many_steps=2, count=1)
    finally:
        gc.enable()
    # For trajectories, training, export and its two files read back, pictures.
    assert left == [0, 0, 0, 0, 0, 0]


def test_too_little_memory_for_pictures_is_one_line(
    finished: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Sampler, "latents", full)
    with pytest.raises(UserError) as error:
        sample_run(finished, seed=5)
    assert str(error.value) == (
        "memory does not suffice for pictures; what is finished is kept. In order of effect: "
        "trajectories.batch_size=1 "
        "(the run goes on); precision=bfloat16, a smaller trajectories.size (another --out); each "
        "by --set of 'rapm distill'"
    )


def test_the_file_for_diffusers_says_nothing_that_an_older_peft_does_not_know(
    finished: Run,
) -> None:
    """What is not said is alpha = rank. benchmarks/versions.py loads it in older ones."""
    with safe_open(finished.export / "pytorch_lora_weights.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert all(key.startswith("unet.") for key in file.keys())  # noqa: SIM118


def test_an_export_takes_nothing_away(finished: Run, tmp_path: Path) -> None:
    """A user's file beside it stays, and a link to another program's folder stays a link."""
    run = Run.existing(finished.folder)
    note = run.export / "notes.txt"
    note.write_text("mine")
    export_run(run)
    assert note.read_text() == "mine"
    note.unlink()
    run.export.rename(tmp_path / "loras")
    run.export.symlink_to(tmp_path / "loras")
    try:
        export_run(run)
        assert run.export.is_symlink() and exported(run).diffusers.is_file()
    finally:
        run.export.unlink()
        (tmp_path / "loras").rename(run.export)


def test_export_is_the_average_and_can_be_repeated(finished: Run) -> None:
    def tensors() -> dict[str, torch.Tensor]:
        with safe_open(finished.export / "pytorch_lora_weights.safetensors", "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118

    first = tensors()
    export_run(finished)
    again = tensors()
    assert all(torch.equal(first[key], again[key]) for key in first)
    _, state = finished.load_checkpoint()
    key = next(iter(first))
    module = key.removeprefix("unet.").removesuffix(".lora_A.weight").removesuffix(".lora_B.weight")
    half = "lora_A" if "lora_A" in key else "lora_B"
    assert torch.equal(first[key], state[f"student.average.{module}.{half}.student.weight"])
    assert not torch.equal(first[key], state[f"student.weights.{module}.{half}.student.weight"])


def test_few_step_teacher_equals_the_pipeline(finished: Run, tiny_teacher: Path) -> None:
    sampler = open_sampler(finished)
    own = sampler.latents(TEACHER, PROMPTS, [3, 4], num_steps=5)
    pipeline = DiffusionPipeline.from_pretrained(tiny_teacher, safety_checker=None)
    z = torch.stack([picture_noise(seed, (4, 8, 8)) for seed in (3, 4)])
    expected = pipeline(
        PROMPTS, num_inference_steps=5, guidance_scale=2.0, latents=z, output_type="latent"
    ).images
    assert (own - expected).abs().max() < 1e-4


def test_a_picture_does_not_depend_on_its_batch(finished: Run) -> None:
    sampler = open_sampler(finished)
    together = sampler.images(STUDENT, PROMPTS * 3, range(6), 4, batch_size=6)
    for k in (0, 5):
        alone = sampler.images(STUDENT, [(PROMPTS * 3)[k]], [k], 4)
        torch.testing.assert_close(together[k : k + 1], alone, rtol=0, atol=1e-4)


def test_sample_writes_three_rows(finished: Run, tmp_path: Path) -> None:
    file = sample_run(finished, prompts=PROMPTS, count=2, many_steps=6, file=tmp_path / "a.png")
    with Image.open(file) as picture:
        assert picture.size == (2 * (128 + 4) + 4, 3 * (128 + 4 + 22) + 4 + 2 * (12 + 4))
    assert sample_run(finished, count=1, many_steps=2) == finished.samples / "seed-0-steps-4.png"


def test_a_run_is_looked_at_before_and_while_it_trains(finished: Run, tmp_path: Path) -> None:
    run = Run.existing(Path(shutil.copytree(finished.folder, tmp_path / "run")))
    _, state = run.load_checkpoint()
    run._checkpoint(8).unlink()
    run.save_checkpoint(4, state)
    half_way = run._checkpoint(4)
    for rows, iteration in ((3, 4), (2, 0)):  # the teacher's alone where there is no student yet
        file = sample_run(run, count=1, many_steps=2)
        assert file == run.samples / f"seed-0-steps-4-iteration-{iteration}.png"
        with Image.open(file) as picture:
            captions = 12 + 4
            assert picture.height == rows * (128 + 4 + 22) + 4 + captions
        half_way.unlink(missing_ok=True)


def test_a_run_of_midpoint_is_sampled_and_exported(midpoint: Run, finished: Run) -> None:
    """From prompts alone; its student is its own, and drawn from the same noise."""
    assert not list(midpoint.trajectories.glob("shard-*"))
    with safe_open(exported(midpoint).diffusers, "pt") as file:
        names = set(file.keys())
    with safe_open(exported(finished).diffusers, "pt") as file:
        assert names == set(file.keys())
    _, state = midpoint.load_checkpoint()
    assert {name.partition(".")[0] for name in state} == {"student"}
    a, b = (open_sampler(run).latents(STUDENT, PROMPTS, [0, 1], 4) for run in (midpoint, finished))
    assert (a - b).abs().max() > 1e-2
    assert sample_run(midpoint, count=1, many_steps=2).name == "seed-0-steps-4.png"


def test_the_whole_chain_in_one_call(tiny_teacher: Path, tmp_path: Path) -> None:
    """The teacher may be named by the file of settings."""
    config = make_config(tiny_teacher, tmp_path, "midpoint", training={"iterations": 2})
    file = tmp_path / "mine.toml"
    file.write_text(settings.dump(config), encoding="utf-8")
    run = rapm.distill(out=tmp_path / "run", config=file, set=["student.rank=2"])
    assert run is not None and run.checkpoint_steps() == [2]
    assert run.config == changed(config, student={"rank": 2})
    assert exported(run).kohya.is_file()
    with pytest.raises(UserError, match="there is no method 'other'"):
        rapm.distill(str(tiny_teacher), tmp_path / "run", method="other")


def test_a_finished_run_is_skipped_stage_by_stage(finished: Run) -> None:
    files = [*finished.trajectories.iterdir(), *finished.checkpoints.iterdir()]
    before = {file: file.stat().st_mtime_ns for file in files}
    assert distill_run(open_run(finished.config, finished.folder))
    assert {file: file.stat().st_mtime_ns for file in before} == before


def test_only_the_toy_teacher_is_scored(finished: Run) -> None:
    with pytest.raises(UserError, match="protocol toy is the toy teacher"):
        evaluate_toy(finished)


def test_another_teacher_is_not_drawn_with(small_teachers: dict[str, Path], tmp_path: Path) -> None:
    """The student is of one network; weights that changed since are told before anything is drawn
    or exported."""
    folder = tmp_path / "teacher"
    shutil.copytree(small_teachers["sd15"], folder)
    run = Run.open(tmp_path / "run", make_config(folder, tmp_path))
    make_trajectories(run)
    assert train_run(run)
    shutil.copy(small_teachers["sd21"] / "vae" / "config.json", folder / "unet" / "other.json")
    for act in (export_run, sample_run):
        with pytest.raises(UserError, match="holds trajectories made with another teacher"):
            act(run)


def test_a_refused_command_leaves_the_run_as_it_was(
    small_teachers: dict[str, Path], tmp_path: Path
) -> None:
    config = make_config(small_teachers["sd15"], tmp_path)
    run = open_run(config, tmp_path / "run")
    make_trajectories(run)
    other = changed(config, trajectories={"count": 5})
    for manifest in (True, False):  # finished, and stopped half-way
        if not manifest:
            (run.trajectories / "manifest.json").unlink()
        with pytest.raises(UserError, match="holds trajectories made with"):
            open_run(other, run.folder)
        assert Run.existing(run.folder).config == config


# ---- what may go wrong


def test_an_export_that_fails_leaves_the_one_before(
    finished: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def files() -> dict[Path, bytes]:
        return {file: file.read_bytes() for file in finished.folder.rglob("*") if file.is_file()}

    def full(*_: Any) -> None:
        raise SafetensorError("Error while serializing: No space left on device (os error 28)")

    kept = files()
    with finished.locked(), pytest.raises(UserError, match="another process is working on"):
        export_run(Run.existing(finished.folder))
    with monkeypatch.context() as patch, pytest.raises(io.NotWritten) as caught:
        patch.setattr(io, "save_file", full)
        export_run(finished)
    assert str(caught.value).endswith(
        "pytorch_lora_weights.safetensors could not be written: Error while serializing: No space "
        "left on device (os error 28)"
    )
    assert files() == kept
    export_run(finished)
    assert files().keys() == kept.keys()


# ---- the card


def card_of(run: Run) -> str:
    return (run.export / "README.md").read_text(encoding="utf-8")


def settings_in(card: str) -> Config:
    """What a card says that the run's settings were."""
    return settings.read_run(card.split("```toml\n")[1].split("```")[0], "card")


def test_the_card_names_a_local_teacher_without_its_place(finished: Run) -> None:
    card = card_of(finished)
    assert f"from `{Path(finished.config.teacher).name}`" in card
    assert str(Path(finished.config.teacher).parent) not in card
    assert "base_model:" not in card


def test_the_card_is_read_off_the_run(students: dict[str, Run], midpoint: Run) -> None:
    """Its method, and the settings as it was run with; where files lay is left out."""
    for run, method in (
        *((run, "rapm") for run in students.values()),
        (midpoint, "midpoint"),
    ):
        card, config = card_of(run), run.config
        assert f"# A 4-step LoRA, trained by rapm's method `{method}`\n" in card
        assert f"tags: [text-to-image, diffusers, lora, template:sd-lora, {method}]\n" in card
        assert ("It is not RAPM" in card) == (method == "midpoint")
        assert ("The method is RAPM" in card) == (method == "rapm")
        assert "at guidance scale 2.0, which is baked\nin" in card
        assert ("k.safetensors:0.7" in card) == bool(config.teacher_loras)
        assert not re.search(r"[`\"' (]/\w|\b[A-Z]:\\", card)
        shown = settings_in(card)
        places = {"teacher": "sd", "teacher_loras": []}
        moved = {"prompts": config.trajectories.prompts}
        same = changed(shown, trajectories=moved).model_copy(update=places)
        assert same == config.model_copy(update=places)
        assert shown.trajectories.prompts == "prompts.txt"
        assert shown.teacher == Path(config.teacher).name


def test_the_card_keeps_names_that_are_no_places(finished: Run) -> None:
    config = finished.config.model_copy(update={"teacher": "owner/name@main"})
    config = changed(config, trajectories={"prompts": "hub:them/theirs@v2:train"})
    card = model_card(Run(finished.folder, config), teacher_of(finished.config), "k")
    assert "base_model: owner/name\n" in card
    assert settings_in(card) == config


def test_the_card_shows_others_names_and_texts_as_they_are(finished: Run) -> None:
    text = "</code><script>alert(1)</script>\n```\n# a\x1b"
    name = "<img src=x>`a.safetensors"
    config = changed(finished.config, trajectories={"negative_prompt": text})
    fused: Any = SimpleNamespace(file=Path(f"/x/{name}"), strength=0.7)
    teacher = replace(teacher_of(finished.config), loras=(fused,))
    card = model_card(Run(finished.folder, config), teacher, "k")
    assert f"- ``{name}`` at strength 0.7\n" in card
    fence = card.split("\n")[-2]
    assert fence == "````"
    before, block, after = card.split(fence)
    shown = settings.read_run(block.removeprefix("toml\n"), "card")
    assert shown.trajectories.negative_prompt == text
    assert "<script>" in block and "<script>" not in before + after
    assert "\x1b" not in card


def test_the_prompts_file_may_be_gone_when_pictures_are_drawn(
    finished: Run, tmp_path: Path
) -> None:
    file = Path(finished.config.trajectories.prompts)
    text = file.read_text(encoding="utf-8")
    file.unlink()
    try:
        assert sample_run(finished, count=1, many_steps=4, file=tmp_path / "a.png").is_file()
    finally:
        file.write_text(text, encoding="utf-8")


# ---- other checkpoints, other forms


def test_another_checkpoint_in_fewer_bits_goes_elsewhere(finished: Run, tmp_path: Path) -> None:
    before = {file: file.read_bytes() for file in finished.export.glob("*.*")}
    files = export_run(finished, tmp_path / "out", dtype="bfloat16", fused=True)
    assert files.diffusers.parent == tmp_path / "out"
    assert {file: file.read_bytes() for file in finished.export.glob("*.*")} == before
    for file in (files.diffusers, files.kohya):
        halves = [x for name, x in load_file(file).items() if "alpha" not in name]
        assert {x.dtype for x in halves} == {torch.bfloat16}
    whole = load_file(exported(finished).diffusers)
    for name, value in load_file(files.diffusers).items():
        assert torch.equal(value, whole[name].bfloat16())
    with pytest.raises(UserError, match="no checkpoint of iteration 3; there are: 8"):
        export_run(finished, tmp_path / "other", step=3)
    assert not (tmp_path / "other").exists()


def test_the_card_of_an_older_checkpoint_has_no_scores_of_the_newest(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path / "run", finished.config)
    shutil.copytree(finished.folder, run.folder)
    newest = run.checkpoints / "step-00000008.safetensors"
    _, weights = run.load_checkpoint()
    newest.unlink()
    run.save_checkpoint(4, weights)
    run.save_checkpoint(8, weights)
    monkeypatch.setattr("rapm.card.scores_text", lambda _: "SCORES")
    starts = set()
    for step, told in ((4, False), (8, True), (None, True)):
        card = model_card(run, teacher_of(run.config), "k", step)
        assert ("SCORES" in card) == told
        starts.add(re.search("scores of checkpoint [0-9a-f]{16}", card)[0])  # type: ignore[index]
    assert len(starts) == 2


def test_the_fused_pipeline_draws_what_the_student_draws(finished: Run, tmp_path: Path) -> None:
    export_run(finished, tmp_path, fused=True)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "fused", safety_checker=None)
    sampler = open_sampler(finished)
    own = sampler.latents(STUDENT, PROMPTS, [3, 4], num_steps=4)
    z = torch.stack([picture_noise(seed, (4, 8, 8)) for seed in (3, 4)])
    given = {"num_inference_steps": 4, "guidance_scale": 1.0, "latents": z}
    drawn = pipeline(PROMPTS, output_type="latent", **given).images
    assert (drawn - own).abs().max() < 1e-3
    others = sampler.latents(TEACHER, PROMPTS, [3, 4], num_steps=4, guidance_scale=1.0)
    assert (drawn - others).abs().max() > 1e-2


@pytest.mark.parametrize("wrong", ["alpha", "a layer"])
def test_a_file_that_reads_back_as_something_else_is_not_written(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    """Alpha that got lost, and a layer that was left out."""

    def damaged(*given: Any) -> dict[str, torch.Tensor]:
        state = kohya_state(*given)
        if wrong == "alpha":
            return {n: x for n, x in state.items() if "alpha" not in n} | {
                n: x * 8 for n, x in state.items() if "alpha" in n
            }
        first = next(iter(state)).partition(".")[0]
        return {n: x for n, x in state.items() if not n.startswith(f"{first}.")}

    monkeypatch.setattr("rapm.export.kohya_state", damaged)
    with pytest.raises(UserError, match=r"run-4-steps\.safetensors was not written: diffusers"):
        export_run(finished, tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def test_the_workflow_asks_for_what_was_trained(finished: Run) -> None:
    """Every link leads to a node before it."""
    nodes = json.loads((finished.export / "comfyui_workflow.json").read_text())
    links = [
        (int(key), value[0])
        for key, node in nodes.items()
        for value in node["inputs"].values()
        if isinstance(value, list)
    ]
    assert links and all(int(source) < key for key, source in links)
    by_kind = {node["class_type"]: node["inputs"] for node in nodes.values()}
    asked = by_kind["KSampler"]
    names = ("steps", "cfg", "sampler_name", "scheduler", "denoise")
    assert [asked[name] for name in names] == [4, 1.0, "euler", "simple", 1.0]
    assert by_kind["LoraLoader"]["lora_name"] == exported(finished).kohya.name
    assert by_kind["LoraLoader"]["strength_model"] == 1.0
    latent = by_kind["EmptyLatentImage"]
    assert (latent["width"], latent["height"]) == teacher_of(finished.config).size()
