"""A user's mistake is one line on stderr and exit code 2, and leaves nothing behind."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

from rapm import config as configuration
from rapm.cli import main

CREATING = ["distill", "trajectories"]
ON_A_RUN = ["train", "export", "sample", "evaluate"]
ON_NOTHING = ["prompts"]
PRESETS = ", ".join(configuration.presets())


@pytest.fixture
def rapm(tmp_path, monkeypatch, capsys):
    """Runs a command in an empty folder; returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["rapm", *arguments])
        with pytest.raises(SystemExit) as caught:
            main()
        return caught.value.code, *capsys.readouterr()

    return command


@pytest.fixture
def teacher(tmp_path, tiny_teacher):
    shutil.copytree(tiny_teacher, tmp_path / "teacher")
    return "teacher"


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
        *(
            (
                f"--size 64x64,64x96 --set training.{side_by_side}=2",
                "settings: trajectories.size names several sizes; pictures of different size fit "
                "in no batch: ",
            )
            for side_by_side in ("batch_size", "walk_ahead")
        ),
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


def test_a_wrong_split(rapm):
    assert (
        mistake(rapm("evaluate", "none", "--split", "train"))
        == "--split is 'test' or 'validation', not 'train'"
    )


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
    ],
)
def test_a_command_that_cannot_be_parsed(rapm, tmp_path, arguments):
    code, _, err = rapm(*arguments.split())
    assert code == 2
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_help_waits_for_no_heavy_import():
    program = """
import sys
sys.argv = ["rapm", "--help"]
from rapm.cli import main
try:
    main()
finally:
    print(sorted({"torch", "diffusers", "transformers", "peft", "numpy", "pydantic"} & set(sys.modules)))
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
