"""Random views as settings: what contrastive recipes differ in."""

from __future__ import annotations

import pydantic

from configs.loading import Config
from data_pipeline.types import (
    ColorJitter,
    GaussianBlur,
    Interpolation,
    RandomResizedCrop,
    Solarize,
    ViewSpec,
)


class Augmentation(Config):
    """One random view. Defaults change nothing but crop and flip."""

    crop_scale: tuple[float, float] = (0.2, 1.0)
    interpolation: Interpolation = "bilinear"
    flip: float = pydantic.Field(0.5, ge=0, le=1)
    rotation: float = pydantic.Field(0.0, ge=0, le=180)  # degrees, either way
    jitter: float = pydantic.Field(0.0, ge=0, le=1)  # probability of the four below
    brightness: float = pydantic.Field(0.4, ge=0)
    contrast: float = pydantic.Field(0.4, ge=0)
    saturation: float = pydantic.Field(0.4, ge=0)
    hue: float = pydantic.Field(0.1, ge=0, le=0.5)
    grayscale: float = pydantic.Field(0.0, ge=0, le=1)
    grayscale_first: bool = False  # before the jitter, as in MoCo v1: grey pictures are jittered as grey
    blur: float = pydantic.Field(0.0, ge=0, le=1)
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # pixels
    solarize: float = pydantic.Field(0.0, ge=0, le=1)

    def view(self, size: tuple[int, int]) -> ViewSpec:
        """What the data pipeline is asked for."""
        return ViewSpec(
            size=size,
            crop=RandomResizedCrop(scale=self.crop_scale),
            interpolation=self.interpolation,
            flip=self.flip,
            rotation=self.rotation,
            jitter=ColorJitter(self.brightness, self.contrast, self.saturation, self.hue, self.jitter)
            if self.jitter
            else None,
            grayscale=self.grayscale,
            grayscale_first=self.grayscale_first,
            blur=GaussianBlur(self.blur_sigma, self.blur) if self.blur else None,
            solarize=Solarize(self.solarize) if self.solarize else None,
        )
