"""rapm: distil a diffusers text-to-image model into a 1 to 8 step generator, from prompts alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rapm.config import Config
    from rapm.errors import NonFinite, UserError
    from rapm.methods import Method, Midpoint, Rapm
    from rapm.network import Backbone
    from rapm.pipeline import distill
    from rapm.run import Run
    from rapm.schedule import Grid, Schedule
    from rapm.trajectories import TrajectoryStore

# Loaded when first asked for: `import rapm` and `rapm --help` must not wait for torch.
_HOMES = {
    "Backbone": "network",
    "Config": "config",
    "Grid": "schedule",
    "Method": "methods",
    "Midpoint": "methods",
    "NonFinite": "errors",
    "Rapm": "methods",
    "Run": "run",
    "Schedule": "schedule",
    "TrajectoryStore": "trajectories",
    "UserError": "errors",
    "distill": "pipeline",
}
__all__ = [
    "Backbone",
    "Config",
    "Grid",
    "Method",
    "Midpoint",
    "NonFinite",
    "Rapm",
    "Run",
    "Schedule",
    "TrajectoryStore",
    "UserError",
    "distill",
]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module 'rapm' has no attribute '{name}'")
    return getattr(import_module(f"rapm.{_HOMES[name]}"), name)
