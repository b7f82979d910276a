"""How far a run has got, in words."""

from __future__ import annotations

from rapm.run import Run
from rapm.trajectories import read_manifest


def standing(run: Run) -> str:
    """What is finished of it and kept, such as "a checkpoint of iteration 400 of 20,000"."""
    steps, config = run.checkpoint_steps(), run.config
    if steps:
        return f"a checkpoint of iteration {steps[-1]:,} of {config.training.iterations:,}"
    if read_manifest(run.trajectories) is not None:
        return "all trajectories, no checkpoint yet"
    shards = len(list(run.trajectories.glob("shard-*.safetensors")))
    if shards:
        rolled = min(shards * config.trajectories.shard_size, config.trajectories.count)
        return f"{rolled:,} of {config.trajectories.count:,} trajectories, no checkpoint yet"
    return "its settings, no trajectories and no checkpoint yet"
