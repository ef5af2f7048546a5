"""What a sweep's YAML says: which runs there are, how many at a time, and when one is given up.

    dir: runs/lr
    configs: [smoke/mae]
    grid: {optimizer.lr: [1e-3, 2e-3], run.seed: [0, 1]}

Every combination of config x grid x members x sample is a run. An entry of `members` with a `config` of its
own goes with that one only.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Literal, Self

import pydantic
from pydantic import Field, PositiveInt

from configs.errors import ConfigError
from configs.loading import Config

Overrides = Mapping[str, Any]
"""Dotted path of a setting to its value."""


class Range(Config):
    """Numbers from `low` to `high`, both included."""

    low: float
    high: float
    log: bool = False  # as likely between 1 and 10 as between 10 and 100
    integer: bool = False

    @pydantic.model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"low: found {self.low:g} beside high={self.high:g}; it has to be less")
        if self.log and self.low <= 0:
            raise ValueError(f"low: found {self.low:g}; with log it has to be above 0")
        return self

    def at(self, unit: float) -> float | int:
        """The value at `unit` of [0, 1), to four digits: what a name shows is what is used."""
        top = math.floor(self.high) + 1 if self.integer else self.high
        linear = self.low + (top - self.low) * unit
        value: float = self.low * (top / self.low) ** unit if self.log else linear
        if self.integer:
            return min(math.floor(value), math.floor(self.high))
        return min(max(float(f"{value:.4g}"), self.low), self.high)


class Choice(Config):
    """One of several values, all as likely."""

    choices: tuple[Any, ...] = Field(min_length=1)

    def at(self, unit: float) -> Any:
        return self.choices[int(unit * len(self.choices))]


class Sample(Config):
    """Points of a space. The first ones stay the same when `count` grows."""

    count: PositiveInt
    seed: int = Field(0, ge=0)
    method: Literal["random", "sobol", "halton"] = "random"  # the last two cover the space more evenly
    space: Mapping[str, Range | Choice] = Field(min_length=1)

    def points(self) -> list[Overrides]:
        """`count` times a value for every setting of the space."""
        rows = unit_points(self.count, len(self.space), self.method, self.seed)
        return [
            {key: way.at(x) for (key, way), x in zip(self.space.items(), row, strict=True)} for row in rows
        ]


class EarlyStop(Config):
    """When a member is given up: it compares itself with the others at some fractions of its training.

    median: it is worse than the median of the others there (Golovin et al. 2017, Vizier, §3.2.2).
    halving: it isn't among the best 1/reduction there so far (ASHA; Li et al. 2018, arXiv:1810.05934).
    """

    rule: Literal["median", "halving"]
    metric: str = "loss"  # a name of metrics.jsonl, or an evaluation's such as knn/top1
    best_is: Literal["highest", "lowest"] | None = None  # None: the lowest of a loss or error, by its name
    rungs: tuple[float, ...] = Field((0.125, 0.25, 0.5), min_length=1)
    reduction: float = Field(2.0, gt=1)
    least: PositiveInt = 3  # others that must have been there, for the median

    @pydantic.field_validator("rungs")
    @classmethod
    def _fractions(cls, rungs: tuple[float, ...]) -> tuple[float, ...]:
        if not all(0 < rung < 1 for rung in rungs) or list(rungs) != sorted(set(rungs)):
            raise ValueError("fractions of the training, rising, between 0 and 1: [0.25, 0.5]")
        return rungs


class SweepConfig(Config):
    """Many runs of one question."""

    dir: Path  # each member is a run folder in here
    configs: tuple[str, ...] = Field(min_length=1)  # one or several, of any objectives
    overrides: Mapping[str, Any] = {}  # for all members; not a part of their names
    grid: Mapping[str, tuple[Any, ...]] = {}
    members: tuple[Overrides, ...] = ()
    sample: Sample | None = None
    parallel: PositiveInt = 4  # members at a time
    early_stop: EarlyStop | None = None

    @pydantic.field_validator("overrides", "grid", "members")
    @classmethod
    def _own_folder(cls, value: Any) -> Any:
        entries = value if isinstance(value, tuple) else (value,)
        if any(key == "run.dir" or key == "run" for entry in entries for key in entry):
            raise ValueError("run.dir is each member's own: it follows from `dir` and the member's name")
        return value

    @pydantic.field_validator("grid")
    @classmethod
    def _not_empty(cls, grid: Mapping[str, tuple[Any, ...]]) -> Mapping[str, tuple[Any, ...]]:
        for key, values in grid.items():
            if not values:
                raise ValueError(f"{key}: has no values; give at least one")
        return grid


@dataclass(frozen=True)
class Member:
    """One run of a sweep."""

    name: str  # of its folder
    config: str
    overrides: Overrides  # its own, without those of all

    def dotlist(self, sweep: SweepConfig) -> list[str]:
        """Everything that is set on top of `config`, as `a.b=c`."""
        # In W&B a sweep is a group, unless it is told another.
        group = {"track.group": sweep.dir.name} if sweep.dir.name else {}
        whole = {**group, **sweep.overrides, **self.overrides, "run.dir": str(sweep.dir / self.name)}
        return [f"{key}={json.dumps(value)}" for key, value in whole.items()]


def members(sweep: SweepConfig) -> list[Member]:
    """All runs of a sweep, in a fixed order, each once. Raises `ConfigError` where two would share a name."""
    found: dict[str, Member] = {}
    for config, overrides in _combinations(sweep):
        member = Member(_name(sweep, config, overrides), config, overrides)
        same = found.setdefault(member.name, member)
        if (same.config, same.overrides) != (config, overrides):
            raise ConfigError(f"members: {same.overrides} and {overrides} would both be {member.name}")
    return list(found.values())


def _combinations(sweep: SweepConfig) -> Iterator[tuple[str, Overrides]]:
    grids = [dict(zip(sweep.grid, values, strict=True)) for values in itertools.product(*sweep.grid.values())]
    points = sweep.sample.points() if sweep.sample else [{}]
    for entry in sweep.members or [{}]:
        own = {key: value for key, value in entry.items() if key != "config"}
        configs = [str(entry["config"])] if "config" in entry else sweep.configs
        for config, cell, point in itertools.product(configs, grids, points):
            yield config, {**cell, **own, **point}


def _name(sweep: SweepConfig, config: str, overrides: Overrides) -> str:
    """Readable, safe in a path, the same for the same member however the sweep grows, and its own.

    The digest is over the config's name and the exact overrides, so values that look alike stay apart.
    """
    exact = json.dumps([config, sorted(overrides.items())], sort_keys=True)
    digest = hashlib.sha256(exact.encode()).hexdigest()[:8]
    lasts = [key.rpartition(".")[2] for key in overrides]
    short = {key: last if lasts.count(last) == 1 else key for key, last in zip(overrides, lasts, strict=True)}
    settings = ",".join(f"{_safe(short[key])}={_safe(value)}" for key, value in overrides.items())
    parts = [_safe("-".join(PurePath(config).with_suffix("").parts[-2:])), settings[:120], digest]
    return "-".join(part for part in parts if part)


def _safe(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return re.sub(r"[^A-Za-z0-9_.+]+", "-", text).strip("-.") or "x"


def unit_points(
    count: int, dimensions: int, method: Literal["random", "sobol", "halton"], seed: int
) -> Sequence[Sequence[float]]:
    """(count, dimensions) numbers in [0, 1); a smaller `count` gives the first rows of a larger one."""
    import numpy as np

    if method == "random":
        return np.random.Generator(np.random.PCG64(seed)).random((count, dimensions)).tolist()  # type: ignore[no-any-return]
    from scipy.stats import qmc

    if method == "halton":
        return qmc.Halton(dimensions, rng=seed).random(count).tolist()  # type: ignore[no-any-return]
    # Sobol's points are even in powers of two, and scipy warns of any other number.
    return qmc.Sobol(dimensions, rng=seed).random_base2(math.ceil(math.log2(count))).tolist()[:count]  # type: ignore[no-any-return]
