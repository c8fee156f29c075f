"""Targets and options are taken, or refused by an error that names them: every border from both sides."""

from __future__ import annotations

import math
import sys

import pytest
import torch

from gcfast import ConvexLoss
from gcfast.losses import MSE, BCEWithLogits, CrossEntropy, Huber, check_matches_outputs

F64 = torch.float64
HUGE = sys.float_info.max


def _t(*rows):
    return torch.tensor(rows, dtype=F64)


class _Plain(ConvexLoss):
    """What the base class does with targets."""

    def value(self, z, y):
        return (z - y).square().sum(1)

    def infimum(self, y):
        return torch.zeros(len(y), dtype=F64)


NO_ROW, EMPTY = r"expected one row per sample", torch.zeros(0, 3)


@pytest.mark.parametrize(
    ("kind", "y", "count"),
    [
        (MSE, torch.zeros(3), 1),
        (MSE, torch.zeros(3, 1), 1),
        (MSE, torch.zeros(3, 2, dtype=torch.int64), 2),
        (MSE, EMPTY, 3),
        (MSE, torch.zeros(3, 0), NO_ROW),
        (MSE, torch.tensor(1.0), NO_ROW),
        (CrossEntropy, torch.zeros(3), 1),
        (CrossEntropy, torch.zeros(3, 1), 1),
        (CrossEntropy, torch.zeros(3, 2), 2),
        (CrossEntropy, torch.zeros(3, 2, dtype=torch.int64), 2),
        (CrossEntropy, torch.tensor([0, 0]), 2),
        (CrossEntropy, torch.tensor([0, 1]), 2),
        (CrossEntropy, torch.tensor([[0], [2], [1]]), 3),
        (CrossEntropy, torch.zeros(0, dtype=torch.int64), 2),
        (CrossEntropy, torch.tensor([3, 0, -1, -2]), "label -1 of sample 2 is out of range"),
        (CrossEntropy, torch.tensor([3, -100]), "label -100 of sample 1 is the loss's ignore_index"),
        (CrossEntropy, torch.tensor([[1, 0], [2, 0]]), 2),
        (CrossEntropy, torch.tensor([1, 0, 3]).to_sparse(), "expected a dense tensor"),
    ],
)
def test_targets_tell_the_outputs_or_are_refused(kind, y, count):
    if isinstance(count, int):
        assert kind().output_count(y) == count
    else:
        with pytest.raises((ValueError, TypeError), match=f"^targets: .*{count}"):
            kind().output_count(y)


SMALL, EPS = 2.0**-14, 2.0**-52  # a float16 below 1/10000 whose double is above
TARGETS = [  # the loss, n and C, the targets, and what is prepared, or why they are refused
    (MSE(), (2, 1), torch.tensor([1.0, 2.0]), [[1.0], [2.0]]),
    (MSE(), (2, 1), torch.tensor([[1.0], [2.0]]), [[1.0], [2.0]]),
    (MSE(), (2, 2), torch.tensor([1.0, 2.0]), r"expected shape \(2, 2\); got \(2,\)"),
    (MSE(), (2, 1), torch.tensor([1.0]), r"expected shape \(2, 1\); got \(1,\)"),
    (MSE(), (2, 4), torch.arange(8.0).reshape(2, 2, 2), [[0.0, 1.0, 2.0, 3.0], [4.0, 5.0, 6.0, 7.0]]),
    (MSE(), (0, 4), torch.zeros(0, 2, 2), []),
    (MSE(), (3, 3), torch.zeros(3, 2, 1), r"expected shape \(3, 3\)"),
    (MSE(), (2, 2), _t([1.0, 2.0], [0.0, math.inf]), "got inf at sample 1"),
    (MSE(), (2, 2), _t([1.0, math.nan], [0.0, math.inf]), "got nan at sample 0"),
    (MSE(), (0, 2), torch.zeros(0, 2), []),
    (_Plain(), (2, 1), torch.zeros(3), r"expected 2 rows, one per sample; got shape \(3,\)"),
    (_Plain(), (2, 2), torch.ones(2, 2), [[1.0, 1.0]] * 2),
    (BCEWithLogits(), (2, 2), _t([0.0, 1.0], [0.5, 0.0]), [[0.0, 1.0], [0.5, 0.0]]),
    (BCEWithLogits(), (2, 2), _t([0.0, 1.0], [0.5, -1e-300]), r"\[0, 1\]; got -1e-300 at sample 1, output 1"),
    (BCEWithLogits(), (2, 2), _t([0.0, 1.5], [0.5, 0.0]), r"\[0, 1\]; got 1.5 at sample 0, output 1"),
    (CrossEntropy(), (2, 3), torch.tensor([0, 2]), [0, 2]),
    (CrossEntropy(), (2, 3), torch.tensor([[0], [2]]), [0, 2]),
    (CrossEntropy(), (2, 3), torch.tensor([0, 3]), "label 3 of sample 1 is out of range for 3 outputs"),
    (CrossEntropy(), (2, 3), torch.tensor([-1, 3]), "label -1 of sample 0 is out of range"),
    (CrossEntropy(), (2, 3), torch.tensor([1, -100]), "label -100 of sample 1 is the loss's ignore_index"),
    (CrossEntropy(ignore_index=2), (2, 3), torch.tensor([0, 2]), "label 2 of sample 1 is the loss's ignore"),
    (CrossEntropy(ignore_index=0), (1, 2), _t([0.5, 0.5]), "ignore_index=0 is for class labels"),
    (CrossEntropy(ignore_index=-1), (1, 2), _t([0.5, 0.5]), [[0.5, 0.5]]),
    (CrossEntropy(), (2, 3), torch.tensor([[0, 1], [1, 2]]), r"must have shape \(2,\); got \(2, 2\)"),
    (CrossEntropy(), (2, 3), torch.tensor([0, 1, 2]), r"must have shape \(2,\); got \(3,\)"),
    (CrossEntropy(), (2, 3), _t([0.5, 0.5], [0.0, 1.0]), r"probabilities of shape \(2, 3\); got \(2, 2\)"),
    (CrossEntropy(), (2, 2), _t([0.5, 0.5], [0.5, -1e-300]), "row 1 is no probability vector"),
    (CrossEntropy(), (2, 2), _t([1.0, -1e-300], [0.5, 0.5]), "row 0 is no probability vector"),
    (CrossEntropy(), (2, 2), _t([0.5, 0.5], [math.nan, 1.0]), "expected finite numbers; got nan at sample 1"),
    (CrossEntropy(), (2, 2), _t([0.0, 1.0], [1.0, 0.0]), [[0.0, 1.0], [1.0, 0.0]]),
    (CrossEntropy(0.5), (2, 2), torch.tensor([0, 1]), [[0.75, 0.25], [0.25, 0.75]]),
    (CrossEntropy(0.5), (2, 2), _t([0.5, 0.5], [0.0, 1.0]), [[0.5, 0.5], [0.25, 0.75]]),
    # a sum of one to within (C + 8) eps of its dtype, and to within 1/10000
    (CrossEntropy(), (1, 2), _t([0.5, 0.5 + 10 * EPS]), [[0.5, 0.5]]),
    (CrossEntropy(), (1, 2), _t([0.5, 0.5 - 10 * EPS]), [[0.5, 0.5]]),
    (CrossEntropy(), (2, 2), _t([0.5, 0.5], [0.5, 0.5 + 11 * EPS]), "row 1 is no probability vector"),
    (CrossEntropy(), (1, 2), _t([0.5, 0.5 - 11 * EPS]), "row 0 is no probability vector"),
    (CrossEntropy(), (1, 3), _t([0.5, 0.5, SMALL]).half(), [[0.5, 0.5, SMALL]]),
    (CrossEntropy(), (1, 3), _t([0.5, 0.5, 2 * SMALL]).half(), "row 0 is no probability vector"),
]


@pytest.mark.parametrize(("loss", "shape", "y", "expected"), TARGETS)
def test_targets_are_prepared_or_refused(loss, shape, y, expected):
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=f"^(targets|loss): .*{expected}"):
            loss.prepare(y, *shape)
    else:
        found = loss.prepare(y, *shape)
        expected = torch.tensor(expected).to(found).reshape(found.shape)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
        if isinstance(loss, CrossEntropy) and found.is_floating_point():
            assert bool(((found.sum(1) - 1).abs() <= 2 * EPS).all())


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: Huber(0.0), ValueError, "delta: expected a positive finite number; got 0.0"),
        (lambda: Huber(math.inf), ValueError, "delta: expected a positive finite number; got inf"),
        (lambda: Huber(math.nan), ValueError, "delta: expected a positive finite number; got nan"),
        (lambda: Huber(0), ValueError, "delta"),
        (lambda: Huber("1"), TypeError, "delta"),
        (lambda: CrossEntropy(1.0 + 1e-15), ValueError, r"label_smoothing: expected a number in \[0, 1\]"),
        (lambda: CrossEntropy(-5e-324), ValueError, "label_smoothing"),
        (lambda: CrossEntropy(2), ValueError, "label_smoothing"),
        (lambda: CrossEntropy(True), TypeError, "label_smoothing"),
        (lambda: CrossEntropy(None), TypeError, "label_smoothing"),
        (lambda: CrossEntropy(ignore_index=1.0), TypeError, "ignore_index: expected an int; got 1.0"),
        (lambda: CrossEntropy(ignore_index=True), TypeError, "ignore_index: expected an int; got True"),
    ],
)
def test_options_are_refused_by_name(make, error, words):
    with pytest.raises(error, match=f"^{words}"):
        make()


def test_options_at_their_limits_are_taken():
    assert [Huber(x).delta for x in (5e-324, HUGE, 2)] == [5e-324, HUGE, 2.0]
    assert [CrossEntropy(x).label_smoothing for x in (0, 1)] == [0.0, 1.0]
    assert (
        Huber().delta == 1.0 and CrossEntropy().label_smoothing == 0.0 and CrossEntropy().ignore_index == -100
    )


def test_targets_and_outputs_of_one_model():
    for y, shape in ((torch.zeros(5), ()), (torch.zeros(5, 1), (1,)), (torch.zeros(5, 2), (2,))):
        check_matches_outputs(MSE(), y, torch.Size(shape))
    check_matches_outputs(MSE(), torch.tensor(1.0), torch.Size([1]))  # which prepare refuses
    check_matches_outputs(CrossEntropy(), torch.zeros(5), torch.Size([3]))
    for y, shape in ((torch.zeros(5), (1,)), (torch.zeros(5, 1), ()), (torch.zeros(5), (1, 1))):
        with pytest.raises(ValueError, match=r"targets: expected shape"):
            check_matches_outputs(MSE(), y, torch.Size(shape))
