"""Methods of distillation, one file each."""

from __future__ import annotations

from rapm.methods.base import Batch, Method
from rapm.methods.midpoint import Midpoint
from rapm.methods.rapm import Rapm

METHODS: dict[str, type[Method]] = {"rapm": Rapm, "midpoint": Midpoint}

__all__ = ["METHODS", "Batch", "Method", "Midpoint", "Rapm"]
