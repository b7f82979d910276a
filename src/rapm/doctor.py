"""What a machine has and lacks, each problem with its remedy."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch
from huggingface_hub import constants

from rapm.versions import versions

EXTRAS = {
    "bitsandbytes": "base_precision = 'nf4' and training.optimizer = 'adamw8bit'",
    "datasets": "prompts out of hub data sets",
}


def examine() -> Iterator[str]:
    """Lines to print; those that begin with "!" are problems."""
    yield ", ".join(
        f"{name.capitalize() if name == 'python' else name} {number}"
        for name, number in versions().items()
    )
    for name, use in EXTRAS.items():
        try:
            yield f"{name} {version(name)}"
        except PackageNotFoundError:
            yield f"{name} is not installed; only {use} take it: pip install {name}"
    yield from _gpu()
    memory = psutil.virtual_memory()
    yield (
        f"Memory {memory.total / 2**30:.1f} GiB, {memory.available / 2**30:.1f} free, "
        f"{torch.get_num_threads()} CPU threads"
    )
    free = shutil.disk_usage(Path.cwd()).free
    yield f"Disk {free / 2**30:.1f} GiB free here"
    if free < 10 << 30:
        yield (
            "! Little disk is left: 'rapm plan' says what a run takes; make room, or name an "
            "--out elsewhere"
        )
    yield from _hub()


def _gpu() -> Iterator[str]:
    if not torch.cuda.is_available():
        if torch.version.cuda is None:
            yield (
                "! This torch was built without CUDA, fine for the toy teacher; for others "
                "install torch for your GPU"
            )
        else:
            yield (
                "! torch sees no GPU, fine for the toy teacher; for others see that the driver "
                "works (nvidia-smi)"
            )
        if not cpu_has_bfloat16():
            yield (
                "! This CPU has no bfloat16, which takes it tens of times as long as float32: "
                "--set precision=float32"
            )
        return
    free, total = torch.cuda.mem_get_info()
    yield (
        f"{torch.cuda.get_device_name()}, {total / 2**30:.1f} GiB, {free / 2**30:.1f} free, "
        f"CUDA "
        f"{torch.version.cuda}"
    )
    if free < 0.8 * total:
        yield "! Other programs hold much of the GPU's memory; close them before a run"
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        yield "! This GPU has no bfloat16; take precision = 'float16'"


def cpu_has_bfloat16() -> bool:
    """Whether the CPU has instructions for bfloat16; without them torch takes tens of times as long
    as in float32."""
    supported = getattr(
        torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None
    )  # absent where torch was built without oneDNN
    return supported is not None and supported()


def _hub() -> Iterator[str]:
    cache = Path(constants.HF_HUB_CACHE)
    models = sorted(
        folder.name.removeprefix("models--").replace("--", "/")
        for folder in cache.glob("models--*")
    )
    yield f"Hub cache {cache}: {', '.join(models) or 'no models'}"
    if constants.HF_HUB_OFFLINE:
        yield (
            "! HF_HUB_OFFLINE is set: only models in the cache can be teachers; unset it to "
            "download others"
        )
