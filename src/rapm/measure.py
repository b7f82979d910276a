"""What real passes and iterations take here, with random weights."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import psutil
import torch

from rapm.compiled import compile_blocks
from rapm.config import Config
from rapm.estimate import Gpus, Stub, kinds, teacher_pass, without_weights
from rapm.methods import METHODS, Batch
from rapm.models.teacher import Teacher, load_backbone
from rapm.train import gradients


@dataclass(frozen=True)
class Measured:
    """Seconds of a fine step of one trajectory and of iterations, and bytes at the peak."""

    fine_step: float
    iterations: Mapping[str, float]
    peak: int


def measure(config: Config, teacher: Teacher, repeats: int = 3) -> Measured:
    """Makes real passes and iterations on the run's own device; the first are not timed.

    Weights are random. On a CPU the peak is that of the whole process.
    """
    device, settings = config.torch_device, config.trajectories
    store, rows = Stub(config, teacher, device), min(settings.batch_size, settings.count)
    backbone = load_backbone(without_weights(teacher), config, device)
    fine_step = duration(teacher_pass(config, backbone, store, rows), device, repeats) / rows
    method = METHODS[config.method](config, backbone, teacher.schedule, store)
    batch = Batch.of([store[0]] * config.training.batch_size, backbone.device)
    if config.training.compile:
        compile_blocks(backbone)

    def iteration(k: int) -> None:
        gradients(method, k, batch)
        for name in method.learning(k):
            method.learners[name].step(0.0)

    own = {name: partial(iteration, numbers[0]) for name, numbers in kinds(method).items()}
    seconds = {name: duration(work, device, repeats) for name, work in own.items()}
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else peak_of_process()
    return Measured(fine_step, seconds, peak)


def peak_of_process() -> int:
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource

    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held if sys.platform == "darwin" else 1024 * held


def duration(work: Callable[[], object], device: str, repeats: int) -> float:
    """The median of ``repeats`` after one that is not counted."""
    taken = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[1:])


def gpus_here() -> Gpus:
    """The GPU here: its rate at a large bfloat16 product, TFLOP/s, and memory, GiB. {}: none."""
    if not torch.cuda.is_available():
        return {}
    square = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    rate = 2 * 4096**3 / duration(lambda: square @ square, "cuda", 5) / 1e12
    return {torch.cuda.get_device_name(): (rate, torch.cuda.mem_get_info()[1] / 2**30)}
