"""What learns: updates, their average, and a state that goes on as if it had never stopped."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import make_unet
from rapm.errors import NonFinite, UserError
from rapm.io import load_tensors, save_tensors
from rapm.models.stable_diffusion import FAMILY
from rapm.network import STUDENT, Backbone
from rapm.optim import Learner, learnt_weights, load_optimizer_tensors, optimizer_tensors

# ---- optimisers


def adamw(weights: Sequence[Tensor], fused: bool) -> tuple[list[nn.Parameter], torch.optim.AdamW]:
    parameters = [nn.Parameter(w.clone()) for w in weights]
    given = {"lr": 0.01, "betas": (0.0, 0.999), "weight_decay": 0.1, "fused": fused}
    return parameters, torch.optim.AdamW(parameters, **given)


def take_steps(
    parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer, steps: Iterable[int]
) -> None:
    """Gradients are a function of step and weights."""
    for step in steps:
        for p in parameters:
            p.grad = torch.sin(3 * p.detach() + step)
        optimizer.step()


def same(a: Mapping[Any, Tensor], b: Mapping[Any, Tensor]) -> bool:
    """To the bit, whatever the order."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def numbered(tensors: Iterable[Tensor]) -> dict[int, Tensor]:
    return dict(enumerate(tensors))


@pytest.mark.parametrize("fused", [False, True])
def test_a_restored_optimizer_goes_on_bit_for_bit(tmp_path, fused):
    start = [torch.linspace(-1, 1, 37), torch.linspace(0, 2, 24).reshape(2, 3, 4)]
    parameters, optimizer = adamw(start, fused)
    take_steps(parameters, optimizer, range(5))
    save_tensors(tmp_path / "a.safetensors", optimizer_tensors(optimizer))
    kept = [p.detach().clone() for p in parameters]
    take_steps(parameters, optimizer, range(5, 12))

    resumed, again = adamw(kept, fused)
    load_optimizer_tensors(again, load_tensors(tmp_path / "a.safetensors"))
    assert again.param_groups[0]["lr"] == 0.01
    take_steps(resumed, again, range(5, 12))
    assert same(numbered(resumed), numbered(parameters))

    fresh, forgetful = adamw(kept, fused)  # what the state is for
    take_steps(fresh, forgetful, range(5, 12))
    assert not same(numbered(fresh), numbered(parameters))


def test_an_optimizer_that_took_no_step_has_no_state():
    parameters, optimizer = adamw([torch.ones(2)], False)
    assert optimizer_tensors(optimizer) == {}
    load_optimizer_tensors(optimizer, {})
    take_steps(parameters, optimizer, range(1))
    assert optimizer_tensors(optimizer).keys() == {"0.step", "0.exp_avg", "0.exp_avg_sq"}


# ---- learners


def learner(*, rank: int = 2, heads: bool = False, **given) -> Learner:
    backbone = Backbone(make_unet(), FAMILY.call, FAMILY.lora_targets)
    backbone.add_adapter(STUDENT, rank, ["to_q", "conv1"], seed=0)
    torch.manual_seed(3)
    settings = {"learning_rate": 0.01, "betas": (0.9, 0.999), "weight_decay": 0.1} | given
    return Learner(backbone, STUDENT, nn.Linear(3, 2) if heads else None, **settings)


def own(it: Learner) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in it.parameters.items()}


def update(it: Learner, times: int = 1) -> None:
    """Gradients are a function of the weights and of how many updates there were."""
    for _ in range(times):
        for p in it.parameters.values():
            p.grad = torch.sin(3 * p.detach() + it.updates)
        it.step(1.0)


def test_parameters_are_the_adapters_and_the_heads():
    it = learner(heads=True)
    lora = it.backbone.parameters(STUDENT)
    assert set(it.parameters) == {*lora, "heads.weight", "heads.bias"}
    assert all(it.parameters[name] is p for name, p in lora.items())
    assert all(p.dtype == torch.float32 and p.requires_grad for p in it.parameters.values())


def test_a_step_is_adamws_at_its_share_of_the_rate():
    """The first step of AdamW goes by the rate, whatever the gradient's length."""
    it = learner(weight_decay=0.0)
    before = own(it)
    for p in it.parameters.values():
        p.grad = torch.full_like(p, -5.0)
    it.step(0.25)
    assert it.updates == 1 and it.optimizer.param_groups[0]["lr"] == 0.0025
    for name, p in it.parameters.items():
        assert p.grad is None
        torch.testing.assert_close(p.detach(), before[name] + 0.0025, rtol=0, atol=1e-7)


@pytest.mark.parametrize("scale", [1.0, 4096.0])
def test_clipping_tells_the_norm_before(scale):
    it = learner()
    it.backbone.loss_scale = scale
    number = sum(p.numel() for p in it.parameters.values())
    for p in it.parameters.values():
        p.grad = torch.full_like(p, scale * 3 / number**0.5)
    assert it.clip(2.0, iteration=0) == pytest.approx(3.0, rel=1e-4)
    clipped = torch.cat([p.grad.flatten() for p in it.parameters.values()])
    assert float(clipped.norm()) == pytest.approx(2.0, rel=1e-4)
    for p in it.parameters.values():
        p.grad = torch.full_like(p, scale * 1.5 / number**0.5)
    assert it.clip(2.0, iteration=1) == pytest.approx(1.5, rel=1e-4)
    for p in it.parameters.values():
        torch.testing.assert_close(p.grad, torch.full_like(p, 1.5 / number**0.5))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_no_number_changes_nothing(value):
    it = learner()
    update(it, 2)
    before, state = own(it), {name: x.clone() for name, x in it.state().items()}
    for p in it.parameters.values():
        p.grad = torch.ones_like(p)
    next(iter(it.parameters.values())).grad[0] = value
    with pytest.raises(NonFinite) as caught:
        it.clip(1.0, iteration=17)
    assert str(caught.value) == (
        "the student's gradient is not finite at iteration 17; nothing was updated, and earlier "
        "checkpoints are kept: try a lower learning_rate, or precision bfloat16 or float32, with "
        "another --out"
    )
    assert same(own(it), before)
    assert same(it.state(), state)


def test_gradients_at_outputs_go_through_its_own_graph():
    """Two outputs at once, each with the gradient that was found for it; by the loss scale."""
    it = learner(heads=True)
    x = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(1))
    gradients = torch.randn(2, 4, 2, generator=torch.Generator().manual_seed(2))
    it.backbone.loss_scale = 16.0
    it.backward([it.heads(x[0]), it.heads(x[1])], list(gradients))
    expected = 16 * torch.einsum("abi,abj->ij", gradients, x)
    torch.testing.assert_close(it.heads.weight.grad, expected)
    assert it.backbone.active is None


# ---- the average


def test_without_an_average_its_weights_are_its_own():
    it = learner()
    update(it, 3)
    assert it.average == {}
    assert same(it.weights, own(it))
    with it.averaged():
        assert same(it.weights, own(it))
    assert not any(name.startswith("average.") for name in it.state())


def test_the_average_warms_up_to_its_decay():
    """The decay is (1 + k) / (10 + k) of update k until it reaches its setting."""
    it = learner(ema=0.5)
    average = {name: p.double() for name, p in own(it).items()}
    for k in range(12):
        update(it)
        decay = min(0.5, (1 + k) / (10 + k))
        for name, p in it.parameters.items():
            average[name] = decay * average[name] + (1 - decay) * p.detach().double()
    assert (1 + 7) / (10 + 7) < 0.5 == (1 + 8) / (10 + 8)
    for name, value in it.weights.items():
        torch.testing.assert_close(value.double(), average[name], rtol=0, atol=1e-6)
        assert not torch.equal(value, it.parameters[name])


def test_the_average_is_put_in_and_its_own_come_back_to_the_bit():
    it = learner(ema=0.9, heads=True)
    update(it, 3)
    before = own(it)
    with it.averaged():
        assert same(own(it), it.average)
        assert not same(own(it), before)
    assert same(own(it), before)
    with pytest.raises(ZeroDivisionError), it.averaged():
        _ = 1 / 0
    assert same(own(it), before)


# ---- state


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_learner_out_of_a_file_goes_on_bit_for_bit(tmp_path, ema):
    whole = learner(ema=ema, heads=True)
    update(whole, 4)
    save_tensors(tmp_path / "a.safetensors", whole.state())
    update(whole, 5)
    resumed = learner(ema=ema, heads=True)
    update(resumed, 1)  # a state of its own, to be replaced
    state = load_tensors(tmp_path / "a.safetensors")
    resumed.load_state(state)
    assert resumed.updates == 4 == int(state["updates"])
    assert same(resumed.weights, learnt_weights(state))
    update(resumed, 5)
    assert same(resumed.state(), whole.state())


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_a_state_of_another_form_is_refused_and_changes_nothing(optimizer):
    whole = learner(rank=64, ema=0.9, optimizer=optimizer)
    update(whole, 2)
    state = {name: value.clone() for name, value in whole.state().items()}
    fresh = learner(rank=64, ema=0.9, optimizer=optimizer)
    before = {name: value.clone() for name, value in fresh.state().items()}
    refused = 0
    for name in [n for n in state if n.startswith("optimizer.0.")] + ["updates", next(iter(state))]:
        less = {n: v for n, v in state.items() if n != name}
        others = [
            less,
            less | {name: state[name][None].repeat(*[3] * (state[name].dim() + 1))},
            less | {name: state[name].half()},
            less | {f"{name}x": state[name]},
        ]
        for other in others:
            with pytest.raises(UserError, match="is not this run's: "):
                fresh.load_state(other)
            refused += 1
    assert refused >= 20
    with pytest.raises(UserError, match="expected: nothing of that name"):
        fresh.load_state(state | {"updates": torch.tensor(0)})
    assert same(fresh.state(), before)
    fresh.load_state(state)
    assert same(fresh.state(), whole.state())


def test_what_a_checkpoint_holds_of_it():
    it = learner(ema=0.9)
    names = list(it.parameters)
    fresh = {*(f"weights.{n}" for n in names), *(f"average.{n}" for n in names), "updates"}
    assert set(it.state()) == fresh
    update(it)
    kinds = ("step", "exp_avg", "exp_avg_sq")
    optimizer = {f"optimizer.{k}.{kind}" for k in range(len(names)) for kind in kinds}
    assert set(it.state()) == fresh | optimizer


def test_learnt_weights_are_the_average_where_there_is_one():
    weights, average = {"a": torch.ones(2)}, {"a": torch.zeros(2)}
    state = {"weights.a": weights["a"], "updates": torch.tensor(3)}
    assert learnt_weights(state) == weights
    assert learnt_weights(state | {"average.a": average["a"]}) == average


# ---- memory


@pytest.mark.parametrize(("optimizer", "bytes_a_weight"), [("adamw", 8), ("adamw8bit", 2)])
def test_room_is_what_its_optimizer_will_take(optimizer, bytes_a_weight):
    it = learner(optimizer=optimizer)
    room = it.room_for_state()
    held = sum(x.numel() * x.element_size() for x in room)
    assert held == bytes_a_weight * sum(p.numel() for p in it.parameters.values())
    update(it)
    assert it.room_for_state() == []


def test_eight_bit_state_goes_on_bit_for_bit(tmp_path):
    """At a rank where tensors are large enough to be held in 8 bits."""
    whole = learner(rank=128, optimizer="adamw8bit")
    update(whole, 3)
    save_tensors(tmp_path / "a.safetensors", whole.state())
    state = load_tensors(tmp_path / "a.safetensors")
    assert any(value.dtype == torch.uint8 for value in state.values())
    update(whole, 4)
    resumed = learner(rank=128, optimizer="adamw8bit")
    resumed.load_state(state)
    update(resumed, 4)
    assert same(own(resumed), own(whole))


def test_eight_bits_say_what_they_take(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(UserError) as caught:
        learner(optimizer="adamw8bit")
    assert str(caught.value) == (
        "training.optimizer = 'adamw8bit' takes bitsandbytes; install it with: "
        "pip install bitsandbytes"
    )


def test_a_plan_on_the_meta_device_steps_nothing():
    backbone = Backbone(make_unet().to("meta"), FAMILY.call, FAMILY.lora_targets)
    backbone.add_adapter(STUDENT, 2, ["to_q"], seed=0)
    it = Learner(backbone, STUDENT, learning_rate=0.01, betas=(0.9, 0.999), weight_decay=0.0)
    assert all(p.device.type == "meta" for p in it.parameters.values())
    assert not it.optimizer.param_groups[0]["fused"]
