"""Timesteps and steps against diffusers' own scheduler, and the order of convergence against
closed-form teachers."""

from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from gaussian import Gaussian, Mixture
from rapm.schedule import END, Grid, Schedule, trailing_timesteps

DIVISORS = [1, 2, 4, 5, 8, 10, 20, 25, 40, 50, 100, 125, 200, 250, 500, 1000]
PREDICTION_TYPES = ["epsilon", "v_prediction", "sample"]
MEAN = {"mean": torch.linspace(-1, 1, 64, dtype=torch.float64).reshape(64, 1, 1, 1)}


def scheduler(prediction_type="epsilon", set_alpha_to_one=False):
    """Stable Diffusion's, at its trailing spacing."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        timestep_spacing="trailing",
        prediction_type=prediction_type,
        set_alpha_to_one=set_alpha_to_one,
    )


def schedule_of(ddim):
    return Schedule.of(ddim.alphas_cumprod, ddim.final_alpha_cumprod, ddim.config.prediction_type)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def predict(schedule, z, t):
    """A Gaussian teacher's answer in the schedule's prediction type."""
    eps = Gaussian(schedule)(z, t, MEAN)
    a, s = schedule.alpha(t, z), schedule.sigma(t, z)
    x0 = (z - s * eps) / a
    return {"epsilon": eps, "v_prediction": a * eps - s * x0, "sample": x0}[
        schedule.prediction_type
    ]


# ---- timesteps


@pytest.mark.parametrize("num_steps", DIVISORS)
def test_trailing_timesteps_are_those_of_diffusers(num_steps):
    ddim = scheduler()
    ddim.set_timesteps(num_steps)
    assert trailing_timesteps(num_steps) == [*ddim.timesteps.tolist(), END]


def test_trailing_timesteps_by_value():
    assert trailing_timesteps(4) == [999, 749, 499, 249, -1]
    assert trailing_timesteps(3) == [999, 666, 332, -1]
    assert trailing_timesteps(1000) == list(range(999, -2, -1))


@pytest.mark.parametrize("num_steps", range(1, 1001, 27))
def test_trailing_timesteps_fall_from_the_top_to_the_end_in_even_steps(num_steps):
    timesteps = trailing_timesteps(num_steps)
    assert len(timesteps) == num_steps + 1
    assert timesteps[0] == 999
    assert timesteps[-1] == END
    assert all(abs(t - s - 1000 / num_steps) < 1 for t, s in pairwise(timesteps))


@pytest.mark.parametrize("num_steps", [0, -1, 1001])
def test_impossible_numbers_of_steps_are_refused(num_steps):
    with pytest.raises(ValueError, match="from 1 to 1000"):
        trailing_timesteps(num_steps)


def test_grid_by_value():
    grid = Grid(slots=4, fine_steps=25, delta=1)
    assert grid.fine == [*range(999, 0, -10), -1]
    assert [grid.coarse(n) for n in range(5)] == [-1, 249, 499, 749, 999]
    assert [grid.intermediate(n) for n in range(4)] == [239, 489, 739, 989]
    assert [Grid(4, 25, delta=10).intermediate(n) for n in range(4)] == [149, 399, 649, 899]
    assert [Grid(4, 25, delta=25).intermediate(n) for n in range(4)] == [-1, 249, 499, 749]


@pytest.mark.parametrize("slots", range(1, 9))
@pytest.mark.parametrize("fine_steps", [1, 7, 25, 125])
def test_coarse_timesteps_are_the_students_trailing_timesteps(slots, fine_steps):
    grid = Grid(slots, fine_steps)
    assert [grid.coarse(n) for n in range(slots, -1, -1)] == trailing_timesteps(slots)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"slots": 0}, "at least 1, not N = 0"),
        ({"fine_steps": 0}, "M = 0"),
        ({"slots": 4, "fine_steps": 251}, "lower M to 250"),
        ({"slots": 1001, "fine_steps": 1}, "do not fit"),
        ({"delta": 0}, "from 1 to M = 25"),
        ({"delta": 26}, "from 1 to M = 25"),
    ],
)
def test_impossible_grids_are_refused(numbers, message):
    with pytest.raises(ValueError, match=message):
        Grid(**numbers)


def test_the_largest_grid_visits_every_timestep():
    assert Grid(slots=4, fine_steps=250).fine == list(range(999, -2, -1))


# ---- steps


@pytest.mark.parametrize("set_alpha_to_one", [False, True])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("num_steps", [4, 100])
def test_sampling_is_that_of_diffusers(num_steps, prediction_type, set_alpha_to_one):
    ddim = scheduler(prediction_type, set_alpha_to_one)
    ddim.set_timesteps(num_steps)
    schedule = schedule_of(ddim)
    ours = theirs = noise(64, 1, 4, 4)
    for t, s in pairwise(trailing_timesteps(num_steps)):
        ours = schedule.step(ours, predict(schedule, ours, t), t, s)
        theirs = ddim.step(predict(schedule, theirs, t), t, theirs).prev_sample
        assert (ours - theirs).abs().max() < 1e-5
    assert ours.dtype == torch.float32


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_timesteps_of_a_batch_are_those_of_its_rows(prediction_type):
    schedule = schedule_of(scheduler(prediction_type))
    z, prediction = noise(3, 4, 2, 2), noise(3, 4, 2, 2, seed=1)
    t, s = [999, 499, 249], [749, 489, END]
    together = schedule.step(z, prediction, torch.tensor(t), torch.tensor(s))
    for i in range(3):
        assert torch.equal(
            together[i : i + 1], schedule.step(z[i : i + 1], prediction[i : i + 1], t[i], s[i])
        )


def test_half_precision_is_stepped_in_float32():
    schedule = schedule_of(scheduler())
    z, prediction = noise(2, 4, 2, 2).bfloat16(), noise(2, 4, 2, 2, seed=1).bfloat16()
    stepped = schedule.step(z, prediction, 999, 749)
    assert stepped.dtype == torch.float32
    assert torch.equal(stepped, schedule.step(z.float(), prediction.float(), 999, 749))


@pytest.mark.parametrize("set_alpha_to_one", [False, True])
def test_the_end_is_the_schedulers_choice(set_alpha_to_one):
    schedule = schedule_of(scheduler(set_alpha_to_one=set_alpha_to_one))
    z = noise(1, 1, 1, 1)
    assert schedule.num_train_timesteps == 1000
    assert schedule.alpha(END, z) == (1 if set_alpha_to_one else schedule.alpha(0, z))
    assert schedule.alpha(0, z).item() ** 2 == pytest.approx(1 - 0.00085, abs=1e-7)
    x0, eps = schedule.x0_and_eps(z, torch.ones_like(z), 9)
    expected = x0 if set_alpha_to_one else 0.99915**0.5 * x0 + 0.00085**0.5 * eps
    assert schedule.step(z, torch.ones_like(z), 9, END).item() == pytest.approx(
        expected.item(), rel=1e-6
    )


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("t", [0, 249, 999])
def test_a_position_splits_into_what_it_was_made_of(prediction_type, t):
    schedule = schedule_of(scheduler(prediction_type))
    x0, eps = noise(2, 4, 8, 8).double(), noise(2, 4, 8, 8, seed=1).double()
    a, s = schedule.alphas[t + 1], schedule.sigmas[t + 1]
    z = a * x0 + s * eps
    prediction = {"epsilon": eps, "v_prediction": a * eps - s * x0, "sample": x0}[prediction_type]
    split_x0, split_eps = schedule.x0_and_eps(z, prediction, t)
    torch.testing.assert_close(split_x0, x0, atol=1e-5, rtol=0)
    torch.testing.assert_close(split_eps, eps, atol=1e-5, rtol=0)


# ---- adding noise


@pytest.mark.parametrize("set_alpha_to_one", [False, True])
@pytest.mark.parametrize(("t", "s"), [(END, 0), (END, 249), (249, 250), (249, 499), (749, 999)])
def test_adding_noise_follows_the_forward_process(t, s, set_alpha_to_one):
    """It is linear in position and noise; z_t = alpha_t x0 + sigma_t eps must become alpha_s
    x0 + sigma_s eps'."""
    schedule = schedule_of(scheduler(set_alpha_to_one=set_alpha_to_one))
    one, zero = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    kept = schedule.add_noise(one, t, s, zero).item()
    added = schedule.add_noise(zero, t, s, one).item()
    alpha_bar_t, alpha_bar_s = (schedule.alphas[k + 1].item() ** 2 for k in (t, s))
    assert kept * alpha_bar_t**0.5 == pytest.approx(alpha_bar_s**0.5, rel=1e-6)  # mean
    assert kept**2 * (1 - alpha_bar_t) + added**2 == pytest.approx(
        1 - alpha_bar_s, abs=1e-6
    )  # variance


@pytest.mark.parametrize("t", [END, 0, 249, 999])
def test_adding_noise_to_the_same_timestep_changes_nothing(t):
    schedule = schedule_of(scheduler())
    z = noise(2, 4, 8, 8)
    assert torch.equal(schedule.add_noise(z, t, t, noise(2, 4, 8, 8, seed=1)), z)


def test_adding_noise_takes_each_row_to_its_own_timestep():
    schedule = schedule_of(scheduler())
    z, eps = noise(2, 4, 2, 2), noise(2, 4, 2, 2, seed=1)
    together = schedule.add_noise(z, torch.tensor([END, 499]), torch.tensor([100, 700]), eps)
    assert torch.equal(together[:1], schedule.add_noise(z[:1], END, 100, eps[:1]))
    assert torch.equal(together[1:], schedule.add_noise(z[1:], 499, 700, eps[1:]))


# ---- convergence


@pytest.mark.parametrize("teacher_type", [Gaussian, Mixture])
def test_ddim_converges_to_the_closed_form_solution_at_first_order(teacher_type):
    schedule = schedule_of(scheduler())
    teacher = teacher_type(schedule)
    start = noise(64, 1, 4, 4)
    solution = teacher.solve(start, 999, END, MEAN)

    def error(num_steps):
        z = start
        for t, s in pairwise(trailing_timesteps(num_steps)):
            z = schedule.step(z, teacher(z, t, MEAN), t, s)
        return (z - solution).square().mean().sqrt().item()

    errors = [error(num_steps) for num_steps in (25, 50, 100, 200, 400)]
    assert errors[0] < 0.06  # of positions that are about 1 in size
    assert all(1.7 < coarse / fine < 2.4 for coarse, fine in pairwise(errors)), errors


# ---- rectified flow


def flow_scheduler(shift):
    return FlowMatchEulerDiscreteScheduler(shift=shift)


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
@pytest.mark.parametrize("num_steps", [1, 4, 8, 50])
def test_a_flow_is_diffusers_flow_match_euler(shift, num_steps):
    """Its sigmas, the time it feeds, and its steps, where sigmas fall evenly from 1 to 1 / N."""
    schedule, euler = Schedule.flow(shift), flow_scheduler(shift)
    euler.set_timesteps(sigmas=torch.linspace(1, 1 / num_steps, num_steps).tolist())
    timesteps = trailing_timesteps(num_steps)
    rows = torch.tensor(timesteps) + 1
    assert schedule.sigmas[rows].tolist() == pytest.approx(euler.sigmas.tolist(), abs=1e-6)
    assert schedule.times[rows[:-1]].tolist() == pytest.approx(euler.timesteps.tolist(), abs=1e-3)
    z, theirs = noise(2, 4, 8, 8), noise(2, 4, 8, 8)
    for k, (t, s) in enumerate(pairwise(timesteps)):
        velocity = noise(2, 4, 8, 8, seed=1 + k)
        theirs = euler.step(velocity, euler.timesteps[k], theirs, return_dict=False)[0]
        z = schedule.step(z, velocity, t, s)
        torch.testing.assert_close(z, theirs, atol=1e-5, rtol=0)


def test_a_flows_grid_by_value():
    """SD3's shift of 3 in four steps; the end is clean."""
    sigmas = Schedule.flow(3.0).sigmas[torch.tensor([999, 749, 499, 249, END]) + 1]
    assert sigmas.tolist() == pytest.approx([1, 0.9, 0.75, 0.5, 0])


@pytest.mark.parametrize("t", [0, 249, 999])
def test_a_flows_position_splits_into_what_it_was_made_of(t):
    schedule = Schedule.flow(3.0)
    x0, eps = noise(2, 4, 8, 8), noise(2, 4, 8, 8, seed=1)
    z = schedule.alpha(t, x0) * x0 + schedule.sigma(t, x0) * eps
    split_x0, split_eps = schedule.x0_and_eps(z, eps - x0, t)
    torch.testing.assert_close(split_x0, x0, atol=1e-5, rtol=0)
    torch.testing.assert_close(split_eps, eps, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("t", "s"), [(END, 0), (END, 249), (249, 250), (249, 499), (749, 998)])
def test_adding_noise_to_a_flow_follows_its_forward_process(t, s):
    schedule = Schedule.flow(3.0)
    one, zero = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    kept = schedule.add_noise(one, t, s, zero).item()
    added = schedule.add_noise(zero, t, s, one).item()
    (at, st), (as_, ss) = ((schedule.alpha(k, one), schedule.sigma(k, one)) for k in (t, s))
    assert kept * at.item() == pytest.approx(as_.item(), rel=1e-6)
    assert (kept * st.item()) ** 2 + added**2 == pytest.approx(ss.item() ** 2, abs=1e-6)


def test_a_flows_steps_converge_to_the_closed_form():
    """Of a Gaussian's velocity; twice the steps, half the error."""
    schedule = Schedule.flow(3.0)
    teacher, z = Gaussian(schedule), noise(64, 1, 1, 1).double()
    expected = teacher.solve(z, 998, END, MEAN)
    errors = []
    for every in (10, 5, 2):
        stand, timesteps = z.float(), [*range(998, -1, -every), END]
        for t, s in pairwise(timesteps):
            eps = teacher(stand, t, MEAN)
            x0 = (stand - schedule.sigma(t, stand) * eps) / schedule.alpha(t, stand)
            stand = schedule.step(stand, eps - x0, t, s)
        errors.append(float((stand - expected).abs().max()))
    assert errors[1] < 0.6 * errors[0] and errors[2] < 0.5 * errors[1] and errors[2] < 0.02
