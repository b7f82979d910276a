"""Rollouts against diffusers' own pipeline, and a store that survives whatever befalls it."""

from __future__ import annotations

import filecmp
import json
import re
import shutil
from dataclasses import replace
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from conftest import changed
from rapm.config import Config
from rapm.errors import UserError
from rapm.models.resolve import resolve_teacher
from rapm.network import TEACHER, Backbone
from rapm.pipeline import make_trajectories, open_run
from rapm.prompts import Prompt
from rapm.rollout import rollout
from rapm.run import Run
from rapm.sample import open_sampler
from rapm.sampling import guided, noise
from rapm.schedule import Grid
from rapm.trajectories import TrajectoryStore, fingerprint, noise_of, stored_prompts

PROMPT = "a red star and a blue ring on grass"


@pytest.mark.parametrize(("slots", "fine_steps"), [(4, 5), (2, 25), (1, 10), (8, 1)])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("negative_prompt", ["", "a green cross on sand"])
def test_rollout_ends_where_the_pipeline_ends(
    tiny_teacher: Path, slots: int, fine_steps: int, guidance_scale: float, negative_prompt: str
) -> None:
    teacher = resolve_teacher(str(tiny_teacher))
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_teacher, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    z = torch.stack([noise(0, k, (4, 8, 8)) for k in range(2)])
    expected = pipeline(
        [PROMPT, "one white cross on brick"],
        negative_prompt=[negative_prompt] * 2,
        num_inference_steps=slots * fine_steps,
        guidance_scale=guidance_scale,
        latents=z,
        output_type="latent",
    ).images
    backbone = Backbone(pipeline.unet, teacher.family.call, teacher.family.lora_targets)
    conditioning = teacher.family.encode(pipeline, [PROMPT, "one white cross on brick"])
    denoiser = guided(
        backbone, teacher.family.unconditional(pipeline, negative_prompt), guidance_scale
    )
    grid = Grid(slots, fine_steps)
    with backbone.adapter(TEACHER):
        absolute, intermediate = rollout(denoiser, teacher.schedule, grid, z, conditioning)
    assert absolute.shape == (2, slots + 1, 4, 8, 8)
    assert intermediate.shape == (2, slots, 4, 8, 8)
    assert torch.equal(absolute[:, slots], z)
    assert (absolute[:, 0] - expected).abs().max() < 1e-4


@pytest.mark.parametrize("delta", [1, 3, 4])
def test_positions_are_those_of_a_plain_loop(ddim_schedule, delta: int) -> None:
    """Absolute positions lie on the fine trajectory. An intermediate one is a single step of length
    delta by the prediction at the head of its slot, and costs no pass."""
    grid, z = Grid(3, 4, delta), torch.randn(1, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    calls = []

    def denoiser(z, t, conditioning):
        calls.append(t.tolist())
        return torch.sin(z) + t[:, None, None, None] / 1000

    absolute, intermediate = rollout(denoiser, ddim_schedule, grid, z, {})
    assert calls == [[t] for t in grid.fine[:-1]]
    fine = [z]
    for t, s in pairwise(grid.fine):
        fine.append(ddim_schedule.step(fine[-1], denoiser(fine[-1], torch.tensor([t]), {}), t, s))
    for n in range(grid.slots + 1):
        assert torch.equal(absolute[:, n], fine[(grid.slots - n) * 4])
    for n in range(grid.slots):
        start, t, s = fine[(grid.slots - n - 1) * 4], grid.coarse(n + 1), grid.intermediate(n)
        prediction = denoiser(start, torch.tensor([t]), {})
        assert torch.equal(intermediate[:, n], ddim_schedule.step(start, prediction, t, s))
        on_the_way = torch.equal(intermediate[:, n], fine[(grid.slots - n - 1) * 4 + delta])
        assert on_the_way == (delta == 1)


def test_a_trajectory_is_the_same_whatever_the_batch(tiny_config: Config, tmp_path: Path) -> None:
    """Kernels may pick another order of summation for another batch: within 1e-4, as far as from
    diffusers' own."""
    configs = [changed(tiny_config, trajectories={"batch_size": size}) for size in (1, 4)]
    alone, together = (
        make_trajectories(Run.open(tmp_path / str(k), config)) for k, config in enumerate(configs)
    )
    for k in range(len(alone)):
        a, b = alone[k], together[k]
        assert torch.equal(a.absolute[-1], b.absolute[-1])
        torch.testing.assert_close(a.absolute, b.absolute, rtol=0, atol=1e-4)
        torch.testing.assert_close(a.intermediate, b.intermediate, rtol=0, atol=1e-4)


def test_a_store_gives_back_what_was_rolled_out(tiny_config: Config, tmp_path: Path) -> None:
    run = Run.open(tmp_path / "run", tiny_config)
    store = make_trajectories(run)
    assert len(store) == 6
    prompts = ["a red star on grass", "a blue ring on sand", "one white cross on brick"]
    assert [store[k].prompt for k in range(6)] == prompts * 2
    sampler = open_sampler(run, student=False)
    embeds = sampler.encode(prompts)[0]["prompt_embeds"]
    for k in range(6):
        assert store[k].absolute.shape == (4, 4, 8, 8)
        assert store[k].intermediate.shape == (3, 4, 8, 8)
        assert torch.equal(store[k].absolute[3], noise(0, k, (4, 8, 8)))
        assert torch.equal(store[k].conditioning["prompt_embeds"], embeds[k % 3])
    with pytest.raises(IndexError):
        store[6]


def test_a_prompts_own_seed_replaces_the_runs(
    tiny_config: Config, tiny_prompts: Path, tmp_path: Path
) -> None:
    plain = make_trajectories(Run.open(tmp_path / "plain", tiny_config))
    file = tiny_prompts.with_suffix(".csv")
    file.write_text(
        "prompt,seed\na red star on grass,\na blue ring on sand,0\none white cross on brick,7\n",
        encoding="utf-8",
    )
    config = changed(tiny_config, trajectories={"prompts": str(file), "count": 7})
    store = make_trajectories(Run.open(tmp_path / "seeded", config))
    expected = [(0, 0), (0, -2), (7, -2), (0, 3), (0, -3), (7, -3), (0, 6)]
    assert [(store[k].seed, store[k].index) for k in range(7)] == expected
    for k, (seed, index) in enumerate(expected):
        assert torch.equal(store[k].absolute[3], noise(seed, index, (4, 8, 8)))
    for k in (0, 3):
        torch.testing.assert_close(store[k].absolute, plain[k].absolute, rtol=0, atol=1e-4)
    opened = TrajectoryStore.open(store.folder)
    assert [(opened[k].prompt, opened[k].seed) for k in (1, 2)] == [
        ("a blue ring on sand", 0),
        ("one white cross on brick", 7),
    ]
    assert json.loads((store.folder / "prompts.json").read_text())[1] == {
        "text": "a blue ring on sand",
        "seed": 0,
    }


def test_no_two_trajectories_and_no_picture_start_from_the_same_noise() -> None:
    """Whatever seeds the prompts bring, the run's own included; only prompts with the same seed
    share, pass by pass."""
    prompts = [Prompt("a"), Prompt("b", 0), Prompt("c", 1), Prompt("d"), Prompt("e", 1)]
    noises = [noise_of(k, prompts, 0) for k in range(200)]
    assert len({*noises}) == 160
    assert all(noises[5 * r + 2] == noises[5 * r + 4] == (1, -2 - r) for r in range(40))
    assert not {*noises} & {(seed, -1) for seed in range(9)}


def test_prompts_that_no_trajectory_has_are_left_out(
    tiny_config: Config, tiny_prompts: Path, tmp_path: Path
) -> None:
    run = Run.open(tmp_path / "run", tiny_config)
    store = make_trajectories(run)
    tiny_prompts.write_text(tiny_prompts.read_text() + "a\nb\nc\n")
    with pytest.raises(UserError, match="made with another prompts"):
        make_trajectories(run)
    short = Run.open(tmp_path / "two", changed(tiny_config, trajectories={"count": 2}))
    assert len(json.loads((make_trajectories(short).folder / "prompts.json").read_text())) == 2
    tiny_prompts.write_text("a red star on grass\na blue ring on sand\n")
    assert [make_trajectories(short)[k].prompt for k in range(2)] == [
        store[k].prompt for k in range(2)
    ]


@pytest.mark.parametrize("change", ["a red star on grass,1", "a red stair on grass,"])
def test_another_text_or_seed_is_another_set_of_prompts(
    tiny_config: Config, tmp_path: Path, change: str
) -> None:
    file = tmp_path / "prompts.csv"
    file.write_text("prompt,seed\na red star on grass,\n")
    config = changed(tiny_config, trajectories={"prompts": str(file), "count": 1})
    run = Run.open(tmp_path / "run", config)
    make_trajectories(run)
    file.write_text(f"prompt,seed\n{change}\n")
    with pytest.raises(UserError, match="made with another prompts"):
        make_trajectories(run)


def test_a_killed_rollout_goes_on_and_gives_the_same_files(
    tiny_config: Config, tmp_path: Path
) -> None:
    whole = make_trajectories(Run.open(tmp_path / "whole", tiny_config)).folder
    run = Run.open(tmp_path / "killed", tiny_config)
    killed = make_trajectories(run).folder
    (killed / "manifest.json").unlink()
    (killed / "shard-00001.safetensors").unlink()
    (killed / ".shard-00001.safetensors.partial").write_bytes(b"half a file")
    kept = (killed / "shard-00000.safetensors").stat().st_mtime_ns
    make_trajectories(run)
    assert (killed / "shard-00000.safetensors").stat().st_mtime_ns == kept
    for file in whole.iterdir():
        assert filecmp.cmp(killed / file.name, file, shallow=False)


def test_a_damaged_store_is_refused(tiny_config: Config, tmp_path: Path) -> None:
    run = Run.open(tmp_path / "run", tiny_config)
    folder = make_trajectories(run).folder
    shard = folder / "shard-00000.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UserError, match=r"shard-00000\.safetensors is not what was written"):
        TrajectoryStore.open(folder)
    shard.unlink()
    with pytest.raises(UserError, match=r"shard-00000\.safetensors is missing"):
        TrajectoryStore.open(folder)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        make_trajectories(run)
    (folder / "manifest.json").write_text(
        '{"files": {}, "fingerprint": "", "facts": {}, "shard_size": 4, "count": 6}'
    )
    with pytest.raises(UserError, match="is damaged or of another version; delete it"):
        make_trajectories(run)
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match="no finished trajectory store"):
        TrajectoryStore.open(folder)
    assert len(make_trajectories(run)) == 6


DAMAGES = {
    "count": lambda m: m.update(count=5),
    "seed": lambda m: m.update(seed=1),
    "shard_size": lambda m: m.update(shard_size=3),
    "no shards": lambda m: m.update(shard_size=0),
    "count in facts": lambda m: m["facts"].update(count=5),
    "a file less": lambda m: m["files"].pop("shard-00001.safetensors"),
    "a file outside": lambda m: m["files"].update({"../../a": "b"}),
    "shapes": lambda m: m.update(shapes=[[4, 8]]),
    "types": lambda m: m.update(count="6"),
    "null": lambda m: m.update(files=None),
}


def test_a_damaged_manifest_is_refused(tiny_config: Config, tmp_path: Path) -> None:
    run = Run.open(tmp_path / "run", tiny_config)
    file = make_trajectories(run).folder / "manifest.json"
    whole = file.read_bytes()
    for damage in DAMAGES.values():
        manifest = json.loads(whole)
        damage(manifest)
        file.write_text(json.dumps(manifest))
        with pytest.raises(UserError, match=r"manifest\.json is damaged or of another version"):
            TrajectoryStore.open(run.trajectories)
    for text in (b"[" * 100_000, b"\xff", b"null", b"[1]", b""):
        file.write_bytes(text)
        with pytest.raises(UserError, match=r"manifest\.json is damaged or of another version"):
            TrajectoryStore.open(run.trajectories)
    file.write_bytes(whole)
    assert len(TrajectoryStore.open(run.trajectories)) == 6
    for text in ("{", "[[]]", '[{"texts": "a"}]', "[" * 100_000):
        (run.trajectories / "prompts.json").write_text(text)
        with pytest.raises(UserError, match=r"prompts\.json is damaged; delete manifest\.json"):
            stored_prompts(run.trajectories)


def test_a_damaged_shard_of_an_unfinished_store_is_rolled_out_again(
    tiny_config: Config, tmp_path: Path
) -> None:
    run = Run.open(tmp_path / "run", tiny_config)
    folder = make_trajectories(run).folder
    (folder / "manifest.json").unlink()
    shard = folder / "shard-00000.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    make_trajectories(run)
    assert shard.read_bytes() == whole


@pytest.mark.parametrize(
    ("section", "key", "value", "named"),
    [
        ("trajectories", "guidance_scale", 2.0, "guidance_scale"),
        ("trajectories", "shard_size", 5, "shard_size"),
        ("rapm", "delta", 3, "grid"),
    ],
)
def test_a_foreign_store_is_refused(
    tiny_config: Config, tmp_path: Path, section: str, key: str, value: object, named: str
) -> None:
    folder = make_trajectories(Run.open(tmp_path / "run", tiny_config)).folder
    run = Run.open(tmp_path / "other", changed(tiny_config, **{section: {key: value}}))
    folder.rename(run.trajectories)
    with pytest.raises(UserError, match=f"made with another {named};"):
        make_trajectories(run)
    (run.trajectories / "manifest.json").unlink()
    with pytest.raises(UserError, match="made with other settings"):
        make_trajectories(run)


def test_a_store_of_another_version_names_both(tiny_config: Config, tmp_path: Path) -> None:
    run = Run.open(tmp_path / "run", tiny_config)
    file = make_trajectories(run).folder / "manifest.json"
    manifest = json.loads(file.read_text())
    assert manifest["versions"]["torch"] == version("torch")
    manifest["facts"]["rapm"] = "0.0.1"
    manifest["fingerprint"] = fingerprint(manifest["facts"])
    file.write_text(json.dumps(manifest))
    with pytest.raises(
        UserError,
        match=rf"made with rapm 0\.0\.1, this is {re.escape(version('rapm'))}; go on with that "
        rf"version",
    ):
        make_trajectories(run)


def test_facts_name_the_teacher_by_its_weights(
    tiny_config: Config, tiny_teacher: Path, tmp_path: Path
) -> None:
    store = make_trajectories(Run.open(tmp_path / "run", tiny_config))
    teacher = resolve_teacher(str(tiny_teacher))
    assert (
        json.loads((store.folder / "manifest.json").read_text())["facts"]["teacher"]
        == teacher.fingerprint
    )
    assert replace(teacher, source="elsewhere").fingerprint == teacher.fingerprint


# ---- midpoint's: no positions


def test_midpoints_store_is_prompts_and_noise(
    tiny_config: Config, tiny_midpoint: Config, tmp_path: Path
) -> None:
    rapm = make_trajectories(Run.open(tmp_path / "rapm", tiny_config))
    made = make_trajectories(Run.open(tmp_path / "midpoint", tiny_midpoint))
    names = {"manifest.json", "conditioning.safetensors", "prompts.json"}
    assert {file.name for file in made.folder.iterdir()} == names
    assert made.manifest["shard_size"] == 0
    store = TrajectoryStore.open(made.folder)
    assert len(store) == len(rapm) == 6
    for k in range(6):
        assert store[k].absolute.shape == (1, 4, 8, 8)
        assert store[k].intermediate.shape == (0, 4, 8, 8)
        assert torch.equal(store[k].absolute[-1], rapm[k].absolute[-1])
        a, b = (each[k].conditioning["prompt_embeds"] for each in (store, rapm))
        assert torch.equal(a, b)
        assert (store[k].prompt, store[k].seed, store[k].index) == (rapm[k].prompt, 0, k)
    assert torch.equal(store.unconditional["prompt_embeds"], rapm.unconditional["prompt_embeds"])


def test_midpoints_store_is_made_again_to_the_same_files(
    tiny_midpoint: Config, tmp_path: Path
) -> None:
    whole = make_trajectories(Run.open(tmp_path / "whole", tiny_midpoint)).folder
    run = Run.open(tmp_path / "killed", tiny_midpoint)
    killed = make_trajectories(run).folder
    (killed / "manifest.json").unlink()
    (killed / "prompts.json").unlink()
    make_trajectories(run)
    for file in whole.iterdir():
        assert filecmp.cmp(killed / file.name, file, shallow=False)
    # What midpoint does not depend on may change; what it does depend on may not.
    for key, value in (("batch_size", 1), ("guidance_scale", 2.0)):
        make_trajectories(Run(run.folder, changed(tiny_midpoint, trajectories={key: value})))
    with pytest.raises(UserError, match="made with another seed;"):
        make_trajectories(Run(run.folder, changed(tiny_midpoint, trajectories={"seed": 5})))


@pytest.mark.parametrize(
    ("before", "finished", "named"),
    [
        ("rapm", True, "another grid, shard_size, guidance_scale;"),
        ("rapm", False, "other settings;"),
        ("midpoint", True, "another grid, shard_size, guidance_scale;"),
    ],
)
def test_a_store_of_another_method_is_refused_and_left_alone(
    tiny_config: Config,
    tiny_midpoint: Config,
    tmp_path: Path,
    before: str,
    finished: bool,
    named: str,
) -> None:
    """Where a folder holds nothing but the store, too."""
    configs = {"rapm": tiny_config, "midpoint": tiny_midpoint}
    own = configs.pop(before)
    (other,) = configs.values()
    run = Run.open(tmp_path / "run", own)
    make_trajectories(run)
    (run.folder / "config.toml").unlink()
    if not finished:
        (run.trajectories / "manifest.json").unlink()
    kept = {file: file.stat().st_mtime_ns for file in run.folder.rglob("*")}
    with pytest.raises(UserError, match=f"holds trajectories made with {named}") as caught:
        open_run(other, run.folder)
    assert "\n" not in str(caught.value)
    assert {file: file.stat().st_mtime_ns for file in run.folder.rglob("*")} == kept


# ---- guidance and noise


def test_noise_is_standard_normal_whatever_was_drawn_before() -> None:
    first = noise(3, 5, (4, 8, 8))
    torch.manual_seed(1)
    assert torch.equal(noise(3, 5, (4, 8, 8)), first)
    values = torch.stack([noise(0, k, (4, 8, 8)) for k in range(100)])
    assert abs(float(values.mean())) < 0.02 and abs(float(values.std()) - 1) < 0.02


def test_guidance_leads_away_from_what_is_not_named() -> None:
    """uncond + scale (cond - uncond); what the unconditional prompt does not name is the same."""
    seen = []

    def denoiser(z, t, conditioning):
        seen.append({name: value.tolist() for name, value in conditioning.items()})
        return conditioning["c"][:, :1, None, None] + conditioning["size"][:, :1, None, None]

    z, t = torch.zeros(2, 1, 1, 1), torch.tensor([7, 8])
    prompts = {"c": torch.tensor([[1.0], [2.0]]), "size": torch.tensor([[10.0], [20.0]])}
    found = guided(denoiser, {"c": torch.tensor([[0.5]])}, 3.0)(z, t, prompts)
    assert seen == [{"c": [[0.5], [0.5], [1], [2]], "size": [[10], [20], [10], [20]]}]
    assert found.flatten().tolist() == [10.5 + 3 * 0.5, 20.5 + 3 * 1.5]


def test_guidance_of_one_asks_once() -> None:
    asked = []

    def denoiser(z, t, conditioning):
        asked.append(len(z))
        return z

    z, t = torch.ones(3, 1, 1, 1), torch.zeros(3, dtype=torch.long)
    guided(denoiser, {}, 1.0)(z, t, {})
    guided(denoiser, {"c": torch.zeros(1, 2)}, 2.0)(z, t, {"c": torch.ones(3, 2)})
    assert asked == [3, 6]


# ---- mistakes


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_what_is_not_finite_is_not_stored(
    tiny_config: Config, tiny_teacher: Path, tmp_path: Path, precision: str
) -> None:
    shutil.copytree(tiny_teacher, tmp_path / "teacher")
    file = tmp_path / "teacher" / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["conv_in.bias"][0] = 3e38  # a number, and none when it is squared
    save_file(weights, file)
    other = {"teacher": str(tmp_path / "teacher"), "precision": precision}
    run = Run.open(tmp_path / "run", tiny_config.model_copy(update=other))
    with pytest.raises(
        UserError, match="trajectories 0 to 2 are not finite; nothing of them was stored"
    ):
        make_trajectories(run)
    assert not list(run.trajectories.glob("shard-*"))
