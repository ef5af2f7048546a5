"""Whether a reopened model computes what the trained one does: one judge for every export.

Python's `max` and comparisons drop a NaN or keep it by its place in the list, so that what isn't finite is
looked for by itself, first.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from configs.errors import RunError

TOLERANCE = 1e-5
"""Largest absolute difference of a float32 output between the trained model and the reopened one."""


class ExportMismatchError(RuntimeError):
    """The reopened folder doesn't compute what the trained model does."""


def require_finite(trained: Mapping[str, Tensor]) -> None:
    """Refuse a model whose weights or outputs, by name, aren't finite. Raises `RunError`."""
    ill = [name for name, value in trained.items() if not bool(torch.isfinite(value).all())]
    if ill:
        more = f" and {len(ill) - 3} more" if len(ill) > 3 else ""
        raise RunError(
            f"the trained model is broken: {', '.join(ill[:3])}{more} aren't finite numbers: training has "
            "diverged; take an earlier checkpoint (--step), or train with a lower rate"
        )


def largest_difference(trained: Mapping[str, Tensor], reopened: Mapping[str, Tensor]) -> float:
    """Of any output, absolute. Raises `RunError` where the trained ones aren't finite.

    Raises `ExportMismatchError` where one is missing, of another shape, not finite, or differs by `TOLERANCE`
    or more.
    """
    if not any(value.numel() for value in trained.values()):
        raise ValueError("nothing to compare")
    require_finite(trained)
    found = []
    for name, value in trained.items():
        got = reopened.get(name)
        if got is None or got.shape != value.shape:
            shape = "nothing" if got is None else tuple(got.shape)
            raise ExportMismatchError(f"{name}: {shape} reopened, {tuple(value.shape)} trained")
        if not bool(torch.isfinite(got).all()):
            raise ExportMismatchError(f"{name}: not finite after reopening")
        if value.numel():  # of another shape it would have been refused
            found.append((got.double() - value.double()).abs().max())
    difference = float(torch.stack(found).max())  # torch's keeps a NaN
    if not difference < TOLERANCE:
        raise ExportMismatchError(f"outputs differ by {difference:.2e}, allowed is less than {TOLERANCE:.0e}")
    return difference
