"""A run's weights are read back as they were trained, and anything else is said in a line."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from configs.errors import RunError
from configs.loading import load
from data_pipeline.order import ORDER_VERSION
from pretrain import checkpoint
from pretrain.config import RunConfig
from pretrain.evaluators.few_shot import FewShotConfig
from pretrain.evaluators.heldout import HeldOutConfig
from pretrain.evaluators.knn import KNNConfig
from pretrain.export.subject import opener, subject
from pretrain.export.timm_folder import export
from pretrain.health.stopping import StopRequest
from pretrain.judging.evaluate import evaluate
from pretrain.judging.schedule import read as read_record
from pretrain.objective import Objective
from pretrain.run import trained
from pretrain.run.folder import RunFolder
from pretrain.run.main import prepare, train
from pretrain.tracking import jsonl
from tests.pretrain.last_look import train_and_look

Ranks = Callable[..., list[Any]]


def train_and_tell(root: str) -> dict[str, Tensor]:
    """Train on this rank; gives the encoder's last weights, while still in training's hands."""

    def look(objective: Objective) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in objective.encoder.state_dict().items()}

    return train_and_look(root, look)


def configured(root: Path, digits: Path, *overrides: str) -> RunConfig:
    own = [f"run.dir={root}", f"data.manifest={digits}/train/manifest.json", "data.workers=0"]
    quick = ["train.duration=6 steps", "optimizer.warmup=2 steps", "checkpoint.every=3 steps"]
    return load("smoke/mae", RunConfig, [*own, *quick, *overrides])


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory, digits: Path, request: pytest.FixtureRequest
) -> tuple[Path, dict[str, Tensor]]:
    """A run of six steps on two ranks under ZeRO-3, with its last encoder."""
    root = tmp_path_factory.mktemp("runs") / "run"
    folder = prepare(configured(root, digits, "train.zero_stage=3"), world_size=2)
    weights, _ = request.getfixturevalue("_fork_server").run(2, train_and_tell, root=str(folder.root))
    return root, weights


def test_the_encoder_is_the_trained_one(run: tuple[Path, dict[str, Tensor]]) -> None:
    root, weights = run
    model = trained.read(root)
    assert (model.step, model.samples) == (6, 6 * 32)
    assert not model.encoder.training
    assert model.encoder.state_dict().keys() == weights.keys()
    for name, value in model.encoder.state_dict().items():
        torch.testing.assert_close(value, weights[name], rtol=0, atol=0)
    assert model.facts()["data_hash"]


def test_a_checkpoint_says_of_which_run_and_where_in_it(run: tuple[Path, dict[str, Tensor]]) -> None:
    """What decides the future besides tensors: position in the data, its order and hash, config, health."""
    told = checkpoint.read_extra(checkpoint.published(run[0])[0].path)
    state = RunFolder(run[0]).read_state()
    assert {"step": 6, "samples": 6 * 32, "manifest_hash": state["manifest_hash"]}.items() <= told.items()
    assert told["order_version"] == ORDER_VERSION and "health" in told
    assert RunConfig.model_validate(told["config"]) == load(run[0] / "config.yaml", RunConfig)


def test_how_long_saving_took_is_a_metric(run: tuple[Path, dict[str, Tensor]]) -> None:
    rows = {row["step"]: row for row in jsonl.rows(run[0] / "metrics.jsonl")}
    told = [step for step, row in rows.items() if row.get("checkpoint_stall", -1) >= 0]
    assert told and set(told) <= {3, 4, 6}
    assert all(row["checkpoint_write"] > 0 for row in rows.values() if "checkpoint_write" in row)


def test_an_earlier_step_is_another_encoder(run: tuple[Path, dict[str, Tensor]]) -> None:
    root, weights = run
    model = trained.read(root, step=3)
    assert model.step == 3
    assert any(not torch.equal(value, weights[name]) for name, value in model.encoder.state_dict().items())


def test_the_untrained_objective_is_the_runs_own_start(digits: Path, tmp_path: Path) -> None:
    config = configured(tmp_path / "run", digits)
    state = torch.random.get_rng_state()
    one, other = trained.new_objective(config), trained.new_objective(config)
    assert torch.equal(torch.random.get_rng_state(), state)
    for (name, value), again in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(value, again), name


def test_what_cannot_be_read_is_named(run: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    root, _ = run
    with pytest.raises(RunError, match="not a run folder"):
        trained.read(tmp_path)
    with pytest.raises(RunError, match="no checkpoint at step 4; there are: 3, 6"):
        trained.read(root, step=4)


def test_a_damaged_checkpoint_is_refused_by_name_and_nothing_is_exported(
    run: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run[0], copy)
    newest, older = sorted((copy / "checkpoints").iterdir(), reverse=True)
    shard = newest / "rank-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(RunError, match=rf"{shard.name}: has \d+ bytes.*choose another step"):
        export(copy, tmp_path / "backbone", step=6)
    assert not (tmp_path / "backbone").exists()
    assert trained.read(copy).checkpoint == older, "without a step the newest whole one is taken"


def test_weights_of_another_network_are_refused(run: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run[0], copy)
    config = copy / "config.yaml"
    config.write_text(config.read_text().replace("depth: 2", "depth: 3"))
    with pytest.raises(RunError, match=r"isn't a checkpoint of this run's model: it lacks blocks\.2\."):
        trained.read(copy)


def test_a_run_and_its_export_score_alike(
    run: tuple[Path, dict[str, Tensor]], digits: Path, tmp_path: Path
) -> None:
    root, _ = run
    result = export(root, tmp_path / "backbone")
    evaluations = [KNNConfig(data=digits), FewShotConfig(data=digits / "val" / "manifest.json", draws=1)]
    told: list[tuple[int, int]] = []
    of_run = evaluate(opener(str(root)), evaluations, progress=lambda done, total: told.append((done, total)))
    of_export = evaluate(opener(str(result.folder)), evaluations)
    assert [s.values for s in of_run] == [s.values for s in of_export]
    assert told[-1] == (1797, 1797)
    with pytest.raises(RunError, match="neither a run folder, an exported folder, nor a model"):
        evaluate(opener("no_such_model"), evaluations)


def test_a_run_is_judged_by_its_own_task_too(run: tuple[Path, dict[str, Tensor]], digits: Path) -> None:
    root, _ = run
    (scores,) = evaluate(opener(str(root)), [HeldOutConfig(data=digits)])
    assert 0 < scores.values["reconstruction_error"] < 3
    assert subject(str(root), device=torch.device("cpu")).objective is not None


def losses(root: Path) -> list[str]:
    lines = (root / "metrics.jsonl").read_text().splitlines()
    return [line.split('"loss": ')[1].split(",")[0] for line in lines]


def train_here(root: str) -> str:
    return train(RunFolder(Path(root)), StopRequest())


def test_evaluations_leave_the_loss_curve_bit_identical(digits: Path, tmp_path: Path, ranks: Ranks) -> None:
    knn, heldout = (
        f"{{kind: {k}, every: {n} steps, data: {digits}}}" for k, n in (("knn", 2), ("heldout", 3))
    )
    curves = []
    for name, overrides in (("plain", ()), ("judged", (f"evaluate=[{knn}, {heldout}]",))):
        root = tmp_path / name
        prepare(configured(root, digits, *overrides), world_size=2)
        ranks(2, train_here, root=str(root))
        curves.append(losses(root))
    assert len(curves[0]) == 6
    assert curves[0] == curves[1]
    card = export(tmp_path / "judged", tmp_path / "backbone").folder / "README.md"
    assert "| knn | top1 |" in card.read_text()
    record = read_record(tmp_path / "judged" / "evaluations.jsonl")
    assert [(row["step"], row["name"]) for row in record] == [
        (2, "knn"), (3, "heldout"), (4, "knn"), (6, "knn"), (6, "heldout"),
    ]  # fmt: skip
    assert 20 < record[0]["values"]["top1"] < 100
