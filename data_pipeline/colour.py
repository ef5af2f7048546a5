"""Pure pixel operations on (B, 3, H, W) float32 in [0, 1] with one parameter a sample, (B,).

The formulas are torchvision's for float tensors (transforms.functional), batched; the tests hold them to it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

_LUMA = (0.2989, 0.587, 0.114)  # ITU-R 601-2, as torchvision rounds it


def _each(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def gray(images: Tensor) -> Tensor:
    """(B, 1, H, W) luminance."""
    red, green, blue = images.unbind(1)
    return (_LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue)[:, None]


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    return (images * _each(factor)).clamp(0, 1)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with the mean luminance of the picture."""
    mean = gray(images).mean((1, 2, 3), keepdim=True)
    return (_each(factor) * images + (1 - _each(factor)) * mean).clamp(0, 1)


def saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with the luminance of each pixel."""
    return (_each(factor) * images + (1 - _each(factor)) * gray(images)).clamp(0, 1)


def hue(images: Tensor, turns: Tensor) -> Tensor:
    """Turn the hue by a fraction of the colour circle."""
    h, s, v = _hsv(images)
    h = (h + turns[:, None, None]).remainder(1.0)
    # Foley and van Dam's conversion without branches: each channel is v less a trapezoid of the hue.
    channels = []
    for offset in (5.0, 3.0, 1.0):
        k = (offset + h * 6).remainder(6.0)
        channels.append(v - v * s * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(channels, dim=1)


def _hsv(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    red, green, blue = images.unbind(1)
    value, low = images.amax(1), images.amin(1)
    spread = value - low
    grey = spread == 0
    saturation = spread / torch.where(grey, torch.ones_like(value), value)
    divisor = torch.where(grey, torch.ones_like(value), spread)
    r, g, b = ((value - channel) / divisor for channel in (red, green, blue))
    turn = torch.where(value == red, b - g, torch.where(value == green, 2.0 + r - b, 4.0 + g - r))
    return (turn / 6 + 1).remainder(1.0), saturation, value


def solarize(images: Tensor, threshold: float) -> Tensor:
    return torch.where(images >= threshold, 1 - images, images)


def blur(images: Tensor, sigma: Tensor, kernel: int) -> Tensor:
    """Separable Gaussian of `kernel` (odd) taps and standard deviation `sigma` pixels, edges mirrored."""
    batch, channels, height, width = images.shape
    half = (kernel - 1) / 2
    taps = torch.linspace(-half, half, kernel, device=images.device)
    weights = torch.exp(-0.5 * (taps[None] / sigma[:, None]) ** 2)
    weights = (weights / weights.sum(1, keepdim=True)).repeat_interleave(channels, 0)
    pad = kernel // 2
    flat = functional.pad(images, (pad, pad, pad, pad), mode="reflect").reshape(
        1, batch * channels, height + 2 * pad, -1
    )
    across = functional.conv2d(flat, weights[:, None, None, :], groups=batch * channels)
    down = functional.conv2d(across, weights[:, None, :, None], groups=batch * channels)
    return down.reshape(batch, channels, height, width)


def rotate(images: Tensor, degrees: Tensor) -> Tensor:
    """Turn counter-clockwise about the centre, bilinear, edges mirrored."""
    angle = degrees * (math.pi / 180)
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    height, width = images.shape[2:]
    # affine_grid works in units of half a side: sides that differ scale the shear terms
    rows = torch.stack([cos, -sin * height / width, zero, sin * width / height, cos, zero], dim=1)
    grid = functional.affine_grid(rows.view(-1, 2, 3), list(images.shape), align_corners=False)
    return functional.grid_sample(
        images, grid, mode="bilinear", padding_mode="reflection", align_corners=False
    )
