"""Can a critic tell a student from its teacher? ``python benchmarks/critic_alone.py RUN [--set
critics.loss=hinge ...]``.

The student of a trained run stands still while a fresh absolute critic learns, with the run's
settings or those given, from all but the last 80 of the run's trajectories. Those say how well it
separates: the share of them whose real position has the higher logit, by slot. Half is chance.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from rapm import config as configuration
from rapm.io import under_prefix
from rapm.models.resolve import teacher_of
from rapm.models.teacher import load_backbone
from rapm.network import ABSOLUTE_CRITIC, STUDENT
from rapm.objective import Conditioning, margin, repeat, student_step
from rapm.run import Run
from rapm.train import batch_of, make_players
from rapm.trajectories import TrajectoryStore
from rapm.turns import Players

HELD_OUT = 80
Pair = tuple[
    Tensor, Tensor, Conditioning
]  # of one trajectory: z~_n, z_n^phi, each [N, C, H, W], and its prompt N times


@torch.no_grad()
def pairs(players: Players, store: TrajectoryStore) -> Iterator[Pair]:
    slots = list(range(players.grid.slots))[::-1]
    for k in range(len(store)):
        batch = batch_of([store[k]], players.backbone.device)
        at = players.positions(slots, batch.coarse[:, -1], batch)
        with players.backbone.role(STUDENT):
            fake = student_step(
                players.backbone, players.schedule, players.grid, slots, at.start, at.conditioning
            )
        yield at.absolute, fake, at.conditioning


def logits(players: Players, pair: Pair, seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """What the critic says of real and fake positions, slots from high noise to low."""
    real, fake, conditioning = pair
    slots = list(range(len(real)))[::-1]
    draws = players.renoising((1, *real.shape[1:]), torch.Generator().manual_seed(seed))
    t, real_noise, fake_noise = draws.of(slots, players.backbone.device)
    shown = torch.cat(
        [players.shown(slots, real, t, real_noise), players.shown(slots, fake, t, fake_noise)]
    )
    both = players.logits(ABSOLUTE_CRITIC, shown, torch.cat([t, t]), repeat(conditioning, 2))
    halves = [x.chunk(2) for x in both]
    return [real for real, _ in halves], [fake for _, fake in halves]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--turns", type=int, default=320)
    arguments = parser.parse_args()
    run = Run.existing(arguments.run)
    config = configuration.load(arguments.run / "config.toml", settings=arguments.settings)
    teacher, store = teacher_of(config), TrajectoryStore.open(run.trajectories)
    players = make_players(config, load_backbone(teacher, config, "cpu"), store, teacher.schedule)
    players.backbone.load(STUDENT, under_prefix("average", run.load_checkpoint()[1]))
    seen = list(pairs(players, store))
    seen, held_out = seen[:-HELD_OUT], seen[-HELD_OUT:]
    critic = players.critics[ABSOLUTE_CRITIC]
    for turn in range(arguments.turns):
        with players.backbone.role(ABSOLUTE_CRITIC):
            loss = players.critic_loss(*logits(players, seen[turn % len(seen)], turn)).mean()
            loss.backward()
        critic.clip(turn, float(loss.detach()), config.training.gradient_clip)
        critic.step(min(1.0, (turn + 1) / 20, 2 * (arguments.turns - turn) / arguments.turns))
    with torch.no_grad(), players.backbone.role(ABSOLUTE_CRITIC):
        margins = torch.stack(
            [margin(*logits(players, pair, 1_000_000 + k)) for k, pair in enumerate(held_out)]
        )
    shares = (margins > 0).float().mean(0)  # slots from high noise to low
    found = ", ".join(f"{n}: {shares[-1 - n]:.2f}" for n in reversed(range(len(shares))))
    print(f"pairs told apart, by slot: {found}")


if __name__ == "__main__":
    main()
