"""Position embeddings of weights that were trained with images of another size or shape.

A table of positions is (1, prefix + rows * columns, D): it doesn't say how many rows. Two grids of as many
places (4 x 16, 8 x 8) have tables of one shape, so the grid must be known where it isn't square.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from configs.errors import RunError

Grid = tuple[int, int]
"""Rows and columns of positions."""

TABLE = "pos_embed"


def grid_of(encoder: Any) -> Grid | None:
    """Of an encoder's own positions; None where it has none, or not on one grid."""
    if not isinstance(getattr(encoder, TABLE, None), Tensor):
        return None
    found = getattr(getattr(encoder, "patch_embed", None), "grid_size", None)
    found = found if found is not None else getattr(encoder, "tokens_spatial_shape", None)
    return (int(found[0]), int(found[1])) if found is not None and len(found) == 2 else None


def grid_at(encoder: Any, size: int | tuple[int, int]) -> Grid | None:
    """Of images of another size, in pixels, cut as the encoder cuts its own."""
    patch = getattr(getattr(encoder, "patch_embed", None), "patch_size", None)
    if patch is None:
        return None
    high, wide = (size, size) if isinstance(size, int) else size
    return high // int(patch[0]), wide // int(patch[1])


def fitted(
    encoder: Any, tensors: Mapping[str, Tensor], grid: Grid | None, source: str
) -> tuple[dict[str, Tensor], Grid | None, str]:
    """The tensors with positions as the encoder has them, the new grid where they were resampled, and a note.

    `grid`: of the tensors, where it is known; else a square, which the note says. Raises `RunError` where the
    places aren't a square's, or the encoder has as many on another shape.
    """
    found = dict(tensors)
    own, table = grid_of(encoder), tensors.get(TABLE)
    if own is None or table is None or table.ndim != 3 or table.shape[-1] != encoder.pos_embed.shape[-1]:
        return found, None, ""
    prefix = encoder.pos_embed.shape[1] - own[0] * own[1]
    places, note = table.shape[1] - prefix, ""
    if grid is None:
        side = math.isqrt(max(places, 0))
        square = side * side == places
        if places == own[0] * own[1] and not square:
            return found, None, ""  # no square has as many places, and the encoder's own shape does
        if not square or (places == own[0] * own[1] and own[0] != own[1]):
            raise RunError(
                f"encoder.weights: {source} has {places} positions, and a file doesn't say of how many rows "
                f"and columns; this encoder has {own[0]} x {own[1]}: say the size of the images they were "
                "trained with by encoder.weights_size=[height,width]"
            )
        grid = (side, side)
        note = (
            f"{places} positions taken as a square of {side} x {side}, which a file doesn't say (if they "
            "aren't, set encoder.weights_size)"
        )
    if grid[0] * grid[1] != places:
        raise RunError(
            f"encoder.weights: {source} has {places} positions beside {prefix} for tokens, which aren't the "
            f"{grid[0]} x "
            f"{grid[1]} of its images; set encoder.weights_size and encoder.args to what it was trained with"
        )
    if grid == own:
        return found, None, note
    found[TABLE] = resampled(table, grid, own, prefix)
    return found, own, note


def resampled(table: Tensor, old: Grid, new: Grid, prefix: int) -> Tensor:
    """(1, prefix + old places, D) -> (1, prefix + new places, D), bicubic and antialiased as timm does it."""
    tokens, places = table[:, :prefix], table[:, prefix:].float()
    map = places.reshape(1, *old, -1).permute(0, 3, 1, 2)
    map = functional.interpolate(map, size=new, mode="bicubic", antialias=True)
    return torch.cat([tokens, map.flatten(2).transpose(1, 2).to(table.dtype)], dim=1)
