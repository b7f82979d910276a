"""The frozen network's large weights held in fewer bits, and brought back to full precision where they are used.

Ours and not a library's, for two reasons: torchao and bitsandbytes hold linear layers only, where much of Stable Diffusion 1.5
is convolution; and diffusers' layerwise casting cannot be trained through without gradient checkpointing (docs/cost.md).
Neither the full weight nor anything else of a layer is kept for the backward pass: the weight is brought back once more there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

from rapm.errors import UserError

Kind = Literal["fp8", "int8", "nf4"]
Layer = nn.Linear | nn.Conv2d


def quantize(network: nn.Module, names: Sequence[str], kind: Kind) -> None:
    """Holds the weights of a frozen network's linear and convolution layers in fewer bits; before any adapter is added.

    The layers keep their class, by which peft makes adapters; ``weight`` becomes the packed bytes, of an integer dtype, which
    peft does not cast adapters to.

    Args:
        names: the layers' names or endings of names; the others keep their precision.
        kind: int8 and fp8 (e4m3) with one scale for each output channel; nf4, 4-bit NormalFloat in blocks of 64
            (arXiv 2305.14314), by bitsandbytes.

    Raises:
        UserError: ``nf4`` and bitsandbytes is not installed.
    """
    endings = tuple(f".{name}" for name in names)
    for name, layer in network.named_modules():
        if isinstance(layer, Layer) and f".{name}".endswith(endings):
            packed, full = (_normal_float if kind == "nf4" else _scaled)(layer, kind)
            layer.weight = nn.Parameter(packed, requires_grad=False)
            layer.forward = partial(_Apply.apply, layer, full)


def _scaled(layer: Layer, kind: Kind) -> tuple[Tensor, Callable[[], Tensor]]:
    """The largest weight of an output channel takes the largest number there is."""
    weight, dtype = layer.weight.detach(), torch.int8 if kind == "int8" else torch.float8_e4m3fn
    largest = 127.0 if kind == "int8" else torch.finfo(dtype).max
    scale = (weight.float().flatten(1).abs().amax(1) / largest).clamp(min=1e-12).view(-1, *[1] * (weight.ndim - 1))
    scaled = weight.float() / scale
    scale = scale.to(weight.dtype)
    layer.register_buffer("scale", scale)
    packed = (scaled.round() if kind == "int8" else scaled).to(dtype).view(torch.int8)
    return packed, lambda: layer.weight.view(dtype).to(scale.dtype) * scale


def _normal_float(layer: Layer, kind: Kind) -> tuple[Tensor, Callable[[], Tensor]]:
    try:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    except ImportError:
        raise UserError("base_precision = 'nf4' takes bitsandbytes; install it with: pip install bitsandbytes") from None
    weight = layer.weight.detach()
    packed, state = quantize_4bit(weight.flatten(1).contiguous(), quant_type="nf4")
    layer.register_buffer("scale", state.absmax)  # the state's own, here to be seen with the layer's other tensors
    shape, flat = weight.shape, packed.shape
    # As many axes as the weight had: peft tells the kind of convolution by them.
    return packed.view(-1, *[1] * (weight.ndim - 1)), lambda: dequantize_4bit(layer.weight.view(flat), state).view(shape)


class _Apply(torch.autograd.Function):
    """A layer whose frozen weight is not kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, layer: Layer, full: Callable[[], Tensor], x: Tensor) -> Tensor:
        ctx.layer, ctx.full, ctx.shape = layer, full, x.shape
        if isinstance(layer, nn.Linear):
            return F.linear(x, full(), layer.bias)
        return layer._conv_forward(x, full(), layer.bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, Tensor]:
        if isinstance(ctx.layer, nn.Linear):
            return None, None, gradients[0] @ ctx.full()
        how = ctx.layer.stride, ctx.layer.padding, ctx.layer.dilation, ctx.layer.groups
        return None, None, conv2d_input(list(ctx.shape), ctx.full(), gradients[0], *how)
