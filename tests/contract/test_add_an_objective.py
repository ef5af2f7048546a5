"""docs/add_an_objective.md, run: what the page says is all it takes."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from configs.loading import load
from data_pipeline.types import Batch
from pretrain import encoders
from pretrain.clock import Progress
from pretrain.config import RunConfig
from pretrain.objective import BuildContext

PAGE = Path(__file__).resolve().parents[2] / "docs/add_an_objective.md"
CLOCK = Progress(step=0, samples=0, total_steps=10, dataset_size=100)


def block(language: str) -> str:
    [found] = re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    return str(found)


@pytest.fixture
def mylab() -> Iterator[None]:
    """Nobody else's package of that name, before or afterwards."""
    _forget_mylab()
    yield
    _forget_mylab()


def _forget_mylab() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "mylab"]:
        del sys.modules[name]


@pytest.mark.usefixtures("mylab")
def test_the_page_adds_simclr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mylab").mkdir()
    (tmp_path / "mylab/__init__.py").write_text("")
    (tmp_path / "mylab/simclr.py").write_text(block("python"))
    (tmp_path / "simclr.yaml").write_text(block("yaml"))
    monkeypatch.syspath_prepend(tmp_path)
    config = load(tmp_path / "simclr.yaml", RunConfig)
    generator = torch.Generator().manual_seed(0)
    views = tuple(torch.randn(16, 3, 32, 32, generator=generator) for _ in range(2))
    batch = Batch(views, torch.arange(16), torch.arange(16))
    gradients = []
    for accumulation in (1, 2):
        torch.manual_seed(0)
        encoder = encoders.build(config.encoder, (32, 32))
        context = BuildContext(encoder, (32, 32), 100, 16, None, accumulation=accumulation)
        objective = config.objective.build(context)
        output = objective(batch, CLOCK)
        output.loss.backward()
        gradients.append(objective.encoder.conv1.weight.grad)
        z = torch.cat(objective.embed(batch)).detach().double().numpy()  # type: ignore[operator]
        similarity = np.exp(z @ z.T / 0.5)
        np.fill_diagonal(similarity, 0)
        want = -np.log([similarity[i, (i + 16) % 32] / similarity[i].sum() for i in range(32)]).mean()
        assert output.loss.item() == pytest.approx(want, rel=1e-5)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-6)
