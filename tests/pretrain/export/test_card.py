"""A card's picture shows the losses, and its text survives hubs' readers."""

from __future__ import annotations

import numpy as np
import yaml
from PIL import Image

from pretrain.export import card
from pretrain.export.card import Card, Story, curve


def heights(picture: Image.Image) -> dict[int, float]:
    """Column to the mean row of the blue line in it, in pixels from the top."""
    pixels = np.asarray(picture).astype(int)
    blue = (pixels[..., 2] - pixels[..., 0]) > 100
    return {int(x): float(np.nonzero(blue[:, x])[0].mean()) for x in np.nonzero(blue.any(axis=0))[0]}


def test_the_curve_is_the_losses() -> None:
    """Against the line through both corners of the frame: a loss that falls evenly."""
    falling = heights(curve([(32 * step, 5 - step / 100) for step in range(1, 401)]))
    columns = sorted(falling)
    across = np.array(columns[5:-10])
    expected = np.interp(across, (columns[0], columns[-1] - 3), (28, 260))
    assert np.abs(np.array([falling[x] for x in across]) - expected).max() < 2
    assert columns[0] < 70 and columns[-1] > 700


def test_a_long_run_is_thinned_by_means() -> None:
    """Rows that jump between 1 and 3 around their mean, 2, draw a flat line."""
    flat = heights(curve([(step, 2.0 + (-1) ** step + 1e-4 * (step > 100_000)) for step in range(200_000)]))
    middle = [flat[x] for x in flat if 80 < x < 350]
    assert max(middle) - min(middle) < 2


def test_one_loss_is_a_dot() -> None:
    assert 2 <= len(heights(curve([(32, 1.5)]))) <= 9


def test_a_card_without_a_story_says_what_it_can() -> None:
    plain = Card("a title", "timm", ("timm",), "mit", "import timm", "a note", 3e-7)
    text = card.text(plain, Story({"step": 3, "evaluations": {"knn": {"top1": 99.125}}}, {}))
    head = yaml.safe_load(text.split("---")[1])
    assert head == {
        "library_name": "timm",
        "license": "mit",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["timm"],
    }
    assert "| step | 3 |" in text and "| knn | top1 | 99.12 |" in text
    assert "| largest difference after reopening | 3.0e-07 |" in text
    assert "## Recipe" not in text and "loss.png" not in text
