"""What a run will cost, before it is paid for: disk, memory, network calls, hours. No weights are
needed.

Memory and FLOPs are not modelled: the library's own rollout and turns are run on tensors without
    contents (torch's meta device)
while every storage and every operation is counted. Hours are FLOPs over a GPU's peak rate times
:data:`SHARE_OF_PEAK`.
"""

from __future__ import annotations

import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch
from torch import Tensor

from rapm.compiled import compile_blocks
from rapm.config import Config
from rapm.counting import count
from rapm.errors import UserError
from rapm.models.teacher import Teacher, load_backbone
from rapm.network import TEACHER, Backbone
from rapm.objective import Conditioning, Renoising
from rapm.train import batch_of, make_players
from rapm.trajectories import Trajectory, guided
from rapm.turns import (
    Batch,
    Players,
    critic_turn,
    critics_alone,
    critics_play,
    student_turn,
    walk,
    walk_ahead,
)

# Dense bfloat16 rate with float32 accumulation, TFLOP/s, and memory, GiB, as their makers state
# them.
GPUS = {
    "RTX 3060 12 GB": (25.5, 12),
    "RTX 4070 Ti Super 16 GB": (88.2, 16),
    "RTX 4090 24 GB": (165.2, 24),
    "RTX A6000 48 GB": (154.8, 48),
    "A100 80 GB": (312.0, 80),
    "H100 80 GB": (989.0, 80),
    "H200 141 GB": (989.0, 141),
}
SHARE_OF_PEAK = 0.35  # assumed, see docs/cost.md
CONTEXT = 600 << 20  # bytes that a CUDA process is taken to hold before anything is computed


@dataclass(frozen=True)
class Plan:
    """What a run costs. Bytes and FLOPs.

    Attributes:
        disk: by what is kept, at the largest.
        memory: of each stage at its peak, by part.
        calls: network passes of the rollout, one row each, and iterations of each kind.
        flops: by stage.
    """

    disk: Mapping[str, int]
    memory: Mapping[str, Mapping[str, int]]
    calls: Mapping[str, int]
    flops: Mapping[str, float]

    @property
    def peak(self) -> int:
        return max(sum(parts.values()) for parts in self.memory.values())

    def hours(self, teraflops: float, stage: str) -> float:
        return self.flops[stage] / (teraflops * 1e12 * SHARE_OF_PEAK) / 3600


# ---- planning


class Stub:
    """A store of one trajectory, the largest of a run's, with random contents or (on meta) none:
    enough to take turns on."""

    def __init__(self, config: Config, teacher: Teacher, device: str) -> None:
        shapes = [teacher.latent_shape(size) for size in config.trajectories.sizes()]
        shape, slots = max(shapes, key=lambda s: s[1] * s[2]), config.rolled_slots
        generator = torch.Generator().manual_seed(
            0
        )  # so that losses can be compared between settings

        def drawn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device)

        of_prompt = {
            name: drawn(*own) for name, own in teacher.family.conditioning(teacher.config).items()
        }
        of_size = {
            name: value[0].to(device)
            for name, value in teacher.family.of_size(*teacher.size()).items()
        }
        coarse, nudged = drawn(slots + 1, *shape), drawn(slots, *shape)
        self.trajectory = Trajectory(coarse, nudged, of_prompt | of_size, "", 0, 0)
        self.unconditional: Conditioning = {name: value[None] for name, value in of_prompt.items()}
        self.manifest = {"sizes": 1}

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Trajectory:
        return self.trajectory


def bytes_of(tensors: Iterator[Tensor]) -> int:
    """What they hold, each counted by itself."""
    return sum(t.numel() * t.element_size() for t in tensors)


def without_weights(teacher: Teacher) -> Teacher:
    """The teacher's architecture; whatever is loaded of it has random contents."""
    return replace(teacher, random=True, checkpoint=None, loras=())


def teacher_pass(config: Config, backbone: Backbone, stub: Stub, rows: int) -> Callable[[], object]:
    """One fine step of the rollout of so many trajectories: what the network does in it."""
    z = stub.trajectory.coarse[:1].expand(rows, *stub.trajectory.coarse.shape[1:])
    conditioning = {
        name: value.expand(rows, *value.shape)
        for name, value in stub.trajectory.conditioning.items()
    }
    network = guided(backbone, stub.unconditional, config.trajectories.guidance_scale)

    def work() -> None:
        with torch.no_grad(), backbone.role(TEACHER):
            network(z, torch.full((rows,), 500), conditioning)

    return work


def walking(players: Players, stub: Stub) -> list[Batch]:
    """Finds the positions of the iterations that walk side by side."""
    training = players.config.training
    rows = [stub.trajectory] * (training.walk_ahead * training.batch_size)
    return walk_ahead(players, batch_of(rows, players.backbone.device))


def given(players: Players, stub: Stub) -> tuple[Batch, dict[str, Renoising]]:
    """What an iteration is given."""
    batch = walking(players, stub)[0]
    generator = torch.Generator().manual_seed(0)
    return batch, {
        role: players.renoising(batch.coarse[:, -1].shape, generator) for role in players.critics
    }


def iterations(players: Players, stub: Stub) -> dict[str, Callable[[], object]]:
    """The kinds of iteration a run can have: the student on distances alone, the critics in their
    head start, both. Without their share of :func:`walking`, where they walk side by side."""
    batch, shown = given(players, stub)
    kinds: dict[str, Callable[[], object]] = {"distances": lambda: student_turn(players, batch, {})}
    if shown:
        kinds |= {
            "critics": lambda: critic_turn(players, walk(players, batch), shown),
            "both": lambda: critic_turn(players, student_turn(players, batch, shown)[1], shown),
        }
    return kinds


def iteration_counts(config: Config) -> dict[str, int]:
    """How many iterations of each kind a run has."""
    counts = {"distances": 0, "critics": 0, "both": 0}
    for iteration in range(config.training.iterations):
        alone = critics_alone(config, iteration)
        counts[
            "critics" if alone else "both" if critics_play(config, iteration) else "distances"
        ] += 1
    return counts


def make_plan(config: Config, teacher: Teacher) -> Plan:
    """Counts what a run of this configuration costs."""
    bare, settings, slot_batch = (
        without_weights(teacher),
        config.trajectories,
        config.training.slot_batch,
    )
    # Groups of slots of one size cost the same but for the teacher's passes, which are counted once
    # and multiplied.
    ahead = config.training.walk_ahead
    counted = slot_batch if settings.slots % slot_batch == 0 and ahead == 1 else settings.slots
    groups = settings.slots // counted
    # A relay holds the student's graph while the teacher walks: one step of the teacher's in each
    # slot is counted in place.
    in_place = int(config.training.positions == "relayed")
    fewer = {"slots": counted, "fine_steps": settings.delta + in_place}
    one = config.model_copy(update={"trajectories": settings.model_copy(update=fewer)})
    stub = Stub(one, teacher, "meta")
    backbone = load_backbone(bare, one, "meta")
    weights = bytes_of(iter([*backbone.network.parameters(), *backbone.network.buffers()]))
    rows = min(settings.batch_size, settings.count)
    pass_flops, pass_peak = count(teacher_pass(one, backbone, stub, rows))
    players = make_players(one, backbone, stub, teacher.schedule)  # type: ignore[arg-type]
    learners = [players.student, *players.critics.values()]
    adapters = bytes_of(p for learner in learners for p in learner.parameters.values())
    student = bytes_of(iter(players.student.parameters.values()))
    state = 2 * adapters if config.training.optimizer == "adamw" else adapters // 2
    number, flops, peak, of_walk = iteration_counts(config), {}, 0, 0
    if ahead > 1:
        of_walk, peak = count(lambda: walking(players, stub))
    for name, turn in iterations(players, stub).items():
        if number[name]:
            there = _gradients_before(name, players) if groups > 1 else 0
            of_group, at_most = count(turn)
            flops[name], peak = groups * of_group + of_walk / ahead, max(peak, there + at_most)
        for learner in learners:
            learner.optimizer.zero_grad(set_to_none=True)
    if config.training.positions != "stored":
        walked = settings.slots - config.rolled_slots  # slots that the teacher goes in training
        slots = slot_batch if ahead == 1 else ahead * walked  # of one batch, in a pass
        of_pass, at_most = count(
            teacher_pass(one, backbone, stub, config.training.batch_size * slots)
        )
        followed = config.training.positions == "followed"
        steps = walked * (settings.fine_steps - (0 if followed else settings.delta))
        made = settings.delta * (counted - 1) * groups if followed else in_place * counted * groups
        left = (steps - made) * of_pass / slots
        flops, peak = {name: whole + left for name, whole in flops.items()}, max(peak, at_most)
    fine = config.rolled_slots * settings.fine_steps
    return Plan(
        disk=_disk(config, teacher, adapters + state + student),
        memory={
            "encoding prompts": {"text encoders": _weights_of(bare, config)},
            "trajectories": {"network": weights}
            | ({f"activations of {rows}": pass_peak} if config.rolled_slots else {}),
            "training": {
                "network": weights,
                "adapters and heads": adapters,
                "their average": student,
                "optimiser": state,
                "gradients and activations": peak,
            },
            "pictures": _pictures(bare, config, stub, pass_peak),
        },
        calls={
            "trajectories": settings.count * fine * (1 if settings.guidance_scale == 1 else 2),
            **{f"iterations, {name}": number[name] for name in flops},
        },
        flops={
            "trajectories": pass_flops * fine * settings.count / rows,
            "training": float(sum(number[name] * flops[name] for name in flops)),
        },
    )


def _gradients_before(kind: str, players: Players) -> int:
    """Gives parameters the gradients that they have from earlier groups of slots, and their bytes:
    the student's, and the critics' once they learn."""
    learners = [players.student, *(players.critics.values() if kind == "critics" else ())]
    parameters = [parameter for learner in learners for parameter in learner.parameters.values()]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    return bytes_of(iter(parameters))


def _disk(config: Config, teacher: Teacher, checkpoint: int) -> dict[str, int]:
    """Bytes of everything that is kept, without the headers of files."""
    settings = config.trajectories
    shapes = [teacher.latent_shape(size) for size in settings.sizes()]
    positions = (
        (2 * config.rolled_slots + 1)
        * sum(torch.Size(shape).numel() for shape in shapes)
        / len(shapes)
    )
    of_prompt = sum(
        torch.Size(shape).numel() for shape in teacher.family.conditioning(teacher.config).values()
    )
    return {
        "positions": int(4 * positions * settings.count),
        "prompts' embeddings, at most": 4 * of_prompt * (settings.count + 1),
        # The oldest goes once the newest is whole.
        f"checkpoints, {config.training.keep_checkpoints + 1}": checkpoint
        * (config.training.keep_checkpoints + 1),
    }


def _weights_of(bare: Teacher, config: Config) -> int:
    parts = [part for part in bare.family.text_parts if not part.startswith("tokenizer")]
    return sum(bytes_of(bare.draw(part, config.torch_dtype, "meta").parameters()) for part in parts)


def _pictures(bare: Teacher, config: Config, stub: Stub, pass_peak: int) -> dict[str, int]:
    """Network and VAE stay; text encoders, sampling as in the rollout and the VAE take turns."""
    dtype = torch.float32 if config.precision == "float16" else config.torch_dtype
    network, vae = (
        bare.draw(part, own, "meta")
        for part, own in ((bare.family.network, config.torch_dtype), ("vae", dtype))
    )
    z = stub.trajectory.coarse[:1].to(dtype)
    with torch.no_grad():
        _, peak = count(lambda: vae.decode(z, return_dict=False))
    in_turn = {
        "text encoders": _weights_of(bare, config),
        "activations": pass_peak,
        "VAE's activations": peak,
    }
    most = max(in_turn, key=lambda part: in_turn[part])
    return {
        "network": bytes_of(network.parameters()),
        "VAE": bytes_of(vae.parameters()),
        most: in_turn[most],
    }


# ---- what there is here


def check_room(plan: Plan, config: Config, out: Path) -> None:
    """
    Raises:
        UserError: disk or memory cannot suffice.
    """
    folder = next(path for path in (out, *out.absolute().parents) if path.is_dir())
    there = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    needed, free = sum(plan.disk.values()) - there, shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"the run needs {in_words(needed)} more on disk, {folder} has {in_words(free)}; fewer "
            f"trajectories.count, "
            "or --force to try"
        )
    memory = memory_here(config)
    if plan.peak > memory:
        stage = max(plan.memory, key=lambda stage: sum(plan.memory[stage].values()))
        raise UserError(
            f"{stage} needs {in_words(plan.peak)} of memory, there are {in_words(memory)}; see "
            f"'rapm plan' and docs/cost.md "
            "for settings that need less, or --force to try"
        )


def memory_here(config: Config) -> int:
    """Bytes that a run could have: what is free on the GPU, or the machine's memory."""
    if config.torch_device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return psutil.virtual_memory().total


def gpus_here() -> dict[str, tuple[float, float]]:
    """The GPU that is there: its rate at a large bfloat16 product, TFLOP/s, and its memory, GiB.
    Empty without one."""
    if not torch.cuda.is_available():
        return {}
    square = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    rate = 2 * 4096**3 / duration(lambda: square @ square, "cuda", 5) / 1e12
    return {torch.cuda.get_device_name(): (rate, torch.cuda.mem_get_info()[1] / 2**30)}


def in_words(size: float) -> str:
    """A number of bytes in words; what is small in MiB."""
    return f"{size / 2**30:.2f} GiB" if size >= 1 << 27 else f"{size / 2**20:.1f} MiB"


@dataclass(frozen=True)
class Measured:
    """Seconds, and bytes at the peak, of a few real passes and iterations with random weights."""

    teacher_pass: float
    iterations: Mapping[str, float]
    peak: int


def measure(config: Config, teacher: Teacher, repeats: int = 3) -> Measured:
    """Makes real iterations on random weights on the run's own device; the first of each kind is
    not timed.

    On a CPU the peak is that of the whole process.
    """
    device = config.torch_device
    stub = Stub(config, teacher, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    backbone = load_backbone(without_weights(teacher), config, device)
    rows = min(config.trajectories.batch_size, config.trajectories.count)
    of_pass = duration(teacher_pass(config, backbone, stub, rows), device, repeats)
    players = make_players(config, backbone, stub, teacher.schedule)  # type: ignore[arg-type]
    learners = [players.student, *players.critics.values()]
    if config.training.compile:
        compile_blocks(backbone)

    def whole(turn: Callable[[], object]) -> Callable[[], None]:
        def work() -> None:
            turn()
            for learner in learners:
                learner.clip(0, 0.0, config.training.gradient_clip)
                learner.step(0.0)

        return work

    ahead = config.training.walk_ahead
    share = duration(lambda: walking(players, stub), device, repeats) / ahead if ahead > 1 else 0.0
    seconds = {
        name: share + duration(whole(turn), device, repeats)
        for name, turn in iterations(players, stub).items()
    }
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else peak_of_process()
    return Measured(of_pass, seconds, peak)


def peak_of_process() -> int:
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def duration(work: Callable[[], object], device: str, repeats: int) -> float:
    """The median of ``repeats`` after one that is not counted."""
    taken = []
    for _ in range(repeats + 1):
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[1:])


# ---- in words


def render(
    plan: Plan,
    config: Config,
    gpus: Mapping[str, tuple[float, float]],
    measured: Measured | None = None,
) -> str:
    """The plan as a table of lines, with hours for these GPUs; see :data:`GPUS` and
    :func:`gpus_here`."""
    lines = ["Disk"]
    lines += [f"  {name:36} {in_words(size):>12}" for name, size in plan.disk.items()]
    lines += ["Memory at the peak of each stage (on a GPU 0.6 GiB more for CUDA itself)"]
    for stage, parts in plan.memory.items():
        named = ", ".join(f"{name} {in_words(size)}" for name, size in parts.items())
        lines.append(f"  {stage:18} {in_words(sum(parts.values())):>12}   {named}")
    lines += [
        "Network calls and iterations",
        *(f"  {name:36} {number:>12,}" for name, number in plan.calls.items()),
    ]
    if gpus or measured:
        lines += [f"Hours, at {SHARE_OF_PEAK:.0%} of a GPU's peak rate   trajectories   training"]
    for name, (rate, memory) in gpus.items():
        fits = "" if plan.peak + CONTEXT < memory * 2**30 else "   does not fit"
        lines.append(
            f"  {name:36} {plan.hours(rate, 'trajectories'):12.2f} "
            f"{plan.hours(rate, 'training'):10.2f}{fits}"
        )
    if gpus and config.precision == "float32":
        lines += [
            "  (by the rate in bfloat16; float32, as these settings have it, takes twice as long "
            "or more)"
        ]
    if measured:
        counts, settings = iteration_counts(config), config.trajectories
        rows = min(settings.batch_size, settings.count)
        rolling = (
            measured.teacher_pass
            * config.rolled_slots
            * settings.fine_steps
            * settings.count
            / rows
        )
        training = sum(counts[name] * seconds for name, seconds in measured.iterations.items())
        lines += [f"  {'measured here':36} {rolling / 3600:12.2f} {training / 3600:10.2f}"]
        lines += [
            f"Measured here, {config.torch_device}, {torch.get_num_threads()} CPU threads, random "
            f"weights"
        ]
        lines += [f"  {f'a fine step of {rows} trajectories':36} {measured.teacher_pass:10.3f} s"]
        lines += [
            f"  {f'iteration, {name}':36} {seconds:10.3f} s"
            for name, seconds in measured.iterations.items()
        ]
        lines += [f"  {'memory at the peak':36} {in_words(measured.peak):>12}"]
    return "\n".join(lines)
