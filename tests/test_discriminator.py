"""Discriminators: heads, and the noise that positions are seen under."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from conftest import make_backbone, make_conditioning
from rapm.discriminator import AddedNoise, Discriminator, Head, Heads
from rapm.network import TEACHER
from rapm.schedule import END, Grid, Schedule

B, N = 2, 4
SHAPE = (B, 3, 4, 4)
GRID = Grid(slots=N, fine_steps=5)


def draw(seed: int = 0, shape=SHAPE, shared: bool = False) -> AddedNoise:
    return AddedNoise.draw(GRID, shape, torch.Generator().manual_seed(seed), shared=shared)


def test_added_noise_is_a_function_of_the_generator() -> None:
    first, again, other, shared = draw(), draw(), draw(seed=1), draw(shared=True)
    assert first.timesteps.shape == (N, B)
    assert first.real.shape == first.fake.shape == (N, *SHAPE)
    for name in ("timesteps", "real", "fake"):
        assert torch.equal(getattr(first, name), getattr(again, name))
        assert not torch.equal(getattr(first, name), getattr(other, name))
    assert not torch.equal(first.real, first.fake)
    assert torch.equal(shared.fake, shared.real)
    assert torch.equal(shared.real, first.real)


def test_it_does_not_depend_on_the_batch() -> None:
    alone, together = draw(shape=(1, 4, 2, 2)), draw(shape=(3, 4, 2, 2))
    for name in ("timesteps", "real", "fake"):
        assert torch.equal(getattr(together, name)[:, :1], getattr(alone, name))


def test_timesteps_are_uniform_in_their_slot() -> None:
    timesteps = draw(shape=(5000, 1, 1, 1)).timesteps
    assert timesteps.amin(1).tolist() == [0, 249, 499, 749]
    assert timesteps.amax(1).tolist() == [248, 498, 748, 998]  # t_{n+1} is the slot's above
    middle = torch.tensor([124, 373.5, 623.5, 873.5])
    standard_error = 250 / 12**0.5 / 5000**0.5
    assert (timesteps.double().mean(1) - middle).abs().max() < 4 * standard_error
    spread = torch.tensor(249 / 12**0.5)
    assert (timesteps.double().std(1) / spread - 1).abs().max() < 0.05


def test_noise_is_standard_normal() -> None:
    drawn = draw(shape=(1000, 1, 4, 4))
    for x in (drawn.real, drawn.fake):
        assert abs(x.mean().item()) < 4 / x.numel() ** 0.5
        assert abs(x.square().mean().item() - 1) < 4 * 2**0.5 / x.numel() ** 0.5


@pytest.mark.parametrize("groups", [[[3], [2], [1], [0]], [[3, 2], [1, 0]], [[3, 2, 1, 0]]])
def test_slots_get_theirs_in_groups_of_any_size(groups: list[list[int]]) -> None:
    drawn = draw()
    parts = zip(*(drawn.of(slots) for slots in groups), strict=True)
    timesteps, real, fake = (torch.cat(part) for part in parts)
    assert torch.equal(timesteps, drawn.timesteps.flip(0).flatten())
    assert torch.equal(real, drawn.real.flip(0).reshape(N * B, *SHAPE[1:]))
    assert torch.equal(fake, drawn.fake.flip(0).reshape(N * B, *SHAPE[1:]))


def test_a_head_is_two_blocks_with_a_residual_and_one_channel() -> None:
    head = Heads([12], 64, seed=0).heads[0]
    assert isinstance(head, Head)
    norms = [m for m in head.modules() if isinstance(m, nn.GroupNorm)]
    assert [(norm.num_groups, norm.num_channels) for norm in norms] == [(32, 64)] * 2
    x = torch.randn(2, 12, 5, 5)
    y = head.first(head.project(x))
    torch.testing.assert_close(head(x), head.out(head.second(y) + y))
    assert head(x).shape == (2, 1, 5, 5)
    again = Heads([12], 64, seed=0).heads[0]
    assert all(
        torch.equal(a, b) for a, b in zip(head.parameters(), again.parameters(), strict=True)
    )


@pytest.mark.parametrize("loss", ["hinge", "relativistic"])
def test_it_learns_to_tell_and_its_gradient_leads_there(ddim_schedule: Schedule, loss) -> None:
    """On two fixed sets of positions: the margin grows, and fakes that follow it are taken in."""
    backbone = make_backbone()
    generator = torch.Generator().manual_seed(0)
    prompts = make_conditioning(1, "sd15", generator)
    real = torch.randn(1, 4, 8, 8, generator=generator)
    fake = real + 0.5
    found = Discriminator.build(
        backbone,
        "relative_discriminator",
        ddim_schedule,
        GRID,
        example=(real, prompts),
        rank=2,
        targets=[],
        head_width=8,
        loss=loss,
        noise="shared",
        seed=0,
        learning_rate=2e-3,
        weight_decay=0.0,
        optimizer="adamw",
    )
    margins = []
    for k in range(40):
        found.draw_noise(real.shape, torch.Generator().manual_seed(k))
        _, margin = found.learn([0], real, fake, prompts)
        found.learner.clip(1.0, k)
        found.learner.step(1.0)
        margins.append(float(margin))
    assert abs(margins[0]) < 0.1
    assert sum(margins[-5:]) / 5 > 0.2
    before = [p.grad for p in found.learner.parameters.values()]
    value, gradient = found.student_gradient([0], real, fake, prompts)
    assert gradient.shape == fake.shape
    assert [p.grad for p in found.learner.parameters.values()] == before == [None] * len(before)
    nearer = fake - 0.1 * gradient / gradient.norm() * fake.norm()
    assert float(found.student_gradient([0], real, nearer, prompts)[0]) < float(value)


def test_positions_are_seen_with_noise_from_their_own_timestep(ddim_schedule: Schedule) -> None:
    """The features are those of the noisy positions, at the timestep the noise leads to."""
    backbone = make_backbone()
    generator = torch.Generator().manual_seed(0)
    prompts = make_conditioning(2, "sd15", generator)
    z = torch.randn(2, 4, 8, 8, generator=generator)
    one = {name: value[:1] for name, value in prompts.items()}
    found = Discriminator.build(
        backbone,
        "absolute_discriminator",
        ddim_schedule,
        GRID,
        example=(z[:1], one),
        rank=2,
        targets=[],
        head_width=8,
        loss="hinge",
        noise="independent",
        seed=0,
        learning_rate=1e-3,
        weight_decay=0.0,
        optimizer="adamw",
    )
    found.draw_noise((1, 4, 8, 8), generator)
    t, _, noise = found.added.of([1, 0])
    with backbone.adapter("absolute_discriminator"), torch.no_grad():
        maps = found.logits([1, 0], z, t, noise, prompts)
    for row, t_n in enumerate([249, END]):
        own = slice(row, row + 1)
        noisy = ddim_schedule.add_noise(z[own], t_n, int(t[row]), noise[own])
        prompt = {name: value[own] for name, value in prompts.items()}
        with backbone.adapter(TEACHER), torch.no_grad():  # a new LoRA changes nothing
            expected = found.heads(backbone.features(noisy, t[own], prompt))
        for a, b in zip(maps, expected, strict=True):
            torch.testing.assert_close(a[own], b, rtol=0, atol=1e-5)
