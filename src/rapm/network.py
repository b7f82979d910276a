"""One frozen network and its adapters. The only file that touches peft.

The teacher is the network with no adapter; the student and each discriminator are one LoRA adapter
on it. Nothing is copied. peft makes, names and saves the adapters; how a layer applies one is ours,
see :func:`_apply`.

Two more facts of peft shape this file. ``set_adapter`` walks the whole model and turns
``requires_grad`` of all other adapters off, which silently cuts graphs built in another adapter.
So the tuner layers are listed once, their active adapter is set directly, and every adapter keeps
``requires_grad``. And a graph with gradient checkpointing recomputes with whatever adapter is
active during backward. So a graph is walked in the adapter that built it, and adapters do not nest.
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
from rapm.sampling import Conditioning

TEACHER, STUDENT = "teacher", "student"
Call = Callable[[nn.Module, Tensor, Tensor, Conditioning], Tensor]
FeatureMap = Callable[[Any, Tensor], Tensor]


def as_it_is(output: Any, z: Tensor) -> Tensor:
    """Of a layer that gives a map, alone or before others."""
    return output[0] if isinstance(output, tuple) else output


class _LastFeature(Exception):
    """Leaves the network's forward once nothing that is still to come is needed."""


def _apply(layer: Any, x: Tensor) -> Tensor:
    """What an adapted layer gives with the active adapter: ``W x + b + B A x``.

    peft's own forward brings ``x`` to the adapter's float32 for each layer anew. Next to a bfloat16
    network this keeps three copies in float32 of what query, key and value share, until the
    backward pass, and multiplies matrices at a GPU's slowest rate. Here the adapter's weights,
    which are small, come to the network's dtype instead; their gradients arrive in float32.
    """
    adapter = None if layer._disable_adapters else layer._active_adapter[0]
    if adapter not in layer.lora_A:
        return layer.base_layer(x)
    a, b = layer.lora_A[adapter], layer.lora_B[adapter].weight.to(x.dtype)
    if isinstance(a, nn.Conv2d):
        weight = a.weight.to(x.dtype)
        below = nn.functional.conv2d(x, weight, None, a.stride, a.padding, a.dilation)
        # In place: backward passes need no layer's output.
        return layer.base_layer(x).add_(nn.functional.conv2d(below, b))
    rows = x.flatten(0, -2)
    out = layer.base_layer(rows).addmm_(rows @ a.weight.to(x.dtype).t(), b.t())
    return out.unflatten(0, x.shape[:-1])


@cache
def _adapted(layer: type) -> type:
    """peft's kind of layer with :func:`_apply` for a forward.

    A class, since torch.compile takes layers for different functions where each has a forward in an
    attribute of its own.
    """
    return type(layer.__name__, (layer,), {"forward": _apply})


class Backbone:
    """A frozen denoising network and its adapters; a :data:`rapm.sampling.Denoiser`.

    Args:
        network: a diffusers model; it is frozen, and its adapters are added here.
        call: ``(network, z, t, conditioning) -> prediction`` in the network's own dtype.
        lora_targets: names of the modules that get LoRA unless an adapter names its own.
        feature_layers: paths of the modules whose outputs are the features, as they are reached.
        feature_map: ``(output, z) -> map [B, C, h, w]`` of a feature layer's output.
        times: what the network is fed as time, see :class:`rapm.schedule.Schedule`; the timestep
            itself when left out.
        gradient_checkpointing: trade a second forward for memory; gradients are the same.

    Usage::

        backbone.add_adapter("student", rank=16, targets=backbone.lora_targets, seed=0)
        with backbone.adapter("student"):
            prediction = backbone(z, t, conditioning)
    """

    def __init__(
        self,
        network: nn.Module,
        call: Call,
        lora_targets: Sequence[str],
        feature_layers: Sequence[str] = (),
        *,
        feature_map: FeatureMap = as_it_is,
        times: Tensor | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        self.network: Any = network.requires_grad_(False).eval()
        self.device: torch.device = self.network.device
        # Asked once: diffusers walks the whole network to answer.
        self.dtype: torch.dtype = self.network.dtype
        # What losses are multiplied by before their backward pass, and gradients divided by after
        # it: float16 holds nothing below 6e-8, and a gradient of one element's share of a mean is
        # soon less.
        self.loss_scale = 4096.0 if self.dtype == torch.float16 else 1.0
        self.call, self.lora_targets = call, tuple(lora_targets)
        self.feature_map, self.times = feature_map, times
        self.configs: dict[str, LoraConfig] = {}
        self.active: str | None = None
        self._layers: list[Any] = []
        self._features: list[Any] | None = None
        self._num_features = len(feature_layers)
        for path in feature_layers:
            network.get_submodule(path).register_forward_hook(self._keep_feature)
        if gradient_checkpointing:
            self.network.enable_gradient_checkpointing()

    # ---- adapters

    def check_targets(self, targets: Sequence[str]) -> None:
        """
        Raises:
            UserError: a name belongs to no linear or convolution layer of the network.
        """
        kinds = nn.Linear | nn.Conv2d | BaseTunerLayer
        layers = [name for name, m in self.network.named_modules() if isinstance(m, kinds)]
        for target in targets:
            if not any(name == target or name.endswith(f".{target}") for name in layers):
                raise UserError(
                    f"LoRA target '{target}' is the name of no linear or convolution layer of this "
                    "network"
                )

    def add_adapter(self, name: str, rank: int, targets: Sequence[str], seed: int) -> None:
        """Adds a LoRA adapter, float32, with alpha = rank (scale 1).

        The network's output is unchanged at first.

        Args:
            targets: names or endings of names of the modules that get LoRA.
            seed: of its first weights.
        """
        assert self.active is None and name not in self.configs, f"adapter {name} added twice"
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=self._layers_alone(targets))
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several are meant
            torch.manual_seed(seed)
            self.network.add_adapter(config, adapter_name=name)
        self.configs[name] = config
        self._layers = [m for m in self.network.modules() if isinstance(m, BaseTunerLayer)]
        for layer in self._layers:
            if type(layer).forward is not _apply:
                layer.__class__ = _adapted(type(layer))
            for part in (layer.lora_A, layer.lora_B):
                if name in part:
                    part[name].to(self.device, torch.float32)  # peft gives it the base's dtype
        for other in self.configs:
            for parameter in self.parameters(other).values():
                parameter.requires_grad_(True)
        self._activate(None)

    def _layers_alone(self, targets: Sequence[str]) -> list[str]:
        """Endings that belong to layers alone, and whole names in place of the others: ``to_out``
        is a layer in one block of FLUX.2's and a list of layers in another. peft takes both."""
        kinds, found = nn.Linear | nn.Conv2d | BaseTunerLayer, []
        modules = [(f".{name}", m) for name, m in self.network.named_modules()]
        for target in targets:
            own = [(name, m) for name, m in modules if name.endswith(f".{target}")]
            layers = [name[1:] for name, m in own if isinstance(m, kinds)]
            found += [target] if len(layers) == len(own) else layers
        return found

    def parameters(self, adapter: str) -> dict[str, nn.Parameter]:
        """By full name; found by the adapter's name and never by ``requires_grad``."""
        return {name: p for name, p in self.network.named_parameters() if f".{adapter}." in name}

    def lora_state(self, adapter: str) -> dict[str, Tensor]:
        """As peft writes it: ``<module>.lora_A.weight``, ``<module>.lora_B.weight``."""
        return get_peft_model_state_dict(self.network, adapter_name=adapter)

    def _activate(self, adapter: str | None) -> None:
        for layer in self._layers:
            own = vars(layer)  # a module's own way of setting what is plain takes 20 times as long
            own["_disable_adapters"] = adapter is None
            if adapter is not None:
                own["_active_adapter"] = [adapter]

    @contextmanager
    def adapter(self, name: str) -> Iterator[None]:
        """Makes an adapter (or ``TEACHER``) active. A graph built inside is walked inside."""
        assert self.active is None, f"adapter {name} inside {self.active}: a graph belongs to one"
        assert name == TEACHER or name in self.configs, f"no adapter {name}"
        self.active = name
        self._activate(None if name == TEACHER else name)
        try:
            yield
        finally:
            self.active = None
            self._activate(None)

    @torch.no_grad()
    def load(self, adapter: str, weights: Mapping[str, Tensor]) -> None:
        """Gives an adapter other weights, named as in :meth:`parameters`."""
        for name, p in self.parameters(adapter).items():
            p.copy_(weights[name])

    # ---- passes

    def __call__(self, z: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The prediction with the active adapter. This is the one place that casts.

        Args:
            z: float32 [B, C, H, W].
            t: int [B], on the CPU.
            conditioning: tensors [B, ...].

        Returns:
            float32 [B, C, H, W].
        """
        assert self.active is not None, "the network is called outside of any adapter"
        cast = {k: v.to(self.device, self.dtype) for k, v in conditioning.items()}
        t = t if self.times is None else self.times[t + 1].float()
        return self.call(self.network, z.to(self.dtype), t.to(self.device), cast).float()

    def features(self, z: Tensor, t: Tensor, conditioning: Conditioning) -> list[Tensor]:
        """Outputs of the feature layers, float32; the forward stops at the last one."""
        assert self._num_features, "this backbone has no feature layers"
        self._features = []
        try:
            self(z, t, conditioning)
        except _LastFeature:
            pass
        finally:
            features, self._features = self._features, None
        return [self.feature_map(output, z).float() for output in features]

    def layers_to_features(self, z: Tensor, t: Tensor, conditioning: Conditioning) -> list[str]:
        """Names of the linear and convolution layers that features depend on.

        Called is not enough: of its last block a transformer's text has no part in them.
        """
        leaves: dict[str, Tensor] = {}

        def mark(name: str, output: Tensor) -> Tensor:
            leaf = leaves.setdefault(name, torch.zeros((), device=self.device, requires_grad=True))
            return output + leaf.to(output.dtype)

        kinds = nn.Linear | nn.Conv2d
        layers = [(name, m) for name, m in self.network.named_modules() if isinstance(m, kinds)]
        hooks = [
            m.register_forward_hook(lambda _, __, output, name=name: mark(name, output))
            for name, m in layers
        ]
        try:
            with torch.enable_grad():
                features = self.features(z, t, conditioning)
                total = torch.stack([feature.sum() for feature in features]).sum()
                found = torch.autograd.grad(total, [*leaves.values()], allow_unused=True)
        finally:
            for hook in hooks:
                hook.remove()
        names = (name for name, own in zip(leaves, found, strict=True) if own is not None)
        # Where an adapter sits already, its base layer is the layer.
        return list(dict.fromkeys(name.removesuffix(".base_layer") for name in names))

    def _keep_feature(self, module: nn.Module, arguments: tuple, output: Any) -> None:
        if self._features is None:
            return
        self._features.append(output)
        if len(self._features) == self._num_features:
            raise _LastFeature
