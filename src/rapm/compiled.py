"""torch.compile of a network's repeated blocks, held against the same blocks uncompiled before it
is relied on.

torch 2.13 compiled blocks with peft's own LoRA layers into ones with a wrong gradient, in silence:
by a tenth, at batch size 1, on a CPU (docs/cost.md). Ours come out right there. Whether others do
is not believed but looked at, where they are to run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException

from rapm.errors import UserError
from rapm.network import Backbone
from rapm.progress import track

# Blocks differ by widths and picture sizes, calls by role, rows and graph. Past its limit torch
# goes on uncompiled, in silence.
_KINDS_AT_MOST = 256
# What rounding does within one block, as a share of an output's or gradient's length: 5e-7 and 7e-3
# in the embedded teacher.
_ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 0.03, torch.float16: 0.03}


def compile_blocks(backbone: Backbone) -> None:
    """Has the repeated blocks compiled where they are next called, each shape by itself: what one
    computes must not hang on which came before it, or a resumed run would not be the run that was
    not stopped."""
    torch._dynamo.config.recompile_limit = _KINDS_AT_MOST
    torch._dynamo.config.accumulated_recompile_limit = _KINDS_AT_MOST
    backbone.network.compile_repeated_blocks(dynamic=False)


def check_compiled(backbone: Backbone, work: Callable[[], object]) -> None:
    """Does some work uncompiled; then every kind of block's call in it is made again, compiled and
    not, and outputs and
    gradients are compared: to the input and to the weights of the adapter that is on.

    Block by block, since in a whole network of 16 bits rounding alone grows as large as the
    mistakes that are looked for.

    Raises:
        UserError: they differ by more than rounding, or blocks cannot be compiled here.
    """
    network, calls = backbone.network, {}

    def note(block: nn.Module, arguments: tuple, named: dict[str, Any]) -> None:
        call = _Call(block, str(backbone.playing), torch.is_grad_enabled(), arguments, named)
        calls.setdefault(call.kind(), call)

    blocks = [m for m in network.modules() if type(m).__name__ in network._repeated_blocks]
    hooks = [block.register_forward_pre_hook(note, with_kwargs=True) for block in blocks]
    try:
        with _stirred(backbone):
            with torch.compiler.set_stance("force_eager"):
                work()
            for hook in hooks:
                hook.remove()
            for call in track(calls.values(), "compiling", total=len(calls)):
                with torch.compiler.set_stance("force_eager"):
                    expected = call.results(backbone)
                for name, found in call.results(backbone).items():
                    length = expected[name].float().norm().clamp(min=1e-30)
                    error = float((found.float() - expected[name].float()).norm() / length)
                    if not error < _ROUNDING[backbone.dtype]:
                        raise UserError(
                            f"training.compile = true, but compiled, the {call.role}'s {name} is "
                            f"off by {error:.1%} "
                            f"(torch {torch.__version__}); set it to false"
                        )
    except TorchDynamoException as error:
        why = " ".join(str(error).split("\n\n")[0].split())
        raise UserError(
            f"training.compile = true, but torch cannot compile here: {why}; set it to false"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True)
class _Call:
    """How a block was called."""

    block: nn.Module
    role: str
    graph: bool
    arguments: tuple
    named: Mapping[str, Any]

    def kind(self) -> tuple[Any, ...]:
        """Calls of one kind are compiled into one function."""
        given = (*self.arguments, *self.named.values())
        tensors = [x for x in given if isinstance(x, Tensor)]
        return (
            self.role,
            self.graph,
            *((tuple(x.shape), self.graph and x.requires_grad) for x in tensors),
        )

    def results(self, backbone: Backbone) -> dict[str, Tensor]:
        """Its output, and where it had a graph the gradients of the output's product with noise."""
        leaves: list[Tensor] = []

        def again(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            x, needed = x.detach(), self.graph and x.requires_grad
            if needed:
                leaves.append(x.requires_grad_())
            return x

        arguments, named = (
            [again(x) for x in self.arguments],
            {name: again(x) for name, x in self.named.items()},
        )
        weights = [p for name, p in self.block.named_parameters() if f".{self.role}." in name]
        with backbone.role(self.role), torch.set_grad_enabled(self.graph):
            output = self.block(*arguments, **named)
            if not output.requires_grad:
                return {"output": output}
            noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
            gradients = torch.autograd.grad(
                output, [*leaves, *weights], noise, materialize_grads=True
            )
        found = {"output": output.detach()}
        for name, parts in (
            ("gradient", gradients[: len(leaves)]),
            ("adapter's gradient", gradients[len(leaves) :]),
        ):
            if parts:
                found[name] = torch.cat([part.flatten() for part in parts])
        return found


@contextmanager
def _stirred(backbone: Backbone) -> Iterator[None]:
    """Noise on the adapters: half of the weights of a new one are zero, and so is what their
    gradients would show."""
    adapters = [p for role in backbone.configs for p in backbone.parameters(role).values()]
    kept, generator = [p.detach().clone() for p in adapters], torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in adapters:
            p += 0.02 * torch.randn(p.shape, generator=generator).to(p)
    try:
        yield
    finally:
        with torch.no_grad():
            for p, before in zip(adapters, kept, strict=True):
                p.copy_(before)
