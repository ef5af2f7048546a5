"""No export passes by a NaN, by nothing, or by half of its outputs, wherever in the list it stands."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from configs.errors import RunError
from pretrain.export.check import ExportMismatchError, largest_difference, require_finite

GOOD, NEAR = torch.ones(3), torch.ones(3) + 4e-6
ILL = [torch.tensor([1.0, bad, 1.0]) for bad in (math.nan, math.inf, -math.inf)]


def test_the_largest_difference_of_all_outputs_is_told() -> None:
    found = largest_difference({"a": GOOD, "b": GOOD}, {"a": GOOD, "b": NEAR})
    assert found == pytest.approx(4e-6, rel=0.05)
    assert largest_difference({"a": GOOD}, {"a": GOOD}) == 0.0


@pytest.mark.parametrize("bad", ILL)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_what_is_not_finite_fails_wherever_it_stands(bad: torch.Tensor, place: int) -> None:
    outputs = dict(zip("abc", [bad if n == place else GOOD for n in range(3)], strict=True))
    fine = dict.fromkeys("abc", GOOD)
    with pytest.raises(RunError, match=f"{'abc'[place]} aren't finite numbers: .*diverged.*--step"):
        largest_difference(outputs, outputs)
    with pytest.raises(ExportMismatchError, match=f"{'abc'[place]}: not finite after reopening"):
        largest_difference(fine, outputs)


def test_outputs_that_are_missing_or_of_another_shape_or_too_far_fail() -> None:
    for reopened, said in (
        ({"a": GOOD}, "b: nothing reopened"),
        ({"a": GOOD, "b": GOOD[:2]}, r"b: \(2,\) reopened, \(3,\) trained"),
        ({"a": GOOD, "b": GOOD + 2e-5}, "outputs differ by 2.0"),
    ):
        for order in itertools.permutations(reopened.items()):
            with pytest.raises(ExportMismatchError, match=said):
                largest_difference({"a": GOOD, "b": GOOD}, dict(order))
    with pytest.raises(ValueError, match="nothing to compare"):
        largest_difference({}, {"a": GOOD})


def test_some_of_many_broken_weights_are_named() -> None:
    with pytest.raises(RunError, match="w0, w1, w2 and 4 more aren't finite"):
        require_finite({f"w{number}": ILL[0] for number in range(7)} | {"whole": torch.tensor([3])})
