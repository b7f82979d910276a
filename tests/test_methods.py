"""Both methods on tiny networks: their gradients against whole copies of the network.

The paper's form of RAPM is held to a flat restatement in test_rapm_faithful.py; here are the
families, the options and what methods share.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from conftest import CALL, make_backbone, make_conditioning, make_unet, shake
from rapm import losses
from rapm.config import Config
from rapm.methods import METHODS, Batch, Method
from rapm.models.stable_diffusion import UNET_LORA_TARGETS, unet_feature_layers
from rapm.network import STUDENT, TEACHER, Backbone
from rapm.sampling import Conditioning, ddim, guided, seeded
from rapm.schedule import Schedule
from rapm.train import gradients

N = 3
EVEN, ODD = 0, 1  # iterations: the discriminators', the student's


@dataclass(frozen=True)
class Row:
    absolute: Tensor
    intermediate: Tensor
    conditioning: Conditioning


class Store(list[Row]):
    unconditional: Conditioning


def make_store(kind: str, size: int = 2) -> Store:
    generator = torch.Generator().manual_seed(6)
    store = Store()
    for _ in range(size):
        prompts = {n: v[0] for n, v in make_conditioning(1, kind, generator).items()}
        positions = torch.randn(2 * N + 1, 4, 8, 8, generator=generator)
        store.append(Row(positions[: N + 1], positions[N + 1 :], prompts))
    store.unconditional = make_conditioning(1, kind, generator)
    return store


def make_method(
    schedule: Schedule,
    name: str = "rapm",
    kind: str = "tiny",
    dtype: torch.dtype = torch.float32,
    **sections: dict[str, Any],
) -> tuple[Method, Batch]:
    """With adapters full of noise, and a batch of two."""
    table: dict[str, Any] = {
        "method": name,
        "trajectories": {"slots": N, "guidance_scale": 3.0},
        "student": {"rank": 3},
        "training": {"gradient_checkpointing": False, "huber_c": 0.1},
    }
    if name == "rapm":
        table["trajectories"]["fine_steps"] = 4
        table["discriminators"] = {"rank": 3, "head_width": 8}
        table["rapm"] = {"absolute_weight": [0.5, 1.0, 2.0]}
    for section, values in sections.items():
        table[section] = table.get(section, {}) | values
    config = Config.model_validate(table)
    checkpointing = config.training.gradient_checkpointing
    backbone, store = make_backbone(checkpointing, kind, dtype), make_store(kind)
    method = METHODS[name](config, backbone, schedule, store)
    for k, adapter in enumerate(method.learners):
        shake(backbone.parameters(adapter), k)
    return method, Batch.of(store, backbone.device)


def found(method: Method, name: str) -> dict[str, Tensor]:
    parameters = method.learners[name].parameters.items()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in parameters}


def single_copies(method: Method, kind: str) -> dict[str, Backbone]:
    """One whole copy of the network for each adapter, added by diffusers' own plain means."""
    copies = {}
    for name in (*method.learners, TEACHER):
        network = make_unet(kind).requires_grad_(False)
        if name != TEACHER:
            targets = {
                key.split(".lora_")[0] for key in method.backbone.parameters(name)
            }  # by full names
            lora = LoraConfig(r=3, lora_alpha=3, target_modules=sorted(targets))
            network.add_adapter(lora, adapter_name=name)
        alone = Backbone(network, CALL[kind], UNET_LORA_TARGETS, unet_feature_layers(network))
        alone.active = name  # always: nothing is ever switched
        for key, p in alone.parameters(name).items() if name != TEACHER else ():
            p.requires_grad_(True)
            p.data = method.backbone.parameters(name)[key].data.clone()
        copies[name] = alone
    return copies


def single_step(
    network: Any, schedule: Schedule, z: Tensor, t: int, s: int, prompts: Any
) -> Tensor:
    return next(ddim(network, schedule, z, [t, s], prompts)).end


OPTIONS: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "all slots in one pass": {"training": {"slot_batch": 3}},
    "relativistic, shared noise, adaptive weight": {
        "discriminators": {"loss": "relativistic", "noise": "shared", "weighting": "adaptive"}
    },
    "joint, checkpointing": {
        "discriminators": {"schedule": "joint"},
        "training": {"gradient_checkpointing": True},
    },
}
ROWS = [
    *(("tiny", name, k) for name in OPTIONS for k in (EVEN, ODD) if not ("joint" in name and k)),
]


@pytest.mark.parametrize(("kind", "options", "iteration"), ROWS)
def test_gradients_of_rapm_equal_those_of_separate_copies(
    ddim_schedule: Schedule, kind: str, options: str, iteration: int
) -> None:
    """Trap 1, every form of the adversary, and no gradient across slots; batch size 2."""
    method, batch = make_method(ddim_schedule, "rapm", kind, **OPTIONS[options])
    config, grid = method.config.discriminators, method.grid
    logged = method.training_step(iteration, batch, seeded("a test"))

    copies, drawn = single_copies(method, kind), method.discriminators  # type: ignore[attr-defined]
    heads = {term: copy.deepcopy(d.heads) for term, d in drawn.items()}
    total = dict.fromkeys(("student", "relative", "absolute"), torch.zeros(()))
    expected: dict[str, float] = {}
    prompts, z = batch.conditioning, batch.noise

    def note(name: str, value: Tensor) -> None:
        expected[name] = expected.get(name, 0.0) + float(value.detach()) / N

    for n in reversed(range(N)):
        t, s = grid.coarse(n + 1), grid.coarse(n)
        z_phi = single_step(copies[STUDENT], ddim_schedule, z, t, s, prompts)
        with torch.no_grad():
            start = batch.intermediate[:, n], grid.intermediate(n)
            z_hat = single_step(copies[STUDENT], ddim_schedule, start[0], start[1], s, prompts)
        w_n = [0.5, 1.0, 2.0][n]
        for term, real, w in (("relative", z_hat, 1.0), ("absolute", batch.absolute[:, n], w_n)):
            tau, of_real, of_fake = drawn[term].added.of([n])
            assert torch.equal(of_real, of_fake) == (config.noise == "shared")
            network = copies[f"{term}_discriminator"]

            def logits(z: Tensor, noise: Tensor, term=term, network=network, tau=tau, s=s) -> Any:
                noisy = ddim_schedule.add_noise(z, s, tau, noise)
                return heads[term](network.features(noisy, tau, prompts))

            fake = logits(z_phi, of_fake)
            distance = losses.pseudo_huber(z_phi, real, 0.1)
            adversarial = losses.hinge_student(fake)
            form = losses.hinge_discriminator
            if config.loss == "relativistic":
                adversarial = losses.relativistic(fake, logits(real, of_real))
                form = losses.relativistic
            weight = torch.tensor(0.1)
            if config.weighting == "adaptive":
                pull, push = (
                    torch.autograd.grad(x.sum(), z_phi, retain_graph=True)[0].flatten(1).norm(dim=1)
                    for x in (distance, adversarial)
                )
                weight = 0.1 * pull / push
            total["student"] = total["student"] + w * (distance + weight * adversarial).mean()
            both = logits(real, of_real), logits(z_phi.detach(), of_fake)
            loss = form(*both).mean()
            total[term] = total[term] + loss
            note(f"{term}_distance", distance.mean())
            note(f"{term}_adversarial", adversarial.mean())
            note(f"{term}_discriminator", loss)
            note(f"{term}_margin", losses.margin(*both).mean())
        z = z_phi.detach()

    learning = method.learning(iteration)
    for name in method.learners:
        term = name.removesuffix("_discriminator")
        own = dict(copies[name].parameters(name))
        if term in heads:
            own |= {f"heads.{key}": p for key, p in heads[term].named_parameters()}
        wanted = torch.autograd.grad(total[term], list(own.values()), allow_unused=True)
        for (key, gradient), reference in zip(found(method, name).items(), wanted, strict=True):
            if name not in learning or reference is None:
                assert not gradient.any(), (name, key)
            else:
                torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=2e-6)
    by_slot = {name: logged.pop(name) for name in list(logged) if "/" in name}
    for name, value in logged.items():
        assert value == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name
        own = [by_slot[f"{name}/{n}"] for n in range(N)] if name.endswith("distance") else []
        assert not own or sum(own) / N == pytest.approx(value)
    assert any("distance" in name for name in logged) == (STUDENT in learning)
    assert any("margin" in name for name in logged) == (learning != (STUDENT,))


@pytest.mark.parametrize(
    ("kind", "slot_batch", "checkpointing"),
    [
        ("tiny", 1, True),
        ("tiny", 2, False),
        ("tiny", 3, True),
        ("sd21", 1, False),
        ("sdxl", 1, False),
    ],
)
def test_gradients_of_midpoint_equal_those_of_separate_copies(
    ddim_schedule: Schedule, kind: str, slot_batch: int, checkpointing: bool
) -> None:
    training = {"slot_batch": slot_batch, "gradient_checkpointing": checkpointing}
    method, batch = make_method(
        ddim_schedule, "midpoint", kind, training=training, midpoint={"weight": [4.0, 1.0, 0.5]}
    )
    logged = method.training_step(0, batch, seeded("a test"))
    copies, grid = single_copies(method, kind), method.grid
    teacher = guided(copies[TEACHER], make_store(kind).unconditional, 3.0)
    total, expected, by_slot = torch.zeros(()), 0.0, {}
    prompts, z = batch.conditioning, batch.noise
    for n in reversed(range(N)):
        t, mid, s = grid.coarse(n + 1), grid.intermediate(n), grid.coarse(n)
        eps = copies[STUDENT](z, torch.full((2,), t), prompts)
        z_phi = ddim_schedule.step(z, eps, t, s)
        with torch.no_grad():
            z_mid = ddim_schedule.step(z, eps, t, mid)
            z_tilde = single_step(teacher, ddim_schedule, z_mid, mid, s, prompts)
        distance = losses.pseudo_huber(z_phi, z_tilde, 0.1).mean()
        total, expected = (
            total + [4.0, 1.0, 0.5][n] * distance,
            expected + float(distance.detach()) / N,
        )
        by_slot[f"distance/{n}"] = pytest.approx(float(distance.detach()), rel=1e-4)
        z = z_phi.detach()
    own = copies[STUDENT].parameters(STUDENT)
    reference = torch.autograd.grad(total, list(own.values()))
    for gradient, wanted in zip(found(method, STUDENT).values(), reference, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=2e-6)
    assert logged == {"distance": pytest.approx(expected, rel=1e-4), **by_slot}


def test_midpoint_is_an_implicit_midpoint_step_of_the_teachers_ode(ddim_schedule: Schedule) -> None:
    """Where the distance is 0, student at z_{n+1} and guided teacher at z_mid agree on x0, eps."""
    method, batch = make_method(ddim_schedule, "midpoint")
    n, z, grid = 1, batch.noise, method.grid
    t, mid, s = grid.coarse(n + 1), grid.intermediate(n), grid.coarse(n)
    assert (t, mid, s) == (666, 499, 332)
    with method.backbone.adapter(TEACHER), torch.no_grad():
        eps = torch.zeros_like(z)  # solved by iteration: eps = teacher(step(z, eps))
        for _ in range(60):
            z_mid = ddim_schedule.step(z, eps, t, mid)
            x0, of_teacher = ddim_schedule.x0_and_eps(
                z_mid,
                method.teacher(z_mid, torch.full((2,), mid), batch.conditioning),
                mid,  # type: ignore[attr-defined]
            )
            eps = 0.5 * (eps + of_teacher)
    own = ddim_schedule.x0_and_eps(z, eps, t)
    torch.testing.assert_close(own[0], x0, rtol=0, atol=1e-3)
    ends = ddim_schedule.step(z, eps, t, s), ddim_schedule.step(z_mid, of_teacher, mid, s)
    assert float(losses.pseudo_huber(*ends).max()) < 1e-3


def test_who_learns_when(ddim_schedule: Schedule) -> None:
    both = ("relative_discriminator", "absolute_discriminator")
    method, _ = make_method(ddim_schedule)
    assert [method.learning(k) for k in range(4)] == [both, (STUDENT,), both, (STUDENT,)]
    method, _ = make_method(ddim_schedule, discriminators={"schedule": "joint"})
    assert [method.learning(k) for k in range(2)] == [(STUDENT, *both)] * 2
    method, _ = make_method(ddim_schedule, discriminators={"adversarial_weight": 0.0})
    assert [method.learning(k) for k in range(2)] == [(STUDENT,)] * 2
    method, _ = make_method(ddim_schedule, rapm={"absolute_weight": 0.0})
    assert [method.learning(k) for k in range(2)] == [both[:1], (STUDENT,)]
    method, _ = make_method(ddim_schedule, "midpoint")
    assert [method.learning(k) for k in range(2)] == [(STUDENT,)] * 2


@pytest.mark.parametrize(
    ("name", "iteration", "passes"),
    [
        # N steps of the student, N relative positions, N judgements by each discriminator.
        ("rapm", EVEN, {STUDENT: 2 * N, "relative_discriminator": N, "absolute_discriminator": N}),
        ("rapm", ODD, {STUDENT: 2 * N, "relative_discriminator": N, "absolute_discriminator": N}),
        ("midpoint", 0, {STUDENT: N, TEACHER: N}),
    ],
)
def test_passes_of_an_iteration(
    ddim_schedule: Schedule, name: str, iteration: int, passes: dict[str, int]
) -> None:
    """RAPM never asks the teacher while training; midpoint asks it once a slot."""
    method, batch = make_method(ddim_schedule, name)
    asked: list[str] = []
    method.backbone.network.register_forward_pre_hook(
        lambda *_: asked.append(str(method.backbone.active))
    )
    method.training_step(iteration, batch, seeded("a test"))
    assert {adapter: asked.count(adapter) for adapter in set(asked)} == passes


@pytest.mark.parametrize(("name", "iteration"), [("rapm", EVEN), ("rapm", ODD), ("midpoint", 0)])
def test_slot_groups_change_nothing(ddim_schedule: Schedule, name: str, iteration: int) -> None:
    results = []
    for slot_batch in (1, 2):
        method, batch = make_method(ddim_schedule, name, training={"slot_batch": slot_batch})
        logged = method.training_step(iteration, batch, seeded("a test"))
        results.append((logged, [found(method, n) for n in method.learners]))
    for logged, gradient in results[1:]:
        assert logged == pytest.approx(results[0][0], rel=1e-4, abs=1e-6)
        for a, b in zip(gradient, results[0][1], strict=True):
            for key in b:
                torch.testing.assert_close(a[key], b[key], rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize(
    ("name", "iteration", "kind"),
    [
        ("rapm", EVEN, "sdxl"),
        ("rapm", ODD, "sdxl"),
        ("rapm", EVEN, "sd21"),
        ("midpoint", 0, "tiny"),
    ],
)
def test_only_what_learns_moves(
    ddim_schedule: Schedule, name: str, iteration: int, kind: str
) -> None:
    method, batch = make_method(ddim_schedule, name, kind)
    network = method.backbone.network
    before = {key: p.clone() for key, p in network.named_parameters()}
    gradients(method, iteration, batch)
    learners = [method.learners[each] for each in method.learning(iteration)]
    for learner in learners:
        learner.step(1.0)
    moved = {key for key, p in network.named_parameters() if not torch.equal(p, before[key])}
    allowed = {key for learner in learners for key in method.backbone.parameters(learner.adapter)}
    assert moved
    assert moved <= allowed
    assert len(moved) > 0.9 * len(allowed)


@pytest.mark.parametrize(("name", "iteration"), [("rapm", EVEN), ("rapm", ODD), ("midpoint", 0)])
def test_float16_gradients_do_not_vanish(
    ddim_schedule: Schedule, name: str, iteration: int
) -> None:
    """Losses a thousand times smaller, as the mean over a large picture makes them."""
    small = {"rapm": {"absolute_weight": 1e-3, "relative": False}}
    if name == "midpoint":
        small = {"midpoint": {"weight": 1e-3}}
    flat: dict[str, Tensor] = {}
    for label, dtype, scaled in (
        ("whole", torch.float32, True),
        ("scaled", torch.float16, True),
        ("bare", torch.float16, False),
    ):
        method, batch = make_method(ddim_schedule, name, "sd15", dtype, **small)
        assert method.backbone.loss_scale == (4096 if dtype == torch.float16 else 1)
        if not scaled:  # no weight makes a discriminator's loss small
            method.backbone.loss_scale = 1e-4 if name == "rapm" and iteration == EVEN else 1.0
        method.training_step(iteration, batch, seeded("a test"))
        learning = method.learning(iteration)
        for each in learning:
            method.learners[each].clip(math.inf, 0)
        parts = [found(method, each) for each in learning]
        flat[label] = torch.cat([g.flatten() for part in parts for g in part.values()])
    error = {k: float((flat[k] - flat["whole"]).norm() / flat["whole"].norm()) for k in flat}
    assert error["scaled"] < 0.02, error
    assert error["bare"] > 0.1, error


def test_float16_that_overflows_is_taken_again_at_a_lower_scale(ddim_schedule: Schedule) -> None:
    results = []
    joint = {"schedule": "joint"}
    for scale in (4096.0, 2.0**36):
        method, batch = make_method(ddim_schedule, dtype=torch.float16, discriminators=joint)
        method.backbone.loss_scale = scale
        logged = gradients(method, 0, batch)
        assert method.backbone.loss_scale == scale
        parts = [found(method, each) for each in method.learners]
        flat = torch.cat([g.flatten() for part in parts for g in part.values()])
        results.append((logged, flat))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-3)
    assert (results[1][1] - results[0][1]).norm() < 1e-3 * results[0][1].norm()
