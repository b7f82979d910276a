"""Names and texts of others are shown as they are, and do nothing; output may fail."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rapm.errors import NonFinite, UserError
from rapm.text import code_block, code_cell, code_span, one_line, output

HOSTILE = "a\x1b[2Jb\nc\rd\u202ee\u2028f\x00g\x9bh\udc80"
SHOWN = "a\\u001b[2Jb\\nc\\rd\\u202ee\\u2028f\\u0000g\\u009bh\\udc80"


@pytest.mark.parametrize(
    "text", ["", "a plain name.safetensors", "出力 élan 🙂 \u3000", "a\\n<b>`"]
)
def test_what_does_nothing_is_shown_as_it_is(text):
    assert one_line(text) == text


def test_what_would_move_a_cursor_or_break_a_line_is_escaped():
    assert one_line(HOSTILE) == SHOWN
    assert one_line(SHOWN) == SHOWN


@pytest.mark.parametrize("kind", [UserError, NonFinite])
def test_a_mistake_is_one_line_whatever_is_named_in_it(kind):
    assert f"{kind(HOSTILE)}" == str(kind(HOSTILE)) == SHOWN


@pytest.mark.parametrize(
    ("text", "span"),
    [
        ("a.safetensors", "`a.safetensors`"),
        ("<script>&*_[a](b)", "`<script>&*_[a](b)`"),
        ("a`b``c", "```a`b``c```"),
        ("`a", "`` `a ``"),
        ("a\n# b", "`a\\n# b`"),
    ],
)
def test_a_code_span_keeps_everything_inside(text, span):
    assert code_span(text) == span


def test_a_code_block_keeps_everything_inside():
    assert code_block("a = 1\nb = 2\n", "toml") == "```toml\na = 1\nb = 2\n```"
    assert code_block('a = "```"\n<b>\x1b', "toml") == '````toml\na = "```"\n<b>\\u001b\n````'


def test_what_the_encoding_lacks_is_escaped(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="cp1252", newline="\n"))
    with output():
        print("run 出力\x1b[2J\nélan")
    assert raw.getvalue() == b"run \\u51fa\\u529b\\u001b[2J\n\xe9lan\n"
    assert isinstance(sys.stdout, io.TextIOWrapper)


# Two lines and a file: what comes after the output fails is done, too.
WORK = """
import pathlib, sys
from rapm.text import output
with output():
    print("first")
    print("x" * 100_000, file=sys.stdout)
    pathlib.Path("done").write_text("")
    print("progress", file=sys.stderr)
"""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a full disk of Linux")
def test_work_goes_on_when_the_disk_under_the_output_is_full(tmp_path):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-c", WORK]
        done = subprocess.run(command, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True)
        both = subprocess.run(command, cwd=tmp_path, stdout=full, stderr=full)
    assert done.returncode == both.returncode == 0
    assert done.stderr == (
        "rapm: the output could not be written: [Errno 28] No space left on device\nprogress\n"
    )
    assert (tmp_path / "done").exists()


@pytest.mark.parametrize("which", ["stdout", "stderr"])
def test_work_goes_on_when_nobody_reads_the_output(tmp_path, which):
    read, write = os.pipe()
    os.close(read)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, which: write}
    done = subprocess.run([sys.executable, "-c", WORK], cwd=tmp_path, text=True, **pipes)
    os.close(write)
    assert done.returncode == 0
    assert done.stderr == ("progress\n" if which == "stdout" else None)
    assert (tmp_path / "done").exists()


def test_a_bar_begins_no_cell():
    assert code_cell("a|b") == "`a\\|b`"
