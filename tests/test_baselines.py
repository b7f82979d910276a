"""The neighbours as benchmarks/baselines restates them, by hand on a small network."""

from __future__ import annotations

import torch
from baselines import pcm
from conftest import make_scheduler, make_unet
from test_network import inputs, shake

from rapm.families.stable_diffusion import FAMILY, UNET_LORA_TARGETS
from rapm.network import STUDENT, TEACHER, Backbone
from rapm.objective import pseudo_huber
from rapm.schedule import Grid, Schedule
from rapm.train import Learner

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
    """By diffusers' own formulas, from a start inside a slot and from the last fine step before its edge."""
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
        found = method.turn(x0, [start], conditioning, torch.Generator().manual_seed(3), critic=False, share=1.0)
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(3))
        z = scheduler.add_noise(x0, noise, torch.tensor([t]))
        with torch.no_grad():
            with other.role(TEACHER):
                empty = {name: torch.zeros_like(value) for name, value in conditioning.items()}
                without, with_ = (other(z, torch.tensor([t]), c) for c in (empty, conditioning))
                moved = step(z, without + SCALE * (with_ - without), t, after)
            with ours.role(STUDENT):
                fake = step(z, ours(z, torch.tensor([t]), conditioning), t, edge)
                target = moved if after == edge else step(moved, ours(moved, torch.tensor([after]), conditioning), after, edge)
        torch.testing.assert_close(found["distance"], float(pseudo_huber(fake, target)), rtol=1e-4, atol=1e-6)


def test_in_pcm_only_whose_turn_it_is_gets_a_gradient() -> None:
    method = make_pcm(pcm.FORMS["sd15"])
    x0, _, conditioning = inputs(2)
    for critic, own, other in ((True, method.critic, method.learner), (False, method.learner, method.critic)):
        method.turn(x0, [0, 4], conditioning, torch.Generator(), critic=critic, share=1.0)
        # Between the hinges real and fake pull a head's last bias in opposite directions, by as much.
        assert all(p.grad is not None and p.grad.any() for name, p in own.parameters.items() if not name.endswith("out.bias"))
        assert all(p.grad is None for p in other.parameters.values())
        own.optimizer.zero_grad()
