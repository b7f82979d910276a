"""The toy data set: scenes rendered by code, a teacher trained on them, an oracle that reads
them."""

from __future__ import annotations

from pathlib import Path

ASSETS = Path(__file__).parent / "assets"
TEACHER = ASSETS / "teacher"
ORACLE = ASSETS / "oracle.safetensors"
GUIDANCE_SCALE = 7.5  # what diffusers takes when none is named; the teacher is scored with it
