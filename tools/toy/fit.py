"""A small trainer for the networks of the toy data set: AdamW, averaged weights, exact resume."""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from rapm.io import load_tensors, save_tensors, under_prefix, with_prefix
from rapm.optim import load_optimizer_tensors, optimizer_tensors

EMA_DECAY = 0.999


@dataclass(frozen=True)
class Stage:
    """How long and how fast a network is trained."""

    updates: int
    batch: int
    rate: float

    def rate_at(self, update: int) -> float:
        """Warm up over 200 updates, hold until half-way, then fall linearly to zero."""
        return self.rate * min(1.0, (update + 1) / 200, 2 * (self.updates - update) / self.updates)


def fit(
    name: str,
    stage: Stage,
    seed: int,
    model: nn.Module,
    loss_of: Callable[[torch.Generator], Tensor],
    state_file: Path,
    save_seconds: float = 120,
) -> None:
    """Trains ``model`` in place and leaves it with its averaged weights.

    Args:
        name: of the stage; what is drawn is a function of it, of ``seed`` and of the update.
        loss_of: the loss of one batch, drawn from the generator it is given.
        state_file: where the state is kept, so that a build that was stopped goes on as if it had
            not been.
    """
    parameters = dict(model.named_parameters())
    average = {key: value.detach().clone() for key, value in parameters.items()}
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=stage.rate, betas=(0.9, 0.99), weight_decay=1e-3, fused=True
    )
    first = 0
    if state_file.exists():
        state = load_tensors(state_file)
        first = int(state["step"])
        model.load_state_dict(under_prefix("model", state), strict=False)
        loaded = under_prefix("average", state)
        average = {
            key: loaded[key].to(value.device) for key, value in parameters.items()
        }  # files sort their keys
        load_optimizer_tensors(optimizer, under_prefix("optimizer", state))
    started = saved = time.monotonic()
    running = 0.0
    model.train()
    for step in range(first, stage.updates):
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name} {step}".encode()))
        loss = loss_of(generator)
        optimizer.param_groups[0]["lr"] = stage.rate_at(step)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        decay = min(EMA_DECAY, (1 + step) / (10 + step))
        get_ema_multi_avg_fn(decay)(
            list(average.values()), [p.detach() for p in parameters.values()], 0
        )
        running = loss.item() if step == first else running + 0.02 * (loss.item() - running)
        if not math.isfinite(running):
            raise FloatingPointError(f"{name}: the loss is {running} at update {step}")
        if step % 100 == 99 or step == stage.updates - 1:
            each = (time.monotonic() - started) / (step + 1 - first)
            left = each * (stage.updates - step - 1) / 60
            print(
                f"{name} {step + 1}/{stage.updates} loss {running:.4f} {each * 1e3:.0f} ms, "
                f"{left:.0f} min left",
                flush=True,
            )
        if time.monotonic() - saved > save_seconds or step == stage.updates - 1:
            saved = time.monotonic()
            save_tensors(
                state_file,
                with_prefix("model", parameters)
                | with_prefix("average", average)
                | with_prefix("optimizer", optimizer_tensors(optimizer))
                | {"step": torch.tensor(step + 1)},
            )
    with torch.no_grad():
        for key, value in average.items():
            parameters[key].copy_(value)
    model.eval()
