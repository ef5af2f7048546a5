"""What an architecture makes of a picture, found out without computing anything: on the meta device.

timm's attributes don't tell it alike for all architectures: `num_features` is the width of a feature here
and that of the last convolution there, and which image sizes are seen whole follows from strides that differ
from family to family. One forward pass of shapes tells both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

Size = tuple[int, int]


@dataclass(frozen=True)
class Dropped:
    """Pixels, or places of an inner map, that no window of a layer reaches."""

    map: Size  # height and width of what the layer is given
    window: Size  # height and width of the layer's window, which is its stride too or smaller


@dataclass(frozen=True)
class Look:
    """Of one picture."""

    given: str  # in words, where it isn't one vector; else empty
    width: int  # numbers of the feature vector; 0 where it isn't one
    dropped: Dropped | None


def look(make: Callable[[], nn.Module], channels: int, size: Size) -> Look:
    """How the module that `make` makes sees (1, channels, *size) images, in evaluation mode.

    On the meta device; where the module can't run there, on the CPU. Raises whatever the module raises there.
    """
    try:
        return _look(make, channels, size, "meta")
    except Exception:  # what can't run on the meta device says so in many ways
        with torch.random.fork_rng(devices=[]):
            return _look(make, channels, size, "cpu")


def fits(make: Callable[[], nn.Module], channels: int, size: Size) -> bool:
    """Whether images of `size` go through on the meta device, and whole."""
    try:
        return _look(make, channels, size, "meta").dropped is None
    except Exception:
        return False


def multiple(
    make: Callable[[Size], nn.Module], channels: int, size: Size, dropped: Dropped | None
) -> tuple[int, Size] | None:
    """A number whose multiples fit, and the next larger size of such; None where none was found.

    Guessed from what is `dropped` at `size`, else the smallest of those that strides and windows come to.
    """
    factors = [4, 7, 8, 14, 16, 28, 32, 56, 64, 112, 128, 224, 256]
    if dropped is not None:
        factors = [round(max(size) / max(dropped.map)) * dropped.window[0], *factors]
    for factor in factors:
        tried = [(_up(size[0], factor) + more, _up(size[1], factor) + more) for more in (0, factor)]
        if all(fits(partial(make, each), channels, each) for each in tried):
            return factor, tried[0]
    return None


def _up(side: int, factor: int) -> int:
    return factor * math.ceil(side / factor)


def _look(make: Callable[[], nn.Module], channels: int, size: Size, device: str) -> Look:
    with torch.device(device):
        module, images = make().eval(), torch.zeros(1, channels, *size)
    windows = _Windows()
    with torch.no_grad(), windows:
        given = module(images)
    vector = isinstance(given, Tensor) and given.ndim == 2 and len(given) == 1
    return Look("" if vector else _words(given), given.shape[1] if vector else 0, windows.dropped)


def _words(given: Any) -> str:
    if isinstance(given, Tensor):
        return f"a tensor of shape {tuple(given.shape)}"
    if isinstance(given, Iterable):
        return f"{type(given).__name__} of {len(list(given))} values"
    return type(given).__name__


class _Windows(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the first layer whose windows, which don't overlap, leave out the end of its input.

    Where windows overlap, or are smaller than their stride (the shortcuts of a ResNet), another layer sees
    what this one doesn't; patches and poolings of 2 x 2 are the only ones to see theirs.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dropped: Dropped | None = None

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name
        if self.dropped is None and name == "aten::convolution" and not args[6] and args[0].ndim == 4:
            dilated = [(k - 1) * d + 1 for k, d in zip(args[1].shape[2:], args[5], strict=False)]
            self._note(args[0], dilated, args[3], args[4], ceil=False)
        elif self.dropped is None and name in ("aten::avg_pool2d", "aten::max_pool2d_with_indices"):
            given: dict[str, Any] = {a.name: a.default_value for a in function._schema.arguments}
            given |= dict(zip(given, args, strict=False)) | (kwargs or {})
            window, padding = given["kernel_size"], given["padding"]
            self._note(given["self"], window, given["stride"] or window, padding, given["ceil_mode"])
        return function(*args, **(kwargs or {}))

    def _note(self, images: Tensor, window: Any, stride: Any, padding: Any, ceil: bool) -> None:
        def pair(value: Any) -> tuple[int, int]:
            values = [value] if isinstance(value, int) else list(value)
            return int(values[0]), int(values[-1])

        map, window, stride, padding = tuple(images.shape[-2:]), pair(window), pair(stride), pair(padding)
        for side, reach, step, pad in zip(map, window, stride, padding, strict=True):
            if ceil or reach < 2 or reach != step:
                continue
            seen = (side + 2 * pad - reach) // step * step + reach - pad
            if seen < side:
                self.dropped = Dropped(map, window)  # type: ignore[arg-type]
