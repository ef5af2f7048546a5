"""What a cluster's YAML says: where jobs run and what they ask for. All that belongs to a site is here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, Self

import pydantic
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from configs.loading import Config, load


class ClusterConfig(Config):
    """One task is one rank: on GPU nodes, one task per GPU."""

    executor: Literal["slurm", "local", "debug"] = (
        "slurm"  # local: background processes here; debug: in this one
    )
    nodes: PositiveInt = 1
    tasks_per_node: PositiveInt = 1
    gpus_per_node: NonNegativeInt = 0
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
    extra: Mapping[str, str | int | bool] = {}  # any further option of sbatch: {mail-type: END}
    setup: tuple[str, ...] = ()  # shell lines before the ranks start: module load cuda
    environment: Mapping[str, str] = {}  # variables, such as NCCL_SOCKET_IFNAME
    container: str | None = None  # a command in front of Python: apptainer exec --nv keel.sif
    python: str | None = None  # on the nodes; by default the one that submits

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
