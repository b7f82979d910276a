"""Distances and adversarial losses, by hand-computed numbers."""

from math import exp, log, log1p

import pytest
import torch

from rapm.losses import (
    hinge_discriminator,
    hinge_student,
    margin,
    pseudo_huber,
    relativistic,
    with_length_of,
)


def test_pseudo_huber_by_hand():
    a = torch.tensor([[3.0, 0.0], [0.0, 0.0]])
    assert pseudo_huber(a, torch.zeros(2, 2), c=4.0).tolist() == [
        0.5,
        0.0,
    ]  # sqrt(9 + 16) - 4 = 1, halved by the mean
    assert pseudo_huber(
        torch.tensor([[[[1.0]]]]), torch.tensor([[[[-1.0]]]])
    ).item() == pytest.approx(2 - 1e-3, abs=1e-6)
    assert pseudo_huber(torch.tensor([[1e-3]]), torch.zeros(1, 1)).item() == pytest.approx(
        1e-3 * (2**0.5 - 1), rel=1e-5
    )


def test_the_gradient_of_pseudo_huber_is_finite_where_positions_agree():
    a = torch.tensor([[0.0, 1e-3, 1.0]], requires_grad=True)
    pseudo_huber(a, torch.zeros(1, 3)).sum().backward()
    assert a.grad[0].tolist() == pytest.approx(
        [0, 2**-0.5 / 3, 1 / 3], abs=1e-6
    )  # d / sqrt(d^2 + c^2), a third each


# Two rows seen by two heads whose maps differ in size: each head counts the same, however large its
# map.
REAL = [
    torch.tensor([[2.0, 0.5], [0.0, 0.0]]).reshape(2, 1, 1, 2),
    torch.tensor([-1.0, 3.0]).reshape(2, 1, 1, 1),
]
FAKE = [
    torch.tensor([[-3.0, 1.0], [0.0, 2.0]]).reshape(2, 1, 1, 2),
    torch.tensor([0.5, -2.0]).reshape(2, 1, 1, 1),
]


def test_hinge_discriminator_by_hand():
    # row 1: relu(1 - real) = 0, 0.5 and relu(1 + fake) = 0, 2 in head 1; 2 and 1.5 in head 2
    # row 2: 1, 1 and 1, 3 in head 1; 0 and 0 in head 2
    assert hinge_discriminator(REAL, FAKE).tolist() == [(1.25 + 3.5) / 2, (3 + 0) / 2]
    chance = [torch.zeros(1, 1, 4, 4)]
    assert hinge_discriminator(chance, chance).tolist() == [2]


def test_hinge_student_by_hand():
    # relu(1 - fake) is 4, 0 and 0.5 in row 1; 1, 0 and 3 in row 2
    assert hinge_student(FAKE).tolist() == [(2 + 0.5) / 2, (0.5 + 3) / 2]


def test_relativistic_by_hand():
    # mean logits of real - fake are 2.25 and -1.5 in row 1, -1 and 5 in row 2 (see below);
    # softplus(-x) = log(1 + exp(-x))
    expected = [(log1p(exp(-2.25)) + log1p(exp(1.5))) / 2, (log1p(exp(1)) + log1p(exp(-5))) / 2]
    assert relativistic(REAL, FAKE).tolist() == pytest.approx(expected, rel=1e-6)
    assert relativistic(REAL, REAL).tolist() == pytest.approx([log(2)] * 2)


def test_margin_by_hand():
    # means of real - fake: 1.25 + 1 and -1.5 in row 1; 0 - 1 and 5 in row 2
    assert margin(REAL, FAKE).tolist() == [(2.25 - 1.5) / 2, (-1 + 5) / 2]
    assert margin(REAL, REAL).tolist() == [0, 0]


def test_with_length_of_by_hand():
    # rows 5 and 2 long to be 10 and 0.5 long; a row to be 0 long; a row of zeros, which has no
    # direction
    gradient = torch.tensor([[3.0, 4.0], [0.0, -2.0], [1.0, 1.0], [0.0, 0.0]]).reshape(4, 1, 1, 2)
    like = torch.tensor([[0.0, 10.0], [0.3, 0.4], [0.0, 0.0], [1.0, 1.0]]).reshape(4, 1, 2, 1)
    assert with_length_of(gradient, like).flatten(1).tolist() == [[6, 8], [0, -0.5], [0, 0], [0, 0]]


@pytest.mark.parametrize("loss", [hinge_discriminator, relativistic, margin])
def test_heads_must_come_in_pairs(loss):
    with pytest.raises(ValueError, match="shorter"):
        loss(REAL, FAKE[:1])
