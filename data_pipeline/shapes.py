"""`shapes`: procedural images with captions. An object over natural-spectrum noise, light and clutter.

The settings of `V3` were chosen so that raw pixels and untrained encoders stand near chance in a few-shot
probe.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "moon", "heart", "bar", "hourglass")
COLOURS = {
    "red": (0.9, 0.15, 0.15), "orange": (0.95, 0.55, 0.1), "yellow": (0.95, 0.9, 0.2),
    "green": (0.15, 0.7, 0.2), "cyan": (0.2, 0.85, 0.85), "blue": (0.15, 0.3, 0.9),
    "purple": (0.6, 0.2, 0.8), "pink": (0.95, 0.5, 0.75),
}  # fmt: skip
TEXTURES = ("plain", "striped", "dotted", "checkered")
SIZES = ("small", "medium", "large")
PLACES = (
    "top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right",
)  # fmt: skip
_MARGIN = 0.85  # of the object's radius, kept inside the picture
_EDGE = 2.5  # steepness of anti-aliased edges, per pixel


@dataclass(frozen=True)
class Difficulty:
    """How hard the object is to see. Lengths are fractions of the picture's side."""

    rotation: float = 20.0  # degrees, either way
    noise: float = 0.06  # standard deviation of the background
    clutter: int = 2  # strokes of random colour
    texture: float = 0.25  # contrast of the texture
    contrast: float = 0.35  # least difference of brightness to the background; up to 0.25 more
    radius: tuple[float, float] = (0.22, 0.34)


V3 = Difficulty()
EASY = Difficulty(rotation=0.0, noise=0.02, clutter=0, texture=0.15, contrast=0.5, radius=(0.30, 0.36))
DIFFICULTIES = {"v3": V3, "easy": EASY}


@dataclass(frozen=True)
class Drawing:
    """A batch of pictures and what they show."""

    images: Tensor  # (B, 3, S, S) uint8
    labels: Tensor  # (B,) int64: number of the shape in SHAPES
    captions: Sequence[str]


@dataclass(frozen=True)
class _Canvas:
    """The pixel grid and the random numbers of one batch."""

    batch: int
    side: int
    generator: torch.Generator

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return torch.rand(self.batch, *shape, generator=self.generator) * (high - low) + low

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(self.batch, *shape, generator=self.generator)

    def choice(self, count: int) -> Tensor:
        return torch.randint(count, (self.batch,), generator=self.generator)

    def grid(self) -> tuple[Tensor, Tensor]:
        """Columns to the right and rows downwards, each (S, S), in pixels at pixel centres."""
        line = torch.arange(self.side) + 0.5
        y, x = torch.meshgrid(line, line, indexing="ij")
        return x, y


@contextmanager
def _one_thread() -> Iterator[None]:
    """torch's exponentials round otherwise at the ends of a thread's part, so the pictures would differ."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@_one_thread()
def draw(batch: int, side: int, seed: int, difficulty: Difficulty = V3) -> Drawing:
    """`batch` pictures of `side` × `side` pixels; the same arguments give the same pictures."""
    canvas = _Canvas(batch, side, torch.Generator().manual_seed(seed))
    shape, colour = canvas.choice(len(SHAPES)), canvas.choice(len(COLOURS))
    texture, template = canvas.choice(len(TEXTURES)), canvas.choice(4)
    low, high = difficulty.radius
    radius = canvas.uniform(low=low, high=high) * side
    room = side - 2 * _MARGIN * radius
    place_x, place_y = canvas.uniform(), canvas.uniform()
    centre = (place_x * room + _MARGIN * radius, place_y * room + _MARGIN * radius)
    mask = _object_mask(canvas, shape, radius, centre, difficulty.rotation)
    palette = torch.tensor(list(COLOURS.values()))
    ink = (palette[colour] + canvas.normal(3) * 0.05).clamp(0, 1)
    picture = _background(canvas, ink, difficulty)
    for _ in range(difficulty.clutter):
        picture = _with_stroke(canvas, picture)
    pattern = _texture(canvas, texture)
    textured = ink[:, :, None, None] * (1 + difficulty.texture * pattern)
    picture = picture * (1 - mask) + mask * textured
    picture = _lit(canvas, picture) + canvas.normal(3, side, side) * 0.02
    size = ((radius / side - low) / (high - low) * 3).long().clamp(0, 2)
    place = (place_y * 3).long().clamp(0, 2) * 3 + (place_x * 3).long().clamp(0, 2)
    captions = [
        _caption(*(int(part) for part in parts))
        for parts in zip(template, size, colour, texture, shape, place, strict=True)
    ]
    return Drawing((picture.clamp(0, 1) * 255).byte(), shape, captions)


def _each(values: Tensor) -> Tensor:
    """(B,) to (B, 1, 1), to go with a grid."""
    return values[:, None, None]


def _object_mask(
    canvas: _Canvas, shape: Tensor, radius: Tensor, centre: tuple[Tensor, Tensor], rotation: float
) -> Tensor:
    """(B, 1, S, S): 1 inside the object, 0 outside, soft at its edge."""
    x, y = canvas.grid()
    angle = canvas.uniform(low=-1, high=1) * math.radians(rotation)
    right, up = (x - _each(centre[0])) / _each(radius), -(y - _each(centre[1])) / _each(radius)
    cos, sin = _each(angle.cos()), _each(angle.sin())
    u, v = cos * right + sin * up, -sin * right + cos * up
    distance = torch.empty_like(u)
    for number, name in enumerate(SHAPES):
        chosen = shape == number
        if chosen.any():
            distance[chosen] = signed_distance(name, u[chosen], v[chosen])
    return torch.sigmoid(-distance * _each(radius) * _EDGE)[:, None]


def signed_distance(shape: str, x: Tensor, y: Tensor) -> Tensor:
    """About the distance to the outline of a shape of radius 1, negative inside; y points up."""
    r = (x * x + y * y + 1e-6).sqrt()
    match shape:
        case "circle":
            return r - 0.8
        case "square":
            return torch.maximum(x.abs(), y.abs()) - 0.72
        case "triangle":
            slope, y = math.sqrt(0.75), y + 0.1
            return torch.maximum(torch.maximum(slope * x + 0.5 * y, -slope * x + 0.5 * y), -y) - 0.52
        case "star":
            return _star(x, y, r)
        case "cross":
            upright = torch.maximum(x.abs() - 0.27, y.abs() - 0.95)
            return torch.minimum(upright, torch.maximum(y.abs() - 0.27, x.abs() - 0.95))
        case "ring":
            return (r - 0.7).abs() - 0.2
        case "moon":
            return torch.maximum(r - 0.95, 0.72 - ((x - 0.5) ** 2 + y * y + 1e-6).sqrt())
        case "heart":
            y, half = y + 0.15, 0.55 * math.sqrt(0.5)
            diamond = (x.abs() + y.abs()) * math.sqrt(0.5) - 0.55
            lobes = ((x.abs() - half) ** 2 + (y - half) ** 2 + 1e-6).sqrt() - 0.55
            return torch.minimum(diamond, lobes)
        case "bar":
            return torch.maximum(x.abs() - 0.24, y.abs() - 1)
        case "hourglass":
            return torch.maximum(y.abs() - 0.9, (x.abs() - y.abs() * 0.85 - 0.03) * 0.75)
    raise ValueError(f"no shape {shape!r}")


def _star(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Five points at radius 1, notches at 0.42: fold into one tenth and take the distance to its edge."""
    sector, notch = 2 * math.pi / 5, 0.42
    angle = torch.atan2(x, y)
    folded = (torch.remainder(angle + sector / 2, sector) - sector / 2).abs()
    px, py = r * folded.cos(), r * folded.sin()
    edge_x, edge_y = notch * math.cos(sector / 2) - 1, notch * math.sin(sector / 2)
    return ((px - 1) * edge_y - py * edge_x) / math.hypot(edge_x, edge_y)


def _background(canvas: _Canvas, ink: Tensor, difficulty: Difficulty) -> Tensor:
    """(B, 3, S, S): coloured 1/f noise, at random brighter or darker than the object."""
    side, brightness = canvas.side, ink.mean(1)
    low = difficulty.contrast
    step = canvas.uniform(low=low, high=low + 0.25)
    brighter = canvas.uniform() < 0.5
    brighter = (brightness + step <= 0.9) & (brighter | (brightness - step < 0.1))
    base = torch.where(brighter, brightness + step, brightness - step)
    paper = base[:, None] + canvas.normal(3) * 0.08
    rows, columns = torch.fft.fftfreq(side)[:, None], torch.fft.rfftfreq(side)[None]
    falloff = 1 / (rows * rows + columns * columns).sqrt().clamp(min=1 / side)
    spectrum = torch.fft.rfft2(canvas.normal(3, side, side)) * falloff
    noise: Tensor = torch.fft.irfft2(spectrum, s=(side, side))
    noise = noise + noise.mean(1, keepdim=True) * 1.5  # mostly grey, as photographs are
    noise = (noise - noise.mean((1, 2, 3), keepdim=True)) / noise.std((1, 2, 3), keepdim=True)
    strength = canvas.uniform(1, 1, 1, low=0.4 * difficulty.noise, high=1.4 * difficulty.noise)
    return paper[:, :, None, None] + noise * strength


def _with_stroke(canvas: _Canvas, picture: Tensor) -> Tensor:
    """A short stroke of random place, angle, length, width, strength and colour."""
    x, y = canvas.grid()
    ux, uy = x - _each(canvas.uniform()) * canvas.side, y - _each(canvas.uniform()) * canvas.side
    angle = canvas.uniform() * math.pi
    length, width = canvas.uniform(low=0, high=4), canvas.uniform(low=0.6, high=1.3)
    cos, sin = _each(angle.cos()), _each(angle.sin())
    along, across = cos * ux + sin * uy, -sin * ux + cos * uy
    distance = ((along.abs() - _each(length)).clamp(min=0) ** 2 + across * across).sqrt() - _each(width)
    mask = torch.sigmoid(-distance * _EDGE)[:, None] * canvas.uniform(1, 1, 1, low=0.4, high=0.9)
    return picture * (1 - mask) + mask * canvas.uniform(3, 1, 1)


def _texture(canvas: _Canvas, texture: Tensor) -> Tensor:
    """(B, 1, S, S) in [-1, 1]: nothing, stripes, dots or squares at a random angle and period."""
    x, y = canvas.grid()
    frequency = 2 * math.pi / canvas.uniform(low=3.5, high=5.5)
    angle = canvas.uniform() * math.pi
    cos, sin = _each(angle.cos()), _each(angle.sin())
    p, q = (cos * x + sin * y) * _each(frequency), (cos * y - sin * x) * _each(frequency)
    kinds = torch.stack(
        [
            torch.zeros_like(p),
            p.sin(),
            (p.sin() + q.sin() - 0.8).clamp(-1, 1),
            (p.sin() * q.sin() * 3).clamp(-1, 1),
        ],
        dim=1,
    )
    return kinds[torch.arange(canvas.batch), texture][:, None]


def _lit(canvas: _Canvas, picture: Tensor) -> Tensor:
    """Light that falls off to one side, and an overall gain."""
    x, y = canvas.grid()
    half = canvas.side / 2
    angle, strength = canvas.uniform() * 2 * math.pi, canvas.uniform(low=0, high=0.35)
    slope = (_each(angle.cos()) * (x - half) + _each(angle.sin()) * (y - half)) / half
    light = 1 + _each(strength) * slope
    gain = canvas.uniform(1, 1, 1, low=0.75, high=1.2)
    return picture * light[:, None] * gain


def _caption(template: int, size: int, colour: int, texture: int, shape: int, place: int) -> str:
    colour_name, shape_name = list(COLOURS)[colour], SHAPES[shape]
    whole = f"{SIZES[size]} {colour_name} {TEXTURES[texture]} {shape_name}"
    article = "an" if colour_name == "orange" else "a"
    return (
        f"a {whole} at the {PLACES[place]}",
        f"there is {article} {colour_name} {shape_name} in the {PLACES[place]}",
        f"a {TEXTURES[texture]} {shape_name} that is {colour_name}",
        f"a photo of a {whole}",
    )[template]
