"""Runs that fall ill, branch, hang or run out of time: what is done about it, on real ranks."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from configs.errors import ConfigError, RunError
from configs.loading import load
from data_pipeline.load import Loader
from pretrain import checkpoint
from pretrain.config import RunConfig
from pretrain.engines.deepspeed import DeepSpeedEngine
from pretrain.health.stopping import StopRequest
from pretrain.objective import LossOutput
from pretrain.run import replay
from pretrain.run.folder import RunFolder
from pretrain.run.fork import Fork
from pretrain.run.main import prepare, train
from tests.conftest import Ranks
from tests.forkserver import Died
from tests.waiting import wait_for

QUICK = ("data.workers=0", "train.duration=14 steps", "checkpoint.every=3 steps", "checkpoint.keep=20")


def config_for(root: Path, digits: Path, *overrides: str) -> RunConfig:
    own = [f"run.dir={root}", f"data.manifest={digits}/train/manifest.json"]
    return load("smoke/mae", RunConfig, [*own, *QUICK, *overrides])


def rows(root: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / name).read_text().splitlines()]


def poisoned(first: int, last: int, factor: float) -> None:
    """From now on in this process the loss of the batches at positions [first, last) is multiplied."""
    forward = DeepSpeedEngine.forward

    def changed(self: DeepSpeedEngine, batch: Any, progress: Any) -> LossOutput:
        output = forward(self, batch, progress)
        if not first <= progress.samples < last:
            return output
        return LossOutput(output.loss * factor, output.metrics)

    DeepSpeedEngine.forward = changed  # type: ignore[method-assign]


def train_ill(root: str, first: int = 0, last: int = 0, factor: float = math.nan) -> str:
    poisoned(first, last, factor)
    return train(RunFolder(Path(root)), StopRequest())


def replayed(
    root: str, step: int, attempt: int | None = None, first: int = 0, last: int = 0
) -> list[replay.Replayed]:
    poisoned(first, last, math.nan)
    return list(replay.replay(Path(root), step, attempt=attempt))


ILL = {"first": 7 * 32, "last": 9 * 32}
"""The batches that would have become step 8."""


@pytest.fixture(scope="module")
def rolled_back(
    tmp_path_factory: pytest.TempPathFactory, digits: Path, request: pytest.FixtureRequest
) -> Path:
    root = tmp_path_factory.mktemp("ill") / "run"
    health = ["train.health.not_finite=2", "train.health.then=roll_back", "train.micro_batch_size=8"]
    evaluation = f"evaluate=[{{kind: effective_rank, data: {digits}, every: 7 steps}}]"
    prepare(config_for(root, digits, *health, evaluation), world_size=2)
    server = request.getfixturevalue("_fork_server")
    assert server.run(2, train_ill, root=str(root), **ILL) == ["done", "done"]
    return root


def test_a_rollback_goes_on_past_the_samples_in_question(rolled_back: Path) -> None:
    found = rows(rolled_back)
    assert [row["step"] for row in found] == list(range(1, 15))
    assert [row["samples"] for row in found] == [32 * n for n in [*range(1, 7), *range(10, 18)]]
    assert [row["attempt"] for row in found] == [1] * 6 + [2] * 8
    assert found[-1]["skipped_batches"] == 3  # two that weren't finite, one that was undone
    assert [row["step"] for row in rows(rolled_back, "metrics.undone.jsonl")] == [7]
    state = RunFolder(rolled_back).read_state()
    assert [a["reason"] for a in state["attempts"]] == ["not_finite", "done"]
    assert (state["attempts"][1]["from_step"], state["attempts"][1]["from_samples"]) == (6, 9 * 32)
    names = [each.path.name for each in checkpoint.published(rolled_back)]
    assert "step-00000006-a02" in names and "step-00000006-a01" in names
    last = checkpoint.read_extra(checkpoint.published(rolled_back)[0].path)
    assert last["health"]["ranges"] == [[6 * 32, 9 * 32]]


def test_what_was_evaluated_on_the_way_not_taken_is_undone(rolled_back: Path) -> None:
    assert [row["step"] for row in rows(rolled_back, "evaluations.undone.jsonl")] == [7]
    assert [row["step"] for row in rows(rolled_back, "evaluations.jsonl")] == [7, 14]


def test_trouble_is_written_down_with_its_samples(rolled_back: Path, digits: Path) -> None:
    [trouble] = rows(rolled_back, "trouble.jsonl")
    assert (trouble["kind"], trouble["step"], trouble["attempt"]) == ("not_finite", 7, 1)
    assert trouble["samples"] == [7 * 32, 9 * 32]
    assert [batch["position"] for batch in trouble["batches"]] == [7 * 32, 8 * 32]
    assert all(len(set(batch["index"])) == 32 for batch in trouble["batches"])
    assert trouble["replay"] == f"keel replay {rolled_back} --step 8 --attempt 1"


def test_a_replay_is_the_step_as_it_was(ranks: Ranks, rolled_back: Path) -> None:
    """On one process what two computed, in their micro-batches; before and after the rollback."""
    before = sorted(path for path in rolled_back.rglob("*") if path.is_file())
    for step in (5, 8):
        [[found]] = ranks(1, replayed, root=str(rolled_back), step=step)
        row = rows(rolled_back)[step - 1]
        assert found.applied and found.position == row["samples"] - 32
        assert found.loss == pytest.approx(row["loss"], rel=1e-5)
        assert found.grad_norm == pytest.approx(row["grad_norm"], rel=1e-4)
        losses = [each.loss for each in found.micro_batches]
        assert len(losses) == 4 and sum(losses) / 4 == pytest.approx(found.loss, rel=1e-6)
        assert all(each.grad_norm > 0 for each in found.micro_batches)
    assert sorted(path for path in rolled_back.rglob("*") if path.is_file()) == before


def test_a_replay_shows_the_batches_that_were_refused(ranks: Ranks, rolled_back: Path) -> None:
    [found] = ranks(1, replayed, root=str(rolled_back), step=8, attempt=1, **ILL)
    assert [(each.position, each.applied) for each in found] == [(224, False), (256, False), (288, True)]
    assert math.isnan(found[0].loss) and found[0].grad_norm is None
    [trouble] = rows(rolled_back, "trouble.jsonl")
    assert [sorted(each.index) for each in found[:2]] == [sorted(b["index"]) for b in trouble["batches"]]
    with pytest.raises(RunError, match="this run has steps 1 to 14"):
        next(replay.replay(rolled_back, 15))


def test_a_run_that_stops_says_where_to_look(ranks: Ranks, tmp_path: Path, digits: Path) -> None:
    root = tmp_path / "run"
    prepare(config_for(root, digits, "train.health.not_finite=2"), world_size=1)
    with pytest.raises(RunError) as caught:
        ranks(1, train_ill, root=str(root), **ILL)
    said = str(caught.value)
    assert "\n" not in said and "not finite for 2 batches in a row after step 7" in said
    assert f"keel replay {root} --step 8 --attempt 1" in said and "train.health.then=roll_back" in said
    assert RunFolder(root).read_state()["status"] == "failed"


def test_a_spike_is_rolled_back_to_before_it(ranks: Ranks, tmp_path: Path, digits: Path) -> None:
    root = tmp_path / "run"
    spike = ["train.health.spike=20", "train.health.spikes=3", "train.health.then=roll_back"]
    prepare(
        config_for(root, digits, *spike, "train.duration=48 steps", "checkpoint.every=1 steps"), world_size=2
    )
    answers = ranks(2, train_ill, root=str(root), first=40 * 32, last=43 * 32, factor=1e4)
    assert answers == ["done", "done"]
    [trouble] = rows(root, "trouble.jsonl")
    assert (trouble["kind"], trouble["samples"]) == ("spike", [40 * 32, 43 * 32])
    found = rows(root)
    assert found[-1]["step"] == 48 and max(row["loss"] for row in found[30:]) < 100
    assert [(r["step"], r["samples"] // 32) for r in found[39:42]] == [(40, 40), (41, 44), (42, 45)]


def test_a_rollback_that_does_not_help_ends(ranks: Ranks, tmp_path: Path, digits: Path) -> None:
    root = tmp_path / "run"
    health = ["train.health.not_finite=2", "train.health.then=roll_back", "train.health.rollbacks=1"]
    prepare(config_for(root, digits, *health), world_size=1)
    with pytest.raises(RunError, match="after step 6, and nothing was applied"):
        ranks(1, train_ill, root=str(root), first=7 * 32, last=99 * 32)
    assert len(rows(root, "trouble.jsonl")) == 2


# ---- forks -----------------------------------------------------------------------------------


def train_here(root: str) -> str:
    return train(RunFolder(Path(root)), StopRequest())


def test_a_fork_goes_on_where_its_parent_was(
    ranks: Ranks, tmp_path: Path, digits: Path, rolled_back: Path
) -> None:
    root = tmp_path / "fork"
    other = ["optimizer.lr=1e-3", "train.duration=16 steps", "train.batch_size=32"]
    prepare(config_for(root, digits, *other), world_size=1, fork=Fork(rolled_back, step=9))
    state = RunFolder(root).read_state()
    rates = {"rate": state["parent"]["rate"], "fork_rate": state["parent"]["fork_rate"]}
    assert state["parent"] | {"checkpoint": ""} == {
        "run": str(rolled_back), "id": RunFolder(rolled_back).read_state()["id"], "checkpoint": "",
        "step": 9, "anew": False, **rates,
    }  # fmt: skip
    assert 0 < rates["fork_rate"] < rates["rate"]  # its cosine is the steeper one: said where it happens
    assert state["id"] != state["parent"]["id"]
    assert ranks(1, train_here, root=str(root)) == ["done"]
    own, parents = rows(root), rows(rolled_back)
    assert [row["step"] for row in own] == list(range(10, 17))
    assert own[0]["samples"] == parents[9]["samples"]
    assert own[0]["loss"] == pytest.approx(parents[9]["loss"], rel=1e-5)  # same weights, same samples
    assert own[1]["loss"] != pytest.approx(parents[10]["loss"], rel=1e-6)  # another learning rate
    prepare(config_for(root, digits, *other), world_size=1)  # from now on a run like any other


def test_a_fork_anew_keeps_weights_and_starts_the_clock(
    ranks: Ranks, tmp_path: Path, digits: Path, rolled_back: Path
) -> None:
    root = tmp_path / "fork"
    other = ["train.batch_size=16", "run.seed=5", "train.duration=2 steps", "optimizer.warmup=0 steps"]
    prepare(config_for(root, digits, *other), world_size=1, fork=Fork(rolled_back, anew=True))
    assert ranks(1, train_here, root=str(root)) == ["done"]
    own = rows(root)
    assert [(row["step"], row["samples"]) for row in own] == [(1, 16), (2, 32)]
    assert own[0]["loss"] < 0.98 * rows(rolled_back)[0]["loss"]


def test_a_fork_that_cannot_be_is_one_line(tmp_path: Path, digits: Path, rolled_back: Path) -> None:
    refused = {
        "encoder.args.embed_dim=32": "tensors differ in shape; the first is",
        "train.duration=9 steps": "9 steps is 9 steps, and the fork begins at step 14",
        f"run.dir={rolled_back}": "is a run already, and a fork is a new one",
    }
    for override, message in refused.items():
        with pytest.raises(RunError) as caught:
            config = config_for(tmp_path / "fork", digits, override, "optimizer.warmup=2 steps")
            prepare(config, world_size=1, fork=Fork(rolled_back))
        assert message in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(RunError, match="no checkpoint at step 5; there are"):
        prepare(config_for(tmp_path / "fork", digits), world_size=1, fork=Fork(rolled_back, step=5))
    with pytest.raises(RunError, match="not a run folder"):
        prepare(config_for(tmp_path / "fork", digits), world_size=1, fork=Fork(tmp_path))
    assert not (tmp_path / "fork" / "config.yaml").exists()


# ---- time, hanging, the best -----------------------------------------------------------------


def test_a_run_leaves_in_time(ranks: Ranks, tmp_path: Path, digits: Path) -> None:
    root = tmp_path / "run"
    prepare(
        config_for(root, digits, "train.duration=90_000 steps", "train.time_limit=0.05 min"), world_size=1
    )
    assert ranks(1, train_here, root=str(root), timeout=120) == ["time_limit"]
    state = RunFolder(root).read_state()
    assert (state["status"], state["attempts"][0]["reason"]) == ("stopped", "time_limit")
    assert checkpoint.published(root)[0].step == state["step"] > 0
    with pytest.raises(ConfigError, match="a time limit is in minutes"):
        config_for(root, digits, "train.time_limit=5 steps")


def hang(root: str, logs: str) -> str:
    """Rank 1 gets no data after step 8."""
    os.dup2(os.open(f"{logs}/{os.environ['RANK']}", os.O_CREAT | os.O_WRONLY), 2)
    give, seen = Loader.__next__, 0

    def given(self: Loader) -> Any:
        nonlocal seen
        seen += 1
        while seen == 9 and os.environ["RANK"] == "1":
            Path(logs, "hanging").touch()
            time.sleep(0.1)
        return give(self)

    Loader.__next__ = given  # type: ignore[method-assign]
    abort = lambda: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
    return train(RunFolder(Path(root)), StopRequest(), abort=abort)


def test_a_rank_that_stands_still_says_where_and_leaves(ranks: Ranks, tmp_path: Path, digits: Path) -> None:
    root = tmp_path / "run"
    config = config_for(root, digits, "train.health.hang_at_least=5", "train.health.hang=3")
    prepare(config, world_size=2)
    answers = ranks(2, hang, root=str(root), logs=str(tmp_path), may_die=True, timeout=120)
    assert Died(signal.SIGKILL) in answers
    told = [(tmp_path / str(rank)).read_text() for rank in range(2)]
    assert any("no step for" in each for each in told)
    if (tmp_path / "hanging").exists() and "no step for" in told[1]:  # else rank 0 was first
        assert "rank 1: no step for" in told[1] and "this rank is in: waiting for data" in told[1]
        assert "in given" in told[1] and "in fit" in told[1]  # the stack of the thread that trains
    assert ranks(2, train_here, root=str(root)) == ["done", "done"]
    assert [row["step"] for row in rows(root)] == list(range(1, 15))


def test_the_best_by_an_evaluation_is_saved_and_pinned(ranks: Ranks, tmp_path: Path, digits: Path) -> None:
    root = tmp_path / "run"
    best = [
        "checkpoint.every=100 steps", "checkpoint.keep=1", "checkpoint.best=heldout/effective_rank",
        "checkpoint.best_is=lowest",
        f"evaluate=[{{kind: effective_rank, data: {digits}, every: 4 steps, name: heldout}}]",
    ]  # fmt: skip
    prepare(config_for(root, digits, *best), world_size=2)
    assert ranks(2, train_here, root=str(root)) == ["done", "done"]
    values = {row["step"]: row["values"]["effective_rank"] for row in rows(root, "evaluations.jsonl")}
    assert sorted(values) == [4, 8, 12, 14]
    step = min(values, key=values.__getitem__)
    [pin] = checkpoint.pins(root).values()
    assert pin == {"checkpoint": f"step-{step:08d}-a01", "value": values[step]}
    found = {each.step for each in checkpoint.published(root)}
    assert {step, 14} <= found and len(found) == 2
    with pytest.raises(ConfigError, match=r"checkpoint\.best: found knn/top1, .* of this run: heldout"):
        prepare(config_for(tmp_path / "b", digits, *best, "checkpoint.best=knn/top1"), world_size=1)


# ---- two incarnations ------------------------------------------------------------------------


def incarnation(root: str, place: str) -> str:
    """Each on its own, on one run folder: the second starts when the first is about to publish."""
    number, here = os.environ["RANK"], Path(place)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):  # it stands alone
        del os.environ[name]
    if number == "0":
        publish = checkpoint.Checkpointer._publish

        def late(self: checkpoint.Checkpointer, *arguments: Any) -> None:
            (here / "about to").touch()
            wait_for("the newer incarnation's end", (here / "over").exists)
            publish(self, *arguments)

        checkpoint.Checkpointer._publish = late  # type: ignore[method-assign]
        return train(RunFolder(Path(root)), StopRequest())
    wait_for("the older incarnation's save", (here / "about to").exists)
    (Path(root) / ".lock").unlink()  # as on a file system whose locks don't reach the other node
    try:
        return train(RunFolder(Path(root)), StopRequest())
    finally:
        (here / "over").touch()


def test_of_two_incarnations_alive_the_newer_one_keeps_the_run(
    ranks: Ranks, tmp_path: Path, digits: Path
) -> None:
    root = tmp_path / "run"
    prepare(config_for(root, digits, "train.duration=40 steps"), world_size=1)
    stale, newer = ranks(2, incarnation, root=str(root), place=str(tmp_path), may_die=True, timeout=120)
    assert newer == "done" and isinstance(stale, Exception)
    assert {each.attempt for each in checkpoint.published(root)} == {2}
    assert all(checkpoint.storage.damage(each.path) is None for each in checkpoint.published(root))
    assert RunFolder(root).read_state()["status"] == "done"
