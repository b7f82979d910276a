"""The training loop: one flat function, for any method."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch

from rapm.compiled import check_compiled, compile_blocks
from rapm.config import Config
from rapm.errors import NonFinite
from rapm.io import under_prefix, with_prefix
from rapm.methods import Batch, Method
from rapm.progress import track
from rapm.run import Run
from rapm.sampling import seeded
from rapm.trajectories import Trajectory, TrajectoryStore

LONGEST_UNSAVED = 15 * 60  # seconds: what a machine that goes down costs at most


def train(
    run: Run,
    method: Method,
    store: TrajectoryStore,
    sample: Callable[[int], None] = lambda iteration: None,
) -> bool:
    """Trains a run's student from its newest checkpoint to its last iteration.

    Args:
        sample: draws pictures and takes scores; called with the number of iterations done, before
            the first, every ``samples.every`` and ``evaluate.every``, and after the last.

    Returns:
        Whether it was finished; False when the user stopped it, after a checkpoint was written.

    Raises:
        NonFinite: a loss or gradient stopped being a number.
        UserError: the newest checkpoint is damaged, or the disk is full.
    """
    config, settings = run.config, run.config.training
    first, state = run.load_checkpoint()
    if state:
        for name, learner in method.learners.items():
            learner.load_state(under_prefix(name, state))
    if settings.compile:
        compile_blocks(method.backbone)
    dry_run(method, store)
    run.forget_metrics_from(first)

    def due(done: int) -> bool:
        return config.samples_due(done) or config.scores_due(done)

    def save(step: int) -> None:
        learners = method.learners.items()
        parts = [with_prefix(name, learner.state()) for name, learner in learners]
        run.save_checkpoint(step, {name: value for part in parts for name, value in part.items()})

    if due(first):  # a kill may have come between a checkpoint and its pictures
        sample(first)
    started = saved = time.monotonic()
    numbers = range(first, settings.iterations)
    with (
        _stop_on_interrupt() as stopped,
        track(numbers, "training", total=settings.iterations, initial=first) as bar,
    ):
        for iteration in bar:
            batch = draw_batch(store, config, iteration, method.backbone.device)
            losses = gradients(method, iteration, batch)
            rate = rate_factor(config, iteration)
            for name in method.learning(iteration):
                method.learners[name].step(rate)
            shown = {n: f"{loss:.4f}" for n, loss in losses.items() if n.endswith("distance")}
            if shown:  # none where discriminators alone learn
                bar.set_postfix(shown, refresh=False)
            seconds = round(time.monotonic() - started, 3)
            run.log({"iteration": iteration} | losses | {"rate": rate, "seconds": seconds})
            done, stop = iteration + 1, stopped()
            last = done == settings.iterations
            overdue = time.monotonic() - saved > LONGEST_UNSAVED
            if last or stop or overdue or done % settings.checkpoint_every == 0:
                save(done)
                saved = time.monotonic()
            if stop and not last:
                return False
            if due(done):
                sample(done)
    return True


def gradients(method: Method, iteration: int, batch: Batch) -> dict[str, float]:
    """The gradients of one iteration, clipped. Returns losses and gradients' norms to log.

    Where float16 overflows they are taken again at a sixteenth of the loss scale, and so on down to
    1. A scale is a power of two: it changes nothing but what over- and underflows, and the next
    iteration begins with the whole one again.

    Raises:
        NonFinite: a loss or gradient is not a number at any scale; no weight was changed.
    """
    backbone, settings = method.backbone, method.config.training
    whole = backbone.loss_scale
    try:
        while True:
            try:
                generator = seeded(f"rapm training {settings.seed} {iteration}")
                losses = method.training_step(iteration, batch, generator)
                for name in method.learning(iteration):
                    norm = method.learners[name].clip(settings.gradient_clip, iteration)
                    losses[f"{name}_gradient"] = norm
                if not all(map(math.isfinite, losses.values())):
                    raise NonFinite(f"a loss is not finite at iteration {iteration}: {losses}")
                return losses
            except NonFinite:
                _clear(method)
                if backbone.loss_scale <= 1:
                    raise
                backbone.loss_scale /= 16
    finally:
        backbone.loss_scale = whole


def draw_batch(
    store: TrajectoryStore, config: Config, iteration: int, device: torch.device
) -> Batch:
    """The trajectories of an iteration: the next ones of a shuffle.

    Each epoch is another shuffle of all of them, a function of the seed and the epoch's number.
    """
    rows, size = [], config.training.batch_size
    for k in range(iteration * size, (iteration + 1) * size):
        epoch, place = divmod(k, len(store))
        generator = seeded(f"rapm epoch {config.training.seed} {epoch}")
        rows.append(store[int(torch.randperm(len(store), generator=generator)[place])])
    return Batch.of(rows, device)


def rate_factor(config: Config, iteration: int) -> float:
    """All learning rates' factor: up over the warm-up, 1, down to 0 over the last ``decay``."""
    training = config.training
    up = (iteration + 1) / training.warmup if iteration < training.warmup else 1.0
    left = training.iterations - iteration
    down = left / (training.decay * training.iterations) if training.decay else 1.0
    return min(1.0, up, down)


def dry_run(method: Method, store: TrajectoryStore) -> None:
    """Takes the gradients of every kind of iteration once, and changes nothing.

    So memory that does not suffice shows now and not in the middle of the night. Room for the state
    that optimisers do not have yet is held meanwhile. Compiled blocks are checked before, at every
    size.

    Raises:
        UserError: compiled blocks are wrong.
    """
    among = min(store.num_sizes**2, len(store))  # however few the prompts are, all sizes are there
    by_size = {row.absolute.shape: row for row in (store[k] for k in range(among))}
    number = method.config.training.iterations
    kinds = {method.learning(k): k for k in range(min(2, number))}

    def every_kind(row: Trajectory) -> None:
        batch = Batch.of([row] * method.config.training.batch_size, method.backbone.device)
        for iteration in kinds.values():
            method.training_step(iteration, batch, seeded("rapm dry run"))
        _clear(method)

    if method.config.training.compile:
        check_compiled(method.backbone, lambda: [every_kind(row) for row in by_size.values()])
    room = [learner.room_for_state() for learner in method.learners.values()]
    every_kind(max(by_size.values(), key=lambda row: row.absolute.numel()))
    del room


def _clear(method: Method) -> None:
    for learner in method.learners.values():
        learner.optimizer.zero_grad(set_to_none=True)


@contextmanager
def _stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Turns the first Ctrl-C into a request to stop after this iteration; the second one quits.

    So do termination and the terminal's end, unless this was ignored, as under nohup.
    """
    asked: list[int] = []

    def ask(number: int, frame: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        with suppress(OSError):  # by itself: a print may be what was interrupted
            os.write(2, b"\nsaving after this iteration; press again to quit without saving\n")

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    numbers = [signal.SIGINT, signal.SIGTERM]
    ends = [getattr(signal, name, None) for name in ("SIGHUP", "SIGBREAK")]  # Unix', Windows'
    numbers += [n for n in ends if n is not None and signal.getsignal(n) != signal.SIG_IGN]
    kept = {number: signal.signal(number, ask) for number in numbers}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
