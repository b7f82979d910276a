"""Other methods as benchmarks/baselines restates them, by hand; and how benchmarks make runs."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import paper
import runs
from baselines import Baseline, Pictures, dmd2, lcm, one_in_each_slot, pcm, regression
from conftest import changed, make_scheduler, make_unet
from rapm import settings
from rapm.config import Config
from rapm.losses import pseudo_huber
from rapm.methods import Batch, Method
from rapm.models.resolve import teacher_of
from rapm.models.stable_diffusion import FAMILY
from rapm.network import STUDENT, TEACHER, Backbone
from rapm.run import Run
from rapm.schedule import Grid, Schedule
from rapm.status import training_seconds
from rapm.trajectories import TrajectoryStore
from runs import Points, Spec

GRID = Grid(slots=2, fine_steps=3)
SCALE = 5.0


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def shake(method: Method, adapter: str) -> None:
    """A new LoRA is the identity, which would hide mistakes."""
    for k, p in enumerate(method.backbone.parameters(adapter).values()):
        p.data = 0.1 * drawn(*p.shape, seed=k)


def prompts(batch: int) -> dict[str, Tensor]:
    return {"prompt_embeds": drawn(batch, 6, 16, seed=1)}


PICTURES = Pictures(drawn(3, 4, 8, 8, seed=2), prompts(3))
STORE: Any = SimpleNamespace(unconditional={"prompt_embeds": torch.zeros(1, 6, 16)})


def a_batch(size: int = 1) -> Batch:
    return Batch(drawn(size, 3, 4, 8, 8, seed=3), drawn(size, 2, 4, 8, 8, seed=4), prompts(size))


def given(scale: float = SCALE, slot_batch: int = 2) -> tuple[Config, Backbone, Schedule, Any]:
    config = settings.load(
        teacher="toy",
        settings=[
            "trajectories.slots=2",
            "trajectories.fine_steps=3",
            f"trajectories.guidance_scale={scale}",
            "student.rank=4",
            f"training.slot_batch={slot_batch}",
        ],
    )
    scheduler, network = make_scheduler(), make_unet()
    schedule = Schedule.of(scheduler.alphas_cumprod, scheduler.final_alpha_cumprod, "epsilon")
    return config, Backbone(network, FAMILY.call, FAMILY.lora_targets), schedule, STORE


def make_pcm(form: str, slot_batch: int = 2) -> pcm.Pcm:
    network = make_unet()
    layers = pcm.feature_layers(network, pcm.FORMS[form])
    second = Backbone(network, FAMILY.call, (), layers)
    method = pcm.Pcm(*given(slot_batch=slot_batch), PICTURES, second, pcm.FORMS[form])
    shake(method, STUDENT)
    return method


def make(kind: type[Baseline], *more: Any, scale: float = SCALE, slot_batch: int = 2) -> Any:
    method = kind(*given(scale, slot_batch), *more)
    shake(method, STUDENT)
    return method


def seeded(seed: int = 4) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gradients(method: Method, name: str) -> list[Tensor]:
    """The nonzero ones of a learner; none where it got none at all."""
    found = [p.grad for p in method.learners[name].parameters.values() if p.grad is not None]
    return [gradient for gradient in found if gradient.any()]


def test_one_start_in_each_slot() -> None:
    grid = Grid(slots=4, fine_steps=25)
    fine = one_in_each_slot(grid, 1000, seeded())
    assert fine.shape == (4, 1000)
    for n in range(4):  # all fine steps of a slot, and no others
        times = {grid.fine[k] for k in fine[n].tolist()}
        assert max(times) == grid.coarse(n + 1) and min(times) > grid.coarse(n)
        assert len(times) == 25


def test_heads_of_pcm_have_the_published_size() -> None:
    with torch.device("meta"):
        of_sd15 = pcm.Heads([320, 640, 1280, 1280, 1280, 1280, 1280, 640, 320], pcm.FORMS["sd15"])
        of_sdxl = pcm.Heads([320, 640, 1280, 1280], pcm.FORMS["sdxl"])
    assert sum(p.numel() for p in of_sd15.parameters()) == 663_784_996
    assert sum(p.numel() for p in of_sdxl.parameters()) == 7_602_244


def test_pcm_asks_for_the_place_where_the_teachers_step_leads() -> None:
    """By diffusers' own formulas, from starts inside a slot and from the last fine step of it."""
    method, scheduler = make_pcm("sdxl"), make_scheduler()
    student, second = method.backbone, method.second

    def step(z: Tensor, eps: Tensor, t: int, s: int) -> Tensor:
        end = scheduler.final_alpha_cumprod
        a, b = (scheduler.alphas_cumprod[k] if k >= 0 else end for k in (t, s))
        return b.sqrt() * (z - (1 - a).sqrt() * eps) / a.sqrt() + (1 - b).sqrt() * eps

    seen = set()
    for seed in range(6):
        found = method.training_step(1, a_batch(), seeded(seed))
        generator, expected = seeded(seed), []
        x0, own = PICTURES.draw(generator, 1)
        starts = one_in_each_slot(GRID, 1, generator)
        noise = torch.randn(2, *x0.shape, generator=generator)
        for n in (0, 1):
            k, edge = int(starts[n]), GRID.coarse(n)
            t, after = GRID.fine[k : k + 2]
            seen.add(after == edge)
            z = scheduler.add_noise(x0, noise[n], torch.tensor([t]))
            with torch.no_grad():
                with second.adapter(TEACHER):
                    both = STORE.unconditional, own
                    without, with_ = (second(z, torch.tensor([t]), c) for c in both)
                    moved = step(z, without + SCALE * (with_ - without), t, after)
                with student.adapter(STUDENT):
                    fake = step(z, student(z, torch.tensor([t]), own), t, edge)
                    target = moved
                    if after != edge:
                        eps = student(moved, torch.tensor([after]), own)
                        target = step(moved, eps, after, edge)
            expected.append(float(pseudo_huber(fake, target)))
        assert found["distance"] == pytest.approx(sum(expected) / 2, rel=1e-4)
    assert seen == {True, False}


def test_in_pcm_discriminator_and_student_learn_in_turn() -> None:
    method = make_pcm("sd15")
    for iteration, own, other in ((0, pcm.DISCRIMINATOR, STUDENT), (1, STUDENT, pcm.DISCRIMINATOR)):
        assert method.learning(iteration) == (own,)
        method.training_step(iteration, a_batch(), seeded())
        # Between the hinges real and fake pull a head's last bias apart, each by as much.
        parameters = method.learners[own].parameters
        moved = [name for name, p in parameters.items() if p.grad is not None and p.grad.any()]
        assert {name for name in parameters if not name.endswith("out.bias")} <= {*moved}
        assert all(p.grad is None for p in method.learners[other].parameters.values())
        method.learners[own].optimizer.zero_grad()


def test_a_new_discriminator_of_pcm_is_between_the_hinges() -> None:
    """Its logits are small: relu(1 - real) + relu(1 + fake) is 2 by and large."""
    found = make_pcm("sdxl").training_step(0, a_batch(), seeded())
    assert found == {"discriminator": pytest.approx(2, abs=0.3)}


def test_lcm_starts_as_the_identity() -> None:
    skip, out = lcm.boundary(torch.tensor([0, -1, 999]), torch.zeros(3, 4, 8, 8))
    assert skip[:2].flatten().tolist() == [1, 1] and out[:2].flatten().tolist() == [0, 0]
    assert float(skip[2]) == pytest.approx(0, abs=1e-8)
    assert float(out[2]) == pytest.approx(1, abs=1e-6)


def test_lcm_compares_predictions_of_the_clean_latent_along_the_teachers_step() -> None:
    method = make(lcm.Lcm, PICTURES)
    network, schedule = method.backbone, method.schedule

    def clean(z: Tensor, t: int, own: Any) -> Tensor:
        return schedule.x0_and_eps(z, network(z, torch.tensor([t]), own), t)[0]

    for seed in range(4):
        found = method.training_step(0, a_batch(), seeded(seed))
        generator, expected = seeded(seed), []
        x0, own = PICTURES.draw(generator, 1)
        starts = one_in_each_slot(GRID, 1, generator)
        noise = torch.randn(2, *x0.shape, generator=generator)
        for n in (0, 1):
            t, s = GRID.fine[int(starts[n]) :][:2]
            z = make_scheduler().add_noise(x0, noise[n], torch.tensor([t]))
            with torch.no_grad():
                with network.adapter(TEACHER):
                    both = STORE.unconditional, own
                    without, with_ = (network(z, torch.tensor([t]), c) for c in both)
                moved = schedule.step(z, without + SCALE * (with_ - without), t, s)
                with network.adapter(STUDENT):
                    before, after = clean(z, t, own), moved if s < 0 else clean(moved, s, own)
            expected.append(float(pseudo_huber(before, after)))
        assert found["distance"] == pytest.approx(sum(expected) / 2, rel=1e-3)
    assert gradients(method, STUDENT)


def test_regression_goes_from_stored_to_stored_positions() -> None:
    method, batch = make(regression.Regression), a_batch()
    found, expected = method.training_step(0, batch, seeded()), 0.0
    with torch.no_grad(), method.backbone.adapter(STUDENT):
        for t, s, n in ((999, 499, 1), (499, -1, 0)):
            z = batch.absolute[:, n + 1]
            eps = method.backbone(z, torch.tensor([t]), batch.conditioning)
            moved = method.schedule.step(z, eps, t, s)
            expected += float(pseudo_huber(moved, batch.absolute[:, n])) / 2
    assert found["distance"] == pytest.approx(expected, rel=1e-4)
    assert gradients(method, STUDENT)


def test_distribution_matching_moves_nothing_where_both_scores_agree() -> None:
    """A fake score that is still the teacher's, without guidance; and one learner at a time."""
    for scale, moves in ((1.0, False), (SCALE, True)):
        method = make(dmd2.Dmd2, scale=scale)
        assert method.learning(0) == (STUDENT,)
        losses = method.training_step(0, a_batch(), seeded())
        assert (losses["matching"] > 0) == moves
        assert bool(gradients(method, STUDENT)) == moves
        assert all(p.grad is None for p in method.fake.parameters.values())
        method.student.optimizer.zero_grad()
        assert all(method.learning(k) == (dmd2.FAKE,) for k in range(1, 6))
        method.training_step(1, a_batch(), seeded())
        assert gradients(method, dmd2.FAKE)
        assert all(p.grad is None for p in method.student.parameters.values())


def test_distribution_matching_moves_towards_where_the_teacher_sees_it() -> None:
    """A step against the gradient leads from what the fake score sees to what the teacher does."""
    method = make(dmd2.Dmd2)
    shake(method, dmd2.FAKE)
    network, schedule = method.backbone, method.schedule
    x0, z, own, t = PICTURES.latents, drawn(3, 4, 8, 8, seed=9), prompts(3), torch.full((3,), 500)
    with torch.no_grad():
        with network.adapter(TEACHER):
            empty = {"prompt_embeds": torch.zeros(3, 6, 16)}
            without, with_ = (network(z, t, c) for c in (empty, own))
        with network.adapter(dmd2.FAKE):
            fake = schedule.x0_and_eps(z, network(z, t, own), t)[0]
    real = schedule.x0_and_eps(z, without + SCALE * (with_ - without), t)[0]
    length = (x0 - real).abs().flatten(1).mean(1)[:, None, None, None]
    found = method.direction(x0, z, t, own)
    torch.testing.assert_close(found, (fake - real) / length, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["pcm", "lcm", "regression"])
def test_slot_groups_change_nothing(name: str) -> None:
    """Two trajectories, two slots: one pass for both slots, or one each."""
    found = []
    for slot_batch in (1, 2):
        if name == "pcm":
            method: Any = make_pcm("sdxl", slot_batch)
        elif name == "lcm":
            method = make(lcm.Lcm, PICTURES, slot_batch=slot_batch)
        else:
            method = make(regression.Regression, slot_batch=slot_batch)
        losses = method.training_step(1, a_batch(2), seeded())
        found.append((losses, gradients(method, STUDENT)))
    (one, at_once), (other, apart) = found
    assert one == pytest.approx(other, rel=1e-4)
    for a, b in zip(at_once, apart, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_students_of_lcm_and_dmd2_are_sampled_with_new_noise() -> None:
    kinds = lcm.Lcm, dmd2.Dmd2, pcm.Pcm, regression.Regression
    assert [kind.stochastic for kind in kinds] == [True, True, False, False]


# ---- runs


def test_every_run_of_the_tables_is_one() -> None:
    """Settings fit, keys and folders are unique, the end is scored."""
    specs = runs.unique(paper.TABLES)
    assert {spec.method for spec in specs.values()} >= {"rapm", "midpoint", "pcm", "lcm"}
    folders = {spec.folder for spec in specs.values()}
    assert len(folders) == len(specs)
    for spec in specs.values():
        config = spec.config()
        assert config.training.iterations == spec.iterations
        for places in spec.score_at.values():
            assert list(places) == sorted({*places}) and places[-1] == spec.iterations
            assert all(k % config.samples.every == 0 for k in places)
        # An earlier point is then what a shorter run would have ended with.
        assert config.method == "midpoint" or not config.training.decay


def test_seconds_are_of_iterations_and_not_of_what_stood_between() -> None:
    taken = [1.0, 2.0, 1.0, 2.0, 90.0, 2.0, -99.0, 2.0]  # a pause, and a clock that began again
    records, now = [], 0.0
    for k, seconds in enumerate(taken):
        now += seconds
        records.append({"iteration": k, ("discriminator", "distance")[k % 2]: 0.0, "seconds": now})
    assert training_seconds(records) == pytest.approx(4 * 1.0 + 4 * 2.0)


def test_runs_with_equal_facts_share_their_trajectories(
    tiny_config: Config, tmp_path: Path
) -> None:
    def store_of(name: str, config: Config) -> Path:
        run = Run.open(tmp_path / name, config)
        store = runs.shared_store(run, tmp_path / "stores")
        assert TrajectoryStore.open(run.trajectories).manifest == store.manifest
        return run.trajectories.resolve()

    one = store_of("one", tiny_config)
    assert store_of("rate", changed(tiny_config, student={"learning_rate": 1.0})) == one
    assert store_of("delta", changed(tiny_config, rapm={"delta": 2})) != one
    assert store_of("one", tiny_config) == one


@pytest.mark.parametrize("killed_at", [4, 10])
def test_a_run_that_was_killed_while_it_was_scored_ends_as_one_that_was_not(
    tiny_config: Config, tmp_path: Path, killed_at: int
) -> None:
    """Points at 2, 4 ... 10, checkpoints at 4, 8 and 10."""
    config = changed(tiny_config, samples={"every": 2})
    spec = Spec("tiny", "regression", (), 0, 10, (2, 4, 6, 8, 10), (4, 10), steps=(1, 3))

    def go_on(name: str, killed_at: int) -> Run:
        run = Run.open(tmp_path / name, config)
        store, teacher = runs.shared_store(run, tmp_path / "stores"), teacher_of(config)
        method = runs.make_method(spec, config, teacher, store, tmp_path)

        def score(num_steps: int) -> dict[str, float]:
            if points.known and points.known[-1]["iteration"] == killed_at - 2:
                raise KeyboardInterrupt
            with method.student.averaged():
                weights = method.student.parameters.values()
                return {"sum": sum(float(p.detach().sum()) for p in weights)}

        points = Points(spec, run, {"test": score, "validation": lambda _: {"sum": 0.0}})
        assert runs.train_and_score(run, method, store, points)
        return run

    whole = go_on("whole", 0)
    with pytest.raises(KeyboardInterrupt):
        go_on("killed", killed_at)
    killed = go_on("killed", 0)
    found = [json.loads((run.folder / "points.json").read_text()) for run in (whole, killed)]
    for points in found:
        validation = [points.pop(k) for k, p in [*enumerate(points)][::-1] if p["sum"] == 0]
        assert [p["iteration"] for p in validation] == [10, 10, 4]
        assert [(p["iteration"], p["steps"]) for p in points] == [
            *((k, 3) for k in (2, 4, 6, 8)),
            (10, 1),
            (10, 3),
        ]
    assert [p["sum"] for p in found[0]] == [p["sum"] for p in found[1]]
    assert len({p["sum"] for p in found[0]}) == 5
    files = [
        (run.checkpoints / "step-00000010.safetensors").read_bytes() for run in (whole, killed)
    ]
    assert files[0] == files[1]
