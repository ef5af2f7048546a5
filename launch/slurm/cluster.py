"""What a cluster's YAML says: where jobs run and what they ask for. All that belongs to a site is here."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import pydantic
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from configs.loading import Config, load

_SETTINGS = {
    "nodes": "nodes", "ntasks": "tasks_per_node", "ntasks-per-node": "tasks_per_node",
    "cpus-per-task": "cpus_per_task", "mem": "memory_gb", "time": "minutes", "partition": "partition",
    "account": "account", "qos": "qos", "constraint": "constraint", "exclude": "exclude",
    "exclusive": "exclusive", "gpus-per-node": "gpus_per_node", "requeue": "requeue",
    "no-requeue": "requeue: false", "N": "nodes", "n": "tasks_per_node", "c": "cpus_per_task", "t": "minutes",
    "p": "partition", "A": "account", "q": "qos", "C": "constraint", "x": "exclude",
}  # fmt: skip
"""Options of sbatch that have a setting of their own, which `extra` would silently overrule."""

_LIVED_BY = {
    "signal": "the run is told by it to save, signal_delay before the end",
    "array": "one task is one run; a sweep makes the array itself",
    "a": "one task is one run; a sweep makes the array itself",
    "output": "keel logs and keel runs look where keel has put it",
    "o": "keel logs and keel runs look where keel has put it",
    "error": "keel logs and keel runs look where keel has put it",
    "e": "keel logs and keel runs look where keel has put it",
    "open-mode": "a job that comes back must not overwrite what it has said before",
    "job-name": "keel knows its jobs again by it",
    "J": "keel knows its jobs again by it",
    "export": "ranks need the environment; see `environment`",
    "wrap": "the script is keel's",
    "test-only": "keel doctor asks that",
    "wait": "keel sweep and keel submit don't wait",
    "W": "keel sweep and keel submit don't wait",
    "parsable": "keel reads what sbatch says itself",
}
"""Options of sbatch that the run lives by."""

_GPUS = ("gres", "gpus", "gpus-per-task", "gpus-per-socket", "G")


class ClusterConfig(Config):
    """One task is one rank: on GPU nodes, one task per GPU."""

    executor: Literal["slurm", "local", "debug"] = (
        "slurm"  # local: background processes here; debug: in this one
    )
    nodes: PositiveInt = 1
    tasks_per_node: PositiveInt = 1
    gpus_per_node: NonNegativeInt = 0
    gpus_by: Literal["gpus-per-node", "gres"] = (
        "gpus-per-node"  # how sbatch is asked for them, as sites have it
    )
    gpu_type: str | None = None  # "a100", where a site has several
    cpus_per_task: PositiveInt = 1
    memory_gb: PositiveFloat | None = None  # of each node
    minutes: PositiveInt = 60  # the job's time limit; it requeues itself before
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None  # nodes, as in "node[3-5],node9"
    exclusive: bool = False
    parallel: PositiveInt = 16  # members of a job array that run at a time
    signal_delay: PositiveInt = Field(120, description="seconds before the time limit that SIGUSR2 comes")
    max_restarts: NonNegativeInt = 100  # times a job may requeue itself
    requeue: bool = True  # False: neither SLURM nor the job itself runs it again
    extra: Mapping[str, str | int | bool] = {}  # any further option of sbatch: {mail-type: END}
    setup: tuple[str, ...] = ()  # shell lines before the ranks start: module load cuda
    environment: Mapping[str, str] = {}  # variables, such as NCCL_SOCKET_IFNAME
    container: str | None = None  # a command in front of Python: apptainer exec --nv keel.sif
    python: str | None = None  # on the nodes; by default the one that submits

    @pydantic.field_validator("extra")
    @classmethod
    def _only_further_ones(cls, extra: Mapping[str, Any]) -> Mapping[str, Any]:
        for given, value in extra.items():
            key = given.lstrip("-").replace("_", "-")
            if key in _GPUS and (key != "gres" or "gpu" in str(value)):
                raise ValueError(
                    f"{given}: found {value!r}; GPUs are asked for by gpus_per_node, gpus_by: gres and "
                    "gpu_type, so that keel knows of them"
                )
            if key in _SETTINGS:
                raise ValueError(f"{given}: found {value!r}; has a setting of its own here: {_SETTINGS[key]}")
            if key in _LIVED_BY:
                raise ValueError(f"{given}: found {value!r}; can't be set: {_LIVED_BY[key]}")
            if not re.fullmatch(r"[A-Za-z][A-Za-z0-9-]*", key) or "\n" in str(value):
                raise ValueError(f"{given}: found {value!r}; an option of sbatch, its value in one line")
        return extra

    @property
    def gpus(self) -> str:
        """What sbatch is asked for on each node, "a100:4"; empty without GPUs."""
        kind = f"{self.gpu_type}:" if self.gpu_type else ""
        return f"{kind}{self.gpus_per_node}" if self.gpus_per_node else ""

    @property
    def ranks(self) -> int:
        return self.nodes * self.tasks_per_node

    @property
    def gpu(self) -> bool | None:
        """Whether ranks have one, on other machines than this; None where they run on this one."""
        return self.gpus_per_node > 0 if self.executor == "slurm" else None

    @pydantic.model_validator(mode="after")
    def _possible(self) -> Self:
        if self.gpus_per_node not in (0, self.tasks_per_node):
            raise ValueError(
                f"gpus_per_node: found {self.gpus_per_node} beside tasks_per_node={self.tasks_per_node}; "
                "each rank has one GPU: set both alike, or no GPUs"
            )
        if self.signal_delay >= 60 * self.minutes:
            raise ValueError(
                f"signal_delay: found {self.signal_delay} s, and the job lasts {self.minutes} min; "
                "the signal has to come before the end"
            )
        if self.executor != "slurm" and self.nodes > 1:
            raise ValueError(f"nodes: found {self.nodes}, but executor {self.executor} has this machine only")
        if self.executor == "debug" and self.tasks_per_node > 1:
            raise ValueError("tasks_per_node: executor debug runs one task, in this process")
        return self


def load_cluster(path: str | Path, overrides: Sequence[str] = ()) -> ClusterConfig:
    """Raises `ConfigError` naming every bad setting."""
    return load(path, ClusterConfig, overrides)


def parted(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Overrides of what is to run, and those of the cluster, which are written with a + in front."""
    own = [text for text in overrides if not text.startswith("+")]
    return own, [text.removeprefix("+") for text in overrides if text.startswith("+")]
