"""What learns: an adapter's weights, the heads a discriminator has, their optimiser and average."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from rapm.errors import NonFinite, UserError
from rapm.io import under_prefix, with_prefix
from rapm.network import Backbone

OptimizerName = Literal["adamw", "adamw8bit"]


class Learner:
    """One adapter that learns.

    Args:
        adapter: its name on the backbone.
        heads: what it learns besides, for a discriminator.
        learning_rate, betas, weight_decay: AdamW's.
        optimizer: ``adamw8bit`` holds AdamW's state in 8 bits (arXiv 2110.02861).
        ema: decay of an average over its weights; 0 keeps none.

    Raises:
        UserError: ``adamw8bit`` without bitsandbytes.
    """

    def __init__(
        self,
        backbone: Backbone,
        adapter: str,
        heads: nn.Module | None = None,
        *,
        learning_rate: float,
        betas: tuple[float, float],
        weight_decay: float,
        optimizer: OptimizerName = "adamw",
        ema: float = 0.0,
    ) -> None:
        self.backbone, self.adapter, self.heads = backbone, adapter, heads
        self.learning_rate, self.ema, self.updates = learning_rate, ema, 0
        self.parameters: dict[str, nn.Parameter] = dict(backbone.parameters(adapter))
        if heads is not None:
            self.parameters |= {f"heads.{name}": p for name, p in heads.named_parameters()}
        given: dict[str, Any] = {"lr": learning_rate, "betas": betas, "weight_decay": weight_decay}
        self._make_optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer]
        if optimizer == "adamw":
            # Nothing is stepped on the meta device, where a run is only planned.
            fused = True if backbone.device.type != "meta" else None
            self._make_optimizer = partial(torch.optim.AdamW, **given, fused=fused)
        else:
            self._make_optimizer = partial(_adamw8bit(), **given)
        self.optimizer = self._make_optimizer(self.parameters.values())
        self.average = {n: p.detach().clone() for n, p in self.parameters.items()} if ema else {}

    @property
    def weights(self) -> dict[str, Tensor]:
        """What is sampled and exported: the average where there is one."""
        return self.average or {name: p.detach() for name, p in self.parameters.items()}

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Gives the adapter :attr:`weights` meanwhile; then its own back, to the bit."""
        kept = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._put(self.weights)
        try:
            yield
        finally:
            self._put(kept)

    @torch.no_grad()
    def _put(self, weights: Mapping[str, Tensor]) -> None:
        for name, p in self.parameters.items():
            p.copy_(weights[name])

    def backward(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """Carries gradients at ``outputs`` through this adapter's own graphs.

        The first stage of the chain rule, the gradient at the outputs, may have been found in
        other adapters; this is the second.
        """
        scaled = [self.backbone.loss_scale * gradient for gradient in gradients]
        with self.backbone.adapter(self.adapter):
            torch.autograd.backward(list(outputs), scaled)

    def clip(self, max_norm: float, iteration: int) -> float:
        """Takes the loss scale off the gradients, clips them, returns their norm before clipping.

        Raises:
            NonFinite: it is not a number; no weight was changed.
        """
        if self.backbone.loss_scale != 1:
            for parameter in self.parameters.values():
                if parameter.grad is not None:
                    parameter.grad /= self.backbone.loss_scale
        norm = float(nn.utils.clip_grad_norm_(self.parameters.values(), max_norm))
        if not math.isfinite(norm):
            raise NonFinite(
                f"the {self.adapter}'s gradient is not finite at iteration {iteration}; nothing "
                "was updated, and earlier checkpoints are kept: try a lower learning_rate, or "
                "precision bfloat16 or float32, with another --out"
            )
        return norm

    def step(self, rate_factor: float) -> None:
        """Takes the step its gradients ask for and clears them."""
        self.optimizer.param_groups[0]["lr"] = self.learning_rate * rate_factor
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema:
            decay = min(self.ema, (1 + self.updates) / (10 + self.updates))
            now = [p.detach() for p in self.parameters.values()]
            get_ema_multi_avg_fn(decay)(list(self.average.values()), now, 0)
        self.updates += 1

    def room_for_state(self) -> list[Tensor]:
        """As many bytes as its optimiser will hold beyond what it holds: two moments."""
        adamw = isinstance(self.optimizer, torch.optim.AdamW)
        dtype = torch.float32 if adamw else torch.uint8
        lacking = [p for p in self.parameters.values() if p not in self.optimizer.state]
        return [torch.zeros(2, *p.shape, dtype=dtype, device=p.device) for p in lacking]

    def state(self) -> dict[str, Tensor]:
        """Everything that a checkpoint needs of it."""
        return (
            with_prefix("weights", self.parameters)
            | with_prefix("average", self.average)
            | with_prefix("optimizer", optimizer_tensors(self.optimizer))
            | {"updates": torch.tensor(self.updates)}
        )

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of :meth:`state`.

        Raises:
            UserError: it is not of this learner; nothing was changed.
        """
        self._check_form(state)
        self._put(under_prefix("weights", state))
        for name, value in under_prefix("average", state).items():
            self.average[name].copy_(value)
        load_optimizer_tensors(self.optimizer, under_prefix("optimizer", state))
        self.updates = int(state["updates"])

    def _check_form(self, state: Mapping[str, Tensor]) -> None:
        """Names, types and shapes: a fused step reads what memory there is, whatever its shape."""
        own = with_prefix("weights", self.parameters) | with_prefix("average", self.average)
        expected = _form(own | {"updates": torch.tensor(0)})
        given, updates = _form(state), state.get("updates")
        if updates is not None and updates.numel() == 1 and updates > 0:
            expected |= with_prefix("optimizer", self._optimizer_form())
        names = sorted(given.keys() | expected.keys())
        wrong = [name for name in names if given.get(name) != expected.get(name)]
        if wrong:
            raise UserError(
                f"the checkpoint's {self.adapter} is not this run's: '{wrong[0]}' is "
                f"{given.get(wrong[0], 'not there')}, expected: "
                f"{expected.get(wrong[0], 'nothing of that name')}; delete the checkpoint"
            )

    def _optimizer_form(self) -> dict[str, str]:
        """What an optimiser of this kind holds after a step, asked of one for each parameter."""
        form = {}
        for index, p in enumerate(self.parameters.values()):
            like = torch.zeros_like(p)
            like.grad = torch.zeros_like(p)
            optimizer = self._make_optimizer([like])
            optimizer.step()
            own = under_prefix("0", optimizer_tensors(optimizer))
            form |= with_prefix(str(index), _form(own))
        return form


def _form(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: f"{value.dtype} {list(value.shape)}" for name, value in tensors.items()}


def learnt_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """:attr:`Learner.weights` out of what :meth:`Learner.state` gave."""
    return under_prefix("average", state) or under_prefix("weights", state)


def _adamw8bit() -> Any:
    with suppress(ImportError):
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit
    raise UserError(
        "training.optimizer = 'adamw8bit' takes bitsandbytes; install it with: "
        "pip install bitsandbytes"
    )


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of an optimiser as flat tensors, ``"<index of the parameter>.<name>"``.

    Read off ``state`` itself: bitsandbytes' ``state_dict`` hides its own in a wrapper. Its tables
    of 256 numbers are one for all parameters, which safetensors refuses; so small ones are copied.
    """
    flat = {
        f"{index}.{name}": torch.as_tensor(value)
        for index, p in enumerate(_parameters(optimizer))
        for name, value in optimizer.state.get(p, {}).items()
    }
    return {name: v.clone() if v.numel() <= 256 else v for name, v in flat.items()}


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Inverse of :func:`optimizer_tensors`; the hyperparameters stay the optimiser's own."""
    for index, p in enumerate(_parameters(optimizer)):
        own = under_prefix(str(index), tensors)
        # A whole number is a count of steps that was no tensor.
        state = {n: v.item() if v.dtype == torch.int64 else v.to(p.device) for n, v in own.items()}
        if state:
            optimizer.state[p] = state


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]
