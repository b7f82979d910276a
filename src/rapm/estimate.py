"""What a run costs, told before it is paid: disk, memory, the teacher's passes, hours.

Nothing is modelled and no weights are loaded. The library's own rollout and training steps are run
on tensors without contents, and every storage and operation is counted. Hours are FLOPs over a
GPU's peak rate times :data:`SHARE_OF_PEAK`.
"""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle

from rapm.config import Config
from rapm.counting import count
from rapm.errors import UserError
from rapm.evaluate.features import BYTES
from rapm.methods import METHODS, Batch, Method
from rapm.models.teacher import Teacher, load_backbone
from rapm.network import TEACHER, Backbone
from rapm.sample import MANY_STEPS, PICTURES
from rapm.samples import many_steps
from rapm.sampling import Conditioning, guided, seeded
from rapm.trajectories import Trajectory

Gpus = Mapping[str, tuple[float, float]]
Memory = Mapping[str, Mapping[str, int]]
if TYPE_CHECKING:
    from rapm.measure import Measured

# Dense bfloat16 rate, TFLOP/s, and memory, GiB, as their makers state them.
GPUS: Gpus = {
    "RTX 3060 12 GB": (25.5, 12),
    "RTX 4070 Ti Super 16 GB": (88.2, 16),
    "RTX 4090 24 GB": (165.2, 24),
    "RTX A6000 48 GB": (154.8, 48),
    "A100 80 GB": (312.0, 80),
    "H100 80 GB": (989.0, 80),
    "H200 141 GB": (989.0, 141),
}
SHARE_OF_PEAK = 0.35  # Assumed, see docs/cost.md.
CONTEXT = 600 << 20  # Bytes that a CUDA process is taken to hold before anything is computed.


@dataclass(frozen=True)
class Plan:
    """What a run costs. Bytes and FLOPs.

    Attributes:
        disk: by what is kept, at the largest.
        memory: of each stage at its peak, by part.
        calls: the teacher's guided passes in the rollout, of one trajectory each.
        iterations: how many of each kind, by who learns.
        picture_passes: what all pictures of a run take, in guided passes of one picture.
        flops: by stage.
        evaluation: memory of ``rapm evaluate`` with published networks, by part; not of a run.
    """

    disk: Mapping[str, int]
    memory: Memory
    calls: int
    iterations: Mapping[str, int]
    picture_passes: float
    flops: Mapping[str, float]
    evaluation: Mapping[str, int]

    @property
    def peaks(self) -> dict[str, int]:
        """Memory of each stage."""
        return {stage: sum(parts.values()) for stage, parts in self.memory.items()}

    def hours(self, teraflops: float, stage: str) -> float:
        return self.flops[stage] / (teraflops * 1e12 * SHARE_OF_PEAK) / 3600


class Stub(list[Trajectory]):
    """A store of one trajectory of each size, the largest first; random, or empty on meta."""

    def __init__(self, config: Config, teacher: Teacher, device: str) -> None:
        shapes = map(teacher.latent_shape, config.trajectories.sizes())
        slots = config.grid().slots if METHODS[config.method].stores_positions else 0
        family, generator = teacher.family, torch.Generator().manual_seed(0)

        def drawn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device)

        shapes_of_prompt = family.conditioning(teacher.config).items()
        prompt = {name: drawn(*own).to(config.torch_dtype) for name, own in shapes_of_prompt}
        own, scale = config.trajectories.sizes()[0], config.trajectories.guidance_scale
        size = {name: x[0].to(device) for name, x in teacher.of_picture(own, scale).items()}
        self.of_prompt: Conditioning = prompt
        away = {} if family.guidance_is_input else prompt
        self.unconditional: Conditioning = {name: value[None] for name, value in away.items()}
        for shape in sorted(shapes, key=math.prod, reverse=True):
            positions = drawn(slots + 1, *shape), drawn(slots, *shape)
            self.append(Trajectory(*positions, prompt | size, "", 0, 0))


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """What they hold, each counted by itself."""
    return sum(t.numel() * t.element_size() for t in tensors)


def without_weights(teacher: Teacher) -> Teacher:
    """The teacher's architecture; whatever is loaded of it has random contents."""
    return replace(teacher, random=True, checkpoint=None, loras=())


def teacher_pass(config: Config, backbone: Backbone, store: Stub, rows: int) -> Callable[[], None]:
    """One fine step of a rollout: what the network does in it."""
    batch = Batch.of([store[0]] * rows, backbone.device)
    denoiser = guided(backbone, store.unconditional, config.trajectories.guidance_scale)

    def work() -> None:
        with torch.no_grad(), backbone.adapter(TEACHER):
            denoiser(batch.noise, torch.full((rows,), 500), batch.conditioning)

    return work


def kinds(method: Method) -> dict[str, list[int]]:
    """Iterations by who learns in them: "student", "discriminators", "student and ..."."""
    found: dict[str, list[int]] = {}
    for k in range(method.config.training.iterations):
        last = Counter(name.split("_")[-1] for name in method.learning(k))
        name = " and ".join(word + "s" * (n > 1) for word, n in last.items())
        found.setdefault(name, []).append(k)
    return found


def make_plan(config: Config, teacher: Teacher) -> Plan:
    """Counts what a run of this configuration costs."""
    store, settings = Stub(config, teacher, "meta"), config.trajectories
    backbone = load_backbone(without_weights(teacher), config, "meta")
    network = bytes_of(backbone.network.state_dict().values())
    rows = min(settings.batch_size, settings.count)
    of_pass, activations = count(teacher_pass(config, backbone, store, rows))
    method = METHODS[config.method](config, backbone, teacher.schedule, store)
    batch = Batch.of([store[0]] * config.training.batch_size, backbone.device)
    learners, iterations, flops, peak = method.learners.values(), kinds(method), 0, 0
    for numbers in iterations.values():
        step = partial(method.training_step, numbers[0], batch, seeded("rapm plan"))
        of_step, at_most = count(step)
        flops, peak = flops + len(numbers) * of_step, max(peak, at_most)
        for learner in learners:
            learner.optimizer.zero_grad(set_to_none=True)
    learnt = {
        "adapters and heads": sum(bytes_of(x.parameters.values()) for x in learners),
        "their average": sum(bytes_of(x.average.values()) for x in learners),
        "optimiser": sum(bytes_of(x.room_for_state()) for x in learners),
    }
    steps = method.grid.slots * method.grid.fine_steps * method.stores_positions
    rollout = {"network": network, f"activations of {rows}": activations} if steps else {}
    training = {"network": network, **learnt, "gradients and activations": peak}
    others, decoding = _other_stages(config, teacher, store[0].absolute[:1], network, activations)
    evaluation = others.pop("evaluation")
    of_picture = of_pass / rows
    plain = 0.5 if settings.guidance_scale > 1 and store.unconditional else 1.0
    pictures = _picture_passes(config, decoding / of_picture, plain)
    positions = sum(bytes_of((row.absolute, row.intermediate)) for row in store if steps)
    prompt, kept = bytes_of(store.of_prompt.values()), config.training.keep_checkpoints + 1
    disk = {
        "positions": positions * settings.count // len(store),
        "prompts' embeddings, at most": prompt * (settings.count + 1),
        f"checkpoints, {kept}": kept * sum(learnt.values()),  # The oldest goes last.
    }
    return Plan(
        disk=disk,
        memory={"trajectories": rollout, "training": training, **others},
        calls=steps * settings.count,
        iterations={name: len(numbers) for name, numbers in iterations.items()},
        picture_passes=pictures,
        flops={
            "trajectories": steps * settings.count * of_picture,
            "training": float(flops),
            "pictures": pictures * of_picture,
        },
        evaluation=evaluation,
    )


def _picture_passes(config: Config, decoding: float, plain: float) -> float:
    """Of those drawn while it trains and of the last ones, decoding among them. A student's pass is
    ``plain`` of the teacher's. One prompt's trajectory is decoded whole."""
    samples, slots = config.samples, config.trajectories.slots
    every = samples.every or math.ceil(config.training.iterations / 20)
    rows = math.ceil(config.training.iterations / every) + 1
    teachers = many_steps(slots) + slots + 2 * decoding
    meanwhile = teachers + rows * (slots * plain + decoding)
    paths = (1 + rows) * slots * decoding if samples.count else 0.0
    last = MANY_STEPS + slots + slots * plain + 3 * decoding
    return samples.count * meanwhile + paths + PICTURES * last


def _other_stages(
    config: Config, teacher: Teacher, z: Tensor, network: int, sampling: int
) -> tuple[dict[str, dict[str, int]], float]:
    """Memory of encoding, of pictures and of evaluation; and FLOPs of decoding a picture.

    The VAE stays. Text encoders take turns with the network and what it computes, and so do the
    networks that read pictures with what is computed.
    """
    bare, dtype = without_weights(teacher), config.torch_dtype
    texts = [part for part in teacher.family.text_parts if not part.startswith("tokenizer")]
    drawn = (bare.draw(part, dtype, "meta") for part in texts)
    encoders = [bytes_of(part.parameters()) for part in drawn]
    for_vae = torch.float32 if config.precision == "float16" else dtype
    vae = bare.draw("vae", for_vae, "meta").requires_grad_(False)
    unpacked = pixel_shuffle(z.to(for_vae), teacher.family.packing)
    flops, decoding = count(lambda: vae.decode(unpacked, return_dict=False))
    computed = {sampling: "activations", decoding: "VAE's activations"}
    encoding, kept = {"text encoders": sum(encoders)}, {"VAE": bytes_of(vae.parameters())}
    stages = {"encoding prompts": encoding}
    for stage, more in (("pictures", {}), ("evaluation", {size: n for n, size in BYTES.items()})):
        turns = computed | more
        drawing = {"network": network, turns[max(turns)]: max(turns)}
        stages[stage] = kept | max(encoding, drawing, key=lambda parts: sum(parts.values()))
    return stages, flops


def check_room(plan: Plan, config: Config, out: Path) -> None:
    """Raises UserError where disk or memory cannot suffice."""
    folder = next(path for path in (out, *out.absolute().parents) if path.is_dir())
    there = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    needed, free = sum(plan.disk.values()) - there, shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"the run needs {in_words(needed)} more on disk, {folder} has {in_words(free)}; fewer "
            "trajectories.count, or --force to try"
        )
    memory, stage = memory_here(config), max(plan.peaks, key=plan.peaks.__getitem__)
    if plan.peaks[stage] > memory:
        raise UserError(
            f"{stage} needs {in_words(plan.peaks[stage])} of memory, there are {in_words(memory)}; "
            "see 'rapm plan' and docs/cost.md for settings that need less, or --force to try"
        )


def memory_here(config: Config) -> int:
    """Bytes that a run could have: what is free on the GPU, or the machine's memory."""
    if config.torch_device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return psutil.virtual_memory().total


def in_words(size: float) -> str:
    """A number of bytes in words; what is small in MiB."""
    return f"{size / 2**30:.2f} GiB" if size >= 1 << 27 else f"{size / 2**20:.1f} MiB"


def render(plan: Plan, config: Config, gpus: Gpus, measured: Measured | None = None) -> str:
    """The plan in lines, with hours for these GPUs: :data:`GPUS` or :func:`gpus_here`."""
    grid, number, each = config.grid(), config.training.iterations, plan.iterations.items()
    fine = f", M = {grid.fine_steps}" if plan.calls else ""
    kinds = ", ".join(f"{n:,} of the {name}" for name, n in each)
    lines = [
        f"Method {config.method}: N = {grid.slots}{fine}, {number:,} iterations ({kinds}), "
        f"{config.trajectories.count:,} trajectories",
        "Disk",
        *(f"  {name:36} {in_words(size):>12}" for name, size in plan.disk.items()),
        "Memory at the peak of each stage (on a GPU 0.6 GiB more for CUDA itself)",
    ]
    for stage, parts in plan.memory.items():
        named = ", ".join(f"{name} {in_words(size)}" for name, size in parts.items() if size)
        lines += [f"  {stage:18} {in_words(plan.peaks[stage]):>12}   {named}"] if parts else []
    named = ", ".join(f"{name} {in_words(size)}" for name, size in plan.evaluation.items())
    lines += [f"  {'rapm evaluate':18} {in_words(sum(plan.evaluation.values())):>12}   {named}"]
    lines += [f"{'Guided passes of the rollout':38} {plan.calls:>12,}"]
    if gpus or measured:
        head = f"Hours, at {SHARE_OF_PEAK:.0%} of a GPU's peak rate"
        lines += [f"{head}   trajectories   training   pictures"]
    for name, (rate, memory) in gpus.items():
        hours = [plan.hours(rate, stage) for stage in plan.flops]
        fits = "" if max(plan.peaks.values()) + CONTEXT < memory * 2**30 else "   does not fit"
        lines += [f"  {name:36} {hours[0]:12.2f} {hours[1]:10.2f} {hours[2]:10.2f}{fits}"]
    if gpus and config.precision == "float32":
        lines += ["  (by the rate in bfloat16; float32, as set here, takes twice as long or more)"]
    if measured:
        training = sum(number * measured.iterations[name] for name, number in each)
        seconds = {"a fine step of one trajectory": measured.fine_step}
        seconds |= {f"iteration, {name}": measured.iterations[name] for name, _ in each}
        rolling, drawing = (n * measured.fine_step for n in (plan.calls, plan.picture_passes))
        hours = [seconds / 3600 for seconds in (rolling, training, drawing)]
        where = f"{config.torch_device}, {torch.get_num_threads()} CPU threads, random weights"
        lines += [f"  {'measured here':36} {hours[0]:12.2f} {hours[1]:10.2f} {hours[2]:10.2f}"]
        lines += [f"Measured here, {where}"]
        lines += [f"  {name:36} {taken:10.3f} s" for name, taken in seconds.items()]
        lines += [f"  {'memory at the peak':36} {in_words(measured.peak):>12}"]
    return "\n".join(lines)
