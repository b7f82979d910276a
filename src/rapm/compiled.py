"""torch.compile of a network's repeated blocks, held against the same blocks uncompiled first.

torch 2.13 compiled blocks with peft's own LoRA layers into ones with a wrong gradient, in silence:
by a tenth, at batch size 1, on a CPU (docs/cost.md). Ours come out right there. Whether others do
is not believed but looked at, where they are to run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch.utils._pytree import tree_leaves, tree_map

from rapm.errors import UserError
from rapm.network import Backbone
from rapm.progress import track

# Calls differ by width, size, adapter and graph. Past its limit torch goes on uncompiled, silently.
_KINDS_AT_MOST = 256
# Share of an output's or gradient's length that rounding is, in one block; found: 5e-7 and 7e-3.
_ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 0.03, torch.float16: 0.03}


def compile_blocks(backbone: Backbone) -> None:
    """Has the repeated blocks compiled where they are next called, each shape by itself.

    What one computes must not hang on which came before it, or a resumed run would not be the run
    that was not stopped.
    """
    torch._dynamo.config.recompile_limit = _KINDS_AT_MOST
    torch._dynamo.config.accumulated_recompile_limit = _KINDS_AT_MOST
    backbone.network.compile_repeated_blocks(dynamic=False)


def check_compiled(backbone: Backbone, work: Callable[[], object]) -> None:
    """Makes every kind of block's call in ``work`` again, compiled and not, and compares.

    Outputs and gradients, to the input and to the active adapter's weights, must agree. Block by
    block: in a whole network of 16 bits rounding alone grows as large as the mistakes looked for.
    Adapters hold noise meanwhile, since half of a new one is zero.

    Raises:
        UserError: they differ by more than rounding, or blocks cannot be compiled here.
    """
    calls: dict[Any, tuple[nn.Module, str, bool, Any]] = {}

    def note(block: nn.Module, arguments: tuple, named: dict[str, Any]) -> None:
        adapter, graph, given = str(backbone.active), torch.is_grad_enabled(), (arguments, named)
        tensors = [x for x in tree_leaves(given) if isinstance(x, Tensor)]
        kind = adapter, graph, *((tuple(x.shape), graph and x.requires_grad) for x in tensors)
        calls.setdefault(kind, (block, adapter, graph, given))

    blocks = (
        m for m in backbone.network.modules()
        if type(m).__name__ in backbone.network._repeated_blocks
    )  # fmt: skip
    hooks = [block.register_forward_pre_hook(note, with_kwargs=True) for block in blocks]
    adapters = [p for name in backbone.configs for p in backbone.parameters(name).values()]
    kept, generator = [p.detach().clone() for p in adapters], torch.Generator().manual_seed(0)
    try:
        for p in adapters:
            p.data += 0.02 * torch.randn(p.shape, generator=generator).to(p)
        with torch.compiler.set_stance("force_eager"):
            work()
        for hook in hooks:
            hook.remove()
        for call in track(calls.values(), "compiling", total=len(calls)):
            with torch.compiler.set_stance("force_eager"):
                expected = _results(backbone, *call)
            for name, found in _results(backbone, *call).items():
                length = expected[name].float().norm().clamp(min=1e-30)
                error = float((found.float() - expected[name].float()).norm() / length)
                if not error < _ROUNDING[backbone.dtype]:
                    raise UserError(
                        f"training.compile = true, but compiled, the {call[1]}'s {name} is off by "
                        f"{error:.1%} (torch {torch.__version__}); set it to false"
                    )
    except TorchDynamoException as error:
        why = " ".join(str(error).split("\n\n")[0].split())
        raise UserError(
            f"training.compile = true, but torch cannot compile here: {why}; set it to false"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
        for p, before in zip(adapters, kept, strict=True):
            p.data.copy_(before)


def _results(
    backbone: Backbone, block: nn.Module, adapter: str, graph: bool, given: Any
) -> dict[str, Tensor]:
    """A call's output, and where it had a graph the gradients of its product with noise."""
    leaves: list[Tensor] = []

    def again(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if not (graph and x.requires_grad):
            return x.detach()
        leaves.append(x.detach().requires_grad_())
        return leaves[-1]

    arguments, named = tree_map(again, given)
    weights = [p for name, p in block.named_parameters() if f".{adapter}." in name]
    with backbone.adapter(adapter), torch.set_grad_enabled(graph):
        output = block(*arguments, **named)
        if not output.requires_grad:
            return {"output": output}
        noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
        inputs = [*leaves, *weights]
        gradients = torch.autograd.grad(output, inputs, noise, materialize_grads=True)
    parts = {"gradient": gradients[: len(leaves)], "adapter's gradient": gradients[len(leaves) :]}
    found = {name: torch.cat([g.flatten() for g in part]) for name, part in parts.items() if part}
    return {"output": output.detach()} | found
