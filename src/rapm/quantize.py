"""The frozen network's large weights held in fewer bits, brought back where they are used.

Ours and not a library's, for two reasons: torchao and bitsandbytes hold linear layers only, where
much of Stable Diffusion 1.5 is convolution; and diffusers' layerwise casting cannot be trained
through without gradient checkpointing (docs/cost.md). Neither the full weight nor anything else of
a layer is kept for the backward pass: the weight is brought back once more there.
"""

from __future__ import annotations

from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

from rapm.errors import UserError

Kind = Literal["int8", "nf4"]
Layer = nn.Linear | nn.Conv2d


def quantize(network: nn.Module, kind: Kind, device: str | None = None) -> None:
    """Holds a frozen network's weights in fewer bits; before any adapter is added.

    Of its blocks all linear and convolution layers; what comes before and after keeps its
    precision. The layers keep their class, by which peft chooses an adapter's too; ``weight``
    becomes the packed bytes, of an integer dtype, which peft does not cast adapters to.

    Args:
        kind: int8 with one scale for each output channel; nf4, 4-bit NormalFloat in blocks of 64
            (arXiv 2305.14314), by bitsandbytes.
        device: where the network goes, layer by layer, so that it is never whole there.

    Raises:
        UserError: ``nf4`` and bitsandbytes is not installed.
    """
    pack, full = {"int8": (_pack_int8, _full_int8), "nf4": (_pack_nf4, _full_nf4)}[kind]
    blocks = [m for m in network.modules() if isinstance(m, nn.ModuleList)]
    layers: dict[Any, None] = {  # in order, each once: lists may be in lists
        m: None for each in blocks for m in each.modules() if isinstance(m, Layer)
    }
    for layer in layers:
        weight = pack(layer, layer.weight.detach().to(device))
        layer.weight = nn.Parameter(weight, requires_grad=False)
        # Methods and no closures: torch.compile takes the layers for one function then.
        layer.full, layer.forward = MethodType(full, layer), MethodType(_forward, layer)
    network.to(device)


def _pack_int8(layer: Any, weight: Tensor) -> Tensor:
    """The largest weight of each output channel becomes 127; gives the layer its scales."""
    scale = (weight.float().flatten(1).abs().amax(1) / 127.0).clamp(min=1e-12)
    scale = scale.view(-1, *[1] * (weight.ndim - 1))
    layer.register_buffer("scale", scale.to(weight.dtype))
    return (weight.float() / scale).round().to(torch.int8)


def _full_int8(layer: Any) -> Tensor:
    """Of the scale's dtype, and on a GPU in one pass over the bytes."""
    return layer.weight * layer.scale


def _pack_nf4(layer: Any, weight: Tensor) -> Tensor:
    try:
        from bitsandbytes.functional import quantize_4bit
    except ImportError:
        raise UserError(
            "base_precision = 'nf4' takes bitsandbytes; install it with: pip install bitsandbytes"
        ) from None
    packed, layer.state = quantize_4bit(weight.flatten(1).contiguous(), quant_type="nf4")
    # Here to be seen with the layer's other tensors.
    layer.register_buffer("scale", layer.state.absmax)
    layer.shapes = packed.shape, weight.shape
    # As many axes as the weight had: peft tells the kind of convolution by them.
    return packed.view(-1, *[1] * (weight.ndim - 1))


def _full_nf4(layer: Any) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    packed, whole = layer.shapes
    return dequantize_4bit(layer.weight.view(packed), layer.state).view(whole)


def _forward(layer: Any, x: Tensor) -> Tensor:
    return _Apply.apply(layer, x)


class _Apply(torch.autograd.Function):
    """A layer whose frozen weight is not kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, layer: Any, x: Tensor) -> Tensor:
        ctx.layer, ctx.shape, full = layer, x.shape, layer.full()
        return (
            F.linear(x, full, layer.bias)
            if isinstance(layer, nn.Linear)
            else layer._conv_forward(x, full, layer.bias)
        )

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        layer, full = ctx.layer, ctx.layer.full()
        if isinstance(layer, nn.Linear):
            return None, gradients[0] @ full
        how = layer.stride, layer.padding, layer.dilation, layer.groups
        return None, conv2d_input(list(ctx.shape), full, gradients[0], *how)
