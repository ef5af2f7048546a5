"""Which members a sweep has, and what they are called."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from configs.errors import ConfigError
from configs.loading import load, validate
from configs.sweep import EarlyStop, Sample, SweepConfig, members


def sweep(**changes: Any) -> SweepConfig:
    return validate({"dir": "runs/s", "configs": ["smoke/mae"]} | changes, SweepConfig, source="test")


def test_a_grid_is_every_combination_of_every_part() -> None:
    found = members(
        sweep(
            configs=["smoke/mae", "smoke/moco"],
            grid={"optimizer.lr": [1e-3, 2e-3], "run.seed": [0, 1]},
            members=[{"train.batch_size": 32}, {"config": "smoke/clip", "train.batch_size": 64}],
        )
    )
    assert len(found) == (2 + 1) * 4
    assert [one.config for one in found].count("smoke/clip") == 4
    assert found[0].overrides == {"optimizer.lr": 1e-3, "run.seed": 0, "train.batch_size": 32}
    assert found[-1].overrides == {"optimizer.lr": 2e-3, "run.seed": 1, "train.batch_size": 64}
    assert len({one.name for one in found}) == 12


def test_names_are_readable_safe_and_stay_when_the_sweep_grows() -> None:
    small = members(sweep(grid={"optimizer.lr": [1e-3], "data.path": ["a b/ç:*"]}))
    large = members(sweep(grid={"optimizer.lr": [5e-4, 1e-3], "data.path": ["z", "a b/ç:*"]}, parallel=9))
    assert small[0].name in {one.name for one in large}
    assert re.fullmatch(r"smoke-mae-lr=0\.001,path=a-b-[0-9a-f]{8}", small[0].name)
    assert all(re.fullmatch(r"[A-Za-z0-9._+=,-]+", one.name) for one in large)
    long = members(sweep(members=[{"a.b": "x" * 300}]))
    assert len(long[0].name) < 160


def test_what_looks_alike_has_folders_of_its_own_and_equals_share_one() -> None:
    apart = members(sweep(members=[{"a.b": "x/y"}, {"a.b": "x y"}, {"a.b": 1}, {"a.b": "1"}, {"a.b": True}]))
    assert len({one.name for one in apart}) == 5
    assert len(members(sweep(members=[{"a.b": 1}, {"a.b": 1}], grid={"run.seed": [3, 3]}))) == 1
    same_last = members(sweep(members=[{"a.lr": 1, "b.lr": 2}]))
    assert "a.lr=1,b.lr=2" in same_last[0].name


def test_overrides_reach_the_config_as_they_were_written(tmp_path: Path) -> None:
    asked = sweep(
        dir=tmp_path, overrides={"x.d": "12 steps"}, members=[{"x.t": "a=b, [c]", "x.f": 1e-05, "x.n": None}]
    )
    (tmp_path / "base.yaml").write_text("x: {}\n")
    from configs.loading import resolved

    (one,) = members(asked)
    found = resolved(tmp_path / "base.yaml", one.dotlist(asked))
    assert found["x"] == {"d": "12 steps", "t": "a=b, [c]", "f": 1e-05, "n": None}
    assert found["run"]["dir"] == str(tmp_path / one.name)


SPACE = {
    "optimizer.lr": {"low": 1e-4, "high": 1e-1, "log": True},
    "train.depth": {"low": 2, "high": 4, "integer": True},
    "optimizer.name": {"choices": ["adamw", "sgd"]},
    "objective.mask_ratio": {"low": 0.25, "high": 0.75},
}


@pytest.mark.parametrize("method", ["random", "sobol", "halton"])
def test_samples_are_seeded_keep_their_beginning_and_fill_the_space(method: str) -> None:
    def points(count: int, seed: int = 0) -> list[Any]:
        sample = {"count": count, "seed": seed, "method": method, "space": SPACE}
        return validate(sample, Sample, source="test").points()

    many = points(64)
    assert points(5) == many[:5] == points(5)
    assert points(5, seed=1) != many[:5]
    rates = [point["optimizer.lr"] for point in many]
    assert all(1e-4 <= rate <= 1e-1 for rate in rates)
    for low in (1e-4, 1e-3, 1e-2):  # log-uniform: every decade alike
        assert 10 <= sum(low <= rate < 10 * low for rate in rates) <= 33
    assert {point["train.depth"] for point in many} == {2, 3, 4}
    assert {point["optimizer.name"] for point in many} == {"adamw", "sgd"}
    assert all(0.25 <= point["objective.mask_ratio"] <= 0.75 for point in many)
    assert all(float(f"{rate:.4g}") == rate for rate in rates)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"grid": {"run.dir": ["x"]}}, "grid: .*run.dir is each member's own"),
        ({"grid": {"a": []}}, "grid: .*a: has no values"),
        ({"configs": []}, "configs"),
        ({"paralel": 2}, "paralel: no such setting; did you mean parallel"),
        ({"sample": {"count": 2, "space": {"a": {"low": 2, "high": 1}}}}, "low: found 2 beside high=1"),
        ({"sample": {"count": 2, "space": {"a": {"low": 0, "high": 1, "log": True}}}}, "has to be above 0"),
        ({"early_stop": {"rule": "best"}}, "early_stop.rule"),
        ({"early_stop": {"rule": "median", "rungs": [0.5, 0.25]}}, "fractions of the training, rising"),
        ({"early_stop": {"rule": "median", "rungs": [1.0]}}, "fractions of the training, rising"),
    ],
)
def test_a_bad_sweep_is_a_line_with_its_path(changes: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        sweep(**changes)


def test_the_shipped_sweeps_have_members() -> None:
    assert len(members(load("sweeps/smoke", SweepConfig))) == 4
    mae = load("sweeps/mae_lr", SweepConfig)
    assert len(members(mae)) == 16
    # by what the encoder is worth: the loss depends on the mask ratio, which the sweep varies
    assert mae.early_stop == EarlyStop(rule="median", metric="knn/top1", rungs=(0.25, 0.5))
