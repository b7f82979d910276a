"""Time and memory of full-size networks with random weights, beside the bare networks' and PCM's.

    python benchmarks/full_size.py --out FILE.json     # SD 1.5 at 512, SDXL at 1024 on a GPU; on a
    CPU SD 1.5 at 256 python benchmarks/full_size.py --table FILE.json   # writes docs/cost.md's
    tables of it python benchmarks/full_size.py --counted           # writes docs/cost.md's table of
    counted FLOPs and bytes; any machine

Every case runs in a process of its own, so that its memory is its own; what is in the file already
is not run again. An iteration is a turn of the student's, and then where there are critics theirs
from the way it went; the first is not timed. On a GPU memory is torch's own peak, on a CPU the
growth of the process's resident memory at its peak over what it was before the network came. A CPU
without bfloat16 is given float32.

The floor: the network passes that a turn made, made again by the network alone, with backward
    passes where the turn had them;
once without any adapter ("bare"), once with the turn's own ("with LoRA"). PCM's iteration is at the
same N positions, one of each slot, as an iteration here, with rank, precision and checkpointing as
here, its heads and 8-bit AdamW as published; its VAE and text encoder are left out. What is counted
rather than measured is the plan's account of the same turns (meta device).
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import psutil
import torch
from baselines import pcm
from markers import markdown, replace_between
from torch import Tensor

from rapm import config as configuration
from rapm.compiled import compile_blocks
from rapm.config import Config
from rapm.counting import count
from rapm.doctor import cpu_has_bfloat16
from rapm.estimate import (
    Stub,
    duration,
    given,
    make_plan,
    peak_of_process,
    teacher_pass,
    walking,
    without_weights,
)
from rapm.models.resolve import architecture_of
from rapm.models.teacher import Teacher, load_backbone
from rapm.network import STUDENT, TEACHER, Backbone
from rapm.objective import Conditioning
from rapm.train import make_players
from rapm.turns import Learner, Walked, critic_turn, student_turn

GIB = 2**30
COST = Path(__file__).parents[1] / "docs" / "cost.md"
START, START_COUNTED = (
    "<!-- table: benchmarks/full_size.py -->",
    "<!-- table: benchmarks/full_size.py --counted -->",
)
CRITICS = ["critics.adversarial_weight=0.4"]
STORED = ["training.positions=stored", "training.relative_weight=1"]
PAPER = [*CRITICS, *STORED, "trajectories.fine_steps=25"]
# Full-size networks: the library's own iteration and what changes its cost, then other iterations.
SETTINGS: dict[str, list[str]] = {
    "as the library does it": [],
    "slot_batch 4": ["training.slot_batch=4"],
    "no checkpointing": ["training.gradient_checkpointing=false"],
    "no checkpointing, slot_batch 4": [
        "training.gradient_checkpointing=false",
        "training.slot_batch=4",
    ],
    "channels_last": ["training.channels_last=true"],
    "compile": ["training.compile=true"],
    "int8": ["base_precision=int8"],
    "fp8": ["base_precision=fp8"],
    "nf4": ["base_precision=nf4"],
    "int8, adamw8bit": ["base_precision=int8", "training.optimizer=adamw8bit"],
    "with critics": CRITICS,
    "the paper's form": PAPER,
    "the paper's form, no checkpointing": [*PAPER, "training.gradient_checkpointing=false"],
}
# As published with AdamW in 8 bits: on SD 1.5 its heads alone have 664 million parameters.
PCM = {
    "PCM": ["training.optimizer=adamw8bit"],
    "PCM, no checkpointing": [
        "training.optimizer=adamw8bit",
        "training.gradient_checkpointing=false",
    ],
}
# The embedded teacher, for which Python's share is largest: as the demo does it, as the library,
# with critics, and the paper's.
TOY = {
    "as the demo does it: no critics, 8 walk ahead": [],
    "as the demo does it, compiled": ["training.compile=true"],
    "no critics": ["training.walk_ahead=1"],
    "with critics": ["training.walk_ahead=1", *CRITICS],
    "stored positions, both terms": ["training.walk_ahead=1", *CRITICS, *STORED],
}
# What is counted: every iteration with critics, if there are any.
COUNTED = {
    "as the library does it": [],
    "with critics": CRITICS,
    "with critics, stored positions": [
        *CRITICS,
        "training.positions=stored",
        "trajectories.fine_steps=25",
    ],
    "the paper's form": PAPER,
    "followed positions of M = 5": ["training.positions=followed", "trajectories.fine_steps=5"],
}


def cases(on_gpu: bool) -> Iterator[dict[str, Any]]:
    """What is run: the model, its size in pixels, the network's precision, a name, settings."""
    half = "bfloat16" if on_gpu or cpu_has_bfloat16() else "float32"
    for model, size in (
        [("toy", 64), ("sd15", 512), ("sdxl", 1024)] if on_gpu else [("toy", 64), ("sd15", 256)]
    ):
        precision = "float32" if model == "toy" else half
        for name, settings in (TOY if model == "toy" else {**SETTINGS, **PCM}).items():
            yield {
                "model": model,
                "size": size,
                "precision": precision,
                "name": name,
                "settings": settings,
            }


def key_of(case: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(case[part] for part in ("model", "size", "precision", "name"))


def config_of(case: Mapping[str, Any]) -> Config:
    if case["model"] == "toy":
        return configuration.load(teacher="toy", settings=case["settings"])
    return full_size(case["model"], case["size"], case["precision"], case["settings"])


def full_size(model: str, size: int, precision: str, settings: Sequence[str]) -> Config:
    given = [
        f"precision={precision}",
        f"trajectories.size={size}x{size}",
        "trajectories.batch_size=1",
    ]
    return configuration.load(teacher=f"random:{model}", settings=[*given, *settings])


# ---- one case


@contextmanager
def timed(device: str, taken: list[float]) -> Iterator[None]:
    """Adds what the block took, in seconds."""
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    yield
    if device == "cuda":
        torch.cuda.synchronize()
    taken.append(time.perf_counter() - started)


def clear(learners: list[Learner]) -> None:
    for learner in learners:
        learner.optimizer.zero_grad(set_to_none=True)


def processor() -> str:
    """The CPU's name where the system tells it, else its kind."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if told.exists() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


class Memory:
    """Bytes at the peak since the last reset, beyond what the process held when this was made."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device == "cuda"
        self.before = 0 if self.on_gpu else psutil.Process().memory_info().rss
        self.reset()

    def reset(self) -> None:
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        elif (
            sys.platform == "linux"
        ):  # elsewhere the peak is that of the whole process, loading with it
            if trim := getattr(
                ctypes.CDLL(None), "malloc_trim", None
            ):  # glibc keeps what loading has given back
                trim(0)
            Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        if self.on_gpu:
            return torch.cuda.max_memory_allocated()
        if sys.platform != "linux":
            return peak_of_process() - self.before
        status = dict(
            line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines()
        )
        return int(status["VmHWM"].split()[0]) * 1024 - self.before


@dataclass(frozen=True)
class Pass:
    """A network pass that a turn made.

    Attributes:
        graph: whether it was made to be walked back: to its adapter's weights, or, if ``to_input``,
            to its input alone.
        tapped: up to the last tap only.
    """

    role: str
    z: Tensor
    t: Tensor
    conditioning: Conditioning
    graph: bool
    to_input: bool
    tapped: bool


@contextmanager
def watched(backbone: Backbone) -> Iterator[list[Pass]]:
    """Notes the passes that are made."""
    call, seen = backbone.call, []

    def noted(network: Any, z: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        role, graph, tapped = (
            str(backbone.playing),
            torch.is_grad_enabled(),
            backbone._features is not None,
        )
        seen.append(Pass(role, z.detach(), t, conditioning, graph, z.requires_grad, tapped))
        return call(network, z, t, conditioning)

    backbone.call = noted
    try:
        yield seen
    finally:
        backbone.call = call


def again(backbone: Backbone, passes: list[Pass], adapters: bool) -> None:
    """The same passes by the network alone, each with its backward pass where it had a graph.
    Without an adapter that leads to the input, as there is nothing else that it could lead to."""
    for one in passes:
        to_input = one.graph and (one.to_input or not adapters)
        with backbone.role(one.role if adapters else TEACHER), torch.set_grad_enabled(one.graph):
            z = one.z.float().requires_grad_(to_input)
            given = z, one.t, one.conditioning
            out = backbone.features(*given) if one.tapped else [backbone(*given)]
            ones = [torch.ones_like(x) for x in out]
            if to_input:
                torch.autograd.grad(out, z, ones)
            elif one.graph:
                torch.autograd.backward(out, ones)


def ours(config: Config, teacher: Teacher, repeats: int, iterations: int) -> dict[str, Any]:
    """Turns, their floor, the rollout, and the losses of a few iterations."""
    device = config.torch_device
    stub, memory = Stub(config, teacher, device), Memory(device)
    backbone = load_backbone(without_weights(teacher), config, device)
    memory.reset()
    rows = min(config.trajectories.batch_size, config.trajectories.count)
    taken = duration(teacher_pass(config, backbone, stub, rows), device, repeats)
    found: dict[str, Any] = {"rows": rows, "teacher_pass": taken}
    found["memory_trajectories"] = memory.peak()
    memory.reset()
    players = make_players(config, backbone, stub, teacher.schedule)  # type: ignore[arg-type]
    learners = [players.student, *players.critics.values()]
    critics = list(players.critics.values())
    if config.training.compile:
        compile_blocks(backbone)
    batch, shown = given(players, stub)
    walked: list[Walked] = []  # the student's last way

    def student() -> dict[str, float]:
        losses, walked[:] = student_turn(players, batch, shown)
        return losses

    def walk() -> dict[str, float]:
        walking(players, stub)
        return {}

    ahead = config.training.walk_ahead
    work: dict[str, tuple[Callable[[], dict[str, float]], list[Learner]]] = {
        **(
            {"walk": (walk, [])} if ahead > 1 else {}
        ),  # of several iterations: they share what it takes
        "student": (student, [players.student]),
        **({"critics": (lambda: critic_turn(players, walked, shown), critics)} if critics else {}),
    }
    found |= {
        "losses": [],
        "seconds": {name: [] for name in work},
        "floor": {},
        "floor_with_lora": {},
        "passes": {},
    }
    for iteration in range(iterations):
        losses: dict[str, float] = {}
        for name, (turn, own) in work.items():
            with timed(device, found["seconds"][name]):
                losses |= turn()
                for learner in own:
                    learner.clip(iteration, 0.0, config.training.gradient_clip)
                    learner.step(1.0)
        found["losses"].append(
            sum(value for key, value in losses.items() if key.endswith(("distance", "critic")))
        )
    found["memory"] = memory.peak()
    for name, (turn, _) in work.items():
        with watched(backbone) as passes:
            turn()
        found["passes"][name] = [[one.role, len(one.z), one.graph, one.tapped] for one in passes]
        for key, adapters in (("floor", False), ("floor_with_lora", True)):
            floor: list[float] = []
            for _ in range(repeats + 1):
                clear(learners)
                with timed(device, floor):
                    again(backbone, passes, adapters)
            found[key][name] = statistics.median(floor[1:])
        clear(learners)
    if ahead > 1:
        found["seconds"]["walk"] = [seconds / ahead for seconds in found["seconds"]["walk"]]
        for key in ("floor", "floor_with_lora"):
            found[key]["walk"] /= ahead
    return found


def pcm_of(
    config: Config, teacher: Teacher, stub: Stub, model: str, device: str
) -> tuple[pcm.Pcm, Callable[[bool], None]]:
    """PCM's step, and what calls it for a turn: of the critics, or the student's."""
    form, grid, bare = pcm.FORMS[model], config.grid(), without_weights(teacher)
    student, network = (
        load_backbone(bare, config, device),
        bare.load_network(config.torch_dtype, device),
    )
    other = Backbone(
        network,
        bare.family.call,
        (),
        pcm.taps(network, form),
        gradient_checkpointing=config.training.gradient_checkpointing,
    )
    student.add_role(STUDENT, config.student.rank, student.lora_targets, 0)
    rows = {name: value[None] for name, value in stub.trajectory.conditioning.items()}
    x0 = stub.trajectory.coarse[:1]
    with other.role(TEACHER), torch.no_grad():
        channels = [x.shape[1] for x in other.features(x0, torch.zeros(1, dtype=torch.long), rows)]
    with torch.device(device):
        heads = pcm.Heads(channels, form)
    rate = config.student.learning_rate
    step = pcm.Pcm(
        student, other, teacher.schedule, grid,
        Learner(student, STUDENT, None, rate, (0.9, 0.999), 1e-3, config.training.optimizer),
        Learner(other, "discriminator", heads, rate, (0.0, 0.999), 1e-3, config.training.optimizer),
        stub.unconditional, config.trajectories.guidance_scale,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)

    def turn(critic: bool) -> None:
        for k in range(0, grid.slots * grid.fine_steps, grid.fine_steps):
            step.turn(x0, [k], rows, generator, critic=critic, share=1 / grid.slots)

    return step, turn


def theirs(config: Config, teacher: Teacher, iterations: int, model: str) -> dict[str, Any]:
    """PCM's turns at the same positions."""
    device = config.torch_device
    stub, memory = Stub(config, teacher, device), Memory(device)
    step, turn = pcm_of(config, teacher, stub, model, device)
    found: dict[str, Any] = {"seconds": {"critics": [], "student": []}}
    for iteration in range(2 * iterations):
        critic = iteration % 2 == 0
        learner = step.critic if critic else step.learner
        with timed(device, found["seconds"]["critics" if critic else "student"]):
            turn(critic)
            learner.clip(iteration, 0.0, config.training.gradient_clip)
            learner.step(1.0)
    return found | {"memory": memory.peak()}


def counted_pcm(config: Config, model: str) -> tuple[float, int]:
    """FLOPs of a pair of PCM's turns, and bytes at the peak: networks, adapters, heads, their
    moments in 8 bits, the rest."""
    teacher = architecture_of(config)
    step, turn = pcm_of(config, teacher, Stub(config, teacher, "meta"), model, "meta")
    modules = step.student.network, step.teacher.network, step.critic.heads
    held = sum(
        t.numel() * t.element_size()
        for module in modules
        if module
        for t in [*module.parameters(), *module.buffers()]
    )
    moments = sum(
        2 * p.numel()
        for learner in (step.learner, step.critic)
        for p in learner.parameters.values()
    )
    flops, peak = 0, 0
    for critic in (True, False):
        of_turn, at_most = count(lambda critic=critic: turn(critic))
        flops, peak = flops + of_turn, max(peak, at_most)
        for learner in (step.learner, step.critic):
            learner.optimizer.zero_grad(set_to_none=True)
    return flops, held + moments + peak


def counted() -> str:
    """Markdown: FLOPs of an iteration and bytes at the peak, by the plan's account, beside those of
    a pair of PCM's turns."""
    rows = []
    for model, size in (("sd15", 256), ("sd15", 512), ("sdxl", 1024)):
        found = {}
        for name, settings in COUNTED.items():
            config = full_size(
                model, size, "bfloat16", ["critics.start=0", "critics.head_start=0", *settings]
            )
            plan = make_plan(config, architecture_of(config))
            found[name] = (
                plan.flops["training"] / config.training.iterations,
                sum(plan.memory["training"].values()),
            )
        found["PCM"] = other = counted_pcm(full_size(model, size, "bfloat16", []), model)
        for name, (flops, memory) in found.items():
            ratios = (
                [f"x {flops / other[0]:.2f}", f"x {memory / other[1]:.2f}"]
                if name != "PCM"
                else ["", ""]
            )
            rows.append(
                [f"{model} at {size}", name, f"{flops / 1e12:.3g}", f"{memory / GIB:.2f}", *ratios]
            )
    titles = "model", "iteration", "TFLOP", "GiB", "FLOPs, PCM is 1", "memory, PCM is 1"
    return markdown(titles, rows)


def run_case(case: Mapping[str, Any], repeats: int, iterations: int) -> dict[str, Any]:
    config = config_of(case)
    teacher = architecture_of(config)
    started = time.monotonic()
    if case["name"] in PCM:
        found = theirs(config, teacher, iterations, case["model"])
    else:
        found = ours(config, teacher, repeats, iterations)
    found["turns"] = {
        name: statistics.median(taken[1:]) for name, taken in found["seconds"].items()
    }
    gpu = torch.cuda.get_device_name() if config.torch_device == "cuda" else ""
    return {
        **case, **found, "device": gpu or processor(), "threads": torch.get_num_threads(),
        "torch": torch.__version__, "diffusers": diffusers.__version__, "repeats": repeats, "wall": time.monotonic() - started,
    }  # fmt: skip


# ---- all


def run_all(out: Path, repeats: int, iterations: int, only: str) -> None:
    rows = json.loads(out.read_text()) if out.exists() else []
    done = {key_of(row) for row in rows if "error" not in row}
    for case in cases(torch.cuda.is_available()):
        key = key_of(case)
        if key in done or only not in " ".join(map(str, key)):
            continue
        command = [
            sys.executable,
            __file__,
            "--case",
            json.dumps(case),
            "--repeats",
            str(repeats),
            "--iterations",
            str(iterations),
        ]
        result = subprocess.run(command, capture_output=True, text=True)
        lines = result.stdout.strip().splitlines()
        row = (
            json.loads(lines[-1])
            if result.returncode == 0
            else {**case, "error": (result.stderr.strip() or "?").splitlines()[-1]}
        )
        rows = [old for old in rows if key_of(old) != key] + [row]
        out.write_text(json.dumps(rows, indent=1))
        print(
            key, {name: row.get(name) for name in ("turns", "memory", "wall", "error")}, flush=True
        )
    for row in rows:  # only now: counting takes time and memory too
        if "floor" in row and "planned" not in row:
            config = config_of(row)
            plan = make_plan(config, architecture_of(config))
            row["planned"] = {stage: dict(parts) for stage, parts in plan.memory.items()}
            row["planned_flops"] = plan.flops["training"] / config.training.iterations
            row["bytes_per_trajectory"] = plan.disk["positions"] / config.trajectories.count
            out.write_text(json.dumps(rows, indent=1))


def tables(rows: list[dict[str, Any]]) -> str:
    """Markdown, one table for each model, size and precision."""
    titles = (
        "settings", "critics' turn, s", "student's turn, s", "over bare passes", "over passes with LoRA",
        "trajectories an hour", "peak, GiB", "planned, GiB", "last loss", "time, PCM is 1", "memory, PCM is 1",
    )  # fmt: skip
    parts: list[str] = []
    for kind in dict.fromkeys(key_of(row)[:-1] for row in rows):
        order = list(TOY if kind[0] == "toy" else {**SETTINGS, **PCM})
        own = sorted(
            (row for row in rows if key_of(row)[:-1] == kind),
            key=lambda row: order.index(row["name"]),
        )
        device = next(
            f"{row['device']}, {row['threads']} CPU threads" for row in own if "device" in row
        )
        beside = {row["name"]: row for row in own if row["name"] in PCM and "error" not in row}
        parts += [
            f"{kind[0]} at {kind[1]} pixels, {kind[2]}, on {device}:",
            markdown(titles, [cells_of(row, beside) for row in own]),
        ]
    return "\n\n".join(parts)


def cells_of(row: Mapping[str, Any], beside: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One line of a table; with PCM's, ``beside``, is compared what has the same checkpointing and
    one slot at a time too."""
    if "error" in row:
        return [row["name"], row["error"], *[""] * 9]
    taken, memory = row["turns"], row["memory"] / GIB
    both = sum(taken.values())
    of_critics = f"{taken['critics']:.3g}" if "critics" in taken else ""
    of_student = f"{taken['student'] + taken.get('walk', 0.0):.3g}"
    cells = [row["name"], of_critics, of_student, "", "", "", f"{memory:.2f}", *[""] * 4]
    if "floor" in row:
        config = config_of(row)
        a_trajectory = (
            config.rolled_slots * config.trajectories.fine_steps * row["teacher_pass"] / row["rows"]
        )
        cells[3:6] = [
            *(f"{both / sum(row[key].values()) - 1:+.0%}" for key in ("floor", "floor_with_lora")),
            f"{3600 / a_trajectory:,.0f}" if a_trajectory else "not rolled out",
        ]
        cells[7] = (
            f"{sum(row['planned']['training'].values()) / GIB:.2f}" if "planned" in row else ""
        )
        cells[8] = f"{row['losses'][-1]:.5g}"
    alike = "PCM, no checkpointing" if "no checkpointing" in row["name"] else "PCM"
    other = None if row["name"] in PCM or "slot_batch" in row["name"] else beside.get(alike)
    if other:
        cells[9:] = [
            f"x {both / sum(other['turns'].values()):.2f}",
            f"x {row['memory'] / other['memory']:.2f}",
        ]
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="where results are kept (JSON)")
    parser.add_argument(
        "--table", type=Path, help="write the tables of such a file into docs/cost.md"
    )
    parser.add_argument(
        "--counted",
        action="store_true",
        help="write the table of what is counted into docs/cost.md",
    )
    parser.add_argument("--repeats", type=int, default=2, help="of the floor")
    parser.add_argument(
        "--iterations",
        type=int,
        default=21,
        help="of student and critics, the first not timed; at least 2",
    )
    parser.add_argument("--only", default="", help="cases whose description has this in it")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(
            json.dumps(
                run_case(json.loads(arguments.case), arguments.repeats, arguments.iterations)
            )
        )
    elif arguments.table:
        replace_between(COST, START, tables(json.loads(arguments.table.read_text())))
    elif arguments.counted:
        replace_between(COST, START_COUNTED, counted())
    elif arguments.out:
        run_all(arguments.out, arguments.repeats, arguments.iterations, arguments.only)
    else:
        parser.error("--out, --table or --counted")


if __name__ == "__main__":
    main()
