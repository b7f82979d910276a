"""One frozen network, four roles. The only file that touches peft's adapters.

The teacher is the network with no adapter; the student and the two critics are one LoRA adapter
each. Nothing is copied. peft makes, names and saves the adapters; how a layer applies one is ours,
see :func:`_apply`.

Two more facts of peft shape this file. ``set_adapter`` walks the whole model and turns
``requires_grad`` of all other adapters off, which silently cuts graphs built in another role; so
the tuner layers are listed once and their active adapter is set directly, and every adapter keeps
``requires_grad``. And a graph with gradient checkpointing recomputes with whatever adapter is
active during backward; so a graph must be walked inside the role that built it, and roles do not
nest.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from rapm.errors import UserError
from rapm.objective import Conditioning

TEACHER, STUDENT, RELATIVE_CRITIC, ABSOLUTE_CRITIC = (
    "teacher",
    "student",
    "relative_critic",
    "absolute_critic",
)
Call = Callable[[nn.Module, Tensor, Tensor, Conditioning], Tensor]


class _LastTapReached(Exception):
    """Leaves the network's forward once nothing that is still to come is needed."""


def _apply(layer: Any, x: Tensor) -> Tensor:
    """What an adapted layer gives in the role that is on: ``W x + b + B A x``.

    peft's own forward brings ``x`` to the adapter's float32 for each layer anew: next to a bfloat16
    network this keeps three copies in float32 of what query, key and value share, until the
    backward pass, and multiplies matrices at a GPU's slowest rate. Here the adapter's weights,
    which are small, come to the network's dtype instead; their gradients arrive in float32.
    """
    role = None if layer._disable_adapters else layer._active_adapter[0]
    if role not in layer.lora_A:
        return layer.base_layer(x)
    a, b = layer.lora_A[role], layer.lora_B[role].weight.to(x.dtype)
    if isinstance(a, nn.Conv2d):
        below = nn.functional.conv2d(x, a.weight.to(x.dtype), None, a.stride, a.padding, a.dilation)
        return layer.base_layer(x).add_(
            nn.functional.conv2d(below, b)
        )  # in place: backward passes need no layer's output
    rows = x.flatten(0, -2)
    out = layer.base_layer(rows).addmm_(rows @ a.weight.to(x.dtype).t(), b.t())
    return out.unflatten(0, x.shape[:-1])


@cache
def _adapted(layer: type) -> type:
    """peft's kind of layer with :func:`_apply` for a forward; a class, since torch.compile takes
    layers for different functions where each has a forward in an attribute of its own."""
    return type(layer.__name__, (layer,), {"forward": _apply})


class Backbone:
    """A frozen denoising network and the adapters that play on it.

    Args:
        network: a diffusers model; it is frozen, and its adapters are added here.
        call: ``(network, z, t, conditioning) -> prediction`` in the network's own dtype, a family's
            knowledge.
        lora_targets: names of the modules that get LoRA unless a role names its own.
        taps: module paths whose outputs are the features, in the order they are reached.
        gradient_checkpointing: trade a second forward for memory; gradients are the same.
        channels_last: convolutions' memory layout.
    """

    def __init__(
        self,
        network: nn.Module,
        call: Call,
        lora_targets: Sequence[str],
        taps: Sequence[str] = (),
        *,
        gradient_checkpointing: bool = False,
        channels_last: bool = False,
    ) -> None:
        self.network: Any = network.requires_grad_(False).eval()
        self.device: torch.device = self.network.device
        self.dtype: torch.dtype = (
            self.network.dtype
        )  # asked once: diffusers walks the whole network to answer
        # What losses are multiplied by before their backward pass, and gradients divided by after
        # it: float16 holds nothing below 6e-8, and a gradient of one element's share of a mean is
        # soon less.
        self.loss_scale = 4096.0 if self.dtype == torch.float16 else 1.0
        self.call, self.lora_targets = call, tuple(lora_targets)
        self.configs: dict[str, LoraConfig] = {}
        self.playing: str | None = None  # the role that is on
        self._layers: list[Any] = []
        self._features: list[Tensor] | None = None
        self._taps = len(taps)
        for path in taps:
            network.get_submodule(path).register_forward_hook(self._tap)
        if gradient_checkpointing:
            self.network.enable_gradient_checkpointing()
        if channels_last:
            self.network.to(memory_format=torch.channels_last)

    # ---- roles

    def check_targets(self, targets: Sequence[str]) -> None:
        """
        Raises:
            UserError: a name belongs to no linear or convolution layer of the network.
        """
        layers = [
            name
            for name, m in self.network.named_modules()
            if isinstance(m, nn.Linear | nn.Conv2d | BaseTunerLayer)
        ]
        for target in targets:
            if not any(name == target or name.endswith(f".{target}") for name in layers):
                raise UserError(
                    f"LoRA target '{target}' is the name of no linear or convolution layer of this "
                    f"network"
                )

    def add_role(self, role: str, rank: int, targets: Sequence[str], seed: int) -> None:
        """Adds a LoRA adapter, float32, with alpha = rank (scale 1), that leaves the network's
        output unchanged at first.

        Args:
            targets: names or endings of names of the modules that get LoRA; see
                :meth:`check_targets`.
            seed: of its first weights.
        """
        assert self.playing is None and role not in self.configs, (
            f"role {role} added twice or inside a role"
        )
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets))
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "Already found a `peft_config`"
            )  # several adapters are the point
            torch.manual_seed(seed)
            self.network.add_adapter(config, adapter_name=role)
        self.configs[role] = config
        self._layers = [
            module for module in self.network.modules() if isinstance(module, BaseTunerLayer)
        ]
        for layer in self._layers:
            if type(layer).forward is not _apply:
                layer.__class__ = _adapted(type(layer))
            for part in (layer.lora_A, layer.lora_B):
                if role in part:
                    part[role].to(self.device, torch.float32)  # peft gives it the base's dtype
        for other in self.configs:
            for parameter in self.parameters(other).values():
                parameter.requires_grad_(True)
        self._activate(None)

    def parameters(self, role: str) -> dict[str, nn.Parameter]:
        """The adapter's parameters by full name, found by the adapter's name and never by
        ``requires_grad``."""
        return {name: p for name, p in self.network.named_parameters() if f".{role}." in name}

    def lora_state(self, role: str) -> dict[str, Tensor]:
        """The adapter as peft writes it: ``<module>.lora_A.weight``, ``<module>.lora_B.weight``."""
        return get_peft_model_state_dict(self.network, adapter_name=role)

    def _activate(self, role: str | None) -> None:
        for layer in self._layers:
            layer._disable_adapters = role is None
            if role is not None:
                layer._active_adapter = [role]

    @contextmanager
    def role(self, role: str) -> Iterator[None]:
        """Plays a role. Every graph built inside must be walked inside."""
        assert self.playing is None, (
            f"role {role} inside role {self.playing}: a graph belongs to one role"
        )
        assert role == TEACHER or role in self.configs, f"no role {role}"
        self.playing = role
        self._activate(None if role == TEACHER else role)
        try:
            yield
        finally:
            self.playing = None
            self._activate(None)

    @torch.no_grad()
    def load(self, role: str, weights: Mapping[str, Tensor]) -> None:
        """Gives a role other weights, named as in :meth:`parameters`."""
        for name, p in self.parameters(role).items():
            p.copy_(weights[name])

    # ---- passes

    def __call__(self, z: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The prediction of the role that is on. float32 in and out; this is the one place that
        casts.

        Args:
            z: float32 [B, C, H, W].
            t: int [B].
            conditioning: tensors [B, ...].
        """
        assert self.playing is not None, "the network is called outside of any role"
        cast = {k: v.to(self.device, self.dtype) for k, v in conditioning.items()}
        return self.call(self.network, z.to(self.dtype), t.to(self.device), cast).float()

    def features(self, z: Tensor, t: Tensor, conditioning: Conditioning) -> list[Tensor]:
        """Outputs of the tapped modules, float32, first to last; the forward stops at the last
        tap."""
        assert self._taps, "this backbone has no taps"
        self._features = []
        try:
            self(z, t, conditioning)
        except _LastTapReached:
            pass
        finally:
            features, self._features = self._features, None
        return features

    def reached(self, z: Tensor, t: Tensor, conditioning: Conditioning) -> list[str]:
        """Names of the linear and convolution layers a critic's forward goes through, up to the
        last tap."""
        names: list[str] = []
        layers = [
            (name, m)
            for name, m in self.network.named_modules()
            if isinstance(m, nn.Linear | nn.Conv2d)
        ]
        hooks = [
            m.register_forward_pre_hook(lambda *_, name=name: names.append(name))
            for name, m in layers
        ]
        try:
            self.features(z, t, conditioning)
        finally:
            for hook in hooks:
                hook.remove()
        return list(dict.fromkeys(names))

    def _tap(self, module: nn.Module, arguments: tuple, output: Any) -> None:
        if self._features is None:
            return
        self._features.append((output[0] if isinstance(output, tuple) else output).float())
        if len(self._features) == self._taps:
            raise _LastTapReached
