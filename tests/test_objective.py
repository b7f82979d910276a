"""Positions, distances and adversarial losses, by hand-computed numbers and against a flat loop
over slots."""

from itertools import pairwise
from math import exp, log, log1p

import pytest
import torch
from diffusers import DDIMScheduler
from gaussian import Gaussian

from rapm.objective import (
    Renoising,
    as_long_as,
    follow,
    from_nudged,
    hinge_critic,
    hinge_student,
    margin,
    positions,
    pseudo_huber,
    relativistic,
    relay,
    repeat,
    shown_to_critic,
    slot_groups,
    squared,
    student_step,
)
from rapm.schedule import END, Grid, Schedule
from rapm.trajectories import rollout

B, N = 2, 4
SHAPE = (B, 3, 4, 4)
GRID = Grid(slots=N, fine_steps=5, delta=2)
DDIM = DDIMScheduler(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", set_alpha_to_one=False
)
SCHEDULE = Schedule.of(DDIM.alphas_cumprod, DDIM.final_alpha_cumprod, "epsilon")
STUDENT = Gaussian(SCHEDULE)
PROMPTS = {
    "mean": torch.tensor([-1.0, 2.0]).reshape(B, 1, 1, 1)
}  # so different that mixed-up rows cannot go unnoticed


class Recording:
    """A denoiser that remembers at which timesteps it was called, a row at a time."""

    def __init__(self, denoiser):
        self.denoiser, self.timesteps = denoiser, []

    def __call__(self, z, t, conditioning):
        assert z.shape[1:] == SHAPE[1:]
        assert len(z) == len(t) == len(conditioning["mean"])
        self.timesteps.append(t.tolist())
        return self.denoiser(z, t, conditioning)


def stored(seed=0):
    """Positions as a store would give them: coarse [B, N + 1, C, H, W] and nudged [B, N, C, H, W];
    here just noise."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, N + 1, *SHAPE[1:], generator=generator), torch.randn(
        B, N, *SHAPE[1:], generator=generator
    )


def one_step(z, t, s, denoiser=STUDENT):
    """The plain form of what is tested: the B prompts, one slot."""
    return SCHEDULE.step(z, denoiser(z, torch.full((B,), t), PROMPTS), t, s)


# ---- positions


@pytest.mark.parametrize(
    ("num_slots", "slot_batch", "groups"),
    [
        (4, 1, [[3], [2], [1], [0]]),
        (4, 2, [[3, 2], [1, 0]]),
        (4, 3, [[3, 2, 1], [0]]),
        (4, 4, [[3, 2, 1, 0]]),
        (4, 9, [[3, 2, 1, 0]]),
        (1, 1, [[0]]),
    ],
)
def test_slot_groups(num_slots, slot_batch, groups):
    assert list(slot_groups(num_slots, slot_batch)) == groups


def test_prompts_are_repeated_batch_after_batch():
    assert repeat({"a": torch.tensor([[1], [2]]), "b": torch.tensor([3, 4])}, 2)["a"].tolist() == [
        [1],
        [2],
        [1],
        [2],
    ]
    assert repeat({"a": torch.tensor([[1], [2]]), "b": torch.tensor([3, 4])}, 2)["b"].tolist() == [
        3,
        4,
        3,
        4,
    ]


@pytest.mark.parametrize("slot_batch", [1, 2, 3, N])
def test_groups_of_any_size_find_the_positions_of_a_flat_loop(slot_batch):
    coarse, nudged = stored()
    starts, relatives, absolutes, steps = (
        [],
        [],
        [],
        [],
    )  # one slot after the other, as in METHOD: the reference
    z = coarse[:, N]
    for n in range(N - 1, -1, -1):
        starts.append(z)
        relatives.append(one_step(nudged[:, n], GRID.nudged(n), GRID.coarse(n)))
        absolutes.append(coarse[:, n])
        z = one_step(z, GRID.coarse(n + 1), GRID.coarse(n))
        steps.append(z)

    found, found_steps = [], []
    z = coarse[:, N]
    for slots in slot_groups(N, slot_batch):
        found.append(positions(STUDENT, SCHEDULE, GRID, slots, z, coarse, nudged, PROMPTS))
        stepped = student_step(
            STUDENT, SCHEDULE, GRID, slots, found[-1].start, found[-1].conditioning
        )
        found_steps.append(stepped)
        z = stepped[-B:]

    assert [n for group in found for n in group.slots] == [3, 2, 1, 0]
    close = {"atol": 1e-6, "rtol": 0}
    torch.testing.assert_close(
        torch.cat([group.start for group in found]), torch.cat(starts), **close
    )
    torch.testing.assert_close(
        torch.cat([group.relative for group in found]), torch.cat(relatives), **close
    )
    torch.testing.assert_close(
        torch.cat([group.absolute for group in found]), torch.cat(absolutes), atol=0, rtol=0
    )
    torch.testing.assert_close(torch.cat(found_steps), torch.cat(steps), **close)


def test_relative_positions_are_asked_for_at_the_nudged_timesteps():
    coarse, nudged = stored()
    student = Recording(STUDENT)
    positions(student, SCHEDULE, GRID, [3, 2], coarse[:, N], coarse, nudged, PROMPTS)
    assert GRID.fine[:8] == [999, 949, 899, 849, 799, 749, 699, 649]
    assert student.timesteps == [
        [999, 999, 899, 899, 649, 649]
    ]  # the start of slot 2 and both relative positions in one pass


def test_a_group_of_one_slot_spends_no_pass_on_its_start():
    coarse, nudged = stored()
    student = Recording(STUDENT)
    found = positions(student, SCHEDULE, GRID, [0], coarse[:, 1], coarse, nudged, PROMPTS)
    assert student.timesteps == [[149, 149]]
    assert torch.equal(found.start, coarse[:, 1])


def test_without_relative_positions_their_pass_is_saved():
    coarse, nudged = stored()
    student = Recording(STUDENT)
    found = positions(
        student, SCHEDULE, GRID, [1, 0], coarse[:, 2], coarse, nudged, PROMPTS, relative=False
    )
    assert student.timesteps == [[499, 499]]
    assert torch.equal(found.relative, torch.cat([nudged[:, 1], nudged[:, 0]]))


def test_a_relative_step_of_no_length_stays_at_the_nudged_position():
    """With delta = M the nudged position of slot n is at t_n already, and in slot 0 there is no
    timestep left to ask for."""
    grid = Grid(slots=N, fine_steps=5, delta=5)
    coarse, nudged = stored()
    student = Recording(STUDENT)
    slots = [3, 2, 1, 0]
    found = positions(student, SCHEDULE, grid, slots, coarse[:, N], coarse, nudged, PROMPTS)
    assert [grid.nudged(n) for n in slots] == [749, 499, 249, END]
    assert min(min(call) for call in student.timesteps) >= 0
    assert torch.equal(found.relative, torch.cat([nudged[:, n] for n in slots]))


def test_a_student_that_knows_the_ode_is_where_the_teacher_is():
    """Closed form: if stored positions lie on the ODE and slots are short, all three positions at
    t_n agree."""
    grid, n = Grid(slots=100, fine_steps=2, delta=1), 50
    z = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    coarse, nudged = torch.zeros(B, n + 1, *SHAPE[1:]), torch.zeros(B, n + 1, *SHAPE[1:])
    coarse[:, n] = STUDENT.solve(z, grid.coarse(n + 1), grid.coarse(n), PROMPTS)
    nudged[:, n] = STUDENT.solve(z, grid.coarse(n + 1), grid.nudged(n), PROMPTS)
    found = positions(STUDENT, SCHEDULE, grid, [n], z, coarse, nudged, PROMPTS)
    own = student_step(STUDENT, SCHEDULE, grid, [n], found.start, found.conditioning)
    moved = (found.absolute - z).abs().mean()
    assert (
        own - found.absolute
    ).abs().mean() < 0.004 * moved  # DDIM's error is of second order in the slot's length
    assert (
        found.relative - found.absolute
    ).abs().mean() < 0.001 * moved  # and half a slot has a quarter of it


def test_gradient_flows_through_the_students_step_and_nowhere_else():
    coarse, nudged = stored()
    bias = torch.zeros(1, requires_grad=True)

    def student(z, t, conditioning):
        return STUDENT(z, t, conditioning) + bias

    z = coarse[:, N].clone().requires_grad_()
    found = positions(student, SCHEDULE, GRID, [3, 2], z, coarse, nudged, PROMPTS)
    assert not any(x.requires_grad for x in (found.start, found.relative, found.absolute))

    student_step(student, SCHEDULE, GRID, [3, 2], found.start, found.conditioning).sum().backward()
    assert z.grad is None
    # d z_s / d eps = sigma_s - alpha_s sigma_t / alpha_t of each slot; with the chain kept, slot 3
    # would count again in slot 2
    expected = 0.0
    for t, s in ((999, 749), (749, 499)):
        (a_t, s_t), (a_s, s_s) = (
            (SCHEDULE.alpha(x, z).item(), SCHEDULE.sigma(x, z).item()) for x in (t, s)
        )
        expected += (s_s - a_s * s_t / a_t) * z.numel()
    assert bias.grad.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("delta", [1, 2, 5])
@pytest.mark.parametrize("slots", [[3], [2, 1], [3, 2, 1, 0]])
def test_following_the_teachers_own_trajectory_leads_along_it(delta, slots):
    """From stored positions the teacher walks to the next stored ones, past the nudged ones."""
    grid = Grid(slots=N, fine_steps=5, delta=delta)
    coarse, nudged = rollout(STUDENT, SCHEDULE, grid, torch.randn(SHAPE), PROMPTS)
    start = torch.cat([coarse[:, n + 1] for n in slots])
    at_nudged, at_end = follow(STUDENT, SCHEDULE, grid, slots, start, repeat(PROMPTS, len(slots)))
    torch.testing.assert_close(
        at_nudged, torch.cat([nudged[:, n] for n in slots]), rtol=0, atol=1e-6
    )
    torch.testing.assert_close(at_end, torch.cat([coarse[:, n] for n in slots]), rtol=0, atol=1e-6)
    moved = from_nudged(STUDENT, SCHEDULE, grid, slots, at_nudged, repeat(PROMPTS, len(slots)))
    asked = positions(
        STUDENT, SCHEDULE, grid, slots, coarse[:, slots[0] + 1], coarse, nudged, PROMPTS
    )
    torch.testing.assert_close(moved, asked.relative, rtol=0, atol=1e-6)


@pytest.mark.parametrize("delta", [1, 2, 4])
@pytest.mark.parametrize("slots", [[3], [2, 1], [3, 2, 1, 0]])
def test_in_a_relay_the_teacher_takes_over_on_the_students_own_step(delta, slots):
    """The student's step and its nudged position share one prediction; from there the teacher makes
    the steps that are left."""
    grid, teacher, z = (
        Grid(slots=N, fine_steps=5, delta=delta),
        Recording(Gaussian(SCHEDULE, std=0.8)),
        torch.randn(SHAPE),
    )
    student = Recording(STUDENT)
    start, nudged = relay(student, SCHEDULE, grid, slots, z, PROMPTS)
    assert student.timesteps == [[grid.coarse(n + 1)] * B for n in slots]
    reached = follow(
        teacher, SCHEDULE, grid, slots, nudged, repeat(PROMPTS, len(slots)), nudged=True
    )[1]
    assert [len(asked) for asked in teacher.timesteps] == [B * len(slots)] * (5 - delta)
    for k, n in enumerate(slots):
        rows = slice(k * B, (k + 1) * B)
        torch.testing.assert_close(start[rows], z, rtol=0, atol=1e-6)
        t = torch.full((B,), grid.coarse(n + 1))
        x0, eps = SCHEDULE.x0_and_eps(z, STUDENT(z, t, PROMPTS), t)
        at = SCHEDULE.alpha(grid.nudged(n), z) * x0 + SCHEDULE.sigma(grid.nudged(n), z) * eps
        torch.testing.assert_close(nudged[rows], at, rtol=0, atol=1e-5)
        fine = grid.fine[(N - n - 1) * 5 + delta : (N - n) * 5 + 1]
        for t, s in pairwise(fine):
            at = SCHEDULE.step(at, teacher.denoiser(at, torch.full((B,), t), PROMPTS), t, s)
        torch.testing.assert_close(reached[rows], at, rtol=0, atol=1e-5)
        z = student_step(STUDENT, SCHEDULE, grid, [n], z, PROMPTS)


# ---- distances


def test_pseudo_huber_by_hand():
    a = torch.tensor([[3.0, 0.0], [0.0, 0.0]])
    assert pseudo_huber(a, torch.zeros(2, 2), c=4.0).tolist() == [
        0.5,
        0.0,
    ]  # sqrt(9 + 16) - 4 = 1, halved by the mean
    assert pseudo_huber(
        torch.tensor([[[[1.0]]]]), torch.tensor([[[[-1.0]]]])
    ).item() == pytest.approx(2 - 1e-3, abs=1e-6)
    assert pseudo_huber(torch.tensor([[1e-3]]), torch.zeros(1, 1)).item() == pytest.approx(
        1e-3 * (2**0.5 - 1), rel=1e-5
    )


def test_the_gradient_of_pseudo_huber_is_finite_where_positions_agree():
    a = torch.tensor([[0.0, 1e-3, 1.0]], requires_grad=True)
    pseudo_huber(a, torch.zeros(1, 3)).sum().backward()
    assert a.grad[0].tolist() == pytest.approx(
        [0, 2**-0.5 / 3, 1 / 3], abs=1e-6
    )  # d / sqrt(d^2 + c^2), a third each


def test_squared_by_hand():
    assert squared(
        torch.tensor([[3.0, 1.0], [0.0, 0.5]]), torch.tensor([[0.0, 0.0], [0.0, 0.0]])
    ).tolist() == [5.0, 0.125]


# ---- adversarial losses

# Two rows seen by two heads whose maps differ in size: each head counts the same, however large its
# map.
REAL = [
    torch.tensor([[2.0, 0.5], [0.0, 0.0]]).reshape(2, 1, 1, 2),
    torch.tensor([-1.0, 3.0]).reshape(2, 1, 1, 1),
]
FAKE = [
    torch.tensor([[-3.0, 1.0], [0.0, 2.0]]).reshape(2, 1, 1, 2),
    torch.tensor([0.5, -2.0]).reshape(2, 1, 1, 1),
]


def test_hinge_critic_by_hand():
    # row 1: relu(1 - real) = 0, 0.5 and relu(1 + fake) = 0, 2 in head 1; 2 and 1.5 in head 2
    # row 2: 1, 1 and 1, 3 in head 1; 0 and 0 in head 2
    assert hinge_critic(REAL, FAKE).tolist() == [(1.25 + 3.5) / 2, (3 + 0) / 2]
    chance = [torch.zeros(1, 1, 4, 4)]
    assert hinge_critic(chance, chance).tolist() == [2]


def test_hinge_student_by_hand():
    # relu(1 - fake) is 4, 0 and 0.5 in row 1; 1, 0 and 3 in row 2
    assert hinge_student(FAKE).tolist() == [(2 + 0.5) / 2, (0.5 + 3) / 2]


def test_relativistic_by_hand():
    # mean logits of real - fake are 2.25 and -1.5 in row 1, -1 and 5 in row 2 (see below);
    # softplus(-x) = log(1 + exp(-x))
    expected = [(log1p(exp(-2.25)) + log1p(exp(1.5))) / 2, (log1p(exp(1)) + log1p(exp(-5))) / 2]
    assert relativistic(REAL, FAKE).tolist() == pytest.approx(expected, rel=1e-6)
    assert relativistic(REAL, REAL).tolist() == pytest.approx([log(2)] * 2)


def test_margin_by_hand():
    # means of real - fake: 1.25 + 1 and -1.5 in row 1; 0 - 1 and 5 in row 2
    assert margin(REAL, FAKE).tolist() == [(2.25 - 1.5) / 2, (-1 + 5) / 2]
    assert margin(REAL, REAL).tolist() == [0, 0]


def test_as_long_as_by_hand():
    # rows 5 and 2 long to be 10 and 0.5 long; a row to be 0 long; a row of zeros, which has no
    # direction
    gradient = torch.tensor([[3.0, 4.0], [0.0, -2.0], [1.0, 1.0], [0.0, 0.0]]).reshape(4, 1, 1, 2)
    like = torch.tensor([[0.0, 10.0], [0.3, 0.4], [0.0, 0.0], [1.0, 1.0]]).reshape(4, 1, 2, 1)
    assert as_long_as(gradient, like).flatten(1).tolist() == [[6, 8], [0, -0.5], [0, 0], [0, 0]]


@pytest.mark.parametrize("loss", [hinge_critic, relativistic, margin])
def test_heads_must_come_in_pairs(loss):
    with pytest.raises(ValueError, match="shorter"):
        loss(REAL, FAKE[:1])


# ---- renoising


def draw(seed=0, shape=SHAPE, shared=False, power=1.0):
    return Renoising.draw(
        GRID, shape, torch.Generator().manual_seed(seed), shared=shared, power=power
    )


def test_renoising_is_a_function_of_the_seed():
    first, again, other = draw(), draw(), draw(seed=1)
    assert first.timesteps.shape == (N, B)
    assert first.real.shape == first.fake.shape == (N, *SHAPE)
    for name in ("timesteps", "real", "fake"):
        assert torch.equal(getattr(first, name), getattr(again, name))
        assert not torch.equal(getattr(first, name), getattr(other, name))
    assert not torch.equal(first.real, first.fake)
    shared = draw(shared=True)
    assert torch.equal(shared.fake, shared.real)
    assert torch.equal(shared.real, first.real)


def test_what_a_trajectory_is_shown_under_does_not_depend_on_the_batch():
    alone, together = draw(shape=(1, 4, 2, 2)), draw(shape=(3, 4, 2, 2))
    for name in ("timesteps", "real", "fake"):
        assert torch.equal(getattr(together, name)[:, :1], getattr(alone, name))


def test_renoising_timesteps_fill_their_slot_and_no_more():
    timesteps = draw(shape=(5000, 1, 1, 1)).timesteps
    assert timesteps.amin(1).tolist() == [0, 249, 499, 749]
    assert timesteps.amax(1).tolist() == [
        248,
        498,
        748,
        998,
    ]  # t_{n+1} itself belongs to the slot above
    middle = torch.tensor([124, 373.5, 623.5, 873.5])
    assert (
        timesteps.double().mean(1) - middle
    ).abs().max() < 4 * 250 / 12**0.5 / 5000**0.5  # 4 standard errors


def test_noise_power_keeps_critics_close_to_the_end_of_a_slot():
    depth = draw(shape=(5000, 1, 1, 1), power=3.0).timesteps.double() - torch.tensor(
        [[0], [249], [499], [749]]
    )
    assert depth.amin() == 0
    assert depth.amax() >= 247
    # floor(250 u^3), and 249 u^3 in the last slot, whose end is timestep 0; E u^3 = 1/4, Var u^3 =
    # 1/7 - 1/16
    assert (depth.mean(1) - (250 / 4 - 0.5)).abs().max() < 0.6 + 4 * 250 * (
        1 / 7 - 1 / 16
    ) ** 0.5 / 5000**0.5


def test_renoising_noise_is_standard_normal():
    drawn = draw(shape=(1000, 1, 4, 4))
    for x in (drawn.real, drawn.fake):
        assert abs(x.mean().item()) < 4 / x.numel() ** 0.5
        assert abs(x.square().mean().item() - 1) < 4 * 2**0.5 / x.numel() ** 0.5


@pytest.mark.parametrize("slot_batch", [1, 2, 3, N])
def test_what_is_drawn_does_not_depend_on_slot_groups(slot_batch):
    drawn = draw()
    parts = zip(
        *(drawn.of(slots, torch.device("cpu")) for slots in slot_groups(N, slot_batch)), strict=True
    )
    timesteps, real, fake = (torch.cat(part) for part in parts)
    assert torch.equal(timesteps, drawn.timesteps.flip(0).flatten())
    assert torch.equal(real, drawn.real.flip(0).reshape(N * B, *SHAPE[1:]))
    assert torch.equal(fake, drawn.fake.flip(0).reshape(N * B, *SHAPE[1:]))


def test_a_critic_is_shown_positions_renoised_from_the_end_of_their_slot():
    slots, z = [1, 0], stored()[0][:, :2].transpose(0, 1).flatten(0, 1)
    t, noise, _ = draw().of(slots, torch.device("cpu"))
    shown = shown_to_critic(SCHEDULE, GRID, slots, z, t, noise)
    for i, t_n in enumerate([249, 249, END, END]):
        row = slice(i, i + 1)
        assert torch.equal(shown[row], SCHEDULE.renoise(z[row], t_n, int(t[i]), noise[row]))
