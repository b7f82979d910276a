"""What a machine is, what it holds, and what it takes."""

from __future__ import annotations

import ctypes
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

from rapm.measure import peak_of_process


def processor() -> str:
    """The GPU's name, or the CPU's where the system tells it, else its kind."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    told = Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if told.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (names or [platform.machine()])[0]


@contextmanager
def timed(device: str, taken: list[float]) -> Iterator[None]:
    """Adds what the block took, in seconds."""
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    yield
    if device == "cuda":
        torch.cuda.synchronize()
    taken.append(time.perf_counter() - started)


class Memory:
    """Bytes at the peak since the last reset, beyond what the process held when this was made."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device == "cuda"
        self.before = 0 if self.on_gpu else psutil.Process().memory_info().rss
        self.reset()

    def reset(self) -> None:
        """Forgets earlier peaks. Elsewhere than on Linux a CPU's process has one for its life."""
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        elif sys.platform == "linux":
            if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
                trim(0)  # glibc keeps what loading has given back
            Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        if self.on_gpu:
            return torch.cuda.max_memory_allocated()
        if sys.platform != "linux":
            return peak_of_process() - self.before
        lines = Path("/proc/self/status").read_text().splitlines()
        status = dict(line.split(":", 1) for line in lines)
        return int(status["VmHWM"].split()[0]) * 1024 - self.before
