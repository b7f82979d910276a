"""Time and memory of full-size networks with random weights, beside the bare network's and PCM's.

    python benchmarks/full_size.py --out FILE.json     # SD 1.5 at 512 and SDXL at 1024 on a GPU; on
                                                       # a CPU SD 1.5 at 256
    python benchmarks/full_size.py --table FILE.json   # writes docs/cost.md's tables of it
    python benchmarks/full_size.py --counted           # writes docs/cost.md's table of what is
                                                       # counted; any machine

Every case runs in a process of its own, so that its memory is its own. What is in the file already
is not run again. Iterations of each kind are made in turn; the first is not timed. On a GPU memory
is torch's own peak; on a CPU it is what the process's resident memory grew by. A CPU without
bfloat16 is given float32.

The floor is the network passes of an iteration, made again by the network alone, with backward
passes where the iteration had them: without any adapter ("bare"), and with the iteration's own
("with LoRA").

PCM's iterations are at the same N positions, one in each slot, with rank, precision and
checkpointing as here, and its heads and 8-bit AdamW as published. Its VAE and text encoder are left
out. What is counted and not measured is the plan's account (meta device).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from baselines import Pictures, pcm
from machine import Memory, processor, timed
from markers import markdown, replace_between
from rapm import settings
from rapm.compiled import compile_blocks
from rapm.config import Config
from rapm.counting import count
from rapm.doctor import cpu_has_bfloat16
from rapm.estimate import (
    Stub,
    bytes_of,
    make_plan,
    teacher_pass,
    without_weights,
)
from rapm.io import write_json
from rapm.measure import duration
from rapm.methods import METHODS, Batch, Method
from rapm.models.resolve import architecture_of
from rapm.models.teacher import Teacher, load_backbone
from rapm.network import STUDENT, TEACHER, Backbone
from rapm.sampling import Conditioning, seeded
from rapm.train import gradients
from rapm.versions import versions

GIB = 2**30
COST = Path(__file__).parents[1] / "docs" / "cost.md"
START = "<!-- table: benchmarks/full_size.py -->"
START_COUNTED = "<!-- table: benchmarks/full_size.py --counted -->"
PCM = "pcm"
Ways = dict[str, tuple[str, list[str]]]  # by name: a method, and settings

NO_DISCRIMINATORS = "discriminators.adversarial_weight=0"
NO_CHECKPOINTING = "training.gradient_checkpointing=false"
EIGHT_BITS = "training.optimizer=adamw8bit"  # PCM's as published
SETTINGS: Ways = {
    "RAPM": ("rapm", []),
    "RAPM, slot_batch 4": ("rapm", ["training.slot_batch=4"]),
    "RAPM, no checkpointing": ("rapm", [NO_CHECKPOINTING]),
    "RAPM, no checkpointing, slot_batch 4": ("rapm", [NO_CHECKPOINTING, "training.slot_batch=4"]),
    "RAPM, compile": ("rapm", ["training.compile=true"]),
    "RAPM, int8": ("rapm", ["base_precision=int8"]),
    "RAPM, nf4": ("rapm", ["base_precision=nf4"]),
    "RAPM, int8, adamw8bit": ("rapm", ["base_precision=int8", EIGHT_BITS]),
    "RAPM, no discriminators": ("rapm", [NO_DISCRIMINATORS]),
    "midpoint": ("midpoint", []),
    "midpoint, no checkpointing": ("midpoint", [NO_CHECKPOINTING]),
    "PCM": (PCM, [EIGHT_BITS]),
    "PCM, no checkpointing": (PCM, [EIGHT_BITS, NO_CHECKPOINTING]),
}
# The toy teacher, for which Python's share is largest.
TOY: Ways = {
    "RAPM": ("rapm", []),
    "RAPM, slot_batch 1": ("rapm", ["training.slot_batch=1"]),
    "RAPM, compile": ("rapm", ["training.compile=true"]),
    "RAPM, no discriminators": ("rapm", [NO_DISCRIMINATORS]),
    "midpoint": ("midpoint", []),
}
COUNTED = ("RAPM", "RAPM, no discriminators", "midpoint", "PCM")


def cases(on_gpu: bool) -> Iterator[dict[str, Any]]:
    """What is run: model, size in pixels, the network's precision, a name."""
    half = "bfloat16" if on_gpu or cpu_has_bfloat16() else "float32"
    large = [("sd15", 512), ("sdxl", 1024)] if on_gpu else [("sd15", 256)]
    for model, size in [("toy", 64), *large]:
        precision = "float32" if model == "toy" else half
        for name in TOY if model == "toy" else SETTINGS:
            yield {"model": model, "size": size, "precision": precision, "name": name}


def key_of(case: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(case[part] for part in ("model", "size", "precision", "name"))


def config_of(case: Mapping[str, Any]) -> Config:
    """A case's settings; PCM's are RAPM's."""
    method, own = (TOY if case["model"] == "toy" else SETTINGS)[case["name"]]
    method = "rapm" if method == PCM else method
    if case["model"] == "toy":
        return settings.load(teacher="toy", method=method, settings=own)
    given = [f"precision={case['precision']}", "trajectories.batch_size=1"]
    size = f"trajectories.size={case['size']}x{case['size']}"
    teacher = f"random:{case['model']}"
    return settings.load(teacher=teacher, method=method, settings=[*given, size, *own])


# ---- one case


@dataclass(frozen=True)
class Pass:
    """A network pass that an iteration made.

    Attributes:
        graph: whether it has a backward pass: to its adapter's weights, or with ``to_input`` to its
            input alone.
        features: it goes as far as the last feature layer.
    """

    adapter: str
    z: Tensor
    t: Tensor
    conditioning: Conditioning
    graph: bool
    to_input: bool
    features: bool


class Noting:
    """A family's ``call`` that can note the passes it makes, in :attr:`passes`."""

    def __init__(self, teacher: Teacher) -> None:
        self.call, self.backbone = teacher.family.call, None
        self.passes: list[Pass] | None = None
        self.teacher = replace(teacher, family=replace(teacher.family, call=self))

    def load(self, config: Config, device: str) -> Backbone:
        """The teacher's backbone, whose passes are noted when :attr:`passes` is a list."""
        self.backbone = load_backbone(self.teacher, config, device)
        return self.backbone

    def __call__(
        self, network: nn.Module, z: Tensor, t: Tensor, conditioning: Conditioning
    ) -> Tensor:
        if self.passes is not None and self.backbone is not None:
            adapter, graph = str(self.backbone.active), torch.is_grad_enabled()
            features = adapter not in (TEACHER, STUDENT)
            given = z.detach(), t, conditioning
            self.passes.append(Pass(adapter, *given, graph, z.requires_grad, features))
        return self.call(network, z, t, conditioning)


def again(backbone: Backbone, passes: Sequence[Pass], adapters: bool) -> None:
    """The same passes by the network alone, with a backward pass where they had a graph.

    Without an adapter that leads to the input, as there is nothing else that it could lead to.
    """
    times, backbone.times = backbone.times, None  # what was noted is what the network was fed
    for one in passes:
        to_input = one.graph and (one.to_input or not adapters)
        adapter = one.adapter if adapters else TEACHER
        with backbone.adapter(adapter), torch.set_grad_enabled(one.graph):
            z = one.z.float().requires_grad_(to_input)
            given = z, one.t, one.conditioning
            out = backbone.features(*given) if one.features else [backbone(*given)]
            ones = [torch.ones_like(x) for x in out]
            if to_input:
                torch.autograd.grad(out, z, ones)
            elif one.graph:
                torch.autograd.backward(out, ones)
    backbone.times = times


def make_method(
    case: Mapping[str, Any], config: Config, backbone: Backbone, teacher: Teacher, store: Stub
) -> Method:
    """The case's method, on random positions or pictures."""
    given: Any = config, backbone, teacher.schedule, store
    if case["name"] not in SETTINGS or SETTINGS[case["name"]][0] != PCM:
        return METHODS[config.method](*given)
    form, device = pcm.FORMS[case["model"]], str(backbone.device)
    row = store[0]
    prompts = {name: value[None] for name, value in row.conditioning.items()}
    second = pcm.second_network(teacher, config, form, device)
    return pcm.Pcm(*given, Pictures(row.absolute[:1], prompts), second, form)


def clear(method: Method) -> None:
    for learner in method.learners.values():
        learner.optimizer.zero_grad(set_to_none=True)


def of_kinds(method: Method) -> dict[str, int]:
    """An iteration of each kind: the student's, and the discriminators'."""
    found: dict[str, int] = {}
    for k in (0, 1):
        found.setdefault("student" if STUDENT in method.learning(k) else "discriminators", k)
    return found


def run_case(case: Mapping[str, Any], repeats: int, iterations: int) -> dict[str, Any]:
    """Iterations, their peak and losses; their floor; a step of the rollout."""
    started, config = time.monotonic(), config_of(case)
    device, teacher = config.torch_device, without_weights(architecture_of(config))
    noting, store, memory = Noting(teacher), Stub(config, teacher, device), Memory(device)
    backbone = noting.load(config, device)
    memory.reset()
    method = make_method(case, config, backbone, teacher, store)
    batch = Batch.of([store[0]] * config.training.batch_size, backbone.device)
    if config.training.compile:
        compile_blocks(backbone)
    kinds = of_kinds(method)
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    losses: list[float] = []
    for _ in range(iterations):
        last: dict[str, float] = {}
        for name, k in kinds.items():
            with timed(device, seconds[name]):
                last |= gradients(method, k, batch)
                for learner in method.learning(k):
                    method.learners[learner].step(1.0)
        ends = "distance", "discriminator"
        losses.append(sum(value for key, value in last.items() if key.endswith(ends)))
    # The first is not timed, unless it is all there is.
    taken = {name: statistics.median(each[1:] or each) for name, each in seconds.items()}
    found: dict[str, Any] = {"seconds": taken, "losses": losses, "memory": memory.peak()}
    if not isinstance(method, pcm.Pcm):
        found |= floors(noting, backbone, method, batch, repeats)
    if method.stores_positions:
        rows = min(config.trajectories.batch_size, config.trajectories.count)
        step = duration(teacher_pass(config, backbone, store, rows), device, repeats) / rows
        found["seconds_a_trajectory"] = method.grid.slots * method.grid.fine_steps * step
    found |= {"device": processor(), "threads": torch.get_num_threads(), "versions": versions()}
    return {**case, **found, "repeats": repeats, "wall": time.monotonic() - started}


def floors(
    noting: Noting, backbone: Backbone, method: Method, batch: Batch, repeats: int
) -> dict[str, Any]:
    """Seconds of the bare passes of each kind of iteration, without adapters and with them."""
    found: dict[str, Any] = {"floor": {}, "floor_with_lora": {}, "passes": {}}
    device = backbone.device.type
    for name, k in of_kinds(method).items():
        noting.passes = []
        method.training_step(k, batch, seeded("full size"))
        passes, noting.passes = noting.passes, None
        found["passes"][name] = [[p.adapter, len(p.z), p.graph, p.features] for p in passes]
        for key, adapters in (("floor", False), ("floor_with_lora", True)):
            taken: list[float] = []
            for _ in range(repeats + 1):
                clear(method)
                with timed(device, taken):
                    again(backbone, passes, adapters)
            found[key][name] = statistics.median(taken[1:])
        clear(method)
    return found


# ---- what is counted


def counted_pcm(case: Mapping[str, Any]) -> tuple[float, int]:
    """FLOPs of PCM's two iterations; bytes at the peak with AdamW's moments in 8 bits."""
    config = config_of(case)
    teacher = without_weights(architecture_of(config))
    store, backbone = Stub(config, teacher, "meta"), load_backbone(teacher, config, "meta")
    method = make_method(case, config, backbone, teacher, store)
    assert isinstance(method, pcm.Pcm)
    networks = [backbone.network, method.second.network, method.heads]
    held = bytes_of(t for part in networks for t in (*part.parameters(), *part.buffers()))
    moments = 2 * sum(p.numel() for x in method.learners.values() for p in x.parameters.values())
    batch, flops, peak = Batch.of([store[0]], backbone.device), 0, 0
    for k in of_kinds(method).values():
        step, at_most = count(lambda k=k: method.training_step(k, batch, seeded("full size")))
        flops, peak = flops + step, max(peak, at_most)
        clear(method)
    return flops, held + moments + peak


def counted() -> str:
    """Markdown: FLOPs of an update of the student's, with the discriminators' that goes with it,
    and bytes at the peak; by the plan's account."""
    rows = []
    for model, size in (("sd15", 256), ("sd15", 512), ("sdxl", 1024)):
        found: dict[str, tuple[float, int]] = {}
        for name in COUNTED:
            case = {"model": model, "size": size, "precision": "bfloat16", "name": name}
            if name == "PCM":
                found[name] = counted_pcm(case)
                continue
            config = config_of(case)
            plan = make_plan(config, architecture_of(config))
            updates = sum(n for kind, n in plan.iterations.items() if "student" in kind)
            memory = sum(plan.memory["training"].values())
            found[name] = plan.flops["training"] / updates, memory
        other = found["PCM"]
        for name, (flops, memory) in found.items():
            ratios = [f"x {a / b:.2f}" for a, b in zip((flops, memory), other, strict=True)]
            cells = [f"{flops / 1e12:.3g}", f"{memory / GIB:.2f}", *ratios]
            rows.append([f"{model} at {size}", name, *cells])
    titles = "model", "method", "TFLOP an update", "GiB", "FLOPs, PCM is 1", "memory, PCM is 1"
    return markdown(titles, rows)


# ---- all


def run_all(
    wanted: Iterable[Mapping[str, Any]],
    out: Path,
    repeats: int,
    iterations: int,
    until: float = math.inf,
) -> None:
    """Runs the cases that the file does not hold, each in a process of its own.

    Args:
        until: by the monotonic clock; a case that has not ended then is given up.
    """
    rows = json.loads(out.read_text()) if out.exists() else []
    done = {key_of(row) for row in rows if "error" not in row}
    for case in wanted:
        key, left = key_of(case), until - time.monotonic()
        if key in done or left < 1:
            continue
        options = ["--repeats", str(repeats), "--iterations", str(iterations)]
        command = [sys.executable, __file__, "--case", json.dumps(case), *options]
        try:
            limit = None if math.isinf(left) else left
            result = subprocess.run(command, capture_output=True, text=True, timeout=limit)
        except subprocess.TimeoutExpired:
            return
        if result.returncode == 0:
            row = json.loads(result.stdout.strip().splitlines()[-1])
        else:
            row = {**case, "error": (result.stderr.strip() or "?").splitlines()[-1]}
        rows = [old for old in rows if key_of(old) != key] + [row]
        write_json(out, rows)
        shown = {name: row.get(name) for name in ("seconds", "memory", "wall", "error")}
        print(key, shown, flush=True)
    for row in rows:  # only now: counting takes time and memory too
        if "floor" in row and "planned" not in row:
            config = config_of(row)
            plan = make_plan(config, architecture_of(config))
            row["planned"] = {stage: dict(parts) for stage, parts in plan.memory.items()}
            write_json(out, rows)


def tables(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown, one table for each model, size and precision."""
    titles = (
        "settings",
        "discriminators' iteration, s",
        "student's iteration, s",
        "over bare passes",
        "over passes with LoRA",
        "trajectories an hour",
        "peak, GiB",
        "planned, GiB",
        "last loss",
        "time, PCM is 1",
        "memory, PCM is 1",
    )
    parts: list[str] = []
    for kind in dict.fromkeys(key_of(row)[:-1] for row in rows):
        order = list(TOY if kind[0] == "toy" else SETTINGS)
        own = [row for row in rows if key_of(row)[:-1] == kind and row["name"] in order]
        own.sort(key=lambda row: order.index(row["name"]))
        whole = [row for row in own if "error" not in row]
        if not whole:
            continue
        device = f"{whole[0]['device']}, {whole[0]['threads']} CPU threads"
        beside = {row["name"]: row for row in whole}
        parts += [
            f"{kind[0]} at {kind[1]} pixels, {kind[2]}, on {device}:",
            markdown(titles, [cells_of(row, beside) for row in own]),
        ]
    return "\n\n".join(parts)


def cells_of(row: Mapping[str, Any], beside: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One line of a table; PCM of the same checkpointing, one slot at a time, is beside it."""
    if "error" in row:
        return [row["name"], row["error"], *[""] * 9]
    taken = row["seconds"]
    both = sum(taken.values())
    each = [f"{taken[kind]:.3g}" if kind in taken else "" for kind in ("discriminators", "student")]
    cells = [row["name"], *each, "", "", "", f"{row['memory'] / GIB:.2f}", *[""] * 4]
    if "floor" in row:
        for column, key in ((3, "floor"), (4, "floor_with_lora")):
            cells[column] = f"{both / sum(row[key].values()) - 1:+.0%}"
        rolled = row.get("seconds_a_trajectory")
        cells[5] = f"{3600 / rolled:,.0f}" if rolled else "not rolled out"
        if "planned" in row:
            cells[7] = f"{sum(row['planned']['training'].values()) / GIB:.2f}"
        cells[8] = f"{row['losses'][-1]:.5g}"
    alike = "PCM, no checkpointing" if "no checkpointing" in row["name"] else "PCM"
    if alike in beside and "PCM" not in row["name"] and "slot_batch" not in row["name"]:
        other = beside[alike]
        cells[9] = f"x {both / sum(other['seconds'].values()):.2f}"
        cells[10] = f"x {row['memory'] / other['memory']:.2f}"
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="where results are kept (JSON)")
    parser.add_argument("--table", type=Path, help="write such a file's tables into docs/cost.md")
    parser.add_argument("--counted", action="store_true", help="write the table of what is counted")
    parser.add_argument("--repeats", type=int, default=2, help="of the floor")
    parser.add_argument(
        "--iterations", type=int, default=21, help="of each kind; the first is not timed"
    )
    parser.add_argument("--only", default="", help="cases whose description has this in it")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case:
        print(json.dumps(run_case(json.loads(given.case), given.repeats, given.iterations)))
    elif given.table:
        replace_between(COST, START, tables(json.loads(given.table.read_text())))
    elif given.counted:
        replace_between(COST, START_COUNTED, counted())
    elif given.out:
        every = cases(torch.cuda.is_available())
        wanted = [case for case in every if given.only in " ".join(map(str, key_of(case)))]
        run_all(wanted, given.out, given.repeats, given.iterations)
    else:
        parser.error("--out, --table or --counted")


if __name__ == "__main__":
    main()
