"""The driver of fault cases: a run, faults by seeded choice, and at the end the proof that nothing was lost.

A case is right when the run came to its end, every step's loss is that of the uninterrupted run, every step
got the very samples it gets there, and no attempt began from less than the newest valid checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from configs.errors import UserError
from configs.loading import load
from data_pipeline import demo
from pretrain import checkpoint
from pretrain.config import RunConfig
from pretrain.engines import storage
from pretrain.ports import BEYOND_STEPS
from pretrain.run.folder import RunFolder
from pretrain.run.main import prepare
from tests.faults.ranks import FAULTS, attempt
from tests.forkserver import Died

STEPS, BATCH, EVERY = 14, 32, 3
PHASES = ("waiting for data", "forward and backward", "optimizer step", BEYOND_STEPS)
Ranks = Callable[..., list[Any]]

BETWEEN = (
    "truncated file", "flipped byte", "file removed", "index truncated", "index byte flipped",
    "newest removed", "torn rows", "shard gone", "disk full", "other ranks",
)  # fmt: skip
"""Faults that happen between attempts, or to the whole of one."""

ON_RANK_0 = frozenset(
    {"kill before the index", "kill before publishing", "kill in publishing", "kill in pruning",
     "kill after evaluation"}
)  # fmt: skip
"""What only rank 0 ever does."""


@dataclass
class Case:
    """What happened to one run."""

    faults: list[str]
    seed: int
    attempts: list[str] = field(default_factory=list)  # how each ended
    wrong: str = ""  # what the proof failed of

    def told(self) -> str:
        """One line: what was done to it and what came of each attempt."""
        ends = ", ".join(how.split(":")[0] for how in self.attempts)
        return f"{' + '.join(self.faults)} -> {ends}{'  WRONG: ' + self.wrong if self.wrong else ''}"


def make_data(folder: Path) -> Path:
    """Digits; gives the folder of their training set's manifest."""
    demo.make(demo.DemoConfig(name="digits"), folder)
    return folder / "train"


class Run:
    """One run under test, with a copy of the data of its own, since shards are taken away from it."""

    def __init__(self, place: Path, data: Path, ranks: Ranks, workers: int = 0) -> None:
        self.root, self.ledger, self.ranks = place / "run", place / "ledger", ranks
        self.ledger.mkdir(parents=True)
        self.data = Path(shutil.copytree(data.parent, place / "data")) / "train"
        self.settings = [
            f"run.dir={self.root}",
            f"data.manifest={self.data}/manifest.json",
            f"data.workers={workers}",
            f"train.duration={STEPS} steps",
            f"checkpoint.every={EVERY} steps",
            "checkpoint.keep=2",
            "checkpoint.best=effective_rank/effective_rank",
            f"evaluate=[{{kind: effective_rank, data: {self.data.parent}, every: 4 steps}}]",
        ]

    @property
    def config(self) -> RunConfig:
        return load("smoke/mae", RunConfig, self.settings)

    def start(self, count: int, fault: Mapping[str, Any] | None = None) -> str:
        """One attempt on `count` ranks; gives how it ended: "done", "killed", or the first error."""
        try:
            prepare(self.config, world_size=count)
            told = self.ranks(
                count, attempt, root=str(self.root), ledger=str(self.ledger),
                fault=None if fault is None else dict(fault), may_die=True, timeout=150,
            )  # fmt: skip
        except UserError as error:
            return f"refused: {error}"
        if any(isinstance(each, Died) for each in told):
            return "killed"
        errors = [each for each in told if isinstance(each, BaseException)]
        mine = [each for each in errors if isinstance(each, UserError)]
        return f"error: {(mine or errors)[0]}" if errors else str(told[0])

    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.root / "metrics.jsonl").read_text().splitlines()]

    def losses(self) -> list[float]:
        return [row["loss"] for row in self.rows()]

    def trained_on(self) -> list[list[int]]:
        """Sorted sample numbers of every step that stands, as its attempt's ranks were given them."""
        given: dict[int, dict[int, list[int]]] = {}
        for file in self.ledger.iterdir():
            number = int(file.name[1:3])
            for line in file.read_text().splitlines():
                position, index = json.loads(line)
                given.setdefault(number, {}).setdefault(position, []).extend(index)
        return [sorted(given[row["attempt"]][row["samples"] - BATCH]) for row in self.rows()]

    def newest(self) -> int:
        """The step to go on from: that of the newest valid checkpoint."""
        for each in checkpoint.published(self.root):
            if storage.damage(each.path) is None:
                return each.step
        return 0


def play(run: Run, case: Case) -> Case:
    """Let the case's faults happen to `run`, one an attempt, then let it finish."""
    chance = random.Random(case.seed)
    for name in case.faults:
        if name in BETWEEN:
            _between(run, name, chance, case)
        else:
            case.attempts.append(_start(run, 2, _fault(name, chance, run.newest())))
    if case.faults[-1] in BETWEEN:  # what was damaged after the end is mended by a start, too
        case.attempts.append(_start(run, 2))
    for _ in range(3):
        if not case.attempts or case.attempts[-1] != "done":
            case.attempts.append(_start(run, 2))
    assert case.attempts[-1] == "done", case
    return case


def _start(run: Run, count: int, fault: Mapping[str, Any] | None = None) -> str:
    """An attempt, which must begin where the newest valid checkpoint is."""
    before, known = run.newest(), len(RunFolder(run.root).read_state().get("attempts", []))
    how = run.start(count, fault)
    begun = RunFolder(run.root).read_state().get("attempts", [])[known:]
    assert all(each["from_step"] == before for each in begun), (before, begun)
    return how


def _fault(name: str, chance: random.Random, start: int) -> dict[str, Any]:
    """Where and when, by seeded choice, within what the attempt will come to."""
    left = max(1, STEPS - start)
    saves = max(1, left // EVERY)
    anybody = chance.choice([0, 1, None])
    return {
        "name": name,
        "rank": 0 if name in ON_RANK_0 else chance.choice([0, 1]) if "rank" in name else anybody,
        "step": chance.randint(1, left),
        "phase": chance.choice(PHASES),
        "count": chance.randint(1, saves) if "evaluation" not in name else 1,
        "seconds": chance.uniform(0.0, 1.5),
    }


def _between(run: Run, name: str, chance: random.Random, case: Case) -> None:
    if run.newest() < 2 * EVERY and name not in ("disk full", "other ranks"):  # something to be damaged
        early = {"name": "kill in step", "rank": None, "step": 2 * EVERY + 2, "phase": PHASES[1]}
        case.attempts.append(_start(run, 2, early))
    over = run.newest() == STEPS  # nothing is read or written any more
    match name:
        case "shard gone":
            with _hidden(chance.choice(sorted(run.data.glob("*.tar")))):
                case.attempts.append(run.start(2))
            assert case.attempts[-1].startswith(("refused", "error")) or over, case
        case "disk full":
            with _full_disk(run.root):
                case.attempts.append(run.start(2))
            assert case.attempts[-1].startswith(("error", "refused")) or over, case
        case "other ranks":
            kill = _fault("kill in step", chance, run.newest()) | {"rank": 0, "phase": PHASES[2]}
            case.attempts.append(_start(run, chance.choice([1, 4]), kill))
        case _:
            _damage(run.root, name, chance)


def _damage(root: Path, name: str, chance: random.Random) -> None:
    valid = [each.path for each in checkpoint.published(root) if storage.damage(each.path) is None]
    if len(valid) < 2:  # with the last one gone, a run is to be refused: that has a test of its own
        return
    newest = valid[0]
    index, file = newest / storage.INDEX, chance.choice(sorted(newest.glob("rank-*")))
    match name:
        case "truncated file":
            os.truncate(file, chance.randrange(file.stat().st_size))
        case "flipped byte":
            _flip(file, chance)
        case "file removed":
            file.unlink()
        case "index truncated":
            os.truncate(index, chance.randrange(index.stat().st_size))
        case "index byte flipped":
            _flip(index, chance)
        case "newest removed":
            shutil.rmtree(newest)
        case "torn rows":
            for record in ("metrics.jsonl", "evaluations.jsonl"):
                with (root / record).open("a") as rows:
                    rows.write('{"step": 7, "lo')


def _flip(file: Path, chance: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    file.write_bytes(content)


@contextmanager
def _hidden(file: Path) -> Iterator[None]:
    aside = file.with_suffix(".aside")
    file.rename(aside)
    try:
        yield
    finally:
        aside.rename(file)


@contextmanager
def _full_disk(root: Path) -> Iterator[None]:
    """The checkpoints on a file system with room for less than one more; what lies there stays readable."""
    folder, aside = root / "checkpoints", root / "aside"
    folder.mkdir(parents=True, exist_ok=True)
    folder.rename(aside)
    folder.mkdir()
    try:
        _mount(folder)
        for each in aside.iterdir():
            (folder / each.name).symlink_to(each)
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], capture_output=True, check=False)
        folder.rmdir()
        aside.rename(folder)


def _mount(folder: Path) -> None:
    command = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)]
    subprocess.run(command, capture_output=True, check=True)


def may_mount() -> bool:
    """Whether this machine lets us have a small file system; elsewhere files are limited, not the disk."""
    with tempfile.TemporaryDirectory() as place, contextlib.suppress(OSError, subprocess.CalledProcessError):
        _mount(Path(place))
        subprocess.run(["umount", place], check=True)
        return True
    return False


EVERY_FAULT = (*FAULTS, *(name for name in BETWEEN if name != "disk full" or may_mount()))


def check(run: Run, case: Case, straight: Run) -> None:
    """The proof. `straight` is the uninterrupted run on two ranks."""
    rows = run.rows()
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1)), case
    assert [row["samples"] for row in rows] == [BATCH * step for step in range(1, STEPS + 1)], case
    assert run.trained_on() == straight.trained_on(), case
    same = "other ranks" not in case.faults
    wanted = straight.losses() if same else pytest.approx(straight.losses(), rel=1e-4)
    assert run.losses() == wanted, case
    assert RunFolder(run.root).read_state()["status"] == "done"
    assert not list((run.root / "checkpoints").glob(".unfinished-*")), case


def table(cases: list[Case]) -> str:
    """Faults by outcomes: in how many runs, how their attempts ended, and which runs weren't right."""
    ends = ("killed", "error", "refused", "terminated", "done")
    met: dict[str, Counter[str]] = {}
    for case in cases:
        for name in set(case.faults):
            counts = met.setdefault(name, Counter())
            counts.update(how.split(":")[0] for how in case.attempts)
            counts["right" if not case.wrong else "wrong"] += 1
    columns = ("right", "wrong", *ends)
    head = f"{'runs with this fault':<24}" + "".join(f"{name:>11}" for name in columns)
    lines = [f"{name:<24}" + "".join(f"{met[name][c]:>11}" for c in columns) for name in sorted(met)]
    bad = [f"wrong: seed {case.seed}, {', '.join(case.faults)}: {case.wrong}" for case in cases if case.wrong]
    return "\n".join([head, *lines, *bad])
