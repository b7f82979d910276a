"""One network, four roles: what FIELD calls traps 1 to 4, and the taps."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from itertools import pairwise

import pytest
import torch
from conftest import CROSS_ATTENTION, SMALL, make_unet
from peft import LoraConfig
from torch import Tensor

from rapm.config import Config
from rapm.discriminator import Heads
from rapm.models import sdxl, stable_diffusion
from rapm.models.stable_diffusion import UNET_LORA_TARGETS, unet_taps
from rapm.network import ABSOLUTE_CRITIC, RELATIVE_CRITIC, STUDENT, TEACHER, Backbone
from rapm.objective import (
    Renoising,
    hinge_critic,
    hinge_student,
    pseudo_huber,
    relativistic,
    shown_to_critic,
    student_step,
)
from rapm.schedule import Grid
from rapm.trajectories import guided
from rapm.turns import Batch, Learner, Players, critic_turn, student_turn, turns, walk, walk_ahead

ROLES = (STUDENT, RELATIVE_CRITIC, ABSOLUTE_CRITIC)
GRID = Grid(slots=3, fine_steps=4)
CALL = {
    "sd15": stable_diffusion.FAMILY.call,
    "sd21": stable_diffusion.FAMILY.call,
    "sdxl": sdxl.FAMILY.call,
}


def backbone(
    checkpointing: bool = False, kind: str = "sd15", dtype: torch.dtype = torch.float32
) -> Backbone:
    network = make_unet(kind).to(dtype)
    return Backbone(
        network,
        CALL[kind],
        UNET_LORA_TARGETS,
        unet_taps(network),
        gradient_checkpointing=checkpointing,
    )


def make_conditioning(batch: int, kind: str, generator: torch.Generator) -> dict[str, Tensor]:
    embeds = {"prompt_embeds": torch.randn(batch, 6, CROSS_ATTENTION[kind], generator=generator)}
    if kind != "sdxl":
        return embeds
    pooled = torch.randn(batch, 16, generator=generator)
    return embeds | {
        "pooled_prompt_embeds": pooled,
        "time_ids": torch.tensor([[16.0, 16, 0, 0, 16, 16]]).expand(batch, 6),
    }


def shake(parameters: Mapping[str, Tensor], seed: int) -> None:
    """Fresh LoRA is the identity, which would hide mistakes: fill it with noise."""
    generator = torch.Generator().manual_seed(seed)
    for p in parameters.values():
        p.data = 0.1 * torch.randn(p.shape, generator=generator)


def inputs(batch: int = 2, kind: str = "sd15") -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    z = torch.randn(batch, 4, 8, 8, generator=generator)
    return z, torch.full((batch,), 500), make_conditioning(batch, kind, generator)


def stored_batch(size: int = 1, kind: str = "sd15") -> Batch:
    generator = torch.Generator().manual_seed(6)
    coarse = torch.randn(size, GRID.slots + 1, 4, 8, 8, generator=generator)
    nudged = torch.randn(size, GRID.slots, 4, 8, 8, generator=generator)
    return Batch(coarse, nudged, make_conditioning(size, kind, generator))


def make_players(
    schedule,
    checkpointing: bool = False,
    slot_batch: int = 1,
    loss: str = "relativistic",
    kind: str = "sd15",
    dtype: torch.dtype = torch.float32,
    **weights,
) -> Players:
    relative = float(weights.get("positions") != "relayed")  # refused there
    config = Config.model_validate(
        {
            "trajectories": {"slots": GRID.slots, "fine_steps": GRID.fine_steps},
            "critics": {"adversarial_weight": 0.3, "loss": loss},
            "training": {
                "slot_batch": slot_batch,
                "positions": "stored",
                "relative_weight": relative,
                **weights,
            },
        }
    )
    body = backbone(checkpointing, kind, dtype)
    learners = {}
    for k, role in enumerate(ROLES):
        body.add_role(role, 3, UNET_LORA_TARGETS, k)
        shake(body.parameters(role), k)
    for k, role in enumerate(ROLES):
        heads = None if role == STUDENT else Heads([16, 32, 32], 8, k)
        learners[role] = Learner(body, role, heads, 1e-3, (0.0, 0.99), 0.0)
    critics = {role: learners[role] for role in ROLES[1:]}
    return Players(
        config,
        body,
        schedule,
        GRID,
        learners[STUDENT],
        critics,
        make_conditioning(1, kind, torch.Generator()),
    )


def draws() -> dict[str, Renoising]:
    return {role: _draw(1, k) for k, role in enumerate(ROLES[1:])}


def _draw(batch: int, seed: int) -> Renoising:
    return Renoising.draw(
        GRID, (batch, 4, 8, 8), torch.Generator().manual_seed(seed), shared=False, power=1.0
    )


def gradients(learner: Learner) -> dict[str, Tensor]:
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in learner.parameters.items()
    }


def single_copies(players: Players, kind: str) -> dict[str, Backbone]:
    """One whole copy of the network for each role, its adapter added by diffusers' own plain
    means."""
    copies = {}
    for role in ROLES:
        network = make_unet(kind)
        network.requires_grad_(False)
        network.add_adapter(
            LoraConfig(r=3, lora_alpha=3, target_modules=list(UNET_LORA_TARGETS)), adapter_name=role
        )
        alone = Backbone(network, CALL[kind], UNET_LORA_TARGETS, unet_taps(network))
        alone.playing = role  # always in this role: nothing is ever switched
        for name, p in alone.parameters(role).items():
            p.requires_grad_(True)
            p.data = players.backbone.parameters(role)[name].data.clone()
        copies[role] = alone
    return copies


@pytest.mark.parametrize("kind", SMALL)
def test_teacher_is_bit_equal_to_the_untouched_network(kind: str) -> None:
    z, t, conditioning = inputs(kind=kind)
    with torch.no_grad():
        expected = CALL[kind](make_unet(kind), z, t, conditioning)
    body = backbone(kind=kind)
    for k, role in enumerate(ROLES):
        body.add_role(role, 4, UNET_LORA_TARGETS, k)
        shake(body.parameters(role), k)
    with body.role(TEACHER), torch.no_grad():
        assert torch.equal(body(z, t, conditioning), expected)


def test_a_fresh_role_changes_nothing_and_a_trained_one_does() -> None:
    z, t, conditioning = inputs()
    body = backbone()
    body.add_role(STUDENT, 4, UNET_LORA_TARGETS, 0)
    with torch.no_grad():
        with body.role(TEACHER):
            teacher = body(z, t, conditioning)
        with body.role(STUDENT):
            assert torch.equal(body(z, t, conditioning), teacher)
            shake(body.parameters(STUDENT), 1)
            assert (body(z, t, conditioning) - teacher).abs().max() > 1e-2


@pytest.mark.parametrize("kind", SMALL)
def test_a_lora_keeps_no_float32_copy_of_what_it_sees(kind: str) -> None:
    """Beside a bfloat16 network; what each of its layers saw is kept once, in bfloat16, by query,
    key and value alike."""
    z, t, conditioning = inputs(kind=kind)
    body = backbone(kind=kind, dtype=torch.bfloat16)
    body.add_role(STUDENT, 3, UNET_LORA_TARGETS, 0)
    kept: dict[str, dict[int, Tensor]] = {}

    def passes(name: str) -> None:
        own = kept.setdefault(name, {})
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: own.setdefault(x.data_ptr(), x), lambda x: x
        ):
            body(z, t, conditioning).sum()

    with body.role(STUDENT):
        passes("ours")
        for layer in body._layers:
            layer.__class__ = type(layer).__base__
        passes("peft's")
    whole = {
        name: sum(x.numel() for x in own.values() if x.dtype == torch.float32)
        for name, own in kept.items()
    }
    held = {name: sum(x.nbytes for x in own.values()) for name, own in kept.items()}
    assert whole["ours"] < 0.02 * whole["peft's"], whole
    assert held["ours"] < 0.8 * held["peft's"], held


def test_scale_is_one_and_every_target_gets_an_adapter() -> None:
    body = backbone()
    body.add_role(STUDENT, 1, UNET_LORA_TARGETS, 0)
    assert {layer.scaling[STUDENT] for layer in body._layers} == {1.0}
    names = [
        name for name, module in make_unet().named_modules() if name.endswith(UNET_LORA_TARGETS)
    ]
    assert len(body._layers) == len(names) > 40
    assert len(body.parameters(STUDENT)) == 2 * len(names)
    assert len(body.lora_state(STUDENT)) == 2 * len(names)


def test_roles_do_not_nest_and_no_pass_without_a_role() -> None:
    z, t, conditioning = inputs()
    body = backbone()
    body.add_role(STUDENT, 1, UNET_LORA_TARGETS, 0)
    with (
        pytest.raises(AssertionError, match="a graph belongs to one role"),
        body.role(STUDENT),
        body.role(TEACHER),
    ):
        pass
    with pytest.raises(AssertionError, match="outside of any role"):
        body(z, t, conditioning)


def test_a_role_can_be_given_other_weights() -> None:
    z, t, conditioning = inputs()
    body = backbone()
    body.add_role(STUDENT, 2, UNET_LORA_TARGETS, 0)
    body.load(
        STUDENT, {name: torch.full_like(p, 0.02) for name, p in body.parameters(STUDENT).items()}
    )
    assert all((p == 0.02).all() and p.requires_grad for p in body.parameters(STUDENT).values())
    with torch.no_grad():
        with body.role(TEACHER):
            teacher = body(z, t, conditioning)
        with body.role(STUDENT):
            assert (body(z, t, conditioning) - teacher).abs().max() > 1e-2


@pytest.mark.parametrize("checkpointing", [False, True])
def test_features_are_the_blocks_own_outputs_and_stop_there(checkpointing: bool) -> None:
    z, t, conditioning = inputs()
    body = backbone(checkpointing)
    expected, reached = [], []
    plain = make_unet()
    for path in unet_taps(plain):
        plain.get_submodule(path).register_forward_hook(
            lambda _, __, out: expected.append(out[0] if isinstance(out, tuple) else out)
        )
    plain(z, t, conditioning["prompt_embeds"])
    body.network.up_blocks[0].register_forward_hook(lambda *_: reached.append(1))
    with body.role(TEACHER):
        found = body.features(z, t, conditioning)
        assert [tuple(x.shape) for x in found] == [(2, 16, 4, 4), (2, 32, 4, 4), (2, 32, 4, 4)]
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert not reached
        body(z, t, conditioning)
        assert reached


ROWS = [
    ("sd15", 1, "hinge"),
    ("sd15", 1, "relativistic"),
    ("sd21", 1, "relativistic"),
    ("sdxl", 1, "relativistic"),
]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("kind", "slot_batch", "loss", "source"),
    [
        *((*row, "stored") for row in [*ROWS, ("sd15", 3, "relativistic")]),
        *((*row, "followed") for row in ROWS[1:]),
        ("sd15", 3, "relativistic", "relayed"),
        ("sdxl", 1, "relativistic", "relayed"),
    ],
)
def test_student_gradients_equal_those_of_separate_copies(
    ddim_schedule, checkpointing: bool, kind: str, slot_batch: int, loss: str, source: str
) -> None:
    """Trap 1, and no gradient across slots: the reference detaches every start and sums over slots,
    on whole copies."""
    # The student is close to a relay's positions, where the distance's gradient turns within c and
    # makes rounding larger.
    settings = {"positions": source, "huber_c": 0.1 if source == "relayed" else 1e-3}
    relative_weights = [0.0, 0.0, 0.0] if source == "relayed" else [0.5, 1.0, 2.0]
    weights = {"relative_weight": relative_weights, "absolute_weight": 0.7}
    players = make_players(
        ddim_schedule, checkpointing, slot_batch, loss, kind, **weights, **settings
    )
    untouched = Backbone(make_unet(kind), CALL[kind], UNET_LORA_TARGETS)
    untouched.playing = TEACHER
    teacher = guided(untouched, players.unconditional, players.config.trajectories.guidance_scale)
    batch, renoising = stored_batch(kind=kind), draws()
    rolled = players.config.rolled_slots  # what a store would hold
    held = Batch(
        batch.coarse[:, -rolled - 1 :], batch.nudged[:, GRID.slots - rolled :], batch.conditioning
    )
    losses, walked = student_turn(players, held, renoising)

    copies = single_copies(players, kind)
    expected = dict.fromkeys(losses, 0.0)
    total, reached = torch.zeros(()), []
    z = batch.coarse[:, GRID.slots]
    for n in reversed(range(GRID.slots)):
        nudged, absolute = batch.nudged[:, n], batch.coarse[:, n]
        with torch.no_grad():
            # Where positions are followed, both start from the same noise in the first slot.
            if source == "relayed" or (source == "followed" and n < GRID.slots - 1):
                absolute, fine = (
                    z,
                    GRID.fine[(GRID.slots - n - 1) * GRID.fine_steps :][: GRID.fine_steps + 1],
                )
                for k, (t, s) in enumerate(pairwise(fine)):
                    walker = copies[STUDENT] if source == "relayed" and k == 0 else teacher
                    absolute = ddim_schedule.step(
                        absolute, walker(absolute, torch.tensor([t]), batch.conditioning), t, s
                    )
                    nudged = absolute if k == 0 else nudged
            step = torch.tensor([GRID.nudged(n)]), torch.tensor([GRID.coarse(n)])
            relative = ddim_schedule.step(
                nudged, copies[STUDENT](nudged, step[0], batch.conditioning), *step
            )
        z_phi = student_step(copies[STUDENT], ddim_schedule, GRID, [n], z, batch.conditioning)
        for name, target, weight, role in (
            ("relative", relative, relative_weights[n], RELATIVE_CRITIC),
            ("absolute", absolute, 0.7, ABSOLUTE_CRITIC),
        ):
            if not weight:
                continue
            t, real_noise, fake_noise = renoising[role].of([n], z.device)
            real, fake = (
                players.critics[role].heads(
                    copies[role].features(
                        shown_to_critic(ddim_schedule, GRID, [n], x, t, e), t, batch.conditioning
                    )
                )
                for x, e in ((target, real_noise), (z_phi, fake_noise))
            )
            distance = pseudo_huber(z_phi, target, players.config.training.huber_c).mean()
            adversarial = (
                hinge_student(fake) if loss == "hinge" else relativistic(fake, real)
            ).mean()
            pull, push = (
                torch.autograd.grad(x, z_phi, retain_graph=True)[0].norm()
                for x in (distance, adversarial)
            )
            total = total + weight * (distance + 0.3 * pull / push * adversarial) / GRID.slots
            expected[f"{name}_distance"] += distance.item() / GRID.slots
            expected[f"{name}_adversarial"] += adversarial.item() / GRID.slots
        z = z_phi.detach()
        reached.append(z)
    own = copies[STUDENT].parameters(STUDENT)
    reference = dict(zip(own, torch.autograd.grad(total, list(own.values())), strict=True))

    for name, gradient in gradients(players.student).items():
        torch.testing.assert_close(gradient, reference[name], rtol=1e-4, atol=1e-6)
    assert losses == pytest.approx(expected, rel=1e-4)
    for way in (
        walked,
        walk(players, held),
    ):  # what critics learn from: the same whether the student learns on it or not
        torch.testing.assert_close(
            torch.cat([one.reached for one in way]), torch.cat(reached), rtol=1e-4, atol=1e-5
        )
        assert [n for one in way for n in one.at.slots] == [*reversed(range(GRID.slots))]
        assert not any(one.reached.requires_grad for one in way)
    for role in ROLES[1:]:
        assert all(p.grad is None for p in players.critics[role].parameters.values()), (
            f"{role} learns in the student's turn"
        )


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("kind", "slot_batch", "loss"), [*ROWS, ("sd15", 2, "relativistic")])
def test_critic_gradients_equal_those_of_separate_copies(
    ddim_schedule, checkpointing: bool, kind: str, slot_batch: int, loss: str
) -> None:
    players = make_players(ddim_schedule, checkpointing, slot_batch, loss, kind)
    critic_loss = hinge_critic if loss == "hinge" else relativistic
    batch, renoising = stored_batch(kind=kind), draws()
    critic_turn(players, walk(players, batch), renoising)

    copies = single_copies(players, kind)
    totals = dict.fromkeys(ROLES[1:], torch.zeros(()))
    heads = {
        role: copy.deepcopy(players.critics[role].heads).requires_grad_() for role in ROLES[1:]
    }
    for h in heads.values():
        h.zero_grad()
    z = batch.coarse[:, GRID.slots]
    for n in reversed(range(GRID.slots)):
        with torch.no_grad():
            nudged = torch.tensor([GRID.nudged(n)]), torch.tensor([GRID.coarse(n)])
            prediction = copies[STUDENT](batch.nudged[:, n], nudged[0], batch.conditioning)
            relative = ddim_schedule.step(batch.nudged[:, n], prediction, *nudged)
            z = student_step(copies[STUDENT], ddim_schedule, GRID, [n], z, batch.conditioning)
        for role, real in ((RELATIVE_CRITIC, relative), (ABSOLUTE_CRITIC, batch.coarse[:, n])):
            t, real_noise, fake_noise = renoising[role].of([n], z.device)
            logits = [
                heads[role](
                    copies[role].features(
                        shown_to_critic(ddim_schedule, GRID, [n], x, t, e), t, batch.conditioning
                    )
                )
                for x, e in ((real, real_noise), (z, fake_noise))
            ]
            totals[role] = totals[role] + critic_loss(*logits).mean() / GRID.slots
    for role in ROLES[1:]:
        own = dict(copies[role].parameters(role)) | {
            f"heads.{name}": p for name, p in heads[role].named_parameters()
        }
        wanted = torch.autograd.grad(totals[role], list(own.values()), allow_unused=True)
        found = gradients(players.critics[role])
        for (name, p), gradient in zip(own.items(), wanted, strict=True):
            expected = torch.zeros_like(p) if gradient is None else gradient
            torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-6)
    assert all(p.grad is None for p in players.student.parameters.values()), (
        "the student learns in the critics' turn"
    )


def test_critics_make_no_pass_but_their_own(ddim_schedule) -> None:
    """Two for each group of slots: real and fake side by side, once for each critic."""
    players = make_players(ddim_schedule, positions="followed")
    _, walked = student_turn(players, stored_batch(), draws())
    asked: list[str | None] = []
    players.backbone.network.register_forward_pre_hook(
        lambda *_: asked.append(players.backbone.playing)
    )
    critic_turn(players, walked, draws())
    assert asked == [RELATIVE_CRITIC, ABSOLUTE_CRITIC] * GRID.slots


@pytest.mark.parametrize("turn", [lambda *given: student_turn(*given, {}), walk])
def test_a_relayed_slot_by_itself_takes_one_pass_of_the_students(ddim_schedule, turn) -> None:
    """The pass that leads to where the teacher takes over is the one that learns."""
    players = make_players(ddim_schedule, positions="relayed")
    asked: list[str | None] = []
    players.backbone.network.register_forward_pre_hook(
        lambda *_: asked.append(players.backbone.playing)
    )
    turn(players, stored_batch())
    assert asked == [STUDENT, *[TEACHER] * (GRID.fine_steps - GRID.delta)] * GRID.slots


def students(players: Players, batch: Batch, renoising: dict[str, Renoising]) -> dict[str, float]:
    return student_turn(players, batch, renoising)[0]


def critics(players: Players, batch: Batch, renoising: dict[str, Renoising]) -> dict[str, float]:
    return critic_turn(players, walk(players, batch), renoising)


@pytest.mark.parametrize("source", ["stored", "followed", "relayed"])
@pytest.mark.parametrize("turn", [students, critics])
def test_slot_groups_change_nothing(ddim_schedule, turn, source: str) -> None:
    found = []
    for slot_batch in (1, 2, 3):
        players = make_players(ddim_schedule, False, slot_batch, positions=source)
        losses = turn(
            players, stored_batch(2), {role: _draw(2, k) for k, role in enumerate(ROLES[1:])}
        )
        learners = [players.student, *players.critics.values()]
        found.append((losses, [g for learner in learners for g in gradients(learner).values()]))
    for losses, grads in found[1:]:
        assert losses == pytest.approx(found[0][0], rel=1e-4)
        for a, b in zip(grads, found[0][1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("source", "slot_batch"), [("stored", 1), ("followed", 1), ("followed", 3), ("relayed", 1)]
)
@pytest.mark.parametrize("turn", [students, critics])
def test_positions_found_ahead_are_those_found_on_the_way(
    ddim_schedule, turn, source: str, slot_batch: int
) -> None:
    """As long as the student is the same: losses and gradients of each of three iterations, two
    trajectories in each."""
    settings = {
        "positions": source,
        "batch_size": 2,
        "huber_c": 0.1,
    }  # at 1e-3 rounding of positions comes back a thousandfold
    players = make_players(ddim_schedule, False, slot_batch, walk_ahead=3, **settings)
    alone = make_players(ddim_schedule, False, slot_batch, **settings)
    batch = stored_batch(6)
    passes: list[int] = []
    hook = players.backbone.network.register_forward_pre_hook(
        lambda network, given: passes.append(len(given[0]))
    )
    batches = walk_ahead(players, batch)
    hook.remove()
    assert len(batches) == 3
    assert min(passes) >= 6, "trajectories side by side"
    for k, ahead in enumerate(batches):
        [own] = walk_ahead(alone, batch.rows(slice(2 * k, 2 * k + 2)))
        assert own.ahead is None
        assert torch.equal(ahead.coarse, own.coarse)
        renoising = {role: _draw(2, place) for place, role in enumerate(ROLES[1:])}
        losses = [turn(each, given, renoising) for each, given in ((players, ahead), (alone, own))]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
        learners = [[each.student, *each.critics.values()] for each in (players, alone)]
        for a, b in zip(*learners, strict=True):
            for x, y in zip(gradients(a).values(), gradients(b).values(), strict=True):
                torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)
            for learner in (a, b):
                learner.optimizer.zero_grad(set_to_none=True)


def test_channels_last_changes_nothing(ddim_schedule) -> None:
    found = []
    for last in (False, True):
        players = make_players(ddim_schedule)
        if last:
            other = Backbone(make_unet(), CALL["sd15"], UNET_LORA_TARGETS, channels_last=True)
            assert other.network.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
            players.backbone.network.to(memory_format=torch.channels_last)
        student_turn(players, stored_batch(), draws())
        found.append(list(gradients(players.student).values()))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("turn", [students, critics])
def test_float16_gradients_do_not_vanish(ddim_schedule, turn) -> None:
    """Losses a thousand times smaller, as the mean over a large picture makes them: float16 alone
    loses them."""
    found: dict[str, Tensor] = {}
    small = {"relative_weight": 1e-3, "absolute_weight": 1e-3}
    for name, dtype, scaled in (
        ("whole", torch.float32, True),
        ("scaled", torch.float16, True),
        ("bare", torch.float16, False),
    ):
        players = make_players(ddim_schedule, dtype=dtype, **small)
        assert players.backbone.loss_scale == (4096 if dtype == torch.float16 else 1)
        movers = [players.student] if turn is students else list(players.critics.values())
        if not scaled:
            players.backbone.loss_scale = (
                1e-4 if turn is critics else 1.0
            )  # no weight makes a critic's loss small
        turn(players, stored_batch(), draws())
        for learner in movers:
            learner.clip(0, 0.0, math.inf)
        found[name] = torch.cat(
            [g.flatten() for learner in movers for g in gradients(learner).values()]
        )
    error = {
        name: float((found[name] - found["whole"]).norm() / found["whole"].norm())
        for name in ("scaled", "bare")
    }
    assert error["scaled"] < 0.02, error
    assert error["bare"] > 0.1, error


def test_float16_that_overflows_is_taken_again_at_a_lower_scale(ddim_schedule) -> None:
    found = []
    for scale in (4096.0, 2.0**52):
        players = make_players(ddim_schedule, dtype=torch.float16)
        players.backbone.loss_scale = scale
        losses = turns(players, stored_batch(), draws(), 0)
        assert players.backbone.loss_scale == scale
        learners = [players.student, *players.critics.values()]
        found.append(
            (
                losses,
                torch.cat(
                    [g.flatten() for learner in learners for g in gradients(learner).values()]
                ),
            )
        )
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-3)
    assert (found[1][1] - found[0][1]).norm() < 1e-3 * found[0][1].norm()


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("turn", [students, critics])
def test_only_the_roles_own_parameters_move(ddim_schedule, turn, kind: str) -> None:
    players = make_players(ddim_schedule, kind=kind)
    before = {name: p.clone() for name, p in players.backbone.network.named_parameters()}
    turn(players, stored_batch(kind=kind), draws())
    movers = [players.student] if turn is students else list(players.critics.values())
    for learner in movers:
        learner.step(1.0)
    moved = {
        name
        for name, p in players.backbone.network.named_parameters()
        if not torch.equal(p, before[name])
    }
    allowed = {name for learner in movers for name in players.backbone.parameters(learner.role)}
    assert moved
    assert moved <= allowed
    assert len(moved) > 0.4 * len(allowed)
