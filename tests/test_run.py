"""The run's folder: when it may be gone on with, and what survives kills and full disks."""

import filecmp
import json
import shutil
import threading
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file

from conftest import changed
from rapm import io
from rapm.errors import UserError
from rapm.pipeline import make_trajectories, train_run
from rapm.run import Run
from rapm.settings import load, read_run

BASE = [
    "training.keep_checkpoints=2",
    "training.iterations=500",
    "student.rank=16",
    "training.warmup=20",
]
KEEP_TWO = load(settings=BASE)


@pytest.fixture
def run(tmp_path):
    return Run.open(tmp_path / "run", KEEP_TWO)


def weights(step):
    return {"a": torch.full((3,), float(step)), "b.c": torch.arange(4).reshape(2, 2) + step}


def names(folder):
    return sorted(file.name for file in folder.iterdir())


def everything_in(folder):
    """Every file's content and when it was written; the lock, which is empty, aside."""
    files = [file for file in folder.rglob("*") if file.is_file() and file.name != ".lock"]
    return {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in files}


def refused(call, *arguments):
    with pytest.raises(UserError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- the folder


def test_open_creates_the_folder_with_its_settings(tmp_path):
    run = Run.open(tmp_path / "deep" / "run", KEEP_TWO)
    assert names(run.folder) == [".lock", "config.toml"]
    assert read_run((run.folder / "config.toml").read_text(), "run") == KEEP_TWO
    assert Run.existing(run.folder).config == KEEP_TWO


def test_the_same_settings_go_on_with_it(run):
    run.log({"iteration": 0})
    assert Run.open(run.folder, KEEP_TWO).read_metrics() == [{"iteration": 0}]


def test_a_checkpoint_says_what_it_was_made_with(run):
    run.save_checkpoint(1, weights(1))
    metadata = io.load_metadata(run.checkpoints / "step-00000001.safetensors")
    made = json.loads(metadata["made"])
    assert made["versions"]["torch"] == torch.__version__
    assert read_run(made["config"], "made") == KEEP_TWO


def test_other_settings_are_refused_with_both_values(run):
    run.save_checkpoint(1, weights(1))
    other = load(settings=[*BASE, "training.iterations=10", "student.rank=2"])
    assert refused(Run.open, run.folder, other) == (
        f"{run.folder} holds a run with other settings (student.rank: 16 -> 2; "
        f"training.iterations: 500 -> 10); "
        "give the same settings to go on with it, or another --out"
    )
    assert Run.existing(run.folder).config == KEEP_TWO


def test_a_long_list_of_other_settings_is_cut(run):
    run.save_checkpoint(1, weights(1))
    changes = ("seed=2", "huber_c=1.0", "decay=0.0", "warmup=3", "gradient_clip=2.0")
    other = load(settings=[*BASE, *(f"training.{change}" for change in changes)])
    line = refused(Run.open, run.folder, other)
    assert line.count("training.") == 4
    assert "training.warmup: 20 -> 3" in line
    assert " ...); " in line


def test_until_there_is_a_checkpoint_settings_may_change(run):
    """A typo that only training finds must not cost the rollout: the store guards itself."""
    other = load(settings=[*BASE, "student.rank=2"])
    assert Run.open(run.folder, other).config == other
    assert Run.existing(run.folder).config == other


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="only Linux says what is mapped")
def test_what_was_loaded_does_not_hold_the_file(run):
    """Windows deletes no file that is mapped, and the checkpoint that a run went on from is deleted
    while it goes on."""
    run.save_checkpoint(1, weights(1))
    _, state = run.load_checkpoint()
    assert str(run.checkpoints) not in Path("/proc/self/maps").read_text()
    assert torch.equal(state["a"], weights(1)["a"])


def test_a_checkpoint_that_cannot_be_deleted_stops_nothing(run, monkeypatch):
    def held(self):
        raise PermissionError("another program has it")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", held)
        for step in (1, 2, 3):
            run.save_checkpoint(step, weights(step))
    assert run.checkpoint_steps() == [1, 2, 3]
    run.save_checkpoint(4, weights(4))
    assert run.checkpoint_steps() == [3, 4]


def test_settings_edited_behind_a_checkpoints_back_are_refused(run):
    run.save_checkpoint(1, weights(1))
    file = run.folder / "config.toml"
    file.write_text(file.read_text().replace("rank = 16", "rank = 3"))
    assert "student.rank: 16 -> 3" in refused(Run.existing(run.folder).load_checkpoint)


def test_one_process_at_a_time(run):
    with run.locked():
        expected = (
            f"another process is working on {run.folder}; wait for it or choose another --out"
        )
        assert refused(Run(run.folder, run.config).locked().__enter__) == expected
        assert refused(Run.open, run.folder, load(settings=[*BASE, "student.rank=3"])) == expected
        assert Run.existing(run.folder).config == run.config
    with run.locked():
        pass


def test_one_may_wait_for_another_process(run):
    """Many open a run at the same moment, to roll out together."""
    is_held, may_end = threading.Event(), threading.Event()

    def hold() -> None:
        with Run.existing(run.folder).locked():
            is_held.set()
            may_end.wait()

    other = threading.Thread(target=hold)
    other.start()
    is_held.wait()
    assert "another process" in refused(Run.open, run.folder, KEEP_TWO)
    threading.Timer(0.3, may_end.set).start()
    Run.open(run.folder, KEEP_TWO, patience=30)
    other.join()


def test_a_refused_command_leaves_the_settings_of_a_run_at_work(run):
    """Both have opened the folder; the one that works first has its own settings there."""
    other = Run.open(run.folder, load(settings=[*BASE, "student.rank=3"]))
    stale = Run.existing(run.folder)
    with run.locked():
        assert "another process is working on" in refused(other.locked().__enter__)
        assert Run.existing(run.folder).config == KEEP_TWO
    assert refused(stale.locked().__enter__) == (
        f"{run.folder / 'config.toml'} was changed by another command meanwhile; run this one again"
    )
    run.save_checkpoint(1, weights(1))
    kept = everything_in(run.folder)
    assert "student.rank: 16 -> 3" in refused(other.locked().__enter__)
    assert everything_in(run.folder) == kept


def test_a_run_is_locked_once_however_many_stages_lock_it(run):
    with run.locked():
        with run.locked():
            pass
        assert "another process" in refused(Run.existing(run.folder).locked().__enter__)
    with Run.existing(run.folder).locked():
        pass


@pytest.mark.parametrize("number", [37, 13])
def test_a_file_system_without_locks_is_told(run, monkeypatch, number):
    def no_locks(self):
        raise OSError(number, "No locks available")

    monkeypatch.setattr(FileLock, "_acquire", no_locks)
    assert refused(Run.open, run.folder, KEEP_TWO) == (
        f"{run.folder} cannot be locked ([Errno {number}] No locks available); a run needs a "
        "folder that may be written, on a file system with locks: choose another --out"
    )


def test_leftovers_of_killed_writes_go_when_the_run_is_opened(run):
    for step in (1, 2):
        run.save_checkpoint(step, weights(step))
    (run.checkpoints / "step-00000002.safetensors").rename(run.folder / "kept")
    run.save_checkpoint(3, weights(3))
    run.save_checkpoint(4, weights(4))
    (run.folder / "kept").rename(run.checkpoints / "step-00000002.safetensors")
    leftovers = [
        run.folder / ".config.toml.partial",
        run.folder / ".tmpAbC123",
        run.checkpoints / ".step-00000005.safetensors.partial",
        run.checkpoints / ".tmpAbC123",
        run.samples / ".teacher.png.partial",
        run.folder / ".export.partial" / "scheduler" / "a.json",
        run.folder / ".export.old.partial" / "README.md",
    ]
    mine = [run.folder / "notes.partial.txt", run.folder / ".tmp", run.export / "README.md"]
    for file in (*leftovers, *mine):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("")
    Run.open(run.folder, KEEP_TWO)
    assert not any(file.exists() for file in leftovers)
    assert not list(run.folder.glob(".export*"))
    assert all(file.exists() for file in mine)
    assert run.checkpoint_steps() == [3, 4]


def test_a_changed_free_setting_is_taken_over(run):
    free = load(settings=[*BASE, "training.keep_checkpoints=7", "training.checkpoint_every=9"])
    assert Run.open(run.folder, free).config == free
    assert Run.existing(run.folder).config == free


def test_a_folder_with_other_things_in_it_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    expected = f"{tmp_path} is not empty and holds no run (no config.toml); choose another --out"
    assert refused(Run.open, tmp_path, KEEP_TWO) == expected
    assert names(tmp_path) == ["thesis.tex"]


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "run").write_text("")
    assert "holds no run" in refused(Run.open, tmp_path / "run", KEEP_TWO)


def test_an_empty_folder_is_welcome(tmp_path):
    assert Run.open(tmp_path, KEEP_TWO).config == KEEP_TWO


def test_existing_needs_a_run(tmp_path):
    assert refused(Run.existing, tmp_path) == f"{tmp_path} holds no run (no config.toml in it)"


@pytest.mark.parametrize("content", [b"teacher = ", b"\xff\xfe\x00"], ids=["cut", "binary"])
def test_damaged_settings_are_told(run, content):
    (run.folder / "config.toml").write_bytes(content)
    expected = f"{run.folder / 'config.toml'} is not a TOML file: "
    assert refused(Run.existing, run.folder).startswith(expected)
    assert refused(Run.open, run.folder, KEEP_TWO).startswith(expected)
    assert (run.folder / "config.toml").read_bytes() == content


# ---- another method, another version


@pytest.mark.parametrize("trained", [True, False], ids=["checkpoint", "settings alone"])
@pytest.mark.parametrize(("before", "now"), [("rapm", "midpoint"), ("midpoint", "rapm")])
def test_another_method_is_refused_and_changes_nothing(tmp_path, before, now, trained):
    """Even before there is a checkpoint, when all other settings may still change."""
    run = Run.open(tmp_path / "run", load(method=before))
    if trained:
        run.save_checkpoint(1, weights(1))
    kept = everything_in(run.folder)
    line = f"{run.folder} holds a run of method '{before}', not '{now}'; choose another --out"
    assert refused(Run.open, run.folder, load(method=now)) == line
    assert refused(Run.check_method, run.folder, load(method=now)) == line
    assert everything_in(run.folder) == kept
    assert Run.open(run.folder, load(method=before)).config == load(method=before)


OLDER = """teacher = "toy"

[trajectories]
count = 96
delta = 1

[critics]
adversarial_weight = 0.4

[training]
positions = "stored"
"""


def test_a_run_of_an_older_version_is_refused_and_changes_nothing(run):
    file = run.folder / "config.toml"
    file.write_text(OLDER)
    kept = everything_in(run.folder)
    line = (
        f"{file} names no method: the run was made by an older rapm, and this one cannot go on "
        "with it; nothing in it was changed: choose another folder"
    )
    assert refused(Run.existing, run.folder) == line
    assert refused(Run.open, run.folder, KEEP_TWO) == line
    assert everything_in(run.folder) == kept


@pytest.mark.parametrize("made", [{"made": json.dumps({"config": OLDER})}, {}])
def test_a_checkpoint_of_an_older_version_is_refused(run, made):
    file = run.checkpoints / "step-00000001.safetensors"
    io.save_tensors(file, weights(1), made)
    kept = everything_in(run.folder)
    for line in (refused(run.load_checkpoint), refused(Run.open, run.folder, KEEP_TWO)):
        assert line.startswith(f"{file} names no method: the run was made by an older rapm")
    assert everything_in(run.folder) == kept


# ---- checkpoints


def test_no_checkpoint_yet(run):
    assert run.load_checkpoint() == (0, {})


def test_the_newest_checkpoint_wins_and_the_oldest_goes(run):
    for step in (9, 10, 100):  # by number, not by name or by date
        run.save_checkpoint(step, weights(step))
    assert run.checkpoint_steps() == [10, 100]
    assert names(run.checkpoints) == ["step-00000010.safetensors", "step-00000100.safetensors"]
    step, tensors = run.load_checkpoint()
    assert step == 100
    torch.testing.assert_close(tensors, weights(100), rtol=0, atol=0)


@pytest.mark.parametrize(
    "left", [0, 5, 60, -1], ids=["empty", "no header", "half a header", "last byte gone"]
)
def test_a_truncated_checkpoint_is_told_and_the_one_before_serves(run, left):
    run.save_checkpoint(10, weights(10))
    run.save_checkpoint(20, weights(20))
    file = run.checkpoints / "step-00000020.safetensors"
    file.write_bytes(file.read_bytes()[:left])
    line = refused(run.load_checkpoint)
    assert line.startswith(f"{file} is damaged (")
    assert line.endswith("); delete it to go on from iteration 10")
    file.unlink()
    assert run.load_checkpoint()[0] == 10


FIRST = "step-00000010.safetensors"


def scaled(tensors, made):
    return {**tensors, "a": tensors["a"] * 1.5}, made


DAMAGES = {
    "a value": scaled,
    "a name": lambda t, m: ({"x": t["a"], "b.c": t["b.c"]}, m),
    "a shape": lambda t, m: ({**t, "b.c": t["b.c"].reshape(4)}, m),
    "a type": lambda t, m: ({**t, "a": t["a"].double()}, m),
    "one less": lambda t, m: ({"a": t["a"]}, m),
    "one more": lambda t, m: ({**t, "d": t["a"].clone()}, m),
    "its iteration": lambda t, m: (t, m | {"step": 19}),
    "its versions": lambda t, m: (t, m | {"versions": {}}),
    "no checksum": lambda t, m: (t, {k: v for k, v in m.items() if k != "sha256"}),
    "its settings": lambda t, m: (t, m | {"config": 5}),
    "all it says": lambda t, m: (t, [m]),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_told_and_the_one_before_offered(run, damage):
    for step in (10, 20):
        run.save_checkpoint(step, weights(step))
    file = run.checkpoints / "step-00000020.safetensors"
    made = json.loads(io.load_metadata(file)["made"])
    tensors, made = damage(load_file(file), made)
    save_file(tensors, file, {"made": json.dumps(made)})
    line = refused(run.load_checkpoint)
    assert line.startswith(f"{file} is ")
    assert line.endswith("; delete it to go on from iteration 10")
    file.unlink()
    assert run.load_checkpoint()[0] == 10
    tensors, made = scaled(
        weights(10), json.loads(io.load_metadata(run.checkpoints / FIRST)["made"])
    )
    save_file(tensors, run.checkpoints / FIRST, {"made": json.dumps(made)})
    assert refused(run.load_checkpoint).endswith("; delete it to train from the start")


@pytest.mark.parametrize(
    "made", ["{", "[" * 100_000, "null", '{"config": "a = ' + "[" * 5_000 + '"}'], ids=range(4)
)
def test_a_checkpoint_that_says_nonsense_of_itself(run, made):
    file = run.checkpoints / FIRST
    io.save_tensors(file, weights(10), {"made": made})
    assert refused(run.load_checkpoint).startswith(str(file))
    assert refused(Run.open, run.folder, KEEP_TWO).startswith(str(file))


def test_a_checkpoint_belongs_to_its_trajectories(run, tiny_midpoint, tmp_path):
    runs = [
        Run.open(tmp_path / str(seed), changed(tiny_midpoint, trajectories={"seed": seed}))
        for seed in (0, 1)
    ]
    for each in runs:
        make_trajectories(each)
        each.save_checkpoint(1, weights(1))
    assert runs[0].load_checkpoint()[0] == 1
    runs[1].trajectories.rename(tmp_path / "away")
    runs[0].trajectories.rename(runs[1].trajectories)
    assert "is a checkpoint of another run" in refused(runs[1].load_checkpoint)


def test_copies_beside_the_checkpoints_are_nobodys(run):
    run.save_checkpoint(10, weights(10))
    for name in ("step-00000020 (1)", "step-best", "step-00000020.safetensors - Copy", "step-5"):
        (run.checkpoints / f"{name}.safetensors").write_bytes(b"")
    (run.checkpoints / "step-00000030.safetensors").mkdir()
    assert run.checkpoint_steps() == [10]
    assert run.load_checkpoint()[0] == 10
    step, digest = run.newest_checkpoint()
    (run.checkpoints / "step-zzz.safetensors").write_bytes(b"a copy")
    assert run.newest_checkpoint() == (step, digest) and step == 10
    run.save_checkpoint(20, weights(20))
    for name, value in run.load_checkpoint(10)[1].items():
        assert value.equal(weights(10)[name])
    assert run.newest_checkpoint()[1] != digest
    (run.checkpoints / "step-00000010.safetensors").unlink()
    with pytest.raises(UserError, match="there is no checkpoint of iteration 10; there are: "):
        run.load_checkpoint(10)


def test_checkpoints_that_cannot_be_looked_for_are_not_called_absent(run):
    assert run.newest_checkpoint() == (0, "")
    run.checkpoints.write_bytes(b"")
    with pytest.raises(UserError, match=f"{run.checkpoints} cannot be read: Not a directory"):
        run.checkpoint_steps()


def test_a_finished_run_goes_on_as_one_that_had_more_iterations_from_the_start(
    tiny_midpoint, tmp_path
):
    few, more = (
        changed(tiny_midpoint, training={"iterations": n, "checkpoint_every": 2, "decay": 0.0})
        for n in (1, 3)
    )
    whole = Run.open(tmp_path / "whole", more)
    make_trajectories(whole)
    shutil.copytree(whole.trajectories, tmp_path / "run" / "trajectories")
    run = Run.open(tmp_path / "run", few)
    assert train_run(whole)
    assert train_run(run)
    run = Run.open(run.folder, more)
    assert train_run(run)
    assert run.checkpoint_steps() == [1, 2, 3]
    for step in (2, 3):
        name = f"step-{step:08d}.safetensors"
        assert filecmp.cmp(run.checkpoints / name, whole.checkpoints / name, shallow=False)
    losses = [[r | {"seconds": 0} for r in each.read_metrics()] for each in (run, whole)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 3
    assert Run.existing(run.folder).config == more
    assert "training.iterations: 3 -> 1" in refused(Run.open, run.folder, few)


def test_a_full_disk_costs_only_the_checkpoint_being_written(run, monkeypatch):
    run.save_checkpoint(10, weights(10))
    run.save_checkpoint(20, weights(20))

    def disk_full(tensors, file, metadata):
        file.write_bytes(b"half a fi")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(io, "save_file", disk_full)
        assert refused(run.save_checkpoint, 30, weights(30)) == (
            f"{run.checkpoints / 'step-00000030.safetensors'} could not be written: [Errno 28] No "
            "space left on device; earlier checkpoints are whole: make room and run again"
        )
    assert names(run.checkpoints) == ["step-00000010.safetensors", "step-00000020.safetensors"]
    step, tensors = run.load_checkpoint()
    assert step == 20
    torch.testing.assert_close(tensors, weights(20), rtol=0, atol=0)
    run.save_checkpoint(30, weights(30))
    assert run.checkpoint_steps() == [20, 30]


# ---- metrics

RECORDS = [{"iteration": i, "loss": 0.1 * i, "who": "student"} for i in range(4)]


def test_metrics_are_read_as_logged(run):
    assert run.read_metrics() == []
    for record in RECORDS:
        run.log(record)
    assert run.read_metrics() == RECORDS


def test_metrics_about_to_be_computed_again_are_forgotten(run):
    for record in RECORDS:
        run.log(record)
    run.forget_metrics_from(2)
    assert run.read_metrics() == RECORDS[:2]
    run.forget_metrics_from(0)
    assert run.read_metrics() == []


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "nothing",
        "[]",
        "5",
        '{"loss": 1.0}',
        '{"iteration": 0}',
        '{"iteration": "3"}',
        "\udcff",
    ],
)
def test_a_damaged_line_of_metrics_is_told(run, line):
    for record in RECORDS:
        run.log(record)
    lines = run.metrics.read_text().splitlines()
    lines[1] = line
    damaged = "".join(f"{each}\n" for each in lines).encode(errors="surrogateescape")
    run.metrics.write_bytes(damaged)
    expected = f"{run.metrics} is damaged: line 2 is no record of an iteration after "
    for call in (run.read_metrics, lambda: run.forget_metrics_from(3)):
        assert refused(call).startswith(expected)
    assert run.metrics.read_bytes() == damaged


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a full disk of Linux")
def test_a_full_disk_under_the_log_is_told(run):
    run.metrics.symlink_to("/dev/full")
    with pytest.raises(io.NotWritten, match=r"metrics\.jsonl could not be written: \[Errno 28\]"):
        run.log(RECORDS[0])


def test_a_cut_last_line_is_passed_over_and_does_not_spoil_the_next(run):
    for record in RECORDS:
        run.log(record)
    run.metrics.write_text(run.metrics.read_text()[:-9])
    assert run.read_metrics() == RECORDS[:3]
    run.forget_metrics_from(3)
    run.log(RECORDS[3])
    assert run.read_metrics() == RECORDS
