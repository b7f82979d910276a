"""The turns of an iteration: the gradients of the student and of the critics, on one network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rapm.config import Config, Kind
from rapm.discriminator import Heads
from rapm.errors import NonFinite, UserError
from rapm.io import load_optimizer_tensors, optimizer_tensors, under_prefix, with_prefix
from rapm.network import ABSOLUTE_CRITIC, RELATIVE_CRITIC, STUDENT, TEACHER, Backbone
from rapm.objective import (
    Conditioning,
    Positions,
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
    relayed_step,
    repeat,
    shown_to_critic,
    slot_groups,
    squared,
    starts,
    student_step,
)
from rapm.schedule import Grid, Schedule
from rapm.trajectories import guided


@dataclass(frozen=True)
class Batch:
    """B stored trajectories over k slots.

    Attributes:
        coarse, nudged: [B, k + 1, C, H, W] and [B, k, C, H, W].
        conditioning: [B, ...] each.
        ahead: the positions of all slots, if they were found ahead (:func:`walk_ahead`).
    """

    coarse: Tensor
    nudged: Tensor
    conditioning: Conditioning
    ahead: Positions | None = None

    def rows(self, rows: slice) -> Batch:
        """Some of the trajectories."""
        conditioning = {name: value[rows] for name, value in self.conditioning.items()}
        return Batch(
            self.coarse[rows],
            self.nudged[rows],
            conditioning,
            self.ahead and self.ahead.of(self.ahead.slots, rows),
        )


def _adamw8bit() -> Any:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise UserError(
            "training.optimizer = 'adamw8bit' takes bitsandbytes; install it with: pip install "
            "bitsandbytes"
        ) from None
    return AdamW8bit


class Learner:
    """What one role learns with: its parameters, its optimiser, for a critic its heads."""

    def __init__(
        self,
        backbone: Backbone,
        role: str,
        heads: Heads | None,
        rate: float,
        betas: tuple[float, float],
        decay: float,
        optimizer: Literal["adamw", "adamw8bit"] = "adamw",
    ):
        self.backbone, self.role, self.heads, self.rate = backbone, role, heads, rate
        self.parameters: dict[str, nn.Parameter] = dict(backbone.parameters(role))
        if heads is not None:
            self.parameters |= {f"heads.{name}": p for name, p in heads.named_parameters()}
        given: dict[str, Any] = {"lr": rate, "betas": betas, "weight_decay": decay}
        self.optimizer: torch.optim.Optimizer
        if optimizer == "adamw":
            fused = (
                True if backbone.device.type != "meta" else None
            )  # on meta nothing is stepped, but planned
            self.optimizer = torch.optim.AdamW(self.parameters.values(), **given, fused=fused)
        else:
            self.optimizer = _adamw8bit()(self.parameters.values(), **given)

    def clip(self, iteration: int, loss: float, clip: float) -> float:
        """Takes the loss scale off its gradients, clips them and returns their norm before
        clipping.

        Raises:
            NonFinite: loss or gradient is not a number; nothing was changed.
        """
        if self.backbone.loss_scale != 1:
            for parameter in self.parameters.values():
                if parameter.grad is not None:
                    parameter.grad /= self.backbone.loss_scale
        norm = float(nn.utils.clip_grad_norm_(self.parameters.values(), clip))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise NonFinite(
                f"the {self.role}'s loss ({loss:.4g}) or gradient ({norm:.4g}) is not finite at "
                f"iteration {iteration}; "
                "nothing was updated, and earlier checkpoints are kept: try a lower learning_rate, "
                "or precision bfloat16 or "
                "float32, with another --out"
            )
        return norm

    def step(self, rate_factor: float) -> None:
        """Takes the step its gradients ask for and clears them."""
        self.optimizer.param_groups[0]["lr"] = self.rate * rate_factor
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def room_for_state(self) -> list[Tensor]:
        """As many bytes as its optimiser will hold beyond what it holds."""
        dtype = (
            torch.float32 if isinstance(self.optimizer, torch.optim.AdamW) else torch.uint8
        )  # two moments
        lacking = [p for p in self.parameters.values() if p not in self.optimizer.state]
        return [torch.zeros(2, *p.shape, dtype=dtype, device=p.device) for p in lacking]

    def state(self) -> dict[str, Tensor]:
        return with_prefix("weights", self.parameters) | with_prefix(
            "optimizer", optimizer_tensors(self.optimizer)
        )

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        for name, value in under_prefix("weights", state).items():
            self.parameters[name].copy_(value)
        load_optimizer_tensors(self.optimizer, under_prefix("optimizer", state))


@dataclass(frozen=True)
class Players:
    """Everything the turns need: the network in its roles, the schedule, the grid, the settings."""

    config: Config
    backbone: Backbone
    schedule: Schedule
    grid: Grid
    student: Learner
    critics: Mapping[str, Learner]
    unconditional: Conditioning

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        training = self.config.training
        return (
            pseudo_huber(a, b, training.huber_c)
            if training.distance == "pseudo_huber"
            else squared(a, b)
        )

    def slot_weight(self, kind: Kind, slots: list[int], batch: int) -> Tensor:
        """The weight of each row of a group of slots, [k B], with 1 / (N B) in it: losses are means
        over slots and batch."""
        weights = self.config.slot_weights(kind)
        rows = torch.tensor([weights[n] for n in slots]).repeat_interleave(batch)
        return rows.to(self.backbone.device) / (self.grid.slots * batch)

    def positions(
        self, slots: list[int], z: Tensor, batch: Batch, relayed: Tensor | None = None
    ) -> Positions:
        """Where the student starts in each slot of a group, and what it is compared with there.
        Called outside of any role.

        Args:
            relayed: the nudged positions of a relay, where they are known already.
        """
        if batch.ahead:
            return batch.ahead.of(slots)
        backbone, schedule, grid = self.backbone, self.schedule, self.grid
        relative = any(self.config.slot_weights("relative"))
        if self.config.training.positions == "stored":
            with backbone.role(STUDENT):
                given = batch.coarse, batch.nudged, batch.conditioning
                return positions(backbone, schedule, grid, slots, z, *given, relative=relative)
        conditioning = repeat(batch.conditioning, len(slots))
        teacher = guided(backbone, self.unconditional, self.config.trajectories.guidance_scale)
        if self.config.training.positions == "relayed":
            start, nudged = z, relayed
            if nudged is None:
                with backbone.role(STUDENT):
                    start, nudged = relay(backbone, schedule, grid, slots, z, batch.conditioning)
            with backbone.role(TEACHER):
                absolute = follow(
                    teacher, schedule, grid, slots, nudged, conditioning, nudged=True
                )[1]
        else:
            with backbone.role(STUDENT):
                start = starts(backbone, schedule, grid, slots, [z], batch.conditioning)
            # In the first slot the student stands where the stored trajectory begins: the teacher
            # has been there already.
            done = len(z) if slots[0] == grid.slots - 1 else 0
            nudged, absolute, later = (
                batch.nudged[:done, -1],
                batch.coarse[:done, -2],
                slots[done // len(z) :],
            )
            if later:
                own = {name: value[done:] for name, value in conditioning.items()}
                with backbone.role(TEACHER):
                    walked = follow(teacher, schedule, grid, later, start[done:], own)
                nudged, absolute = torch.cat([nudged, walked[0]]), torch.cat([absolute, walked[1]])
        if relative:
            with backbone.role(STUDENT):
                nudged = from_nudged(backbone, schedule, grid, slots, nudged, conditioning)
        return Positions(slots, start, nudged, absolute, conditioning)

    def reached(self, slots: list[int], z: Tensor, batch: Batch) -> tuple[Positions, Tensor]:
        """The positions of a group of slots, and where the student's steps from there lead, [k B,
        C, H, W]. Called outside of any role; the graph of these steps is to be walked in the
        student's."""
        backbone, schedule, grid = self.backbone, self.schedule, self.grid
        if self.config.training.positions == "relayed" and len(slots) == 1 and not batch.ahead:
            with backbone.role(
                STUDENT
            ):  # one pass for where the teacher takes over and for what learns
                nudged, z_phi = relayed_step(
                    backbone, schedule, grid, slots[0], z, batch.conditioning
                )
            return self.positions(slots, z, batch, nudged.detach()), z_phi
        at = self.positions(slots, z, batch)
        with backbone.role(STUDENT):
            return at, student_step(backbone, schedule, grid, slots, at.start, at.conditioning)

    def shown(self, slots: Sequence[int], z: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Positions of a group of slots as a critic gets to see them."""
        return shown_to_critic(self.schedule, self.grid, slots, z, t, noise)

    def renoising(self, shape: Sequence[int], generator: torch.Generator) -> Renoising:
        """What a critic is shown a batch of (B, C, H, W) under."""
        critics = self.config.critics
        return Renoising.draw(
            self.grid, shape, generator, shared=critics.noise == "shared", power=critics.noise_power
        )

    def critic_loss(self, real: Sequence[Tensor], fake: Sequence[Tensor]) -> Tensor:
        return (hinge_critic if self.config.critics.loss == "hinge" else relativistic)(real, fake)

    def logits(
        self, role: str, shown: Tensor, t: Tensor, conditioning: Conditioning
    ) -> list[Tensor]:
        """What a critic says of re-noised positions. Called inside its role."""
        heads = self.critics[role].heads
        assert heads is not None
        return heads(self.backbone.features(shown, t, conditioning))


KIND: dict[str, Kind] = {RELATIVE_CRITIC: "relative", ABSOLUTE_CRITIC: "absolute"}


@dataclass(frozen=True)
class Walked:
    """Where the student came to in a group of slots, [k B, C, H, W], without a graph, and what it
    is compared with there."""

    at: Positions
    reached: Tensor


def walk_ahead(players: Players, batch: Batch) -> list[Batch]:
    """The batches of ``training.walk_ahead`` iterations, whose trajectories lie one after the other
    in ``batch``.

    Of several iterations the positions are found here, side by side, with the student as it is now;
    of a single one on its way.
    """
    training, every = players.config.training, list(range(players.grid.slots - 1, -1, -1))
    if training.walk_ahead > 1:
        batch = replace(batch, ahead=players.positions(every, batch.coarse[:, -1], batch))
    return [
        batch.rows(slice(k, k + training.batch_size))
        for k in range(0, len(batch.coarse), training.batch_size)
    ]


@torch.no_grad()
def walk(players: Players, batch: Batch) -> list[Walked]:
    """The student's way through all slots: what a turn of the critics alone takes."""
    found, z = [], batch.coarse[:, -1]
    for slots in slot_groups(players.grid.slots, players.config.training.slot_batch):
        at, reached = players.reached(slots, z, batch)
        found.append(Walked(at, reached))
        z = reached[-len(z) :]
    return found


def student_turn(
    players: Players, batch: Batch, renoising: Mapping[str, Renoising]
) -> tuple[dict[str, float], list[Walked]]:
    """Accumulates the student's gradient over the slots, from high noise to low. Returns losses to
    log and the way it went, so that critics can learn from that next without a pass of the
    student's or the teacher's.

    Every graph lives in one role: the losses' gradient with respect to the student's positions is
        found first, each critic's in
    the critic's role, then carried through the student's own graph.
    """
    backbone, device = players.backbone, players.backbone.device
    sums: dict[str, float] = {}
    found, z = [], batch.coarse[:, -1]
    for slots in slot_groups(players.grid.slots, players.config.training.slot_batch):
        at, z_phi = players.reached(slots, z, batch)
        leaf = z_phi.detach().requires_grad_()
        gradient = torch.zeros_like(leaf)
        targets: dict[Kind, Tensor] = {"relative": at.relative, "absolute": at.absolute}
        for role, kind in KIND.items():
            weight = players.slot_weight(kind, slots, len(z))
            if not weight.any():
                continue
            losses = {"distance": players.distance(leaf, targets[kind])}
            pull = torch.autograd.grad(losses["distance"].sum(), leaf)[0]
            if role in renoising:
                t, real_noise, fake_noise = renoising[role].of(slots, device)
                with backbone.role(role):
                    fake = players.logits(
                        role, players.shown(slots, leaf, t, fake_noise), t, at.conditioning
                    )
                    if players.config.critics.loss == "hinge":
                        adversarial = hinge_student(fake)
                    else:
                        shown = players.shown(slots, targets[kind], t, real_noise)
                        with torch.no_grad():
                            real = players.logits(role, shown, t, at.conditioning)
                        adversarial = relativistic(fake, real)
                    push = torch.autograd.grad(backbone.loss_scale * adversarial.sum(), leaf)[0]
                pull += players.config.critics.adversarial_weight * as_long_as(push, pull)
                losses["adversarial"] = adversarial
            gradient += weight[:, None, None, None] * pull
            for name, loss in losses.items():
                share = float(loss.detach().sum()) / (players.grid.slots * len(z))
                sums[f"{kind}_{name}"] = sums.get(f"{kind}_{name}", 0.0) + share
        with backbone.role(STUDENT):
            z_phi.backward(backbone.loss_scale * gradient)
        found.append(Walked(at, z_phi.detach()))
        z = z_phi.detach()[-len(z) :]
    return sums, found


def critic_turn(
    players: Players, walked: Sequence[Walked], renoising: Mapping[str, Renoising]
) -> dict[str, float]:
    """Accumulates both critics' gradients over the slots. Returns losses and margins to log."""
    backbone, device = players.backbone, players.backbone.device
    sums: dict[str, float] = {}
    for one in walked:
        at, fake = one.at, one.reached
        for role, draws in renoising.items():
            real = at.relative if role == RELATIVE_CRITIC else at.absolute
            t, real_noise, fake_noise = draws.of(at.slots, device)
            with backbone.role(role):
                shown = torch.cat(
                    [
                        players.shown(at.slots, real, t, real_noise),
                        players.shown(at.slots, fake, t, fake_noise),
                    ]
                )
                logits = players.logits(role, shown, torch.cat([t, t]), repeat(at.conditioning, 2))
                real_logits, fake_logits = zip(*(x.chunk(2) for x in logits), strict=True)
                share = len(at.slots) / (players.grid.slots * len(fake))
                loss = share * players.critic_loss(real_logits, fake_logits).sum()
                (backbone.loss_scale * loss).backward()
            for name, value in (
                ("critic", loss),
                ("margin", share * margin(real_logits, fake_logits).sum()),
            ):
                sums[f"{KIND[role]}_{name}"] = sums.get(f"{KIND[role]}_{name}", 0.0) + float(
                    value.detach()
                )
    return sums


def critics_play(config: Config, iteration: int) -> bool:
    """Whether critics take part in an iteration."""
    return config.critics.adversarial_weight > 0 and iteration >= _critics_start(config)


def critics_alone(config: Config, iteration: int) -> bool:
    """Whether an iteration belongs to the critics' head start, in which the student does not
    learn."""
    passed = iteration - _critics_start(config)
    return (
        critics_play(config, iteration)
        and passed < config.critics.head_start * config.training.iterations
    )


def _critics_start(config: Config) -> int:
    return math.ceil(config.critics.start * config.training.iterations)


def turns(
    players: Players, batch: Batch, renoising: Mapping[str, Renoising], iteration: int
) -> dict[str, float]:
    """The gradients of one iteration, clipped: the student's, unless critics are alone, and those
    of the critics that play.

    Where float16 overflows they are taken again at a sixteenth of the loss scale, and so on down to
    1. A scale is a power of
    two: it changes nothing but what over- and underflows, and the next iteration begins with the
        whole one again.

    Returns:
        Losses to log.

    Raises:
        NonFinite: a loss or gradient is not a number at any scale; nothing was changed.
    """
    backbone, clip, whole = (
        players.backbone,
        players.config.training.gradient_clip,
        players.backbone.loss_scale,
    )
    learners = {role: players.critics[role] for role in renoising}

    def taken() -> dict[str, float]:
        if critics_alone(players.config, iteration):
            losses, walked = {}, walk(players, batch)
        else:
            losses, walked = student_turn(players, batch, renoising)
            losses["gradient"] = players.student.clip(iteration, sum(losses.values()), clip)
        losses |= critic_turn(players, walked, renoising)
        for role, learner in learners.items():
            kind = KIND[role]
            losses[f"{kind}_gradient"] = learner.clip(iteration, losses[f"{kind}_critic"], clip)
        return losses

    try:
        while True:
            try:
                return taken()
            except NonFinite:
                for learner in (players.student, *learners.values()):
                    learner.optimizer.zero_grad(set_to_none=True)
                if backbone.loss_scale <= 1:
                    raise
                backbone.loss_scale /= 16
    finally:
        backbone.loss_scale = whole
