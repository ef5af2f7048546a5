"""Pictures of a model: the arithmetic behind them, on any number of ranks, without a trace in training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import ImageFont
from sklearn.decomposition import PCA
from torch import Tensor

from data_pipeline.load import chosen, sequential
from pretrain import encoders
from pretrain.encoders import EncoderConfig
from pretrain.evaluators.pictures import PicturesConfig
from pretrain.judging import sheets
from pretrain.judging.subject import Subject
from pretrain.ports import Scores
from tests.contract.test_objectives import build
from tests.pretrain.conftest import VIEW
from tests.pretrain.evaluators.test_zero_shot import clip, shapes, subject

__all__ = ["shapes"]

VIT = EncoderConfig(
    name="vit_tiny_patch16_224", args={"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
)


def vit() -> Any:
    torch.manual_seed(0)
    return encoders.build(VIT, (32, 32)).eval()


def test_some_samples_are_those_of_the_set(digits: Path) -> None:
    whole = next(sequential(digits / "val", VIEW, batch_size=50))
    picked = chosen(digits / "val", VIEW, [40, 3, 3])
    assert whole.target is not None and picked.target is not None
    assert torch.equal(picked.views[0], whole.views[0][[40, 3, 3]])
    assert torch.equal(picked.target, whole.target[[40, 3, 3]])


def test_attention_is_that_of_the_last_block(digits: Path) -> None:
    """Head by head, query by key, against timm's own output of the attention with those weights."""
    encoder, images = vit(), torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        got = sheets.attention_maps(encoder, images)
        seen: list[Tensor] = []
        attn = encoder.blocks[-1].attn
        hook = attn.register_forward_hook(lambda m, i, o: seen.extend([i[0], o]))
        encoder.forward_features(images)
        hook.remove()
        x, out = seen
        q, k, v = attn.qkv(x).reshape(3, 17, 3, 2, 8).permute(2, 0, 3, 1, 4)
        weights = torch.empty(3, 2, 17, 17)
        for image in range(3):
            for head in range(2):
                weights[image, head] = ((q[image, head] @ k[image, head].T) / 8**0.5).softmax(dim=1)
        mixed = (weights @ v).transpose(1, 2).reshape(3, 17, 16)
        torch.testing.assert_close(attn.proj(mixed), out, rtol=1e-4, atol=1e-6)  # these are its weights
    torch.testing.assert_close(got, weights[:, :, 0, 1:].mean(dim=1).reshape(3, 4, 4), rtol=1e-4, atol=1e-6)
    assert bool((got.sum(dim=(1, 2)) < 1).all()), "the class token looks at itself too"


def test_colours_are_principal_components() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(4, 5, 5, 12, generator=generator) * torch.linspace(3, 0.5, 12)
    colours = sheets.principal_colours(tokens)
    assert colours.shape == (4, 3, 5, 5) and 0 <= float(colours.min()) < float(colours.max()) <= 1
    reference = PCA(3, svd_solver="full").fit_transform(tokens.reshape(-1, 12).double().numpy())
    got = colours.permute(0, 2, 3, 1).reshape(-1, 3)
    for number in range(3):
        inside = (got[:, number] > 0) & (got[:, number] < 1)  # the rest is cut at the percentiles
        pair = torch.stack([got[inside, number].double(), torch.tensor(reference[:, number])[inside]])
        assert abs(float(torch.corrcoef(pair)[0, 1])) == pytest.approx(1, abs=1e-6)
    assert torch.equal(colours, sheets.principal_colours(tokens))


def drawn(data: str, name: str) -> Scores:
    model = subject(clip()) if name == "clip" else _of_smoke(name)
    return PicturesConfig(data=Path(data), count=4).build()(model)


def _of_smoke(name: str) -> Subject:
    objective = build(name).eval()
    return Subject(objective.encoder, objective.encoder, VIEW, torch.device("cpu"), objective, batch_size=7)


def on_ranks(data: str, name: str) -> dict[str, Tensor]:
    from pretrain.engines import processes

    processes.start("cpu")
    found = drawn(data, name)
    processes.stop()
    return dict(found.pictures)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mae", {"reconstructions", "neighbours", "attention", "components"}),
        ("moco", {"neighbours"}),
        ("clip", {"similarities", "neighbours", "attention", "components"}),
    ],
)
def test_what_fits_the_model_is_drawn_on_any_number_of_ranks(
    ranks: Any, shapes: Path, name: str, expected: set[str]
) -> None:
    alone = drawn(str(shapes / "val"), name)
    assert set(alone.pictures) == expected == set(alone.details["drawn"]) and not alone.values
    for picture in alone.pictures.values():
        assert picture.dtype == torch.float32 and picture.shape[0] == 3 and min(picture.shape[1:]) >= 32
        assert 0 <= float(picture.min()) < float(picture.max()) <= 1
    if name == "clip":
        assert alone.details["captions"]["similarities"] == sheets.captions(
            shapes / "val/manifest.json", range(4)
        )
        for found in ranks(2, on_ranks, data=str(shapes / "val"), name=name):
            for key, picture in found.items():
                assert float((picture - alone.pictures[key]).abs().mean()) < 1e-3, key


def test_no_letter_of_a_caption_is_an_empty_box_and_none_is_cut_in_silence() -> None:
    """Pillow's own font knows ASCII: what it can't draw is told by its number, what doesn't fit by dots."""
    font = ImageFont.load_default(12)
    assert sheets.drawable("a red\n circle", font) == "a red circle"
    assert sheets.drawable("红 on 🐈", font) == "<U+7EA2> on <U+1F408>"
    assert sheets.drawable("", font) == ""
    text = "a very long caption that goes on and on"
    short = sheets.shortened(text, 120, font)
    assert short.endswith("...") and font.getlength(short) <= 120 and text.startswith(short[:-3])
    assert sheets.shortened(text, 1000, font) == text


def test_an_image_is_not_its_own_neighbour(digits: Path, pixels: Subject) -> None:
    """Raw pixels find a digit of the same class for nearly all: few frames in the mark's colour."""
    features = pixels.features(digits / "val/manifest.json")
    path = digits / "val/manifest.json"
    sheet = sheets.neighbours(pixels, path, path, (features, features), near=3, most=10)
    assert sheet.height == 10 * 68
    first, second = (sheet.crop((x, 2, x + 64, 66)) for x in (0, 76))
    assert first.tobytes() != second.tobytes()
