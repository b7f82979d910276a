"""One network and its adapters: what FIELD calls traps 1 to 4, and features."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from conftest import SMALL, make_backbone, make_conditioning, make_unet, shake
from rapm.models.stable_diffusion import UNET_LORA_TARGETS, unet_feature_layers
from rapm.network import STUDENT, TEACHER

NAMES = (STUDENT, "relative_discriminator", "absolute_discriminator")


def inputs(batch: int = 2, kind: str = "tiny") -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    z = torch.randn(batch, 4, 8, 8, generator=generator)
    return z, torch.full((batch,), 500), make_conditioning(batch, kind, generator)


@pytest.mark.parametrize("kind", SMALL)
def test_teacher_is_bit_equal_to_the_untouched_network(kind: str) -> None:
    z, t, conditioning = inputs(kind=kind)
    with torch.no_grad():
        expected = make_backbone(kind=kind).call(make_unet(kind), z, t, conditioning)
    body = make_backbone(kind=kind)
    for k, name in enumerate(NAMES):
        body.add_adapter(name, 4, UNET_LORA_TARGETS, k)
        shake(body.parameters(name), k)
    with body.adapter(TEACHER), torch.no_grad():
        assert torch.equal(body(z, t, conditioning), expected)


def test_a_fresh_adapter_changes_nothing_and_a_trained_one_does() -> None:
    z, t, conditioning = inputs()
    body = make_backbone()
    body.add_adapter(STUDENT, 4, UNET_LORA_TARGETS, 0)
    with torch.no_grad():
        with body.adapter(TEACHER):
            teacher = body(z, t, conditioning)
        with body.adapter(STUDENT):
            assert torch.equal(body(z, t, conditioning), teacher)
            shake(body.parameters(STUDENT), 1)
            assert (body(z, t, conditioning) - teacher).abs().max() > 1e-2


@pytest.mark.parametrize("kind", SMALL)
def test_a_lora_keeps_no_float32_copy_of_what_it_sees(kind: str) -> None:
    """Beside a bfloat16 network; what each of its layers saw is kept once, in bfloat16, by query,
    key and value alike."""
    z, t, conditioning = inputs(kind=kind)
    body = make_backbone(kind=kind, dtype=torch.bfloat16)
    body.add_adapter(STUDENT, 3, UNET_LORA_TARGETS, 0)
    kept: dict[str, dict[int, Tensor]] = {}

    def passes(name: str) -> None:
        own = kept.setdefault(name, {})
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: own.setdefault(x.data_ptr(), x), lambda x: x
        ):
            body(z, t, conditioning).sum()

    with body.adapter(STUDENT):
        passes("ours")
        for layer in body._layers:
            layer.__class__ = type(layer).__base__
        passes("peft's")
    whole = {
        name: sum(x.numel() for x in own.values() if x.dtype == torch.float32)
        for name, own in kept.items()
    }
    held = {name: sum(x.nbytes for x in own.values()) for name, own in kept.items()}
    assert whole["ours"] < 0.02 * whole["peft's"], whole
    assert held["ours"] < 0.8 * held["peft's"], held


def test_scale_is_one_and_every_target_gets_an_adapter() -> None:
    body = make_backbone(kind="sd15")
    body.add_adapter(STUDENT, 1, UNET_LORA_TARGETS, 0)
    assert {layer.scaling[STUDENT] for layer in body._layers} == {1.0}
    names = [
        name for name, module in make_unet().named_modules() if name.endswith(UNET_LORA_TARGETS)
    ]
    assert len(body._layers) == len(names) > 40
    assert len(body.parameters(STUDENT)) == 2 * len(names)
    assert len(body.lora_state(STUDENT)) == 2 * len(names)


def test_adapters_do_not_nest_and_no_pass_without_one() -> None:
    z, t, conditioning = inputs()
    body = make_backbone()
    body.add_adapter(STUDENT, 1, UNET_LORA_TARGETS, 0)
    with (
        pytest.raises(AssertionError, match="a graph belongs to one"),
        body.adapter(STUDENT),
        body.adapter(TEACHER),
    ):
        pass
    with pytest.raises(AssertionError, match="outside of any adapter"):
        body(z, t, conditioning)


def test_an_adapter_can_be_given_other_weights() -> None:
    z, t, conditioning = inputs()
    body = make_backbone()
    body.add_adapter(STUDENT, 2, UNET_LORA_TARGETS, 0)
    body.load(
        STUDENT, {name: torch.full_like(p, 0.02) for name, p in body.parameters(STUDENT).items()}
    )
    assert all((p == 0.02).all() and p.requires_grad for p in body.parameters(STUDENT).values())
    with torch.no_grad():
        with body.adapter(TEACHER):
            teacher = body(z, t, conditioning)
        with body.adapter(STUDENT):
            assert (body(z, t, conditioning) - teacher).abs().max() > 1e-2


@pytest.mark.parametrize("checkpointing", [False, True])
def test_features_are_the_blocks_own_outputs_and_stop_there(checkpointing: bool) -> None:
    z, t, conditioning = inputs(kind="sd15")
    body = make_backbone(checkpointing, "sd15")
    expected, reached = [], []
    plain = make_unet()
    for path in unet_feature_layers(plain):
        plain.get_submodule(path).register_forward_hook(
            lambda _, __, out: expected.append(out[0] if isinstance(out, tuple) else out)
        )
    plain(z, t, conditioning["prompt_embeds"])
    body.network.up_blocks[0].register_forward_hook(lambda *_: reached.append(1))
    with body.adapter(TEACHER):
        found = body.features(z, t, conditioning)
        assert [tuple(x.shape) for x in found] == [(2, 16, 4, 4), (2, 32, 4, 4), (2, 32, 4, 4)]
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert not reached
        body(z, t, conditioning)
        assert reached
