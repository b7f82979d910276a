"""Frozen weights held in fewer bits: the network of the weights they stand for, to the last bit, at
a fraction of the bytes."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from conftest import SMALL
from test_network import CALL, backbone, inputs, shake
from torch import Tensor, nn

from rapm.errors import UserError
from rapm.models.stable_diffusion import UNET_LORA_TARGETS, unet_taps
from rapm.network import STUDENT, TEACHER, Backbone
from rapm.quantize import Kind, quantize

KINDS: tuple[Kind, ...] = ("int8", "fp8", "nf4")


def held(
    kind: str, base: Kind, checkpointing: bool = False, dtype: torch.dtype = torch.float32
) -> Backbone:
    body = backbone(kind=kind, dtype=dtype)
    quantize(body.network, UNET_LORA_TARGETS, base)
    return Backbone(
        body.network,
        CALL[kind],
        UNET_LORA_TARGETS,
        unet_taps(body.network),
        gradient_checkpointing=checkpointing,
    )


def full(layer: nn.Module) -> Tensor:
    return layer.full()  # type: ignore[operator]


def quantized_layers(network: nn.Module) -> dict[str, nn.Module]:
    return {
        name: m
        for name, m in network.named_modules()
        if isinstance(m, nn.Linear | nn.Conv2d) and not m.weight.is_floating_point()
    }


@pytest.mark.parametrize("base", KINDS)
@pytest.mark.parametrize("kind", SMALL)
def test_it_is_the_network_of_the_weights_it_stands_for(kind: str, base: Kind) -> None:
    """Predictions and the student's gradients, with and without checkpointing."""
    found = []
    for checkpointing in (False, True):
        body = held(kind, base, checkpointing)
        plain = backbone(kind=kind)
        layers = quantized_layers(body.network)
        assert set(layers) == {
            name
            for name, m in plain.network.named_modules()
            if isinstance(m, nn.Linear | nn.Conv2d)
            and f".{name}".endswith(tuple(f".{target}" for target in UNET_LORA_TARGETS))
        }
        for name, layer in layers.items():
            plain.network.get_submodule(name).weight.data = full(layer)
        for each in (body, plain):
            each.add_role(STUDENT, 3, UNET_LORA_TARGETS, 0)
            shake(each.parameters(STUDENT), 0)
            with each.role(STUDENT):
                prediction = each(*inputs(kind=kind))
                prediction.square().mean().backward()
            found.append((prediction.detach(), [p.grad for p in each.parameters(STUDENT).values()]))
    for prediction, gradients in found[1:]:
        torch.testing.assert_close(prediction, found[0][0], rtol=1e-4, atol=1e-5)
        for a, b in zip(gradients, found[0][1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("base", "error", "share"), [("int8", 0.01, 0.6), ("fp8", 0.04, 0.6), ("nf4", 0.12, 0.4)]
)
def test_what_it_costs_and_saves(base: Kind, error: float, share: float) -> None:
    """Weights come back within the error of their form; bytes of a bfloat16 network, small as it
    is, fall."""
    body, plain = (
        held("sdxl", base, dtype=torch.bfloat16),
        backbone(kind="sdxl", dtype=torch.bfloat16),
    )
    for name, layer in quantized_layers(body.network).items():
        weight = plain.network.get_submodule(name).weight.float()
        assert (full(layer).float() - weight).norm() / weight.norm() < error

    def size(body: Backbone) -> int:
        return sum(
            x.untyped_storage().nbytes()
            for x in [*body.network.parameters(), *body.network.buffers()]
        )

    assert size(body) < share * size(plain)
    assert body.dtype == torch.bfloat16


def test_a_zero_channel_comes_back_as_zeros() -> None:
    network = nn.ModuleDict({"to_q": nn.Linear(4, 3)})
    network["to_q"].weight.data[1] = 0
    wanted = copy.deepcopy(network["to_q"].weight.data)
    quantize(nn.ModuleDict({"a": network}), ["to_q"], "int8")
    torch.testing.assert_close(full(network["to_q"]), wanted, rtol=0, atol=0.005)
    assert not full(network["to_q"])[1].any()


def test_nf4_says_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(
        UserError,
        match="base_precision = 'nf4' takes bitsandbytes; install it with: pip install "
        "bitsandbytes",
    ):
        held("sd15", "nf4")


def test_the_teacher_is_the_held_network() -> None:
    body = held("sd15", "int8")
    with body.role(TEACHER), torch.no_grad():
        before = body(*inputs())
    body.add_role(STUDENT, 2, UNET_LORA_TARGETS, 0)
    shake(body.parameters(STUDENT), 1)
    with body.role(TEACHER), torch.no_grad():
        assert torch.equal(body(*inputs()), before)
