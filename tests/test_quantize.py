"""Frozen weights held in fewer bits: the network of the weights they stand for, to the last bit, at
a fraction of the bytes."""

from __future__ import annotations

import copy
import re
import sys
from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from conftest import CALL, SMALL, make_backbone, make_conditioning, make_unet, shake
from rapm.config import Config
from rapm.errors import UserError
from rapm.models.stable_diffusion import UNET_LORA_TARGETS, unet_feature_layers
from rapm.network import STUDENT, TEACHER, Backbone
from rapm.quantize import Kind, quantize

KINDS: tuple[Kind, ...] = get_args(Kind)


def held(
    kind: str, base: Kind, checkpointing: bool = False, dtype: torch.dtype = torch.float32
) -> Backbone:
    network = make_unet(kind).to(dtype)
    quantize(network, base)
    return Backbone(
        network,
        CALL[kind],
        UNET_LORA_TARGETS,
        unet_feature_layers(network),
        gradient_checkpointing=checkpointing,
    )


def inputs(kind: str = "sd15") -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    z = torch.randn(2, 4, 8, 8, generator=generator)
    return z, torch.full((2,), 500), make_conditioning(2, kind, generator)


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
        plain = make_backbone(kind=kind)
        layers = quantized_layers(body.network)
        assert set(layers) == {
            name
            for name, m in plain.network.named_modules()
            if isinstance(m, nn.Linear | nn.Conv2d) and re.match(r"(down|mid|up)_block", name)
        }
        for name, layer in layers.items():
            plain.network.get_submodule(name).weight.data = full(layer)
        for each in (body, plain):
            each.add_adapter(STUDENT, 3, UNET_LORA_TARGETS, 0)
            shake(each.parameters(STUDENT), 0)
            with each.adapter(STUDENT):
                prediction = each(*inputs(kind))
                prediction.square().mean().backward()
            found.append((prediction.detach(), [p.grad for p in each.parameters(STUDENT).values()]))
    for prediction, gradients in found[1:]:
        torch.testing.assert_close(prediction, found[0][0], rtol=1e-4, atol=1e-5)
        for a, b in zip(gradients, found[0][1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("base", "error", "share"), [("int8", 0.01, 0.6), ("nf4", 0.12, 0.4)])
def test_what_it_costs_and_saves(base: Kind, error: float, share: float) -> None:
    """Weights come back within the error of their form; bytes of a bfloat16 network, small as it
    is, fall."""
    body = held("sdxl", base, dtype=torch.bfloat16)
    plain = make_backbone(kind="sdxl", dtype=torch.bfloat16)
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
    quantize(nn.ModuleList([network]), "int8")
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
    with body.adapter(TEACHER), torch.no_grad():
        before = body(*inputs())
    body.add_adapter(STUDENT, 2, UNET_LORA_TARGETS, 0)
    shake(body.parameters(STUDENT), 1)
    with body.adapter(TEACHER), torch.no_grad():
        assert torch.equal(body(*inputs()), before)


def test_these_kinds_can_be_asked_for() -> None:
    assert KINDS == ("int8", "nf4")
    assert get_args(Config.model_fields["base_precision"].annotation) == ("same", *KINDS)
