"""The training loop: one flat function over stored trajectories."""

from __future__ import annotations

import hashlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

from rapm.compiled import check_compiled, compile_blocks
from rapm.config import Config
from rapm.discriminator import Heads
from rapm.io import under_prefix, with_prefix
from rapm.network import STUDENT, TEACHER, Backbone
from rapm.progress import track
from rapm.run import Run
from rapm.schedule import Schedule
from rapm.trajectories import Trajectory, TrajectoryStore
from rapm.turns import (
    KIND,
    Batch,
    Learner,
    Players,
    critic_turn,
    critics_alone,
    critics_play,
    student_turn,
    turns,
    walk_ahead,
)

LONGEST_UNSAVED = (
    15 * 60
)  # seconds: what a machine that goes down costs at most, however slow its iterations are


def _generator(seed: int, *what: object) -> torch.Generator:
    """Randomness as a function of the seed and what it is for."""
    digest = hashlib.sha256(repr((seed, *what)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def draw_batch(
    store: TrajectoryStore, size: int, seed: int, iteration: int, device: torch.device
) -> Batch:
    """The trajectories of an iteration: each epoch is a shuffle of all of them, a function of the
    seed and its number."""
    rows = []
    for k in range(iteration * size, (iteration + 1) * size):
        epoch, place = divmod(k, len(store))
        order = torch.randperm(len(store), generator=_generator(seed, "epoch", epoch))
        rows.append(store[int(order[place])])
    return batch_of(rows, device)


def batch_of(rows: Sequence[Trajectory], device: torch.device) -> Batch:
    """Trajectories of one size side by side."""
    conditioning = {
        name: torch.stack([row.conditioning[name] for row in rows]).to(device)
        for name in rows[0].conditioning
    }
    coarse, nudged = (
        torch.stack([getattr(row, name) for row in rows]).to(device)
        for name in ("coarse", "nudged")
    )
    return Batch(coarse, nudged, conditioning)


def rate_factor(config: Config, iteration: int) -> float:
    """Both learning rates' factor: up over the warm-up, 1, then linearly down to 0 over the last
    share ``decay``."""
    training = config.training
    up = (iteration + 1) / training.warmup if iteration < training.warmup else 1.0
    down = (
        (training.iterations - iteration) / (training.decay * training.iterations)
        if training.decay
        else 1.0
    )
    return min(1.0, up, down)


def make_players(
    config: Config, backbone: Backbone, store: TrajectoryStore, schedule: Schedule
) -> Players:
    """Adds the roles to the backbone and gives each its optimiser."""
    grid, training, seed = config.grid(), config.training, config.training.seed
    targets = backbone.lora_targets
    backbone.add_role(STUDENT, config.student.rank, config.student.targets or targets, seed)
    roles = [
        role
        for role, kind in KIND.items()
        if config.critics.adversarial_weight and any(config.slot_weights(kind))
    ]
    critics: dict[str, Learner] = {}
    if roles:
        batch = draw_batch(store, 1, seed, 0, backbone.device)
        probe = batch.coarse[:, -1], torch.zeros(1, dtype=torch.long), batch.conditioning
        with backbone.role(TEACHER), torch.no_grad():
            maps, reached = backbone.features(*probe), backbone.reached(*probe)
        endings = tuple(f".{target}" for target in config.critics.targets or targets)
        reached = [
            name.removesuffix(".base_layer") for name in reached
        ]  # where the student's adapter sits
        for place, role in enumerate(roles):
            own = [name for name in reached if name.endswith(endings)]
            backbone.add_role(role, config.critics.rank, own, seed + 1 + place)
        for place, role in enumerate(roles):
            heads = Heads(
                [x.shape[1] for x in maps], config.critics.head_width, seed + 11 + place
            ).to(backbone.device)
            rate, betas = config.critics.learning_rate, (0.0, 0.999)
            critics[role] = Learner(
                backbone, role, heads, rate, betas, training.weight_decay, training.optimizer
            )
    rate, betas = config.student.learning_rate, (0.9, 0.999)
    student = Learner(
        backbone, STUDENT, None, rate, betas, training.weight_decay, training.optimizer
    )
    return Players(config, backbone, schedule, grid, student, critics, store.unconditional)


def rehearse(players: Players, store: TrajectoryStore) -> None:
    """Takes both turns once and changes nothing: memory that does not suffice shows now and not in
    the middle of the night, when the critics come in or the largest picture does. Room for the
    state that optimisers do not have yet is held meanwhile. Compiled blocks are checked before, at
    every size.

    Raises:
        UserError: compiled blocks are wrong.
    """
    learners, backbone = [players.student, *players.critics.values()], players.backbone
    among = min(
        store.manifest["sizes"] ** 2, len(store)
    )  # however few the prompts are, all sizes are among these
    by_size = {row.coarse.shape: row for row in (store[k] for k in range(among))}
    side_by_side = players.config.training.walk_ahead * players.config.training.batch_size

    def turns_on(row: Trajectory) -> None:
        batch = walk_ahead(players, batch_of([row] * side_by_side, backbone.device))[0]
        renoising = {
            role: players.renoising(batch.coarse[:, -1].shape, _generator(0, role))
            for role in players.critics
        }
        _, walked = student_turn(players, batch, renoising)
        critic_turn(players, walked, renoising)
        for learner in learners:
            learner.optimizer.zero_grad(set_to_none=True)

    if players.config.training.compile:
        check_compiled(backbone, lambda: [turns_on(row) for row in by_size.values()])
    room = [learner.room_for_state() for learner in learners]
    turns_on(max(by_size.values(), key=lambda row: row.coarse.numel()))
    del room


def train(run: Run, backbone: Backbone, store: TrajectoryStore, schedule: Schedule) -> bool:
    """Trains a run's student from its newest checkpoint to its last iteration.

    Returns:
        Whether it was finished; False when the user stopped it (Ctrl-C), after a checkpoint was
        written.

    Raises:
        NonFinite: a loss or gradient stopped being a number.
        UserError: the newest checkpoint is damaged, or the disk is full.
    """
    config = run.config
    training = config.training
    players = make_players(config, backbone, store, schedule)
    average = {name: p.detach().clone() for name, p in players.student.parameters.items()}
    learners = {STUDENT: players.student, **players.critics}

    first, state = run.load_checkpoint()
    if state:
        for role, learner in learners.items():
            learner.load_state(under_prefix(role, state))
        stored = under_prefix("average", state)
        average = {name: stored[name].to(backbone.device) for name in average}
    if training.compile:
        compile_blocks(backbone)
    rehearse(players, store)
    run.forget_metrics_from(first)

    def save(step: int) -> None:
        parts = [with_prefix(role, learner.state()) for role, learner in learners.items()]
        run.save_checkpoint(
            step,
            {
                name: value
                for part in (*parts, with_prefix("average", average))
                for name, value in part.items()
            },
        )

    batches: list[Batch] = []
    due, started = False, time.monotonic()
    saved = started
    with (
        _stop_on_interrupt() as stopped,
        track(
            range(first, training.iterations), "training", total=training.iterations, initial=first
        ) as bar,
    ):
        for iteration in bar:
            block, place = divmod(iteration, training.walk_ahead)
            if place == 0:
                size = training.walk_ahead * training.batch_size
                batches = walk_ahead(
                    players, draw_batch(store, size, training.seed, block, backbone.device)
                )
            batch = batches[place]
            critics = players.critics if critics_play(config, iteration) else {}
            renoising = {
                role: players.renoising(
                    batch.coarse[:, -1].shape, _generator(training.seed, role, iteration)
                )
                for role in critics
            }
            factor = rate_factor(config, iteration)
            record: dict[str, float | str] = {"iteration": iteration}
            losses = turns(players, batch, renoising, iteration)
            for learner in critics.values():
                learner.step(factor)
            if not critics_alone(config, iteration):
                players.student.step(factor)
                decay = min(config.student.ema, (1 + iteration) / (10 + iteration))
                weights = [p.detach() for p in players.student.parameters.values()]
                get_ema_multi_avg_fn(decay)(list(average.values()), weights, 0)
            run.log(
                record | losses | {"rate": factor, "seconds": round(time.monotonic() - started, 3)}
            )
            stop, last = stopped(), iteration + 1 == training.iterations
            due |= (
                (iteration + 1) % training.checkpoint_every == 0
                or stop
                or time.monotonic() - saved > LONGEST_UNSAVED
            )
            # Not among iterations that walked side by side: what the student was when they did
            # would have to be saved, too.
            if last or (due and place + 1 == training.walk_ahead):
                save(iteration + 1)
                due, saved = False, time.monotonic()
                if stop and not last:
                    return False
    return True


@contextmanager
def _stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Turns the first Ctrl-C (or termination, or the terminal's end) into a request to stop after
    this iteration; the second one quits. The terminal's end is ignored where it was, as under
    nohup."""
    asked: list[int] = []

    def ask(number: int, frame: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    numbers = [signal.SIGINT, signal.SIGTERM]
    ends = [
        getattr(signal, name) for name in ("SIGHUP", "SIGBREAK") if hasattr(signal, name)
    ]  # the second is Windows'
    numbers += [number for number in ends if signal.getsignal(number) != signal.SIG_IGN]
    kept = {number: signal.signal(number, ask) for number in numbers}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
