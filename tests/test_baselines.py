"""The neighbours as benchmarks/baselines restates them, by hand on a small network."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from baselines import Pictures, World, dmd2, lcm, one_in_each_slot, pcm, regression
from conftest import make_scheduler, make_unet
from paper import Spec, View, memory_of, seconds_of
from test_network import inputs, shake

from rapm import config as configuration
from rapm.estimate import bytes_of
from rapm.models.resolve import teacher_of
from rapm.models.stable_diffusion import FAMILY, UNET_LORA_TARGETS
from rapm.models.teacher import load_backbone
from rapm.network import STUDENT, TEACHER, Backbone
from rapm.objective import pseudo_huber
from rapm.schedule import Grid, Schedule
from rapm.train import draw_batch
from rapm.trajectories import Trajectory, rollout
from rapm.turns import Learner

GRID = Grid(slots=2, fine_steps=3)
SCALE = 5.0


def networks(form: pcm.Form) -> tuple[Backbone, Backbone]:
    """A student whose LoRA is shaken, and a teacher."""
    student = Backbone(make_unet(), FAMILY.call, UNET_LORA_TARGETS)
    student.add_role(STUDENT, 4, UNET_LORA_TARGETS, 0)
    shake(student.parameters(STUDENT), 1)
    network = make_unet()
    return student, Backbone(network, FAMILY.call, (), pcm.taps(network, form))


def make_pcm(form: pcm.Form) -> pcm.Pcm:
    student, teacher = networks(form)
    z, t, conditioning = inputs(1)
    with torch.no_grad(), teacher.role(TEACHER):
        heads = pcm.Heads([x.shape[1] for x in teacher.features(z, t, conditioning)], form)
    scheduler = make_scheduler()
    return pcm.Pcm(
        student,
        teacher,
        Schedule.of(scheduler.alphas_cumprod, scheduler.final_alpha_cumprod, "epsilon"),
        GRID,
        Learner(student, STUDENT, None, 1e-4, (0.9, 0.999), 0.0),
        Learner(teacher, "discriminator", heads, 1e-4, (0.0, 0.999), 0.0),
        {name: torch.zeros_like(value[:1]) for name, value in conditioning.items()},
        SCALE,
    )


def test_heads_of_pcm_have_the_published_size() -> None:
    with torch.device("meta"):
        of_sd15 = pcm.Heads([320, 640, 1280, 1280, 1280, 1280, 1280, 640, 320], pcm.FORMS["sd15"])
        of_sdxl = pcm.Heads([320, 640, 1280, 1280], pcm.FORMS["sdxl"])
    assert sum(p.numel() for p in of_sd15.parameters()) == 663_784_996
    assert sum(p.numel() for p in of_sdxl.parameters()) == 7_602_244


def test_pcm_asks_for_the_place_where_the_teachers_step_leads() -> None:
    """By diffusers' own formulas, from a start inside a slot and from the last fine step before its
    edge."""
    method = make_pcm(pcm.FORMS["sdxl"])
    x0, _, conditioning = inputs(1)
    x0, conditioning = x0[:1], {name: value[:1] for name, value in conditioning.items()}
    scheduler, ours, other = make_scheduler(), method.student, method.teacher

    def step(z: torch.Tensor, eps: torch.Tensor, t: int, s: int) -> torch.Tensor:
        end = scheduler.final_alpha_cumprod
        a, b = (scheduler.alphas_cumprod[k] if k >= 0 else end for k in (t, s))
        return b.sqrt() * (z - (1 - a).sqrt() * eps) / a.sqrt() + (1 - b).sqrt() * eps

    for start, t, after, edge in ((1, 832, 666, 499), (5, 166, -1, -1)):
        assert GRID.fine[start : start + 2] == [t, after]
        found = method.turn(
            x0, [start], conditioning, torch.Generator().manual_seed(3), critic=False, share=1.0
        )
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(3))
        z = scheduler.add_noise(x0, noise, torch.tensor([t]))
        with torch.no_grad():
            with other.role(TEACHER):
                empty = {name: torch.zeros_like(value) for name, value in conditioning.items()}
                without, with_ = (other(z, torch.tensor([t]), c) for c in (empty, conditioning))
                moved = step(z, without + SCALE * (with_ - without), t, after)
            with ours.role(STUDENT):
                fake = step(z, ours(z, torch.tensor([t]), conditioning), t, edge)
                target = (
                    moved
                    if after == edge
                    else step(moved, ours(moved, torch.tensor([after]), conditioning), after, edge)
                )
        torch.testing.assert_close(
            found["distance"], float(pseudo_huber(fake, target)), rtol=1e-4, atol=1e-6
        )


def test_in_pcm_only_whose_turn_it_is_gets_a_gradient() -> None:
    method = make_pcm(pcm.FORMS["sd15"])
    x0, _, conditioning = inputs(2)
    for critic, own, other in (
        (True, method.critic, method.learner),
        (False, method.learner, method.critic),
    ):
        method.turn(x0, [0, 4], conditioning, torch.Generator(), critic=critic, share=1.0)
        # Between the hinges real and fake pull a head's last bias in opposite directions, by as
        # much.
        assert all(
            p.grad is not None and p.grad.any()
            for name, p in own.parameters.items()
            if not name.endswith("out.bias")
        )
        assert all(p.grad is None for p in other.parameters.values())
        own.optimizer.zero_grad()


def make_world(scale: float = SCALE) -> World:
    student, _ = networks(pcm.FORMS["sdxl"])
    x0, _, conditioning = inputs(3)
    scheduler = make_scheduler()
    config = configuration.load(teacher="toy", settings=[f"trajectories.guidance_scale={scale}"])
    unconditional = {name: torch.zeros_like(value[:1]) for name, value in conditioning.items()}
    generator = torch.Generator().manual_seed(8)
    rows = [
        Trajectory(
            torch.randn(3, 4, 8, 8, generator=generator),
            torch.randn(2, 4, 8, 8, generator=generator),
            {name: value[k] for name, value in conditioning.items()}, "", 0, k,
        )
        for k in range(3)
    ]  # fmt: skip
    schedule = Schedule.of(scheduler.alphas_cumprod, scheduler.final_alpha_cumprod, "epsilon")
    store: Any = rows
    return World(config, student, schedule, GRID, unconditional, Pictures(x0, conditioning), store)


def learner(world: World) -> Learner:
    return Learner(world.student, STUDENT, None, 1e-4, (0.9, 0.999), 0.0)


def test_lcm_starts_as_the_identity() -> None:
    skip, out = lcm.boundary(torch.tensor([0, -1, 999]), torch.zeros(3, 4, 8, 8))
    assert skip[:2].flatten().tolist() == [1, 1] and out[:2].flatten().tolist() == [0, 0]
    assert float(skip[2]) == pytest.approx(0, abs=1e-8) and float(out[2]) == pytest.approx(
        1, abs=1e-6
    )


def test_lcm_compares_predictions_of_the_clean_latent_along_the_teachers_step() -> None:
    world = make_world()
    found, _ = lcm.Lcm(world, learner(world)).iterate(0, torch.Generator().manual_seed(4))
    generator = torch.Generator().manual_seed(4)
    x0, conditioning = world.pictures.draw(generator, 2)
    starts = one_in_each_slot(GRID, generator)
    noise = torch.randn(x0.shape, generator=generator)
    expected = []
    for k, start in enumerate(starts):
        t, s, z = GRID.fine[start], GRID.fine[start + 1], x0[k : k + 1]
        own = {name: value[k : k + 1] for name, value in conditioning.items()}
        z = make_scheduler().add_noise(z, noise[k : k + 1], torch.tensor([t]))
        with torch.no_grad():
            with world.student.role(TEACHER):
                without, with_ = (
                    world.student(z, torch.tensor([t]), c) for c in (world.unconditional, own)
                )
            moved = world.schedule.step(z, without + SCALE * (with_ - without), t, s)
            with world.student.role(STUDENT):
                before = world.schedule.x0_and_eps(z, world.student(z, torch.tensor([t]), own), t)[
                    0
                ]
                after = world.schedule.x0_and_eps(
                    moved, world.student(moved, torch.tensor([max(s, 0)]), own), max(s, 0)
                )[0]
        expected.append(pseudo_huber(before, moved if s < 0 else after))
    assert found["distance"] == pytest.approx(float(torch.stack(expected).mean()), rel=1e-3)


def test_regression_goes_from_stored_to_stored_positions() -> None:
    world = make_world()
    found, _ = regression.Regression(world, learner(world)).iterate(
        0, torch.Generator().manual_seed(4)
    )
    batch, expected = (
        draw_batch(world.store, 1, world.config.training.seed, 0, torch.device("cpu")),
        0.0,
    )
    with torch.no_grad(), world.student.role(STUDENT):
        for t, s, n in ((999, 499, 1), (499, -1, 0)):
            z = batch.coarse[:, n + 1]
            moved = world.schedule.step(
                z, world.student(z, torch.tensor([t]), batch.conditioning), t, s
            )
            expected += float(pseudo_huber(moved, batch.coarse[:, n])) / 2
    assert found["distance"] == pytest.approx(expected, rel=1e-4)


def test_distribution_matching_moves_nothing_where_both_scores_agree() -> None:
    """A fake-score LoRA that is still the identity against a teacher without guidance; and only
    whose turn it is learns."""
    for scale, moves in ((1.0, False), (SCALE, True)):
        world = make_world(scale)
        critic = Backbone(make_unet(), FAMILY.call, UNET_LORA_TARGETS)
        critic.add_role(dmd2.FAKE, 4, UNET_LORA_TARGETS, 0)
        student, fake = learner(world), Learner(critic, dmd2.FAKE, None, 1e-4, (0.9, 0.999), 0.0)
        method = dmd2.Dmd2(world, critic, student, fake)
        losses, whose = method.iterate(0, torch.Generator().manual_seed(4))
        assert whose == [student] and (losses["matching"] > 0) == moves
        assert (
            any(p.grad is not None and p.grad.any() for p in student.parameters.values()) == moves
        )
        assert all(p.grad is None for p in fake.parameters.values())
        student.optimizer.zero_grad()
        _, whose = method.iterate(1, torch.Generator().manual_seed(4))
        assert whose == [fake] and any(
            p.grad.any() for p in fake.parameters.values() if p.grad is not None
        )
        assert all(p.grad is None for p in student.parameters.values())


def test_distribution_matching_moves_towards_where_the_teacher_sees_it() -> None:
    """A step against the loss's gradient takes the clean latent from what the fake score predicts
    to what the teacher does."""
    world = make_world()
    critic = Backbone(make_unet(), FAMILY.call, UNET_LORA_TARGETS)
    critic.add_role(dmd2.FAKE, 4, UNET_LORA_TARGETS, 0)
    shake(critic.parameters(dmd2.FAKE), 2)
    method = dmd2.Dmd2(
        world, critic, learner(world), Learner(critic, dmd2.FAKE, None, 1e-4, (0.9, 0.999), 0.0)
    )
    x0, t, conditioning = inputs(2)
    z = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        with critic.role(TEACHER):
            empty = {name: torch.zeros_like(value) for name, value in conditioning.items()}
            without, with_ = (critic(z, t, c) for c in (empty, conditioning))
        with critic.role(dmd2.FAKE):
            fake = world.schedule.x0_and_eps(z, critic(z, t, conditioning), t)[0]
    real = world.schedule.x0_and_eps(z, without + SCALE * (with_ - without), t)[0]
    length = (x0 - real).abs().flatten(1).mean(1)[:, None, None, None]
    torch.testing.assert_close(
        method._direction(x0, z, t, conditioning), (fake - real) / length, rtol=1e-3, atol=1e-5
    )


def test_seconds_are_of_turns_and_not_of_what_stood_between() -> None:
    taken = [1.0, 2.0, 1.0, 2.0, 90.0, 2.0, -99.0, 2.0]  # a pause, and a clock that began again
    records, now = [], 0.0
    for k, seconds in enumerate(taken):
        now += seconds
        records.append({"iteration": k, ("critic", "distance")[k % 2]: 0.0, "seconds": now})
    assert seconds_of(records, 1) == pytest.approx(4 * 1.0 + 4 * 2.0)
    ends = [
        8.0,
        8.0,
        8.0,
        8.0,
        98.0,
        98.0,
        98.0,
        98.0,
        106.0,
        106.0,
        106.0,
        106.0,
        110.0,
        110.0,
    ]  # four walk side by side
    assert seconds_of(
        [{"iteration": k, "seconds": end} for k, end in enumerate(ends)], 4
    ) == pytest.approx(14 * 2.0)


def test_memory_of_neighbours_is_counted_as_the_plan_counts() -> None:
    """Regression takes the student's pass that RAPM takes on distances alone; PCM has a second
    network of 20 MiB and heads."""
    alone = ["trajectories.count=64", "critics.adversarial_weight=0"]
    plan, regressed, consistent, phased = (
        memory_of(Spec("", method, method, alone if method == "rapm" else []))
        for method in ("rapm", "regression", "lcm", "pcm")
    )
    assert regressed == pytest.approx(plan, rel=0.02)
    assert consistent == pytest.approx(regressed, rel=0.02)
    config = configuration.load(settings=["device=cpu"])
    network = load_backbone(teacher_of(config), config, "cpu").network
    assert 1 < (phased - consistent) / bytes_of(iter(network.parameters())) < 1.5


def test_fewer_slots_are_seen_in_a_rollout_of_more() -> None:
    network, schedule = Backbone(make_unet(), FAMILY.call, ()), make_world().schedule
    z, _, conditioning = inputs(1)
    fine = Grid(slots=8, fine_steps=2)
    with network.role(TEACHER):
        coarse, nudged = rollout(network, schedule, fine, z, conditioning)
        row: Any = Trajectory(coarse[0], nudged[0], {}, "", 0, 0)
        stored: Any = SimpleNamespace(manifest={"facts": {"grid": [8, 2, 1]}}, unconditional={})
        for slots in (4, 2, 1):
            coarse, nudged = rollout(
                network, schedule, Grid(slots=slots, fine_steps=16 // slots), z, conditioning
            )
            view = View(stored, 1, slots)
            view.store = [row]  # type: ignore[assignment]
            assert torch.equal(view[0].coarse, coarse[0]) and torch.equal(view[0].nudged, nudged[0])
