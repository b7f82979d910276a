"""Compiled blocks: as many functions as there are kinds of calls, the same results, and wrong ones
are found out."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

from conftest import make_backbone
from rapm.compiled import check_compiled, compile_blocks
from rapm.errors import UserError
from rapm.methods import Batch, Method
from rapm.models.stable_diffusion import UNET_LORA_TARGETS
from rapm.network import STUDENT
from rapm.quantize import quantize
from rapm.sampling import seeded
from test_methods import EVEN, ODD, found, make_method
from test_network import inputs


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def both_kinds(method: Method, batch: Batch) -> list[torch.Tensor]:
    """Gradients of a discriminators' and of a student's iteration, by every learner."""
    gradients = []
    for iteration in (EVEN, ODD):
        method.training_step(iteration, batch, seeded("a test"))
        gradients += [g for name in method.learners for g in found(method, name).values()]
        for learner in method.learners.values():
            learner.optimizer.zero_grad(set_to_none=True)
    return gradients


@pytest.mark.skipif(
    not shutil.which("g++"),
    reason="torch.compile takes a compiler for the CPU, and there is no g++ here",
)
@pytest.mark.parametrize(("name", "checkpointing"), [("rapm", False), ("midpoint", True)])
def test_compiling_changes_nothing(ddim_schedule, name: str, checkpointing: bool) -> None:
    """Gradients of every learner, where peft's own layers come out wrong."""
    results = []
    for compiled in (False, True):
        training = {"gradient_checkpointing": checkpointing}
        method, batch = make_method(ddim_schedule, name, training=training)
        if compiled:
            compile_blocks(method.backbone)
            weights = method.student.parameters.values()
            before = [p.clone() for p in weights]
            check_compiled(method.backbone, lambda m=method, b=batch: both_kinds(m, b))
            assert all(torch.equal(p, b) for p, b in zip(weights, before, strict=True))
            compiled_before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        results.append(both_kinds(method, batch))
    # Compiled, and all of it was checked.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled_before > 0
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def off_by(share: float, backward: bool):
    """A compiler that makes what a block gives, or its gradients, too large."""

    def too_large(graph: Any, inputs: Any) -> Any:
        def run(*given: Any) -> list[Any]:
            return [
                x * (1 + share) if isinstance(x, torch.Tensor) and x.is_floating_point() else x
                for x in graph(*given)
            ]

        return make_boxed_func(run)

    def right(graph: Any, inputs: Any) -> Any:
        return make_boxed_func(graph)

    return aot_autograd(
        fw_compiler=right if backward else too_large, bw_compiler=too_large if backward else right
    )


@pytest.mark.parametrize(("share", "backward"), [(0.01, True), (0.01, False)])
def test_wrong_blocks_are_found_out(ddim_schedule, share: float, backward: bool) -> None:
    method, batch = make_method(ddim_schedule, "midpoint")
    before = [p.clone() for p in method.student.parameters.values()]
    method.backbone.network.compile_repeated_blocks(backend=off_by(share, backward), dynamic=False)
    with pytest.raises(
        UserError,
        match=rf"{'gradient' if backward else 'output'} is off by 1.0%.*set it to false",
    ):
        check_compiled(method.backbone, lambda: both_kinds(method, batch))
    for p, b in zip(method.student.parameters.values(), before, strict=True):
        assert torch.equal(p, b)


def test_no_compiler_is_said_in_one_line(ddim_schedule) -> None:
    def none(graph: Any, inputs: Any) -> Any:
        raise FileNotFoundError("no compiler")

    method, batch = make_method(ddim_schedule, "midpoint")
    method.backbone.network.compile_repeated_blocks(backend=none)
    with pytest.raises(
        UserError, match=r"cannot compile here: .*no compiler.*set it to false"
    ) as caught:
        check_compiled(method.backbone, lambda: both_kinds(method, batch))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("base", [None, "int8"])
def test_blocks_of_a_kind_share_what_was_compiled(base: Any) -> None:
    """However many they are: SDXL has seventy."""
    body = make_backbone(kind="sdxl")
    if base:
        quantize(body.network, base)
    body.add_adapter(STUDENT, 2, UNET_LORA_TARGETS, 0)
    made: list[int] = []

    def count(graph: Any, inputs: Any) -> Any:
        made.append(1)
        return graph.forward

    body.network.compile_repeated_blocks(backend=count, dynamic=False)
    blocks = [
        m for m in body.network.modules() if type(m).__name__ in body.network._repeated_blocks
    ]
    with body.adapter(STUDENT), torch.no_grad():
        body(*inputs(kind="sdxl"))
    kinds = {m.norm1.normalized_shape for m in blocks}
    assert len(blocks) > len(kinds)
    assert len(made) == len(kinds), (len(made), len(blocks), kinds)
