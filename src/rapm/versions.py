"""What a result was computed with."""

from __future__ import annotations

import platform
from importlib.metadata import version

LIBRARIES = ("rapm", "torch", "diffusers", "transformers", "peft", "safetensors")


def versions() -> dict[str, str]:
    """Python's version and those of the libraries that numbers depend on."""
    return {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES}
