"""A sweep: its members checked and prepared; those missing or failed submitted as one array, or run here."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from configs.errors import ConfigError, RunError, UserError
from configs.loading import leaves, load
from configs.sweep import Member, SweepConfig, members
from data_pipeline.files import write_atomically
from launch.ranks.job import DONE, STOPPED
from launch.runs.early_stop import SWEEP
from launch.runs.figures import of_training
from launch.runs.places import writing
from launch.runs.registry import Run, look
from launch.slurm.cluster import ClusterConfig
from launch.slurm.submit import dry_run, submit
from launch.sweeps.same_sweep import recorded, require_distinct, require_same
from pretrain.config import RunConfig
from pretrain.run.main import prepare

Say = Callable[[str], None]


@dataclass(frozen=True)
class Planned:
    """A member, and how its run stands."""

    member: Member
    folder: Path
    config: RunConfig
    run: Run | None  # None where it has no folder yet
    later: bool = False  # left for another submission, since only so many were asked for

    @property
    def state(self) -> str:
        return "missing" if self.run is None else self.run.state

    @property
    def due(self) -> bool:
        """Whether it is to be submitted: never begun, or ended against its user's will."""
        wanted = self.run is None or self.run.state == "new" or self.run.resumable
        return wanted and not self.later


def load_sweep(path: str, overrides: Sequence[str] = ()) -> SweepConfig:
    """Raises `ConfigError` naming every bad setting."""
    sweep = load(path, SweepConfig, overrides)
    return sweep.model_copy(update={"dir": sweep.dir.expanduser().absolute()})


def plan(sweep: SweepConfig, at_most: int | None = None) -> list[Planned]:
    """Every member with its config and state; `at_most` so many of them due.

    Raises `ConfigError` naming what is wrong in all of them, and `RunError` where DIR holds members that
    this sweep wouldn't make: of another sweep, or of this file as it was before.
    """
    configs: dict[str, RunConfig] = {}
    wrong: dict[str, str] = {}  # what is wrong to the first member that has it
    found = members(sweep)
    for member in found:
        try:
            configs[member.name] = load(member.config, RunConfig, member.dotlist(sweep))
        except UserError as error:
            for line in str(error).splitlines():
                wrong.setdefault(line, member.name)
    if wrong:
        raise ConfigError("\n".join(f"{line} (in {name})" for line, name in wrong.items()))
    require_distinct(configs)
    _refuse_impossible_rule(sweep, list(configs.values()))
    require_same(sweep, configs)
    there = [
        sweep.dir / member.name for member in found if (sweep.dir / member.name / "config.yaml").is_file()
    ]
    runs = {run.path: run for run in look(there)}
    if torn := [f"{run.path}: {run.note}" for run in runs.values() if run.state == "unreadable"]:
        raise RunError(
            "\n".join(torn)
            + "\nrestore them from a copy, or remove these runs, before they are submitted anew"
        )
    planned = [
        Planned(member, folder := sweep.dir / member.name, configs[member.name], runs.get(str(folder)))
        for member in found
    ]
    late = [] if at_most is None else [one for one in planned if one.due][at_most:]
    return [replace(one, later=True) if one in late else one for one in planned]


def remarks(sweep: SweepConfig, planned: Sequence[Planned]) -> list[str]:
    """What isn't wrong and may still mislead."""
    rule = sweep.early_stop
    if rule is None or not of_training(rule.metric):
        return []
    seen: dict[str, set[str]] = {}
    for one in planned:
        for path, value in leaves(one.config.objective.model_dump(mode="json"), "objective"):
            seen.setdefault(path, set()).add(repr(value))
    differing = [path for path, values in seen.items() if len(values) > 1]
    if not differing:
        return []
    return [
        f"early_stop.metric: {', '.join(differing)} differs among the members, and {rule.metric} may depend "
        "on it; an evaluation such as knn/top1 compares them"
    ]


def _refuse_impossible_rule(sweep: SweepConfig, configs: Sequence[RunConfig]) -> None:
    rule = sweep.early_stop
    if rule is None:
        return
    name, _, _ = rule.metric.rpartition("/")
    if of_training(rule.metric):
        kinds = sorted({config.objective.name for config in configs})
        if len(kinds) > 1:
            raise ConfigError(
                f"early_stop.metric: {rule.metric} of {' and '.join(kinds)} can't be compared; "
                "use an evaluation, such as knn/top1"
            )
        return
    for config in configs:
        if not any(one.title == name and one.every is not None for one in config.evaluate):
            raise ConfigError(
                f"early_stop.metric: found {rule.metric}, but {config.run.dir.name} has no evaluation {name} "
                "with an `every`, so that there is nothing to compare at the rungs"
            )


def require_fitting(planned: Sequence[Planned], ranks: int, gpu: bool | None = None) -> None:
    """Refuse members that can't run on `ranks`, with GPUs or without, before any is made.

    `gpu`: see `pretrain.run.main.prepare`. Raises `UserError`.
    """
    for one in planned:
        if one.due:
            one.config.micro_batch(ranks)
            one.config.train.require_device(gpu)


def make_ready(
    planned: Sequence[Planned],
    ranks: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
    gpu: bool | None = None,
) -> None:
    """Make the folders of the members that are due; all are checked before the first. Raises `UserError`."""
    require_fitting(planned, ranks, gpu)
    due = [one for one in planned if one.due]
    for number, one in enumerate(due):
        prepare(one.config, world_size=ranks, gpu=gpu)
        progress(number + 1, len(due))


def start(
    sweep: SweepConfig,
    planned: Sequence[Planned],
    *,
    cluster: ClusterConfig | None,
    nproc: int = 1,
    say: Say = print,
) -> int:
    """Submit what is due as one array, or run it here without a `cluster`; gives the exit code.

    They have been made ready. Raises `UserError`.
    """
    folders = [one.folder for one in planned if one.due]
    if not folders:
        return DONE
    write_record(sweep, planned)
    if cluster is None:
        return run_here(folders, nproc, sweep.parallel, say)
    for folder, job in zip(folders, submit(folders, cluster, parallel=sweep.parallel), strict=True):
        say(f"{folder.name}: job {job}")
    return DONE


def script(sweep: SweepConfig, planned: Sequence[Planned], cluster: ClusterConfig) -> str:
    """The sbatch script of what is due, and what its tasks will run. Needs no SLURM and writes nothing."""
    folders = [one.folder for one in planned if one.due]
    return dry_run(folders, cluster, parallel=sweep.parallel) if folders else ""


def write_record(sweep: SweepConfig, planned: Sequence[Planned]) -> None:
    """DIR/sweep.json: the sweep as submitted, with the overrides of each member, earlier ones included."""
    own = {one.member.name: {"config": one.member.config, **one.member.overrides} for one in planned}
    record = {**sweep.model_dump(mode="json"), "runs": {**recorded(sweep.dir), **own}}
    with writing(sweep.dir):
        write_atomically(sweep.dir / SWEEP, json.dumps(record, indent=1) + "\n")


def run_here(folders: Sequence[Path], nproc: int, parallel: int, say: Say) -> int:
    """Train prepared runs on this machine, `parallel` at a time, each by a `keel train` of its own.

    Gives 0, or what the first that failed gave, or 3 where all were well and some were stopped from outside.
    """
    waiting, running = list(folders), dict[Path, subprocess.Popen[bytes]]()
    codes: dict[Path, int] = {}
    try:
        while waiting or running:
            while waiting and len(running) < parallel:
                folder = waiting.pop(0)
                running[folder] = _train(folder, nproc)
            for folder in [folder for folder, process in running.items() if process.poll() is not None]:
                codes[folder] = running.pop(folder).returncode
                (run,) = look([folder])
                say(f"{folder.name}: {run.state}" + (f" ({run.note})" if run.note else ""))
                if run.reason == "early_stop":
                    codes[folder] = DONE
            time.sleep(0.1)
    finally:
        for process in running.values():  # they save and leave; on Ctrl-C a terminal has told them already
            process.send_signal(signal.SIGTERM)
        for process in running.values():
            process.wait()
    failed = [code for code in codes.values() if code not in (DONE, STOPPED)]
    return next(iter(failed), max(codes.values(), default=DONE))


def _train(folder: Path, nproc: int) -> subprocess.Popen[bytes]:
    # -P: a folder named `configs` where the user stands must not hide ours.
    command = [
        sys.executable,
        "-P",
        "-m",
        "launch",
        "train",
        str(folder / "config.yaml"),
        "--nproc",
        str(nproc),
    ]
    with (folder / "logs" / "launcher.log").open("ab") as log:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)


def listing(planned: Sequence[Planned]) -> list[Mapping[str, object]]:
    """What `--dry-run` and `--json` show."""
    return [
        {"run": str(one.folder), "config": one.member.config, "overrides": dict(one.member.overrides),
         "state": one.state, "submit": one.due}
        for one in planned
    ]  # fmt: skip
