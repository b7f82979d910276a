"""A user's mistake is one line on stderr and exit code 2, and leaves nothing behind."""

import logging
import os
import re
import shutil
import subprocess
import sys
import warnings
from importlib import metadata
from pathlib import Path

import psutil
import pytest
import torch
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from transformers.utils import logging as transformers_logging

from conftest import changed, make_lora
from rapm import pipeline
from rapm.cli import main
from rapm.errors import UserError
from rapm.models.resolve import resolve_teacher
from rapm.pipeline import make_trajectories
from rapm.presets import check_preset
from rapm.run import Run
from rapm.settings import presets
from rapm.threads import CHOSEN_BY_USER, threads_for_idle_cores

CREATING = ["distill", "trajectories"]
ON_A_RUN = ["train", "export", "sample", "evaluate"]
ON_NOTHING = ["prompts", "plan", "doctor", "presets"]
PRESETS = ", ".join(presets())


@pytest.fixture
def rapm(tmp_path, monkeypatch, capsys):
    """Runs a command in an empty folder; returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def command(*arguments):
        capsys.readouterr()  # what came before
        monkeypatch.setattr(sys, "argv", ["rapm", *arguments])
        with pytest.raises(SystemExit) as caught:
            main()
        return caught.value.code, *capsys.readouterr()

    return command


@pytest.fixture
def teacher(tmp_path, tiny_teacher):
    shutil.copytree(tiny_teacher, tmp_path / "teacher")
    return "teacher"


def everything_in(folder):
    """Every file's content and when it was written; the lock, which is empty, aside."""
    files = [file for file in folder.rglob("*") if file.is_file() and file.name != ".lock"]
    return {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in files}


def mistake(answer):
    """The one line of a command that found a mistake."""
    code, out, err = answer
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("rapm: ")
    return err.removeprefix("rapm: ").rstrip("\n")


@pytest.mark.parametrize("command", CREATING)
@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            "--set training.iteration=5",
            "settings: unknown key 'training.iteration'; did you mean 'training.iterations'?",
        ),
        (
            "--set training.iterations=many",
            "settings: training.iterations: Input should be a valid integer",
        ),
        (
            "--set trajectories.slots=0",
            "settings: trajectories.slots: Input should be greater than or equal to 1 (given: 0)",
        ),
        ("--set seed", "--set 'seed': write KEY=VALUE, for instance training.iterations=100"),
        ("--config none.toml", "there is no config file none.toml"),
        ("--preset huge", f"there is no preset 'huge'; there are: {PRESETS}"),
        (
            "--teacher nowhere",
            "teacher 'nowhere' is neither 'toy', nor a folder, nor a .safetensors file, nor a hub "
            "id",
        ),
        (
            "--teacher model.ckpt",
            "teacher 'model.ckpt' is a pickle, which may run code when it is opened; convert it to "
            ".safetensors",
        ),
        ("--teacher none.safetensors", "there is no file none.safetensors"),
        ("--teacher .", "teacher '"),
        ("--teacher-lora none.safetensors:0.8", "there is no LoRA file "),
        ("--teacher-config .", "teacher_config goes with a single .safetensors file only"),
        (
            "--size 64",
            "settings: trajectories.size: write WIDTHxHEIGHT in pixels, several with commas "
            "between: 1024x1024,896x1152",
        ),
        (
            "--size 66x64",
            "trajectories.size: this teacher's pictures have sides that are multiples of 16 "
            "pixels, not 66x64",
        ),
        (
            "--size 64x64,64x96 --set training.batch_size=2",
            "settings: trajectories.size names several sizes; pictures of different size fit "
            "in no batch: training.batch_size = 1",
        ),
        ("--method other", "there is no method 'other'; there are: rapm, midpoint"),
        (
            "--method midpoint --set rapm.delta=1",
            "settings: rapm.delta is not read by method 'midpoint'; method 'rapm' reads it",
        ),
        (
            "--set midpoint.weight=1",
            "settings: midpoint.weight is not read by method 'rapm'; method 'midpoint' reads it",
        ),
        (
            "--method midpoint --preset sdxl-paper",
            "preset 'sdxl-paper' is of method 'rapm', not 'midpoint'",
        ),
        ("--teacher=", "--teacher is empty"),
    ],
)
def test_bad_settings_create_nothing(rapm, tmp_path, command, arguments, line):
    assert mistake(rapm(command, "--out", "run", *arguments.split())).startswith(line)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", CREATING)
@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("--prompts none.txt", "there is no prompt file none.txt"),
        ("--prompts 2024", "there is no prompt file 2024"),
        ("--prompts empty.txt", "empty.txt holds no prompts"),
        ("--prompts teacher", "there is no prompt file teacher"),
        (
            "",
            "trajectories.prompts names no file; give one with --prompts FILE ('rapm prompts --out "
            "prompts.txt' makes one)",
        ),
        (
            "--prompts good.txt --set device=cuda",
            "device = 'cuda' but torch sees no GPU; use 'cpu' or 'auto', or install torch for your "
            "GPU",
        ),
    ],
)
def test_what_the_settings_name_must_be_there(
    rapm, tmp_path, monkeypatch, teacher, command, arguments, line
):
    """Else the folder would hold the mistake, and the command put right would be refused as another
    run's."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "empty.txt").write_text("\n  \n")
    (tmp_path / "good.txt").write_text("a cat\n")
    found = mistake(rapm(command, "--out", "run", "--teacher", teacher, *arguments.split()))
    assert found.replace(f"{tmp_path}{os.sep}", "") == line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", CREATING)
def test_another_folder_is_left_as_it_is(rapm, tmp_path, teacher, command):
    (tmp_path / "prompts.txt").write_text("a cat\n")
    before = sorted(
        file.relative_to(tmp_path / teacher) for file in (tmp_path / teacher).rglob("*")
    )
    line = mistake(
        rapm(command, "--out", teacher, "--teacher", teacher, "--prompts", "prompts.txt")
    )
    assert line == "teacher is not empty and holds no run (no config.toml); choose another --out"
    assert (
        sorted(file.relative_to(tmp_path / teacher) for file in (tmp_path / teacher).rglob("*"))
        == before
    )


@pytest.mark.parametrize("command", ON_A_RUN)
@pytest.mark.parametrize("folder", ["none", "."])
def test_a_folder_that_holds_no_run(rapm, tmp_path, command, folder):
    assert mistake(rapm(command, folder)) == f"{folder} holds no run (no config.toml in it)"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        "distil --out run",
        "distill",
        "prompts",
        "prompts --out a.txt --count 0",
        "distill --out run --rank 4",
        "train",
        "sample run --count 0",
        "sample run --seed x",
        "evaluate run --split train",
        "evaluate run --protocol coco2017",
        "evaluate run --count 1",
    ],
)
def test_a_command_that_cannot_be_parsed(rapm, tmp_path, arguments):
    code, _, err = rapm(*arguments.split())
    assert code == 2
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


# ---- a run and its method


@pytest.mark.parametrize("stage", ["settings", "trajectories", "checkpoint"])
@pytest.mark.parametrize("command", CREATING)
@pytest.mark.parametrize("before", ["rapm", "midpoint"])
def test_a_run_does_not_change_its_method(
    rapm, tmp_path, tiny_config, tiny_midpoint, before, command, stage
):
    configs = {"rapm": tiny_config, "midpoint": tiny_midpoint}
    run = Run.open(tmp_path / "run", configs.pop(before))
    (now,) = configs
    if stage != "settings":
        make_trajectories(run)
    if stage == "checkpoint":
        run.save_checkpoint(4, {"a": torch.ones(1)})
    kept = everything_in(run.folder)
    teacher, prompts = run.config.teacher, run.config.trajectories.prompts
    options = ["--teacher", teacher, "--prompts", prompts, "--set", "device=cpu", "--method", now]
    line = f"run holds a run of method '{before}', not '{now}'; choose another --out"
    assert mistake(rapm(command, "--out", "run", *options)) == line
    assert everything_in(run.folder) == kept


OLDER = """teacher = "toy"

[trajectories]
count = 96

[critics]
adversarial_weight = 0.4
"""


@pytest.mark.parametrize(
    "arguments",
    [
        "distill --out run",
        "distill --out run --method midpoint",
        "trajectories --out run",
        "trajectories run",
        *(f"{command} run" for command in ON_A_RUN),
    ],
)
def test_a_run_of_an_older_version_is_left_as_it_is(rapm, tmp_path, arguments):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "config.toml").write_text(OLDER)
    (tmp_path / "run" / "checkpoints" / "step-00000004.safetensors").write_bytes(b"weights")
    kept = everything_in(tmp_path)
    assert mistake(rapm(*arguments.split())) == (
        f"run{os.sep}config.toml names no method: the run was made by an older rapm, and this one "
        "cannot go on with it; nothing in it was changed: choose another folder"
    )
    assert everything_in(tmp_path) == kept


# ---- rapm trajectories


@pytest.mark.parametrize("arguments", ["", "run --out other", "--show 2"])
def test_a_run_or_a_new_one(rapm, tmp_path, arguments):
    line = "name either the folder of a run, or a new one with --out"
    assert mistake(rapm("trajectories", *arguments.split())) == line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("option", "name"),
    [
        ("--set training.seed=1", "--set"),
        ("--teacher-lora a.safetensors", "--teacher-lora"),
        ("--method rapm", "--method"),
    ],
)
def test_a_runs_settings_are_not_changed_on_the_way(rapm, tmp_path, tiny_config, option, name):
    """Else they would be passed over in silence."""
    Run.open(tmp_path / "run", tiny_config)
    line = mistake(rapm("trajectories", "run", *option.split()))
    assert line == f"run has its own settings; {name} goes with --out"
    assert not (tmp_path / "run" / "trajectories").exists()


def test_trajectories_are_made_and_shown(rapm, tmp_path, tiny_config):
    """Of a new run, then of the same again by its folder."""
    own = tiny_config.trajectories
    options = ["--teacher", tiny_config.teacher, "--prompts", own.prompts, "--out", "run"]
    settings = ["device=cpu", "trajectories.count=3", "trajectories.slots=2"]
    settings += ["trajectories.fine_steps=2"]
    shown = f"Picture: run{os.sep}samples{os.sep}trajectories.png"
    told = f"3 trajectories in run{os.sep}trajectories"
    arguments = [*options, *(f"--set={setting}" for setting in settings)]
    code, out, _ = rapm("trajectories", *arguments, "--show", "1")
    assert (code, out.splitlines()) == (0, ["3 prompts", told, shown])
    assert picture_size(tmp_path / "run") == (3 * 132 + 4, 2 * (128 + 4 + 22) + 4)
    kept = everything_in(tmp_path / "run" / "trajectories")
    code, out, _ = rapm("trajectories", "run", "--show", "2")
    assert (code, out.splitlines()) == (0, [told, shown])
    assert picture_size(tmp_path / "run") == (3 * 132 + 4, 4 * (128 + 4 + 22) + 4)
    code, out, _ = rapm("trajectories", "run")
    assert (code, out.splitlines()) == (0, [told])
    assert everything_in(tmp_path / "run" / "trajectories") == kept


def picture_size(run):
    with Image.open(run / "samples" / "trajectories.png") as opened:
        return opened.size


def test_midpoint_has_none_to_show_and_says_so(rapm, tmp_path, tiny_midpoint):
    Run.open(tmp_path / "run", tiny_midpoint)
    told = (
        "Method 'midpoint' learns without a rollout: 6 pairs of prompt and noise are ready in "
        f"run{os.sep}trajectories, no trajectories\n"
    )
    code, out, err = rapm("trajectories", "run", "--show", "1")
    line = "rapm: method 'midpoint' stores no trajectories: there is nothing to show\n"
    assert (code, out, err) == (2, told, line)
    assert rapm("trajectories", "run") == (0, told, "")
    assert not (tmp_path / "run" / "samples").exists()


# ---- the whole chain


def test_distilling_says_what_it_does_and_goes_on(rapm, tmp_path, tiny_midpoint):
    settings = changed(tiny_midpoint, training={"iterations": 4}, samples={"count": 1, "every": 2})
    file = tmp_path / "mine.toml"
    shutil.copy(Run.open(tmp_path / "other", settings).folder / "config.toml", file)
    code, out, _ = rapm("distill", "--config", "mine.toml", "--out", "run", "--force")
    assert code == 0
    lines = out.splitlines()
    assert lines[0] == "3 prompts"
    assert "Computes on cpu" in lines
    run = Path("run")
    assert lines[-5:] == [
        f"LoRA for diffusers: {run / 'export' / 'pytorch_lora_weights.safetensors'}",
        f"LoRA for ComfyUI, Forge and A1111: {run / 'export' / 'run-3-steps.safetensors'}",
        f"Page: {run / 'report.html'}",
        f"Picture: {run / 'samples' / 'iterations.png'}",
        f"Picture: {run / 'samples' / 'seed-0-steps-3.png'}",
    ]
    kept = everything_in(tmp_path / "run" / "checkpoints")
    code, out, _ = rapm("train", "run")
    assert (code, out.splitlines()) == (0, lines[-5:])
    assert everything_in(tmp_path / "run" / "checkpoints") == kept


@pytest.mark.parametrize(
    ("command", "stage"),
    [
        *(("train", stage) for stage in ("settings", "shard", "trajectories", "checkpoint")),
        ("distill", "checkpoint"),
    ],
)
def test_what_is_stopped_says_what_is_there(
    rapm, tmp_path, monkeypatch, tiny_config, command, stage
):
    """And where it goes on, when it does."""
    run = Run.open(tmp_path / "run", tiny_config)
    if stage != "settings":
        make_trajectories(run)
    if stage == "shard":
        (run.trajectories / "manifest.json").unlink()
        (run.trajectories / "shard-00001.safetensors").unlink()
    if stage == "checkpoint":
        run.save_checkpoint(4, {"a": torch.ones(1)})

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "distill_run", interrupted)
    monkeypatch.setattr(pipeline, "train_run", interrupted)
    options = ["--config", str(run.folder / "config.toml"), "--force", "--out"]
    code, out, _ = rapm(command, *(options if command == "distill" else []), "run")
    there = {
        "settings": "its settings, no trajectories and no checkpoint yet",
        "shard": "4 of 6 trajectories, no checkpoint yet",
        "trajectories": "all trajectories, no checkpoint yet",
        "checkpoint": "a checkpoint of iteration 4 of 10",
    }
    lines = out.splitlines()
    assert code == 130
    assert lines[-1] == f"Stopped. run has {there[stage]}. The same command goes on from there."
    goes_on = [line for line in lines if line.startswith("Goes on")]
    assert goes_on == [f"Goes on from {there[stage]}"] * (stage == "checkpoint")


# ---- what there is to choose from


def test_presets_are_listed(rapm):
    code, out, _ = rapm("presets")
    assert (code, [line.split()[0] for line in out.splitlines()]) == (0, presets())
    assert "sdxl-8gb     SDXL at 1024 x 1024 on a GPU of 8 GB: the network in int8\n" in out
    code, out, _ = rapm("distill", "--help")
    assert code == 0
    told = re.sub(r"(?<=-)\s+", "", out)  # lines end after hyphens too
    assert f"Teacher and memory: {PRESETS}." in re.sub(r"\s+", " ", told)


@pytest.mark.parametrize("given", ["x", "2/2", "0/0", "-1/2", "1/2/3"])
def test_a_share_that_is_none_is_one_line(rapm, given):
    line = mistake(rapm("trajectories", "--out", "run", "--shard", given))
    assert line == f"--shard {given}: write I/N, of N parts the I-th from 0, such as 0/4"


def test_the_version(rapm):
    assert rapm("--version") == (0, f"rapm {metadata.version('rapm')}\n", "")


@pytest.mark.parametrize("command", ["distill --out run", "plan"])
def test_a_preset_of_another_family_is_refused(rapm, tmp_path, small_teachers, command):
    (tmp_path / "sd15").symlink_to(small_teachers["sd15"])
    (tmp_path / "sdxl").symlink_to(small_teachers["sdxl"])
    rest = ["--prompts", "prompts.txt"]
    line = mistake(rapm(*command.split(), "--preset", "sd15-8gb", "--teacher", "sdxl", *rest))
    assert line == (
        f"preset 'sd15-8gb' is for a StableDiffusionPipeline, teacher '{tmp_path / 'sdxl'}' is a "
        "StableDiffusionXLPipeline; presets for it: "
        "sdxl-12gb, sdxl-16gb, sdxl-24gb, sdxl-8gb, sdxl-paper"
    )
    line = mistake(rapm(*command.split(), "--preset", "sdxl-paper", "--teacher", "sd15", *rest))
    assert line.endswith("presets for it: sd15-12gb, sd15-8gb, sd15-paper, toy, toy-paper")
    assert not (tmp_path / "run").exists()


def test_a_preset_goes_with_every_teacher_of_its_family(small_teachers):
    for kind, names in (
        ("sd15", ["sd15-8gb", "toy-paper"]),
        ("sd21", ["sd15-12gb"]),
        ("sdxl", ["sdxl-paper"]),
    ):
        for name in names:
            check_preset(name, resolve_teacher(str(small_teachers[kind])))


def test_fused_loras_are_confirmed(rapm, tmp_path, tiny_teacher, tiny_prompts):
    make_lora(tiny_teacher, tmp_path / "lora", "kohya")
    options = ["--teacher", str(tiny_teacher), "--prompts", str(tiny_prompts), "--out", "run"]
    few = ["device=cpu", "trajectories.count=1", "trajectories.fine_steps=1"]
    code, out, _ = rapm(
        "trajectories",
        *options,
        *(f"--set={each}" for each in few),
        "--teacher-lora=lora/k.safetensors:0.8",
    )
    assert code == 0
    assert out.splitlines()[0] == "Fused into the teacher: k.safetensors at strength 0.8"


def test_a_call_from_python_is_as_quiet_as_the_command_line(monkeypatch, tmp_path, recwarn):
    """And what a user hears of these libraries elsewhere is as it was."""
    heard = []

    def noisy(*_):
        warnings.warn("deprecated", FutureWarning, stacklevel=2)
        heard.extend(one.get_verbosity() for one in libraries)
        heard.append(kernels.level)
        raise UserError("enough")

    libraries = diffusers_logging, transformers_logging
    before = [one.get_verbosity() for one in libraries]
    kernels = logging.getLogger("bitsandbytes")
    monkeypatch.setattr(kernels, "level", logging.INFO)
    monkeypatch.setattr(pipeline, "open_run", noisy)
    with pytest.raises(UserError, match="enough"):
        pipeline.distill("toy", tmp_path / "run")
    assert heard == [logging.ERROR] * 3
    assert list(recwarn) == []
    assert [one.get_verbosity() for one in libraries] == before
    assert kernels.level == logging.INFO


@pytest.mark.parametrize(
    ("threads", "cores", "percent", "chosen"),
    [
        (2, 2, 95.0, 1),
        (2, 2, 10.0, None),  # nobody else is there
        (8, 16, 40.0, None),  # six of sixteen are busy, ten are not
        (8, 16, 75.0, 4),
        (8, 8, 100.0, 1),
        (1, 8, 100.0, None),
    ],
)
def test_busy_cores_are_left_alone(monkeypatch, threads, cores, percent, chosen):
    told = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    monkeypatch.setattr(psutil, "cpu_count", lambda: cores)
    monkeypatch.setattr(psutil, "cpu_percent", lambda seconds: percent)
    for name in CHOSEN_BY_USER:
        monkeypatch.delenv(name, raising=False)
    line = threads_for_idle_cores()
    assert told == [chosen] * (chosen is not None)
    if chosen:
        busy = round(cores * percent / 100)
        assert line == (
            f"{busy} of {cores} cores are busy: computes with {chosen} of {threads} threads "
            "(OMP_NUM_THREADS=N chooses)"
        )
    else:
        assert line is None
    for name in CHOSEN_BY_USER:
        with monkeypatch.context() as patch:
            patch.setenv(name, "8")
            assert threads_for_idle_cores() is None


def test_help_waits_for_no_heavy_import():
    program = """
import sys
sys.argv = ["rapm", "--help"]
from rapm.cli import main
try:
    main()
finally:
    heavy = {"torch", "diffusers", "transformers", "peft", "numpy", "pydantic"}
    print(sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "[]"
    assert all(command in done.stdout for command in CREATING + ON_A_RUN + ON_NOTHING)


def test_the_line_stands_alone_in_a_process_of_its_own(tmp_path, teacher):
    """No library adds its warnings to it."""
    program = "from rapm.cli import main; main()"
    arguments = ["distill", "--out", "run", "--teacher", teacher, "--prompts", "none.txt"]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (
        2,
        "",
        f"rapm: there is no prompt file {tmp_path / 'none.txt'}\n",
    )
