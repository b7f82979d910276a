"""What a run costs, foretold and then paid."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import SMALL
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from rapm import config as configuration
from rapm.config import Config, load
from rapm.counting import count
from rapm.doctor import examine
from rapm.errors import UserError
from rapm.estimate import (
    GPUS,
    SHARE_OF_PEAK,
    Stub,
    check_room,
    iteration_counts,
    iterations,
    make_plan,
    measure,
    render,
    walking,
    without_weights,
)
from rapm.models.resolve import architecture_of, teacher_of
from rapm.models.teacher import load_backbone
from rapm.pipeline import make_trajectories, train_run
from rapm.run import Run
from rapm.train import make_players


def changed(config: Config, **sections: dict[str, object]) -> Config:
    return config.model_copy(
        update={
            name: getattr(config, name).model_copy(update=values)
            for name, values in sections.items()
        }
    )


def test_flops_and_bytes_by_hand() -> None:
    """y = relu(x w): x and w were there before; y and its half are new, and w's transpose is
    none."""
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
    """Operations of one form are run once and told from then on: strides, dtypes and types of
    numbers tell forms apart."""
    x = torch.empty(8, 16, device="meta")

    def work(x: Tensor, number: float) -> list[Tensor]:
        y = x * number
        return [y, torch.relu(y.t().contiguous()).add_(1)]

    for given, number in (
        (x, 2),
        (x, 2.0),
        (x.int(), 2),
        (x.int(), 2.0),
        (x.half(), 2),
        (x.t(), 2),
    ):
        real = work(torch.ones_like(given, device="cpu"), number)
        copied = real[0].nbytes if given.is_contiguous() else 0  # until relu is done
        for _ in range(2):
            made: list[Tensor] = []
            assert count(
                lambda given=given, number=number, made=made: made.extend(work(given, number))
            ) == (
                0,
                real[0].nbytes + real[1].nbytes + copied,
            )
            assert [(t.shape, t.stride(), t.dtype) for t in made] == [
                (t.shape, t.stride(), t.dtype) for t in real
            ]


def test_attention_is_counted_without_its_matrix() -> None:
    q = torch.empty(1, 2, 512, 64, device="meta", dtype=torch.bfloat16, requires_grad=True)
    flops, peak = count(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q))
    assert flops == 4 * 2 * 512 * 512 * 64
    assert peak < 2 * 512 * 512 * 2  # bytes of the matrix


def test_a_logged_loss_is_no_obstacle() -> None:
    assert count(lambda: float(torch.empty(3, device="meta").sum()))[0] == 0


@pytest.mark.parametrize(
    ("kind", "slot_batch", "source", "ahead"),
    [
        ("sd15", 1, "followed", 1),
        ("sd15", 1, "followed", 3),
        ("sd15", 2, "followed", 1),
        ("sd15", 1, "relayed", 1),
        ("sd15", 3, "relayed", 2),
        ("sd15", 3, "stored", 1),
        ("sd21", 1, "stored", 1),
        ("sdxl", 1, "stored", 1),
    ],
)
def test_flops_are_those_of_real_iterations(
    tiny_config: Config,
    small_teachers: dict[str, Path],
    kind: str,
    slot_batch: int,
    source: str,
    ahead: int,
) -> None:
    """All slots of real iterations, by torch's own counter. (It counts plain attention, whose
    backward pass computes less.)"""
    relative = 0.0 if source == "relayed" else 1.0
    training = {
        "slot_batch": slot_batch,
        "positions": source,
        "walk_ahead": ahead,
        "relative_weight": relative,
    }
    config = changed(tiny_config, training=training)
    config = config.model_copy(update={"teacher": str(small_teachers[kind])})
    teacher = teacher_of(config)
    plan = make_plan(config, teacher)
    stub = Stub(config, teacher, "cpu")
    players = make_players(config, load_backbone(teacher, config, "cpu"), stub, teacher.schedule)  # type: ignore[arg-type]
    number, total = iteration_counts(config), 0.0
    left_out = {torch.ops.aten.addmm_: lambda _, a, b, **more: 2 * a[0] * a[1] * b[1]}

    def flops(work: Callable[[], object]) -> int:
        with (
            sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(display=False, custom_mapping=left_out) as counted,
        ):
            work()
        return counted.get_total_flops()

    walk = flops(lambda: walking(players, stub)) / ahead
    for name, turn in iterations(players, stub).items():
        total += number[name] * (walk + flops(turn))
    assert (walk > 0) == (ahead > 1)
    assert plan.flops["training"] == pytest.approx(total, rel=0.03)
    assert plan.hours(100, "training") == pytest.approx(
        plan.flops["training"] / (100e12 * SHARE_OF_PEAK * 3600)
    )


@pytest.mark.parametrize(
    ("kind", "source"),
    [*((kind, "stored") for kind in SMALL), ("sd15", "followed"), ("sd15", "relayed")],
)
def test_disk_and_iterations_are_those_of_the_run(
    tiny_config: Config, small_teachers: dict[str, Path], tmp_path: Path, kind: str, source: str
) -> None:
    relative = 0.0 if source == "relayed" else 1.0
    training = {"keep_checkpoints": 2, "positions": source, "relative_weight": relative}
    config = changed(tiny_config, critics={"start": 0.4}, training=training, student={"rank": 64})
    config = config.model_copy(update={"teacher": str(small_teachers[kind])})
    plan = make_plan(config, teacher_of(config))
    run = Run.open(tmp_path / "run", config)
    store = make_trajectories(run)
    assert train_run(run)

    def size(*files: Path) -> int:
        return sum(file.stat().st_size for file in files)

    checkpoints = sorted(run.checkpoints.glob("step-*"))
    assert plan.disk["checkpoints, 3"] == pytest.approx(
        1.5 * size(*checkpoints), rel=0.05
    )  # names in files' headers
    shards = [store[k] for k in range(len(store))]
    assert plan.disk["positions"] == sum(
        4 * (row.coarse.numel() + row.nudged.numel()) for row in shards
    )
    of_prompt = sum(
        value.numel() for name, value in shards[0].conditioning.items() if name != "time_ids"
    )
    assert plan.disk["prompts' embeddings, at most"] == 4 * of_prompt * 7
    kinds = [
        "distances"
        if "absolute_critic" not in record
        else "both"
        if "absolute_adversarial" in record
        else "critics"
        for record in run.read_metrics()
    ]
    assert {
        name: kinds.count(name) for name in ("distances", "critics", "both")
    } == iteration_counts(config)
    assert all(iteration_counts(config).values())
    assert ("activations of 3" in plan.memory["trajectories"]) == (
        source != "relayed"
    )  # nothing is rolled out
    assert (
        plan.calls["trajectories"] == 6 * {"stored": 3, "followed": 1, "relayed": 0}[source] * 4 * 2
    )
    learned = plan.memory["training"]
    _, state = run.load_checkpoint()

    def held(part: str) -> int:
        return sum(value.numel() * 4 for name, value in state.items() if part in name)

    assert learned["adapters and heads"] == held(".weights.")
    assert learned["their average"] == held("average.")
    assert learned["optimiser"] == pytest.approx(
        held(".optimizer."), rel=0.01
    )  # counts of steps aside


def test_one_group_of_slots_tells_of_all(tiny_config: Config) -> None:
    """FLOPs and memory of whole iterations, though one group of three is counted; earlier groups
    leave gradients, too."""
    config = changed(tiny_config, training={"positions": "followed"}, student={"rank": 32})
    teacher = teacher_of(config)
    stub, number, flops, peaks = Stub(config, teacher, "meta"), iteration_counts(config), 0, []
    players = make_players(
        config, load_backbone(without_weights(teacher), config, "meta"), stub, teacher.schedule
    )  # type: ignore[arg-type]
    for name, turn in iterations(players, stub).items():
        of_all, peak = count(turn)
        flops += number[name] * of_all
        peaks.append(peak)
        for learner in (players.student, *players.critics.values()):
            learner.optimizer.zero_grad(set_to_none=True)
    plan = make_plan(config, teacher)
    assert plan.flops["training"] == pytest.approx(flops)
    assert plan.memory["training"]["gradients and activations"] == pytest.approx(
        max(peaks), rel=0.02
    )


def test_memory_follows_the_settings(tiny_config: Config) -> None:
    """Each setting lowers the part that it says it lowers."""
    base = changed(
        tiny_config, training={"slot_batch": 3}, trajectories={"size": "64x64"}
    ).model_copy(update={"precision": "bfloat16"})
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
    many = make_plan(
        changed(base, trajectories={"size": "64x64", "batch_size": 6}), teacher
    ).memory  # twice as many as planned
    assert (
        many["pictures"]["activations"]
        == many["trajectories"]["activations of 6"]
        > 1.9 * max(planned["pictures"].values())
    )
    checkpointed = changed(base, training={"gradient_checkpointing": True})
    assert (
        make_plan(checkpointed, teacher).memory["training"]["gradients and activations"]
        < plain["gradients and activations"]
    )


def test_activations_are_those_of_a_real_turn(tiny_config: Config) -> None:
    """The bytes that autograd keeps of a real pass on the CPU, by its own hooks, are there in the
    plan's account of it."""
    teacher = teacher_of(tiny_config)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    def work(device: str) -> None:
        stub = Stub(tiny_config, teacher, device)
        backbone = load_backbone(
            teacher if device == "cpu" else without_weights(teacher), tiny_config, device
        )
        backbone.add_role("student", 4, backbone.lora_targets, 0)
        z = stub.trajectory.coarse[:1]
        conditioning = {name: value[None] for name, value in stub.trajectory.conditioning.items()}
        weights = {p.untyped_storage()._cdata for p in backbone.network.parameters()}

        def forward() -> None:
            with backbone.role("student"):
                done.append(backbone(z, torch.full((1,), 500), conditioning))

        done: list[Tensor] = []
        if device == "meta":
            found.append(count(forward)[1])
        else:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                forward()
            found.append(sum(size for key, size in kept.items() if key not in weights))

    found: list[int] = []
    work("cpu")
    work("meta")
    saved, peak = found
    assert saved <= peak <= 1.5 * saved


@pytest.mark.parametrize("name", [name for name in configuration.presets() if name != "toy"])
def test_presets_are_whole_and_name_published_models(name: str) -> None:
    config = load(preset=name)
    teacher = architecture_of(config)
    assert teacher.source == config.teacher
    assert name.startswith("sdxl") == (
        teacher.family.pipeline.__name__ == "StableDiffusionXLPipeline"
    )
    if name.endswith("gb"):
        assert config.precision == "bfloat16"


def test_too_little_disk_or_memory_is_refused(tiny_config: Config, tmp_path: Path) -> None:
    plan = make_plan(tiny_config, teacher_of(tiny_config))
    check_room(plan, tiny_config, tmp_path / "not" / "there" / "yet")
    large = make_plan(changed(tiny_config, trajectories={"count": 10**9}), teacher_of(tiny_config))
    with pytest.raises(
        UserError,
        match=r"the run needs [\d.]+ GiB more on disk, .* has [\d.]+ GiB; fewer trajectories.count",
    ):
        check_room(large, tiny_config, tmp_path)
    wide = replace(plan, memory={"pictures": {"network": 1}, "training": {"network": 10**15}})
    with pytest.raises(
        UserError,
        match=r"training needs 931322\.57 GiB of memory, there are [\d.]+ GiB; see 'rapm plan'",
    ):
        check_room(wide, tiny_config, tmp_path)


def test_what_is_measured_is_told(tiny_config: Config) -> None:
    teacher = teacher_of(tiny_config)
    text = render(
        make_plan(tiny_config, teacher), tiny_config, GPUS, measure(tiny_config, teacher, 1)
    )
    assert "RTX 4090 24 GB" in text
    assert "iteration, critics" in text
    assert "a fine step of 3 trajectories" in text
    assert "hours" not in render(make_plan(tiny_config, teacher), tiny_config, {}).lower()


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
