"""The toy data set: scenes, oracle, teacher, protocol, and the tools that made them."""

from __future__ import annotations

import hashlib
import json
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import get_args

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

import build
import score
from build import blur, to_tensor
from fit import Stage, fit
from rapm import network
from rapm.config import MethodName
from rapm.errors import UserError
from rapm.evaluate import toy as protocol
from rapm.evaluate.metrics import Score, frechet_distance
from rapm.evaluate.rows import Row, Scores
from rapm.network import STUDENT
from rapm.pipeline import make_trajectories, train_run
from rapm.run import Run
from rapm.sample import open_sampler
from rapm.scores import evaluate_toy, scores_file
from rapm.settings import load
from rapm.toy import ASSETS, GUIDANCE_SCALE, ORACLE, TEACHER
from rapm.toy.oracle import FEATURES, Oracle
from rapm.toy.scenes import (
    COLOURS,
    GROUNDS,
    KINDS,
    SHAPES,
    captions,
    draw_scene,
    parse_caption,
    render_many,
    scene,
    split_of,
)

# ---- scenes


def test_scene_k_of_a_seed_is_always_the_same() -> None:
    assert scene(3, 17, "train") == scene(3, 17, "train")
    assert scene(3, 17, "train") != scene(3, 18, "train") != scene(4, 18, "train")
    assert scene(3, 17, "train").caption == "on grass, one yellow triangle and a cross in green"
    # Shapes are drawn in float32, whose last digit may differ between machines: compare what
    # survives rounding.
    coarse = (
        render_many([scene(3, 17, "train")])[0]
        .reshape(8, 8, 8, 8, 3)
        .mean((1, 3))
        .round(-1)
        .astype(int)
    )
    assert hashlib.sha256(str(coarse.tolist()).encode()).hexdigest()[:16] == "213ac8cc615699b3"


def test_captions_say_what_is_there_and_leave_the_rest_open() -> None:
    rng = np.random.default_rng(0)
    for _ in range(500):
        drawn = draw_scene(rng)
        assert parse_caption(drawn.caption) == (
            drawn.ground,
            sorted(thing.kind for thing in drawn.things),
        )
        assert len({thing.kind for thing in drawn.things}) == len(drawn.things)
    assert (len(SHAPES), len(COLOURS), len(GROUNDS), len(KINDS)) == (6, 8, 4, 48)


def test_counts_are_weighted_towards_one_and_two() -> None:
    rng = np.random.default_rng(1)
    counts = np.bincount([len(draw_scene(rng).things) for _ in range(2_000)], minlength=4) / 2_000
    np.testing.assert_allclose(counts, [0, 0.5, 0.35, 0.15], atol=0.04)


def test_splits_share_no_caption() -> None:
    sets = [set(captions(800, 5, split)) for split in ("train", "validation", "test")]
    assert not (sets[0] & sets[1] or sets[0] & sets[2] or sets[1] & sets[2])
    assert all(split_of(text) == "test" for text in sets[2])


def test_objects_lie_inside_and_apart() -> None:
    for index in range(300):
        things = scene(0, index).things
        for k, a in enumerate(things):
            assert a.radius < a.x < 64 - a.radius
            for b in things[k + 1 :]:
                assert np.hypot(a.x - b.x, a.y - b.y) > 0.9 * (a.radius + b.radius)


@pytest.mark.parametrize("text", ["", "a dog on grass", "a red star", "a big star on grass"])
def test_other_texts_are_no_captions(text: str) -> None:
    with pytest.raises(ValueError, match=r"not a caption|no colour"):
        parse_caption(text)


# ---- oracle


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle.load(ORACLE)


@pytest.fixture(scope="module")
def renders() -> tuple[torch.Tensor, list[str]]:
    """600 fresh scenes of captions no network was trained on, through the teacher's VAE as its
    pictures are."""
    drawn = [scene(99, index, "test") for index in range(600)]
    return to_tensor(render_many(drawn)), [d.caption for d in drawn]


def test_oracle_reads_fresh_renders(
    oracle: Oracle, renders: tuple[torch.Tensor, list[str]]
) -> None:
    assert oracle.is_right(*renders).float().mean() >= 0.97


def test_oracle_refuses_what_the_caption_does_not_say(
    oracle: Oracle, renders: tuple[torch.Tensor, list[str]]
) -> None:
    images, texts = renders
    assert oracle.is_right(images, [*texts[1:], texts[0]]).float().mean() <= 0.03


def test_fid_rises_with_what_few_step_sampling_does_wrong(
    oracle: Oracle, renders: tuple[torch.Tensor, list[str]]
) -> None:
    """Damage to one half of what the teacher learnt from, against the other half; in units of the
    distance undamaged."""
    half, other = renders[0].chunk(2)
    reference = oracle.features(half)

    def fid(images: torch.Tensor) -> float:
        return frechet_distance(oracle.features(images), reference)

    floor, mean = fid(other), other.mean((1, 2, 3), keepdim=True)
    blurred = [fid(blur(other, torch.full((len(other),), sigma))) / floor for sigma in (0.3, 0.6)]
    assert blurred[0] > 1.1
    assert blurred[1] > 1.5 * blurred[0]
    assert fid(0.8 * other + 0.2 * other.roll(1, 0)) > 2 * floor
    contrast = [fid(mean + share * (other - mean)) / floor for share in (0.95, 0.8)]
    assert 1.1 < contrast[0] < contrast[1]


def test_features_are_standardised(oracle: Oracle, renders: tuple[torch.Tensor, list[str]]) -> None:
    features = oracle.features(renders[0])
    assert features.shape == (600, FEATURES)
    assert features.mean(0).abs().max() < 0.35
    assert (features.std(0) - 1).abs().max() < 0.35


# ---- teacher


def test_teacher_is_a_plain_diffusers_pipeline_of_the_size_it_claims() -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(TEACHER)
    kinds = (CLIPTokenizer, CLIPTextModel, AutoencoderKL, UNet2DConditionModel, DDIMScheduler)
    parts = (
        pipeline.tokenizer,
        pipeline.text_encoder,
        pipeline.vae,
        pipeline.unet,
        pipeline.scheduler,
    )
    assert all(isinstance(part, kind) for part, kind in zip(parts, kinds, strict=True))
    assert 3e6 <= pipeline.unet.num_parameters() <= 6e6
    assert sum(file.stat().st_size for file in ASSETS.rglob("*") if file.is_file()) <= 15e6
    image = pipeline("a red star on grass", num_inference_steps=2, guidance_scale=3.0).images[0]
    assert image.size == (64, 64)


def test_every_word_of_the_world_is_one_token() -> None:
    tokenizer = CLIPTokenizer.from_pretrained(TEACHER / "tokenizer")
    texts = captions(300, 2, "test")
    assert max(len(tokenizer(text).input_ids) for text in texts) <= tokenizer.model_max_length == 24
    for text in texts:
        assert len(tokenizer.tokenize(text)) == len(text.replace(",", " ,").split())


def test_the_teachers_figures_reach_their_thresholds() -> None:
    """The shipped reference: accuracy over 1,000 held-out captions, and how much worse few steps
    are."""
    reference = protocol.load_reference("test")
    teacher = reference[100]
    assert len(teacher.first) == len(teacher.second) == 1000
    floor = frechet_distance(teacher.first, teacher.second)
    figures = json.loads((ASSETS / "figures-test.json").read_text())
    assert figures["guidance_scale"] == GUIDANCE_SCALE
    for method in get_args(MethodName):
        assert load(method=method).trajectories.guidance_scale == GUIDANCE_SCALE
    assert figures["fid_floor"] == pytest.approx(floor, rel=1e-3)
    assert figures["captions"] == pytest.approx(float(teacher.right.mean()), abs=1e-4)
    assert figures["captions"] >= 0.8
    assert figures["few_steps"]["4"]["fid"] == pytest.approx(
        frechet_distance(reference[4].first, teacher.second), rel=1e-3
    )
    assert figures["few_steps"]["4"]["fid"] >= 5 * floor
    assert figures["few_steps"]["2"]["fid"] >= 20 * floor


# ---- protocol


def row(
    model: str,
    steps: int,
    fid: float,
    accuracy: float,
    diversity: float = 1.0,
    sharpness: float = 1.0,
) -> Row:
    values = {"fid": fid, "captions": accuracy, "diversity": diversity, "sharpness": sharpness}
    scores = {name: Score(value, value - 0.1, value + 0.1) for name, value in values.items()}
    return Row(model, steps, 1.0, 1000, scores, 0.1)


TEACHER_ROWS = [row("teacher", 100, 0.4, 0.8), row("teacher", 4, 10.0, 0.6)]


@pytest.mark.parametrize(
    ("method", "fid", "accuracy"), [("rapm", 0.35, 0.66), ("midpoint", 0.30, 0.74)]
)
def test_thresholds_are_a_table(method: str, fid: float, accuracy: float) -> None:
    reached = row("student", 4, fid, accuracy, 0.9, 0.9)
    assert protocol.against_thresholds([*TEACHER_ROWS, reached], method)[1]
    short = row("student", 4, fid + 0.01, accuracy - 0.01, 0.89, 1.2)
    assert protocol.against_thresholds([*TEACHER_ROWS, short], method) == (
        [
            "threshold   student     asked  reached",
            f"FID           {fid + 0.01:.3f} <=  {fid:.3f}  no",
            f"captions      {accuracy - 0.01:.3f} >=  {accuracy:.3f}  no",
            "diversity     0.890 >=  0.900  no",
            "sharpness     1.200 >=  0.900  yes",
        ],
        False,
    )


def test_every_method_has_thresholds_and_what_is_no_number_misses_them() -> None:
    assert protocol.THRESHOLDS.keys() == set(get_args(MethodName))
    nothing = row("student", 4, *[float("nan")] * 4)
    for method in protocol.THRESHOLDS:
        lines, reached = protocol.against_thresholds([*TEACHER_ROWS, nothing], method)
        assert [line.split()[-1] for line in lines[1:]] == ["no"] * 4
        assert not reached


def test_a_student_is_scored_while_it_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On validation captions: those drawn right; and FID, where there is a reference. The last
    scores are those of the student that is kept."""
    numbers = {"CHECKOUT": tmp_path, "CAPTIONS": 8, "PAIRS": 4, "_BATCH": 2}
    for name, value in numbers.items():
        monkeypatch.setattr(protocol, name, value)
    sets = ["trajectories.count=2", "training.iterations=4", "samples.count=0", "evaluate.every=2"]
    config = load(method="midpoint", preset="toy", settings=[*sets, "training.checkpoint_every=2"])

    def curve(folder: Path) -> Run:
        run = Run.open(folder, config)
        make_trajectories(run)
        assert train_run(run)
        return run

    run = curve(tmp_path / "without")
    points = run.read_samples()
    assert [p["iteration"] for p in points if "captions" in p] == [0, 2, 4]
    assert not any("fid" in point for point in points)
    sampler, oracle = open_sampler(run), Oracle.load(ORACLE)
    jobs = [("first", 0), ("first", 2)]
    drawn = [protocol.draw(sampler, oracle, STUDENT, 4, "validation", job) for job in jobs]
    right = torch.cat([right for _, right, _ in drawn]).float().mean()
    assert points[-1]["captions"] == pytest.approx(float(right), abs=1e-4)

    first = torch.cat([features for features, _, _ in drawn])
    measured = protocol.Measured(first, first.roll(1, 1), torch.ones(4), torch.ones(4))
    protocol.save_reference("validation", measured, measured)
    other = protocol.load_reference("validation")[protocol.MANY_STEPS].second
    found = curve(tmp_path / "with").read_samples()[-1]["fid"]
    assert found == pytest.approx(frechet_distance(first, other), rel=1e-3)


def test_a_checkpoint_is_scored_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And another one, or the same of another version, anew."""
    run = Run(tmp_path, load(method="midpoint"))
    rows, asked = [*TEACHER_ROWS, row("student", 4, 0.2, 0.8)], []
    monkeypatch.setattr(protocol, "score", lambda *given: asked.append(given[1:]) or rows)
    monkeypatch.setattr("rapm.scores.open_sampler", lambda run, step: None)
    run.save_checkpoint(4, {"a": torch.ones(1)})
    first = evaluate_toy(run)
    assert first == evaluate_toy(run)
    assert first[1]
    file = scores_file(run, "toy")
    assert first[0][-1] == f"Scores: {file}"
    assert asked == [("test", 4)]
    evaluate_toy(run, "validation")
    assert asked.pop() == ("validation", 4)
    text = file.read_text()
    damages = (text[:-9], "[]", text.replace('"model"', '"who"'), text.replace("0.1.0", "0.0.9"))
    for damaged in damages:
        file.write_text(damaged)
        assert evaluate_toy(run) == first
    assert asked == [("test", 4)] * 5
    run.save_checkpoint(8, {"a": torch.ones(1)})
    run.save_checkpoint(8, {"a": torch.zeros(1)})
    assert evaluate_toy(run) == evaluate_toy(run) == first
    assert asked == [("test", 4)] * 6


def test_a_run_is_scored_against_the_shipped_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole protocol at small numbers: a student that is the teacher without guidance, then
    references that are not its."""
    numbers = {"CAPTIONS": 24, "PAIRS": 24, "TIMED": 4, "MANY_STEPS": 3, "FEW_STEPS": 1}
    for name, value in ({"ASSETS": tmp_path} | numbers).items():
        monkeypatch.setattr(protocol, name, value)
    config = load(method="midpoint", settings=["trajectories.slots=2", "midpoint.weight=1"])
    run = Run(tmp_path, config)
    sampler = open_sampler(run, student=False)
    sampler.backbone.add_adapter(STUDENT, 1, ("to_q",), 0)
    monkeypatch.setattr("rapm.scores.open_sampler", lambda run, step: sampler)
    oracle = Oracle.load(ORACLE)
    with pytest.raises(UserError, match="make it with"):
        evaluate_toy(run)

    many, few = (
        protocol.measure(sampler, oracle, network.TEACHER, steps, "test") for steps in (3, 1)
    )
    protocol.save_reference("test", many, few)
    table, all_reached = evaluate_toy(run)
    file = scores_file(run, "toy")
    scores = Scores.load(file, {"method": "midpoint"})
    assert scores
    full, short, student = rows = scores.rows
    expected = {"name": "toy", "captions": "test", "count": 24}
    expected |= {"pairs_for_diversity": 24, "reference": "the teacher's 3 steps"}
    assert scores.protocol == expected
    thresholds, reached = protocol.against_thresholds(rows, "midpoint")
    assert not reached
    ends = ["", *thresholds, "", f"Scores: {file}"]
    assert (table, all_reached) == ([*scores.render(), *ends], False)
    alone = protocol.measure(sampler, oracle, STUDENT, 2, "test")
    shipped = protocol.load_reference("test")[3]
    assert [(row.model, row.steps, row.guidance_scale) for row in rows] == [
        ("teacher", 3, 7.5),
        ("teacher", 1, 7.5),
        ("student", 2, 1.0),
    ]
    assert full.scores["diversity"].value == pytest.approx(1)
    assert full.scores["sharpness"].value == pytest.approx(1)
    for scored, measured in ((full, many), (short, few), (student, alone)):
        # float16 features are near enough for everything that is compared
        fid = frechet_distance(measured.first, shipped.second)
        assert scored.images == 24
        assert scored.scores["fid"].value == pytest.approx(fid, rel=0.02)
        right = float(measured.right.mean())
        assert scored.scores["captions"].value == pytest.approx(right)
        sharp = float(measured.sharp.mean() / shipped.sharp.mean())
        assert scored.scores["sharpness"].value == pytest.approx(sharp, rel=0.01)

    protocol.save_reference("test", replace(many, first=many.first + 0.2), few)
    with pytest.raises(UserError, match="another teacher or oracle"):
        protocol.score(sampler, "test", 2)
    with pytest.raises(UserError, match="has guidance scale 3;"):
        sampler.guidance_scale = 3.0
        protocol.score(sampler, "test", 2)


# ---- tools


@pytest.mark.parametrize("tool", [build, score])
def test_the_tools_say_how_they_are_run(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [f"{tool.__name__}.py", "--help"])
    with pytest.raises(SystemExit) as caught:
        tool.main()
    assert not caught.value.code
    assert f"python tools/toy/{tool.__name__}.py" in capsys.readouterr().out


def test_a_build_that_was_stopped_goes_on_bit_for_bit(tmp_path: Path) -> None:
    def trained(name: str, stops: list[int]) -> torch.Tensor:
        torch.manual_seed(0)
        model = nn.Linear(3, 1)
        calls = 0

        def loss_of(generator: torch.Generator) -> torch.Tensor:
            nonlocal calls
            calls += 1
            if calls in stops:
                raise KeyboardInterrupt
            x = torch.randn(4, 3, generator=generator)
            return (model(x) - x.sum(1, keepdim=True)).square().mean()

        for _ in range(len(stops) + 1):
            with suppress(KeyboardInterrupt):
                fit(
                    "line",
                    Stage(20, 4, 0.1),
                    1,
                    model,
                    loss_of,
                    tmp_path / f"{name}.safetensors",
                    save_seconds=0,
                )
        assert calls == 20 + len(stops)
        return model.weight.detach().clone()

    assert torch.equal(trained("stopped", [3, 9]), trained("whole", []))
