"""The one walk: against diffusers, in closed form, and what rides on it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import EulerDiscreteScheduler, LCMScheduler
from torch import Tensor

from conftest import make_scheduler
from gaussian import Gaussian, Mixture
from rapm.rollout import rollout
from rapm.sampling import ddim, guided, noise, picture_noise, repeat, sample, seeded
from rapm.schedule import END, Grid, Schedule, trailing_timesteps

SHAPE = (2, 3, 4, 4)
PROMPTS = {"mean": torch.tensor([-1.0, 2.0]).reshape(2, 1, 1, 1)}  # rows cannot be mixed up unseen


def start(seed: int = 0) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


class Recording:
    """A denoiser that remembers at which timesteps it was asked."""

    def __init__(self, denoiser):
        self.denoiser, self.timesteps = denoiser, []

    def __call__(self, z, t, conditioning):
        assert len(z) == len(t) == len(conditioning["mean"])
        self.timesteps.append(t.tolist())
        return self.denoiser(z, t, conditioning)


@pytest.mark.parametrize("num_steps", [1, 2, 4, 5, 8, 10])
def test_sampling_equals_diffusers_ddim(ddim_schedule: Schedule, num_steps: int) -> None:
    teacher, scheduler = Mixture(ddim_schedule), make_scheduler()
    scheduler.set_timesteps(num_steps)
    z = start()
    for t in scheduler.timesteps:
        z = scheduler.step(teacher(z, int(t), PROMPTS), t, z).prev_sample
    found = sample(teacher, ddim_schedule, start(), PROMPTS, num_steps)
    torch.testing.assert_close(found, z, rtol=0, atol=1e-5)


class Asked(NamedTuple):
    """What a diffusers scheduler asks of a network that a :class:`Gaussian` stands for."""

    teacher: Gaussian
    scheduler: Any

    def sample(self, generators: Callable[[int], list[torch.Generator]]) -> Tensor:
        """Two pictures by diffusers' own loop; of step k by these generators."""
        scheduler, z = self.scheduler, start()
        if isinstance(scheduler, EulerDiscreteScheduler):  # in its own scale
            z = z * (scheduler.sigmas[0].square() + 1).sqrt()
        for k, t in enumerate(scheduler.timesteps):
            given = scheduler.scale_model_input(z, t)
            eps = self.teacher(given, torch.full((2,), int(t)), PROMPTS)
            z = scheduler.step(eps, t, z, generator=generators(k)).prev_sample
        return z.float()


@pytest.mark.parametrize("num_steps", [1, 4, 8])
def test_euler_equals_diffusers_euler(ddim_schedule: Schedule, num_steps: int) -> None:
    """DDIM up to the last step, which ends where no noise is left. Both start at the noise that
    training starts at; diffusers' pipelines take 0.2 % less."""
    scheduler = EulerDiscreteScheduler.from_config(
        make_scheduler().config, timestep_spacing="trailing"
    )
    scheduler.set_timesteps(num_steps)
    assert scheduler.timesteps.tolist() == trailing_timesteps(num_steps)[:-1]
    teacher = Gaussian(ddim_schedule)
    expected = Asked(teacher, scheduler).sample(lambda k: [])
    found = sample(teacher, ddim_schedule, start(), PROMPTS, num_steps, "euler")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    ddim_end = sample(teacher, ddim_schedule, start(), PROMPTS, num_steps)
    assert (found - ddim_end).abs().max() > 1e-3


def test_lcm_equals_diffusers_lcm(ddim_schedule: Schedule) -> None:
    """With the same noise; diffusers' boundary conditions leave 1e-6 of the position before."""
    scheduler = LCMScheduler.from_config(make_scheduler().config)
    scheduler.set_timesteps(timesteps=trailing_timesteps(4)[:-1])
    teacher = Gaussian(ddim_schedule)

    def generators(k: int) -> list[torch.Generator]:
        return [seeded(f"consistency sampling {seed} {k}") for seed in (5, 6)]

    expected = Asked(teacher, scheduler).sample(generators)
    found = sample(teacher, ddim_schedule, start(), PROMPTS, 4, "lcm", (5, 6))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    alone = {"mean": PROMPTS["mean"][1:]}
    one = sample(teacher, ddim_schedule, start()[1:], alone, 4, "lcm", (6,))
    torch.testing.assert_close(one, found[1:], rtol=0, atol=1e-6)


def test_a_walk_gives_each_position_prediction_and_end(ddim_schedule: Schedule) -> None:
    teacher = Recording(Gaussian(ddim_schedule))
    steps = list(ddim(teacher, ddim_schedule, start(), [999, 749, 499, END], PROMPTS))
    assert teacher.timesteps == [[999] * 2, [749] * 2, [499] * 2]
    assert torch.equal(steps[0].z, start())
    for (a, b), t, s in zip(
        pairwise([*steps, None]), (999, 749, 499), (749, 499, END), strict=True
    ):
        expected = teacher.denoiser(a.z, torch.full((2,), t), PROMPTS)
        assert torch.equal(a.prediction, expected)
        assert torch.equal(a.end, ddim_schedule.step(a.z, expected, t, s))
        assert b is None or torch.equal(b.z, a.end)


def test_rows_may_stand_at_different_places(ddim_schedule: Schedule) -> None:
    teacher, places = Gaussian(ddim_schedule), [torch.tensor([999, 499]), torch.tensor([749, END])]
    together = next(ddim(teacher, ddim_schedule, start(), places, PROMPTS)).end
    for row in range(2):
        own = slice(row, row + 1)
        prompts = {"mean": PROMPTS["mean"][own]}
        timesteps = [int(place[row]) for place in places]
        alone = next(ddim(teacher, ddim_schedule, start()[own], timesteps, prompts)).end
        torch.testing.assert_close(together[own], alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("delta", [1, 2, 5])
def test_a_rollout_is_a_walk_and_intermediate_positions_one_step(
    ddim_schedule: Schedule, delta: int
) -> None:
    """z^Delta is ONE step of length delta; no call of the teacher's is spent on it."""
    grid, teacher = Grid(slots=4, fine_steps=5, delta=delta), Recording(Mixture(ddim_schedule))
    absolute, intermediate = rollout(teacher, ddim_schedule, grid, start(), PROMPTS)
    assert absolute.shape == (2, 5, 3, 4, 4)
    assert intermediate.shape == (2, 4, 3, 4, 4)
    assert teacher.timesteps == [[t] * 2 for t in grid.fine[:-1]]
    z = start()
    for k, (t, s) in enumerate(pairwise(grid.fine)):
        n, within = 3 - k // 5, k % 5
        prediction = teacher.denoiser(z, torch.full((2,), t), PROMPTS)
        if within == 0:
            assert torch.equal(absolute[:, n + 1], z)
            one = ddim_schedule.step(z, prediction, t, grid.intermediate(n))
            assert torch.equal(intermediate[:, n], one)
        z = ddim_schedule.step(z, prediction, t, s)
    assert torch.equal(absolute[:, 0], z)


def test_the_clean_picture_of_a_step_is_read_off_its_ends(ddim_schedule: Schedule) -> None:
    teacher, z = Mixture(ddim_schedule), start()
    for t, s in ((999, 989), (999, 749), (249, 239), (249, END)):
        prediction = teacher(z, torch.full((2,), t), PROMPTS)
        x0, _ = ddim_schedule.x0_and_eps(z, prediction, t)
        end = ddim_schedule.step(z, prediction, t, s)
        found = ddim_schedule.x0_of_step(z, end, t, s)
        torch.testing.assert_close(found, x0, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", [Gaussian, Mixture])
def test_a_rollout_converges_to_the_closed_form_solution(ddim_schedule: Schedule, kind) -> None:
    teacher, z = kind(ddim_schedule), start()
    errors = []
    for fine_steps in (25, 50, 100):
        absolute, _ = rollout(teacher, ddim_schedule, Grid(4, fine_steps), z, PROMPTS)
        solution = teacher.solve(z, 999, END, PROMPTS)
        errors.append((absolute[:, 0] - solution).square().mean().sqrt().item())
    assert all(1.7 < a / b < 2.4 for a, b in pairwise(errors)), errors


def test_a_student_that_knows_the_ode_is_where_the_teacher_is(ddim_schedule: Schedule) -> None:
    """If stored positions lie on the ODE and slots are short, all three positions agree."""
    student, grid, n, z = Gaussian(ddim_schedule), Grid(slots=100, fine_steps=2), 50, start()
    t, mid, s = grid.coarse(n + 1), grid.intermediate(n), grid.coarse(n)
    z_tilde, z_delta = (student.solve(z, t, u, PROMPTS).float() for u in (s, mid))
    z_phi = next(ddim(student, ddim_schedule, z, [t, s], PROMPTS)).end
    z_hat = next(ddim(student, ddim_schedule, z_delta, [mid, s], PROMPTS)).end
    moved = (z_tilde - z).abs().mean()
    # DDIM's error is of second order in the slot's length, and half a slot has a quarter of it.
    assert (z_phi - z_tilde).abs().mean() < 0.004 * moved
    assert (z_hat - z_tilde).abs().mean() < 0.001 * moved


def test_guidance_extrapolates_and_scale_one_asks_once(ddim_schedule: Schedule) -> None:
    teacher = Gaussian(ddim_schedule)
    unconditional = {"mean": torch.zeros(1, 1, 1, 1)}
    z, t = start(), torch.full((2,), 499)
    without = teacher(z, t, {"mean": torch.zeros(2, 1, 1, 1)})
    with_ = teacher(z, t, PROMPTS)
    found = guided(teacher, unconditional, 3.0)(z, t, PROMPTS)
    torch.testing.assert_close(found, without + 3 * (with_ - without), rtol=0, atol=1e-5)
    assert guided(teacher, unconditional, 1.0) is teacher


def test_prompts_are_repeated_batch_after_batch() -> None:
    prompts = repeat({"a": torch.tensor([[1], [2]]), "b": torch.tensor([3, 4])}, 2)
    assert prompts["a"].tolist() == [[1], [2], [1], [2]]
    assert prompts["b"].tolist() == [3, 4, 3, 4]


def test_noise_is_a_function_of_seed_and_index() -> None:
    assert torch.equal(noise(1, 2, (4, 8, 8)), noise(1, 2, (4, 8, 8)))
    drawn = [noise(s, k, (4, 8, 8)) for s in range(3) for k in (-1, 0, 1)]
    assert not any(torch.equal(a, b) for a, b in pairwise(drawn))
    assert torch.equal(picture_noise(5, (4, 8, 8)), noise(5, -1, (4, 8, 8)))
    assert seeded("a").initial_seed() == seeded("a").initial_seed() != seeded("b").initial_seed()


def test_the_walk_of_few_steps_visits_the_trailing_timesteps(ddim_schedule: Schedule) -> None:
    teacher = Recording(Gaussian(ddim_schedule))
    sample(teacher, ddim_schedule, start(), PROMPTS, 4)
    assert teacher.timesteps == [[t, t] for t in (999, 749, 499, 249)]
    assert trailing_timesteps(4) == [999, 749, 499, 249, END]
