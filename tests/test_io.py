"""A file is complete or absent; an optimiser out of a file goes on as if it had never stopped."""

import hashlib

import pytest
import torch

from rapm.io import (
    complete_or_absent,
    load_optimizer_tensors,
    load_tensors,
    optimizer_tensors,
    save_tensors,
    sha256,
    under_prefix,
    with_prefix,
    write_json,
    write_text,
)


def contents(folder):
    return {file.name: file.read_text() for file in folder.iterdir()}


def test_a_complete_file_replaces_the_older_one(tmp_path):
    file = tmp_path / "deep" / "a.txt"
    write_text(file, "old")
    with complete_or_absent(file) as temporary:
        temporary.write_text("new")
        assert file.read_text() == "old"
    assert contents(file.parent) == {"a.txt": "new"}


@pytest.mark.parametrize("before", [{}, {"a.txt": "old and whole"}], ids=["absent", "older"])
@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), KeyboardInterrupt()],
    ids=["full", "interrupt"],
)
def test_a_failure_leaves_what_was_there(tmp_path, before, error):
    for name, text in before.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(type(error)), complete_or_absent(tmp_path / "a.txt") as temporary:
        temporary.write_text("half a fi")
        raise error
    assert contents(tmp_path) == before


def test_a_failure_before_the_first_byte(tmp_path):
    with pytest.raises(ZeroDivisionError), complete_or_absent(tmp_path / "a.txt"):
        _ = 1 / 0
    assert contents(tmp_path) == {}


def test_json_keeps_every_letter(tmp_path):
    write_json(tmp_path / "a.json", {"prompt": "élan"})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "prompt": "élan"\n}\n'


def test_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"rapm" * 100_000)
    assert sha256(tmp_path / "a") == hashlib.sha256(b"rapm" * 100_000).hexdigest()


def test_tensors_round_trip(tmp_path):
    tensors = {
        "a": torch.randn(3, 4).T,  # not contiguous
        "b": torch.randn(5).bfloat16().requires_grad_(),
        "c": torch.tensor(7),
    }
    save_tensors(tmp_path / "a.safetensors", tensors, {"step": "7"})
    loaded = load_tensors(tmp_path / "a.safetensors")
    assert {name: value.dtype for name, value in loaded.items()} == {
        name: value.dtype for name, value in tensors.items()
    }
    assert all(torch.equal(loaded[name], value) for name, value in tensors.items())


def test_prefixes():
    assert with_prefix("student", {"a.b": 1}) == {"student.a.b": 1}
    assert under_prefix("student", {"student.a.b": 1, "student2.a": 2, "a.student.b": 3}) == {
        "a.b": 1
    }


# ---- optimisers


def learner(weights, fused):
    parameters = [torch.nn.Parameter(w.clone()) for w in weights]
    return parameters, torch.optim.AdamW(
        parameters, lr=0.01, betas=(0.0, 0.999), weight_decay=0.1, fused=fused
    )


def take_steps(parameters, optimizer, steps):
    """Gradients are a function of step and weights."""
    for step in steps:
        for p in parameters:
            p.grad = torch.sin(3 * p.detach() + step)
        optimizer.step()


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("fused", [False, True])
def test_a_restored_optimizer_goes_on_bit_for_bit(tmp_path, fused):
    start = [torch.linspace(-1, 1, 37), torch.linspace(0, 2, 24).reshape(2, 3, 4)]
    parameters, optimizer = learner(start, fused)
    take_steps(parameters, optimizer, range(5))
    save_tensors(tmp_path / "a.safetensors", optimizer_tensors(optimizer))
    kept = [p.detach().clone() for p in parameters]
    take_steps(parameters, optimizer, range(5, 12))

    resumed, again = learner(kept, fused)
    load_optimizer_tensors(again, load_tensors(tmp_path / "a.safetensors"))
    assert again.param_groups[0]["lr"] == 0.01
    take_steps(resumed, again, range(5, 12))
    assert same(resumed, parameters)

    fresh, forgetful = learner(kept, fused)  # what the state is for
    take_steps(fresh, forgetful, range(5, 12))
    assert not same(fresh, parameters)


def test_an_optimizer_that_took_no_step_has_no_state():
    parameters, optimizer = learner([torch.ones(2)], False)
    assert optimizer_tensors(optimizer) == {}
    load_optimizer_tensors(optimizer, {})
    take_steps(parameters, optimizer, range(1))
    assert optimizer_tensors(optimizer).keys() == {"0.step", "0.exp_avg", "0.exp_avg_sq"}
