"""A run from its config to its end: checks and folder first, then every part built and the loop started."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TextIO

import torch

from configs import loading
from configs.errors import RunError
from data_pipeline.facts import Facts
from data_pipeline.files import write_atomically
from data_pipeline.prepare import make_missing
from pretrain.config import RunConfig, refused_changes
from pretrain.engines import processes
from pretrain.health.stopping import StopRequest
from pretrain.judging import best
from pretrain.ports import StopReason
from pretrain.run import fork as forks
from pretrain.run import starting_weights
from pretrain.run.attempt import Outside, attempts
from pretrain.run.folder import RunFolder, now, provenance
from pretrain.run.fork import Fork
from pretrain.run.plan import Plan

log = logging.getLogger(__name__)

DemoProgress = Callable[[int, int], None]


def prepare(
    config: RunConfig,
    *,
    world_size: int,
    gpu: bool | None = None,
    progress: DemoProgress | None = None,
    fork: Fork | None = None,
) -> RunFolder:
    """Check all that can be checked without a process group, then make or open the run folder.

    `gpu`: whether its ranks will have one, where they run on other machines; None where they run on this
    one. `fork`: where a new run gets its state from. Nothing is written before everything holds. Raises
    `UserError`.
    """
    config = config.placed()
    if not loading.is_text(str(config.run.dir)):  # by the folder that this was called from
        raise RunError(f"run.dir: {config.run.dir}: a part of its path isn't UTF-8; choose another place")
    config.micro_batch(world_size)
    config.require_devices(world_size, gpu)  # before demo data are made
    folder = RunFolder(config.run.dir)
    if folder.exists():
        if fork is not None:
            raise RunError(f"run.dir: {folder.root} is a run already, and a fork is a new one; set another")
        _refuse_another_run(folder, config)
    best.require_known(config.checkpoint, config.evaluate)
    make_missing(config.data, config.run.dir, progress)
    plan = Plan.of(config)
    consumed = plan.total_steps * config.train.batch_size
    plan.data.require(config.objective.needs, world_size=world_size, seed=config.run.seed, samples=consumed)
    state = folder.read_state() if folder.exists() else {}
    _refuse_other_data(folder, state, plan.data)
    config.optimizer.schedule_for(config.train.batch_size, plan.samples, plan.total_steps)
    with torch.device("meta"):
        objective = plan.objective(world_size)
    plan.require_different_samples()
    config.train.require_possible(objective, gpu, config.run.device)
    config.optimizer.require_possible(config.train.zero_stage)
    for evaluation in config.evaluate:
        evaluation.require_possible(objective)
        evaluation.require_data()
    starting_weights.require_reopenable(config.encoder, plan.image_size)
    branch = None if fork is None else fork.checkpoint()
    starting = None if state or fork is not None else starting_weights.opened(config.encoder, plan.image_size)
    if fork is not None and branch is not None:
        forks.require_fitting(fork, branch, plan, objective)
    folder.create()
    with folder.lease():
        # The checkpoint first: what has a config is a run, and would start from nothing without it.
        parent = {} if fork is None or branch is None else {"parent": forks.bring(fork, branch, plan, folder)}
        began = {}
        if starting is not None:
            began["starting_weights"] = starting_weights.keep(folder, config.encoder, *starting)
        write_atomically(folder.config_file, loading.dump(config))
        if not state:
            identity = {"id": secrets.token_hex(4), "created": now(), "status": "new"}
            data = {**plan.data.identity, "total_steps": plan.total_steps}
            folder.update_state(**identity, **data, **parent, **began)
        folder.update_state(**provenance())
    return folder


def _refuse_another_run(folder: RunFolder, config: RunConfig) -> None:
    old = loading.load(folder.config_file, RunConfig)
    refused = refused_changes(loading.difference(old, config))
    if refused:
        lines = [
            f"{path}: found {new!r}, but {folder.root} was started with {before!r}; "
            "keep it, or set another run.dir"
            for path, (before, new) in refused.items()
        ]
        raise RunError("\n".join(lines))


def _refuse_other_data(folder: RunFolder, state: dict[str, Any], data: Facts) -> None:
    for name, found in data.identity.items():
        before = state.get(name, found)
        if before != found:
            raise RunError(
                f"{data.place(name)} holds other data than {folder.root} was trained on (hash "
                f"{found[:12]}, was {before[:12]}); set another run.dir"
            )


def train(folder: RunFolder, stop: StopRequest, console: TextIO | None = None, **outside: Any) -> StopReason:
    """Train the run of `folder` as the rank that the environment describes; collective.

    The future of the run follows from its newest valid checkpoint and RUN/config.yaml alone. `console` is
    where rank 0 draws progress, `outside` more of `attempt.Outside`.
    """
    config = loading.load(folder.config_file, RunConfig)
    torch.set_num_threads(config.run.threads)
    here = processes.start(config.run.device)
    if here.main and (slow := config.slow_optimizer):
        log.warning("%s; %s", *slow)
    try:
        with folder.lease() if here.main else nullcontext():
            return attempts(folder, config, here, Outside(stop, console, **outside))
    finally:
        processes.stop()


def open_run(path: str | Path) -> RunFolder:
    """An existing run folder; raises `RunError` where there is none."""
    folder = RunFolder(Path(path).expanduser().absolute())
    if not folder.exists():
        raise RunError(f"{path}: not a run folder (no config.yaml in it); train one with keel train")
    return folder
