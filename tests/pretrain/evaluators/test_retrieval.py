"""Recall in both directions against a sorted list, whatever the ranks and the pieces it works in."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from configs.errors import ConfigError, DataError
from data_pipeline.hashing import key
from data_pipeline.indexing import add_shard
from data_pipeline.manifest import Manifest, all_fields
from data_pipeline.shards import write_shard
from pretrain.evaluators import retrieval
from pretrain.evaluators.retrieval import Pairs, RetrievalConfig, places_of_images, places_of_texts
from pretrain.judging.features import NotFiniteError
from tests.pretrain.evaluators.test_zero_shot import clip, subject


def captioned(folder: Path, count: int = 23) -> Path:
    """Pictures of noise with one to three captions each, in a JSON field."""
    samples = []
    for number in range(count):
        noise = torch.randint(0, 256, (32, 32, 3), generator=torch.Generator().manual_seed(number))
        buffer = io.BytesIO()
        Image.fromarray(noise.to(torch.uint8).numpy()).save(buffer, "PNG")
        texts = ", ".join(f'"{key(number, n) % 1000} red circles {n}"' for n in range(number % 3 + 1))
        samples.append(
            (f"{number:04d}", {"png": buffer.getvalue(), "json": f'{{"said": [{texts}]}}'.encode()})
        )
    made = []
    for number, part in enumerate((samples[:9], samples[9:])):
        write_shard(folder / f"{number}.tar", part)
        made.append(add_shard(folder, folder / f"{number}.tar", f"{number}.tar"))
    Manifest(folder, tuple(m.shard for m in made), all_fields(m.fields for m in made)).save()
    return folder / "manifest.json"


def score(manifest: str) -> dict[str, float]:
    config = RetrievalConfig(data=Path(manifest), captions=("json.said",), at=(1, 5, 10))
    return dict(config.build()(subject(clip())).values)


def on_ranks(manifest: str) -> dict[str, float]:
    from pretrain.engines import processes

    processes.start("cpu")
    found = score(manifest)
    processes.stop()
    return found


@pytest.mark.parametrize("ill", [0, 1])
def test_embeddings_that_are_not_finite_are_no_perfect_score(tmp_path: Path, ill: int) -> None:
    """A comparison with NaN is never true, so that nothing seems to be nearer than the right one."""
    model = clip()
    with torch.no_grad():
        (model.image_projection, model.text.ln_final)[ill].weight.fill_(float("nan"))  # type: ignore[operator]
    config = RetrievalConfig(data=captioned(tmp_path, 12), captions=("json.said",))
    with pytest.raises(NotFiniteError, match=r"embeddings of (images|captions): \d+ of \d+ aren't finite"):
        config.build()(subject(model))


def unit(count: int, seed: int) -> torch.Tensor:
    return nn.functional.normalize(
        torch.randn(count, 6, generator=torch.Generator().manual_seed(seed)), dim=1
    )


def test_places_are_those_in_a_sorted_list(monkeypatch: pytest.MonkeyPatch) -> None:
    owners = torch.tensor([0, 0, 1, 2, 2, 2, 3, 4])
    pairs = Pairs(unit(5, 0), unit(8, 1), owners)
    for held in (2**24, 20):
        monkeypatch.setattr(retrieval, "_SIMILARITIES", held)
        texts = places_of_texts(pairs, torch.arange(5))
        for image in range(5):
            order = sorted(range(8), key=lambda t, i=image: -float(pairs.images[i] @ pairs.texts[t]))
            assert texts[image] == next(place for place, t in enumerate(order) if owners[t] == image)
        images = places_of_images(pairs, torch.arange(8))
        for text in range(8):
            order = sorted(range(5), key=lambda i, t=text: -float(pairs.images[i] @ pairs.texts[t]))
            assert images[text] == order.index(int(owners[text]))


def test_collapsed_embeddings_find_nothing() -> None:
    one = torch.ones(12, 1)
    pairs = Pairs(one, one, torch.arange(12))
    assert (places_of_texts(pairs, torch.arange(12)) == 11).all()
    assert (places_of_images(pairs, torch.arange(12)) == 11).all()


def test_ranks_do_not_matter(ranks: Any, tmp_path: Path) -> None:
    manifest = captioned(tmp_path)
    alone = score(str(manifest))
    assert set(alone) == {f"{way}_at_{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)}
    assert 0 < alone["image_to_text_at_5"] < alone["image_to_text_at_10"] < 100
    assert ranks(2, on_ranks, manifest=str(manifest)) == [pytest.approx(alone)] * 2


def test_what_it_refuses_is_one_line(tmp_path: Path) -> None:
    config = RetrievalConfig(data=captioned(tmp_path))
    with pytest.raises(ConfigError, match=r"captions: found txt, but .* has the fields json, png"):
        config.build()(subject(clip()))
    with pytest.raises(DataError, match=r"a caption is a text or a list of texts|has no caption"):
        config.model_copy(update={"captions": ("json",)}).build()(subject(clip()))
    with pytest.raises(ConfigError, match=r"evaluate\.retrieval: needs a run whose objective embeds"):
        config.require_possible(nn.Linear(2, 2))
