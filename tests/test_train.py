"""The loop: exact resume, what moves when, stops that lose nothing."""

from __future__ import annotations

import filecmp
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import rapm.train as training
from conftest import changed
from rapm import settings
from rapm.config import Config
from rapm.errors import NonFinite, UserError
from rapm.methods import METHODS, Method
from rapm.models.resolve import teacher_of
from rapm.models.teacher import load_backbone
from rapm.optim import Learner
from rapm.pipeline import make_trajectories, train_run
from rapm.run import Run
from rapm.train import _stop_on_interrupt, draw_batch, dry_run, rate_factor
from rapm.trajectories import TrajectoryStore


def trained(config: Config, folder: Path) -> Run:
    run = Run.open(folder, config)
    make_trajectories(run)
    assert train_run(run)
    return run


@pytest.mark.parametrize("method", ["rapm", "midpoint"])
def test_stopped_and_resumed_equals_never_stopped_bit_for_bit(
    tiny_config: Config,
    tiny_midpoint: Config,
    tmp_path: Path,
    method: str,
) -> None:
    """Of other families: tests/test_flow.py."""
    config = {"rapm": tiny_config, "midpoint": tiny_midpoint}[method]
    whole = trained(config, tmp_path / "whole")
    assert whole.checkpoint_steps() == [4, 8, 10]
    for step in (4, 8):
        stopped = tmp_path / f"stopped-{step}"
        shutil.copytree(whole.folder, stopped)
        for later in (s for s in (8, 10) if s > step):
            (stopped / "checkpoints" / f"step-{later:08d}.safetensors").unlink()
        run = Run.open(stopped, config)
        assert run.checkpoint_steps()[-1] == step
        assert train_run(run)
        for later in (8, 10):
            name = f"step-{later:08d}.safetensors"
            assert filecmp.cmp(run.checkpoints / name, whole.checkpoints / name, shallow=False)
        strip = [
            {k: v for k, v in record.items() if k != "seconds"} for record in run.read_metrics()
        ]
        assert strip == [
            {k: v for k, v in record.items() if k != "seconds"} for record in whole.read_metrics()
        ]


def test_it_saves_in_time_however_slow_iterations_are(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "LONGEST_UNSAVED", 0)
    config = changed(
        tiny_config, training={"iterations": 3, "checkpoint_every": 1000, "keep_checkpoints": 9}
    )
    assert trained(config, tmp_path / "run").checkpoint_steps() == [1, 2, 3]


SLOTS = range(3)


def test_what_is_logged(tiny_config: Config, tmp_path: Path) -> None:
    records = trained(tiny_config, tmp_path / "run").read_metrics()
    assert [record["iteration"] for record in records] == list(range(10))
    always = {"iteration", "rate", "seconds"}
    for record in records:
        if record["iteration"] % 2 == 0:
            parts = ("discriminator", "margin", "discriminator_gradient")
        else:
            parts = ("distance", "adversarial")
        expected = {f"{term}_{part}" for term in ("relative", "absolute") for part in parts}
        if record["iteration"] % 2:
            expected |= {f"{term}_distance/{n}" for term in ("relative", "absolute") for n in SLOTS}
            expected.add("student_gradient")
        assert record.keys() == always | expected


def test_what_midpoint_logs(
    tiny_midpoint: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And shows in its bar."""
    records = trained(tiny_midpoint, tmp_path / "run").read_metrics()
    for record in records:
        always = {"iteration", "rate", "seconds", "distance", "student_gradient"}
        assert record.keys() == always | {f"distance/{n}" for n in SLOTS}
    said = capsys.readouterr().err
    shown = re.findall(r"training .* (\d+)/10 .* left, distance=([\d.]+)\]", said)
    assert shown == [(str(k + 1), f"{row['distance']:.4f}") for k, row in enumerate(records)]


def test_without_an_adversary_every_iteration_is_the_students(
    tiny_config: Config, tmp_path: Path
) -> None:
    none = changed(tiny_config, discriminators={"adversarial_weight": 0.0})
    run = trained(none, tmp_path / "run")
    for record in run.read_metrics():
        assert "student_gradient" in record
        assert not any("margin" in name for name in record)
    _, state = run.load_checkpoint()
    assert not any("discriminator" in name for name in state)


@pytest.mark.parametrize(
    ("kept", "gone", "settings"),
    [
        ("relative", "absolute", {"absolute_weight": 0.0}),
        ("absolute", "relative", {"relative": False}),
    ],
)
def test_one_loss_alone(
    tiny_config: Config, tmp_path: Path, kept: str, gone: str, settings: dict[str, Any]
) -> None:
    run = trained(changed(tiny_config, rapm=settings), tmp_path / "run")
    names = {name for record in run.read_metrics() for name in record}
    assert {f"{kept}_distance", f"{kept}_margin"} <= names
    assert not any(name.startswith(gone) for name in names)


def test_another_seed_is_another_run(tiny_config: Config, tmp_path: Path) -> None:
    few = changed(tiny_config, training={"iterations": 4})
    a = trained(few, tmp_path / "a").read_metrics()
    b = trained(changed(few, training={"seed": 1}), tmp_path / "b").read_metrics()
    for k in (1, 3):
        assert a[k]["absolute_adversarial"] != b[k]["absolute_adversarial"]


def test_it_learns(tiny_config: Config, tmp_path: Path) -> None:
    """One trajectory, distances alone: the student comes closer to the teacher's positions than the
    teacher's own big steps."""
    config = changed(
        tiny_config,
        trajectories={"count": 1},
        discriminators={"adversarial_weight": 0.0},
        training={"iterations": 40, "checkpoint_every": 40},
        student={"learning_rate": 3e-3, "rank": 8},
    )
    distances = [
        record["absolute_distance"] for record in trained(config, tmp_path / "run").read_metrics()
    ]
    assert distances[-1] < 0.5 * distances[0]


def test_too_little_memory_is_one_line_and_loses_nothing(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The optimisers' state asks for more than any machine has."""
    few = changed(tiny_config, training={"iterations": 2})
    run = trained(few, tmp_path / "run")
    for file in run.checkpoints.iterdir():
        file.unlink()
    config = changed(few, student={"rank": 4})
    huge = Run.open(run.folder, config)
    with monkeypatch.context() as patch, pytest.raises(UserError) as error:
        patch.setattr(Learner, "room_for_state", lambda self: [torch.zeros(1 << 50)])
        train_run(huge)
    assert str(error.value) == (
        "memory does not suffice for training; what is finished is kept. In order of effect: "
        "training.gradient_checkpointing=true, training.slot_batch=1 (the run goes on); "
        "precision=bfloat16, base_precision=int8, base_precision=nf4, "
        "training.optimizer=adamw8bit, "
        "student.rank=2, a smaller trajectories.size (another --out); each by --set of "
        "'rapm distill'"
    )
    assert train_run(Run.open(run.folder, few))


def make_method(config: Config, folder: Path) -> tuple[Method, TrajectoryStore]:
    store, teacher = make_trajectories(Run.open(folder, config)), teacher_of(config)
    backbone = load_backbone(teacher, config, "cpu")
    return METHODS[config.method](config, backbone, teacher.schedule, store), store


def test_a_dry_run_meets_every_kind_of_iteration_and_changes_nothing(
    tiny_config: Config, tmp_path: Path
) -> None:
    method, store = make_method(tiny_config, tmp_path / "run")
    network = method.backbone.network
    before = {name: p.clone() for name, p in network.named_parameters()}
    asked: list[str | None] = []
    hook = network.register_forward_pre_hook(lambda *_: asked.append(method.backbone.active))
    dry_run(method, store)
    hook.remove()
    assert set(asked) == {*method.learners}
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in network.named_parameters())
    assert all(not learner.optimizer.state for learner in method.learners.values())


def test_compiled_blocks_are_what_trains_and_wrong_ones_never_do(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By compilers that hand on what they were given, or 1.01 times as much; the real one, and the
    discriminators' calls, are in test_compiled.py."""
    made: list[int] = []

    def times(factor: float) -> None:
        def compiler(graph: Any, inputs: Any) -> Any:
            made.append(1)
            return (
                graph.forward
                if factor == 1
                else lambda *given: tuple(factor * x for x in graph.forward(*given))
            )

        torch._dynamo.reset()
        monkeypatch.setattr(
            training,
            "compile_blocks",
            lambda b: b.network.compile_repeated_blocks(backend=compiler),
        )

    few = changed(
        tiny_config, training={"iterations": 2}, discriminators={"adversarial_weight": 0.0}
    )
    compiled, plain = changed(few, training={"compile": True}), trained(few, tmp_path / "plain")
    times(1.0)
    right = trained(compiled, tmp_path / "right")
    assert made
    (step, expected), (other, found) = (run.load_checkpoint() for run in (plain, right))
    assert step == other == 2
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    times(1.01)
    with pytest.raises(UserError, match=r"off by 1\.0%"):
        trained(compiled, tmp_path / "wrong")
    assert not Run.open(tmp_path / "wrong", compiled).checkpoint_steps()


@pytest.mark.parametrize(("optimizer", "bytes_a_weight"), [("adamw", 8), ("adamw8bit", 2)])
def test_a_dry_run_holds_what_optimisers_will_take(
    tiny_config: Config, tmp_path: Path, optimizer: str, bytes_a_weight: int
) -> None:
    config = changed(tiny_config, training={"optimizer": optimizer})
    learner = make_method(config, tmp_path / "run")[0].student
    held = sum(room.numel() * room.element_size() for room in learner.room_for_state())
    assert held == bytes_a_weight * sum(p.numel() for p in learner.parameters.values())
    for parameter in learner.parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    learner.step(1.0)
    assert not learner.room_for_state()


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has none")
def test_a_lost_terminal_is_a_stop() -> None:
    found = signal.getsignal(signal.SIGHUP)  # ignored where the tests themselves run under nohup
    try:
        for handling, stops in ((signal.SIG_DFL, True), (signal.SIG_IGN, False)):
            signal.signal(signal.SIGHUP, handling)
            with _stop_on_interrupt() as stopped:
                assert not stopped()
                os.kill(os.getpid(), signal.SIGHUP)
                assert stopped() == stops
    finally:
        signal.signal(signal.SIGHUP, found)


def test_eight_bit_optimizer_resumes_bit_for_bit(tiny_config: Config, tmp_path: Path) -> None:
    """At a rank where tensors are large enough to be held in 8 bits."""
    config = changed(tiny_config, training={"optimizer": "adamw8bit"}, student={"rank": 32})
    whole = trained(config, tmp_path / "whole")
    stopped = tmp_path / "stopped"
    shutil.copytree(whole.folder, stopped)
    for step in (8, 10):
        (stopped / "checkpoints" / f"step-{step:08d}.safetensors").unlink()
    run = Run.open(stopped, config)
    assert train_run(run)
    _, state = run.load_checkpoint()
    assert any(value.dtype == torch.uint8 for value in state.values())
    name = "step-00000010.safetensors"
    assert filecmp.cmp(run.checkpoints / name, whole.checkpoints / name, shallow=False)


@pytest.mark.parametrize("thrown", ["student", "discriminators"])
def test_non_finite_stops_before_the_update_and_keeps_what_was_saved(
    tiny_config: Config, tmp_path: Path, thrown: str
) -> None:
    """An absurd rate throws a learner far away, and whoever meets it first says so."""
    alone = {"adversarial_weight": 0.0} if thrown == "student" else {"learning_rate": 1e30}
    config = changed(
        tiny_config,
        training={"iterations": 40, "checkpoint_every": 1, "warmup": 0},
        student={"learning_rate": 1e30 if thrown == "student" else 1e-3},
        discriminators=alone,
    )
    run = Run.open(tmp_path / "run", config)
    make_trajectories(run)
    said = r"(student|discriminator)'s gradient is not finite at iteration \d+; nothing was updated"
    with pytest.raises(NonFinite, match=said) as error:
        train_run(run)
    assert "\n" not in str(error.value)
    step, state = run.load_checkpoint()
    assert step == len(run.read_metrics()) > 0
    assert all(torch.isfinite(value).all() for value in state.values())


def test_another_teachers_trajectories_are_refused(
    tiny_config: Config, tiny_teacher: Path, tmp_path: Path
) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(tiny_teacher, teacher)
    run = Run.open(tmp_path / "run", tiny_config.model_copy(update={"teacher": str(teacher)}))
    make_trajectories(run)
    file = teacher / "unet" / "config.json"
    file.write_text(file.read_text() + "\n")
    with pytest.raises(
        UserError, match="made with another teacher; choose another folder or delete it"
    ):
        train_run(run)


def test_each_epoch_visits_every_trajectory_once(tiny_config: Config, tmp_path: Path) -> None:
    store, cpu = make_trajectories(Run.open(tmp_path / "run", tiny_config)), torch.device("cpu")
    config = changed(tiny_config, training={"seed": 3})
    first = [draw_batch(store, config, k, cpu).absolute for k in range(12)]
    for epoch in (first[:6], first[6:]):
        for k in range(6):
            assert sum(torch.equal(row[0], store[k].absolute) for row in epoch) == 1
    pairs = changed(config, training={"batch_size": 2})
    found = [draw_batch(store, pairs, k, cpu).absolute for k in range(6)]
    assert torch.equal(torch.cat(found), torch.cat(first))


def test_rates() -> None:
    config = Config.model_validate({"training": {"iterations": 100, "warmup": 10, "decay": 0.5}})
    factors = [rate_factor(config, k) for k in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9:51] == [1.0] * 42
    assert factors[75] == pytest.approx(0.5)
    assert factors[99] == pytest.approx(0.02)
    constant = changed(config, training={"decay": 0.0})
    assert [rate_factor(constant, k) for k in (9, 50, 99)] == [1.0] * 3


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for another process")
def test_ctrl_c_saves_and_the_same_command_goes_on(tiny_config: Config, tmp_path: Path) -> None:
    config = changed(tiny_config, training={"iterations": 400, "checkpoint_every": 1000})
    file, out = tmp_path / "config.toml", tmp_path / "run"
    file.write_text(settings.dump(config), encoding="utf-8")
    command = [
        sys.executable,
        "-c",
        "from rapm.cli import main; main()",
        "distill",
        "--config",
        str(file),
        "--out",
        str(out),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (out / "metrics.jsonl").is_file():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    step = Run.existing(out).checkpoint_steps()[-1]
    kept = f"Stopped. {out} has a checkpoint of iteration {step} of 400."
    assert stdout.splitlines()[-1] == f"{kept} The same command goes on from there."
    said = "saving after this iteration; press again to quit without saving"
    assert said in stderr.splitlines()
    assert "\r" not in stderr
    assert 0 < step < 400
    assert len(Run.existing(out).read_metrics()) == step
