"""What is looked at while a run trains: samples, scores, signs that it goes wrong, its page."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import psutil
import torch

from rapm.progress import say
from rapm.report import write_report
from rapm.run import Run
from rapm.samples import TrainingSamples, row_file
from rapm.signs import find_signs
from rapm.trackers import Tracker


class Watch:
    """Called by :func:`rapm.train.train` with the number of iterations done.

    Draws and measures samples, takes scores, says what looks wrong, once for each kind, and writes
    the page anew. Each time is a record in the run's ``samples.jsonl``.

    Args:
        samples: draws a row; returns what it measures.
        scores: of the student as it stands; None where nothing can score it.
        trackers: are told all that is logged.
    """

    def __init__(
        self,
        run: Run,
        samples: TrainingSamples,
        scores: Callable[[], Mapping[str, float]] | None = None,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        self.run, self.samples, self.scores, self.trackers = run, samples, scores, trackers
        self._said: set[str] = set()
        if trackers:
            run.listeners.append(self._logged)

    def _logged(self, record: Mapping[str, Any]) -> None:
        values = {k: v for k, v in record.items() if k not in ("iteration", "seconds")}
        for tracker in self.trackers:
            tracker.log(record["iteration"], values, {})

    def __call__(self, iteration: int) -> None:
        run, config = self.run, self.run.config
        record: dict[str, Any] = {
            "iteration": iteration,
            "memory_gib": memory_held(config.torch_device),
        }
        if config.samples_due(iteration):
            record |= self.samples(iteration)
        if self.scores and config.scores_due(iteration):
            record |= self.scores()
        before = [r for r in run.read_samples() if r["iteration"] < iteration]
        signs = find_signs(config, run.read_metrics(), [*before, record])
        run.log_sample(record | {"signs": [sign.name for sign in signs]})
        for sign in signs:
            if sign.name not in self._said:
                say(f"Warning at iteration {iteration:,}: {sign}")
                self._said.add(sign.name)
        for tracker in self.trackers:
            values = {f"samples/{k}": v for k, v in record.items() if k != "iteration"}
            row = row_file(run.samples, iteration)
            tracker.log(iteration, values, {"samples": row} if row.is_file() else {})
        try:
            write_report([run], run.page)
        except Exception as error:  # no page is worth a night of training
            warnings.warn(f"the page could not be written: {error!r}", stacklevel=2)


def memory_held(device: str) -> float:
    """GiB that this process has held at its peak on the GPU, or holds now in memory."""
    if device == "cuda":
        held = torch.cuda.max_memory_allocated()
    else:
        held = psutil.Process().memory_info().rss
    return round(held / 2**30, 3)
