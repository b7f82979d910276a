"""What a run costs, foretold and then paid."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from conftest import changed
from rapm.config import Config
from rapm.counting import count
from rapm.doctor import examine
from rapm.errors import UserError
from rapm.estimate import (
    GPUS,
    SHARE_OF_PEAK,
    Stub,
    check_room,
    kinds,
    make_plan,
    render,
    teacher_pass,
)
from rapm.measure import measure
from rapm.methods import METHODS, Batch
from rapm.models.resolve import architecture_of, teacher_of
from rapm.models.teacher import load_backbone
from rapm.pipeline import make_trajectories, train_run
from rapm.run import Run
from rapm.sampling import seeded
from rapm.settings import load, presets


def test_flops_and_bytes_by_hand() -> None:
    """y = relu(x w): y and its half are new, x and w were there before, w's transpose is none."""
    x, w = torch.empty(8, 16, device="meta"), torch.empty(32, 16, device="meta")

    def work() -> None:
        y = torch.relu(x @ w.t())
        del y
        torch.empty(5, device="meta")

    assert count(work) == (2 * 8 * 16 * 32, 2 * 8 * 32 * 4)
    b, a = (torch.empty(size, 4, device="meta") for size in (32, 16))

    def adapted() -> None:
        (x @ w.t()).addmm_(x @ a, b.t())

    assert count(adapted) == (2 * 8 * (16 * 32 + 16 * 4 + 4 * 32), 8 * (32 + 4) * 4)


def test_what_is_known_already_is_counted_as_if_it_were_new() -> None:
    """Operations of one form are run once and told from then on.

    Strides, dtypes and types of numbers tell forms apart.
    """
    x = torch.empty(8, 16, device="meta")

    def work(x: Tensor, number: float) -> list[Tensor]:
        y = x * number
        flat = torch.ops.aten._unsafe_view(y.t().contiguous(), [128])
        return [y, torch.relu(flat.view(16, 8)).add_(1)]

    for given, number in (
        (x, 2),
        (x, 2.0),
        (x.int(), 2),
        (x.int(), 2.0),
        (x.half(), 2),
        (x.t(), 2),
    ):
        real = work(torch.ones_like(given, device="cpu"), number)
        copied = real[0].nbytes if given.is_contiguous() else 0  # Until relu is done.
        expected = 0, real[0].nbytes + real[1].nbytes + copied
        for _ in range(2):
            made: list[Tensor] = []
            assert count(lambda x=given, n=number, made=made: made.extend(work(x, n))) == expected
            assert [(t.shape, t.stride(), t.dtype) for t in made] == [
                (t.shape, t.stride(), t.dtype) for t in real
            ]


def test_attention_is_counted_without_its_matrix() -> None:
    q = torch.empty(1, 2, 512, 64, device="meta", dtype=torch.bfloat16, requires_grad=True)
    flops, peak = count(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q))
    assert flops == 4 * 2 * 512 * 512 * 64
    assert peak < 2 * 512 * 512 * 2  # Bytes of the matrix.


def test_a_logged_loss_is_no_obstacle() -> None:
    assert count(lambda: float(torch.empty(3, device="meta").sum()))[0] == 0


RAPM: dict[str, dict[str, Any]] = {
    "two slots, then one": {"training": {"slot_batch": 2}, "rapm": {"delta": 4}},
    "joint": {
        "training": {"gradient_checkpointing": True, "batch_size": 2},
        "discriminators": {"schedule": "joint", "loss": "relativistic"},
    },
    "through all": {"rapm": {"detach_slots": False, "detach_relative": False}},
    "distances alone": {"discriminators": {"adversarial_weight": 0.0}, "rapm": {"relative": False}},
}


@pytest.mark.parametrize(
    ("method", "kind", "sections"),
    [
        *(("rapm", "tiny", sections) for sections in RAPM.values()),
        ("rapm", "sdxl", {}),  # as it is
        ("midpoint", "sd21", {"training": {"slot_batch": 2}}),
    ],
)
def test_flops_are_those_of_real_iterations(
    tiny_config: Config,
    tiny_midpoint: Config,
    small_teachers: dict[str, Path],
    method: str,
    kind: str,
    sections: dict[str, dict[str, Any]],
) -> None:
    """Of real passes and iterations, by torch's own counter.

    It counts plain attention, whose backward pass computes less.
    """
    config = changed(tiny_config if method == "rapm" else tiny_midpoint, **sections)
    config = config.model_copy(update={"teacher": str(small_teachers[kind])})
    teacher = teacher_of(config)
    plan, store = make_plan(config, teacher), Stub(config, teacher, "cpu")
    backbone = load_backbone(teacher, config, "cpu")
    left_out = {torch.ops.aten.addmm_: lambda _, a, b, **more: 2 * a[0] * a[1] * b[1]}

    def flops(work: Any) -> int:
        counter = FlopCounterMode(display=False, custom_mapping=left_out)
        with sdpa_kernel(SDPBackend.MATH), counter:
            work()
        return counter.get_total_flops()

    of_pass = flops(teacher_pass(config, backbone, store, 1))
    assert plan.flops["trajectories"] == pytest.approx(plan.calls * of_pass, rel=0.03)
    made = METHODS[method](config, backbone, teacher.schedule, store)
    batch, total = Batch.of([store[0]] * config.training.batch_size, backbone.device), 0
    for numbers in kinds(made).values():
        step = numbers[0], batch, seeded("a test")
        total += len(numbers) * flops(lambda step=step: made.training_step(*step))
    assert plan.flops["training"] == pytest.approx(total, rel=0.03)
    hours = plan.flops["training"] / (100e12 * SHARE_OF_PEAK * 3600)
    assert plan.hours(100, "training") == pytest.approx(hours)


def test_pictures_are_in_the_plan(tiny_config: Config) -> None:
    """Those of the end, 100 and N guided steps and N plain ones; and those on the way."""
    config = changed(tiny_config, samples={"count": 0})
    teacher = teacher_of(config)
    plan = make_plan(config, teacher)
    vae = teacher.load(["vae"], torch.float32, "cpu").vae
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        vae.decode(torch.zeros(1, 4, 8, 8))
    of_pass = plan.flops["trajectories"] / plan.calls
    decoding = counter.get_total_flops() / of_pass
    last = 100 + 3 + 3 / 2 + 3 * decoding
    assert plan.picture_passes == pytest.approx(8 * last, rel=0.01)
    assert plan.flops["pictures"] == pytest.approx(plan.picture_passes * of_pass)
    more = make_plan(changed(config, samples={"count": 2, "every": 4}), teacher)  # 0, 4, 8, 10
    on_the_way = 21 + 3 + 2 * decoding + 4 * (3 / 2 + decoding)
    paths = 5 * 3 * decoding  # of one prompt: the teacher's, and four of the student's
    expected = pytest.approx(2 * on_the_way + paths, rel=0.01)
    assert more.picture_passes - plan.picture_passes == expected


@pytest.mark.parametrize(
    ("method", "kind", "ema"),
    [("rapm", "tiny", 0.0), ("midpoint", "sdxl", 0.9)],
)
def test_disk_and_iterations_are_those_of_the_run(
    tiny_config: Config,
    tiny_midpoint: Config,
    small_teachers: dict[str, Path],
    tmp_path: Path,
    method: str,
    kind: str,
    ema: float,
) -> None:
    config = changed(
        tiny_config if method == "rapm" else tiny_midpoint,
        training={"keep_checkpoints": 2},
        student={"rank": 64, "ema": ema},
    )
    config = config.model_copy(update={"teacher": str(small_teachers[kind])})
    plan = make_plan(config, teacher_of(config))
    run = Run.open(tmp_path / "run", config)
    store = make_trajectories(run)
    assert train_run(run)
    checkpoints = sum(file.stat().st_size for file in run.checkpoints.glob("step-*"))
    # Names in files' headers are left out.
    assert plan.disk["checkpoints, 3"] == pytest.approx(1.5 * checkpoints, rel=0.05)
    rows = [store[k] for k in range(len(store))]
    positions = sum(row.absolute.nbytes + row.intermediate.nbytes for row in rows)
    assert plan.disk["positions"] == (positions if method == "rapm" else 0)
    prompt = sum(x.nbytes for name, x in rows[0].conditioning.items() if name != "time_ids")
    assert plan.disk["prompts' embeddings, at most"] == 7 * prompt
    learnt = [tuple(k for k in record if k.endswith("_gradient")) for record in run.read_metrics()]
    assert list(plan.iterations.values()) == list(Counter(learnt).values())
    assert ("discriminators" in plan.iterations) == (method == "rapm")
    assert plan.calls == (6 * 3 * 4 if method == "rapm" else 0)
    rolled_out = ["network", "activations of 3"] if method == "rapm" else []
    assert list(plan.memory["trajectories"]) == rolled_out
    learned, (_, state) = plan.memory["training"], run.load_checkpoint()

    def held(part: str) -> int:
        return sum(value.nbytes for name, value in state.items() if part in name)

    assert learned["adapters and heads"] == held(".weights.")
    assert learned["their average"] == held(".average.")
    assert (learned["their average"] > 0) == (ema > 0)
    # But for counts of steps.
    assert learned["optimiser"] == pytest.approx(held(".optimizer."), rel=0.01)


def test_memory_follows_the_settings(tiny_config: Config) -> None:
    """Each setting lowers the part that it says it lowers."""
    base = changed(tiny_config, training={"slot_batch": 3}, trajectories={"size": "64x64"})
    base = base.model_copy(update={"precision": "bfloat16"})
    teacher = teacher_of(base)
    network = teacher.load_network(torch.bfloat16, "cpu")
    planned = make_plan(base, teacher).memory
    plain = planned["training"]
    assert plain["network"] == sum(2 * p.numel() for p in network.parameters())
    cheaper = {
        "network": base.model_copy(update={"base_precision": "int8"}),
        "optimiser": changed(base, training={"optimizer": "adamw8bit"}),
        "gradients and activations": changed(base, training={"slot_batch": 1}),
        "adapters and heads": changed(base, student={"rank": 1}),
    }
    for part, config in cheaper.items():
        assert make_plan(config, teacher).memory["training"][part] < 0.75 * plain[part], part
    # Twice as many as planned.
    many = make_plan(changed(base, trajectories={"size": "64x64", "batch_size": 6}), teacher)
    activations = many.memory["pictures"]["activations"]
    assert activations == many.memory["trajectories"]["activations of 6"]
    assert activations > 1.9 * max(planned["pictures"].values())
    checkpointed = make_plan(changed(base, training={"gradient_checkpointing": True}), teacher)
    part = "gradients and activations"
    assert checkpointed.memory["training"][part] < plain[part]


@pytest.mark.parametrize(("method", "checkpointing"), [("rapm", True), ("midpoint", False)])
def test_memory_is_that_of_real_iterations(
    tiny_config: Config, tiny_midpoint: Config, method: str, checkpointing: bool
) -> None:
    """Of the CPU's own allocator, as torch's profiler follows it."""
    config = changed(
        tiny_config if method == "rapm" else tiny_midpoint,
        training={"slot_batch": 3, "gradient_checkpointing": checkpointing},
        trajectories={"size": "64x64"},
    )
    teacher = teacher_of(config)
    store, backbone = Stub(config, teacher, "cpu"), load_backbone(teacher, config, "cpu")
    made = METHODS[method](config, backbone, teacher.schedule, store)
    batch, peaks = Batch.of([store[0]], backbone.device), []
    for numbers in kinds(made).values():
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            made.training_step(numbers[0], batch, seeded("a test"))
        for learner in made.learners.values():
            learner.optimizer.zero_grad(set_to_none=True)
        events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
        sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
        peaks.append(max(accumulate(sizes)))
    planned = make_plan(config, teacher).memory["training"]
    assert planned["gradients and activations"] == pytest.approx(max(peaks), rel=0.03)


@pytest.mark.parametrize("name", [name for name in presets() if not name.startswith("toy")])
def test_presets_are_whole_and_name_published_models(name: str) -> None:
    config = load(preset=name)
    teacher = architecture_of(config)
    assert teacher.source == config.teacher
    is_xl = teacher.family.pipeline.__name__ == "StableDiffusionXLPipeline"
    assert name.startswith("sdxl") == is_xl
    if name.endswith("gb"):
        assert config.precision == "bfloat16"


def test_positions_of_several_sizes_are_counted_by_their_mean(tiny_config: Config) -> None:
    config = changed(tiny_config, trajectories={"size": "16x16, 16x32"})
    disk = make_plan(config, teacher_of(config)).disk
    assert disk["positions"] == 6 * (2 * 3 + 1) * 4 * (8 * 8 + 16 * 8) / 2 * 4


def test_too_little_disk_or_memory_is_refused(tiny_config: Config, tmp_path: Path) -> None:
    plan = make_plan(tiny_config, teacher_of(tiny_config))
    check_room(plan, tiny_config, tmp_path / "not" / "there" / "yet")
    large = replace(plan, disk={"positions": 10**15})
    message = r"the run needs 931322.57 GiB more on disk, .* has [\d.]+ GiB; fewer trajectories.cou"
    with pytest.raises(UserError, match=message):
        check_room(large, tiny_config, tmp_path)
    wide = replace(plan, memory={"pictures": {"network": 1}, "training": {"network": 10**15}})
    message = r"training needs 931322\.57 GiB of memory, there are [\d.]+ GiB; see 'rapm plan'"
    with pytest.raises(UserError, match=message):
        check_room(wide, tiny_config, tmp_path)


def test_what_is_planned_and_measured_is_told(tiny_config: Config, tiny_midpoint: Config) -> None:
    teacher = teacher_of(tiny_config)
    plan = make_plan(tiny_config, teacher)
    measured = measure(tiny_config, teacher, 1)
    lines = render(plan, tiny_config, GPUS, measured).splitlines()
    assert lines[0] == (
        "Method rapm: N = 3, M = 4, 10 iterations (5 of the discriminators, 5 of the student), "
        "6 trajectories"
    )
    text = "\n".join(lines)
    assert "RTX 4090 24 GB" in text
    assert "of a GPU's peak rate   trajectories   training   pictures" in text
    calls = plan.calls, plan.picture_passes
    rolling, drawing = (n * measured.fine_step / 3600 for n in calls)
    training = sum(5 * seconds for seconds in measured.iterations.values()) / 3600
    assert f"  {'measured here':36} {rolling:12.2f} {training:10.2f} {drawing:10.2f}" in lines
    for name, seconds in measured.iterations.items():
        assert f"  {f'iteration, {name}':36} {seconds:10.3f} s" in lines
    assert f"  {'a fine step of one trajectory':36} {measured.fine_step:10.3f} s" in lines
    assert f"  {'positions':36} {'0.0 MiB':>12}" in lines
    assert "hours" not in render(plan, tiny_config, {}).lower()
    joint = changed(tiny_config, discriminators={"schedule": "joint"})
    first = render(make_plan(joint, teacher), joint, {}).splitlines()[0]
    assert "10 iterations (10 of the student and discriminators)" in first
    text = render(make_plan(tiny_midpoint, teacher), tiny_midpoint, {})
    assert text.startswith(
        "Method midpoint: N = 3, 10 iterations (10 of the student), 6 trajectories"
    )
    assert "activations of 3" not in text


def test_the_doctor_finds_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    lines = list(examine())
    assert any(f"torch {torch.__version__}" in line for line in lines)
    assert any(line.startswith("! HF_HUB_OFFLINE is set") for line in lines)
    if not torch.cuda.is_available():
        assert any(line.startswith("! ") and "fine for the toy teacher" in line for line in lines)
        monkeypatch.setattr("rapm.doctor.cpu_has_bfloat16", lambda: False)
        assert any("--set precision=float32" in line for line in examine())
