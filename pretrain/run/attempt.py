"""Attempts at a run: each goes on from a checkpoint, until the run is done, stopped, or given up.

An attempt that got into trouble is followed by another in the same processes, from the last checkpoint before
the trouble and with the data after it, where the config wants that.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from configs.errors import RunError, UserError, fault_of_place
from data_pipeline.load import Loader
from data_pipeline.order import ORDER_VERSION
from data_pipeline.stream import StreamLoader
from data_pipeline.transform import device_half
from pretrain import checkpoint, encoders, tracking
from pretrain.accumulation import accumulate_for
from pretrain.clock import Progress
from pretrain.collectives import Agreement, MeanLater, from_main
from pretrain.config import RunConfig
from pretrain.engines import deepspeed, processes
from pretrain.engines.processes import Processes
from pretrain.health.health import Health, TroubleError, add_range
from pretrain.health.stopping import Stopping, StopRequest, TimeLimit
from pretrain.health.stragglers import Stragglers
from pretrain.health.watchdog import Watchdog, dump
from pretrain.judging.best import KeepBest
from pretrain.judging.schedule import Evaluate, trained_subject
from pretrain.judging.schedule import read as read_evaluations
from pretrain.judging.subject import evaluation_view
from pretrain.objective import Objective, WholeBatchObjective
from pretrain.ports import Engine, Listener, Scores, StopReason
from pretrain.run import starting_weights as beginning
from pretrain.run import trouble
from pretrain.run.folder import Heartbeat, RunFolder, now
from pretrain.run.plan import Plan
from pretrain.trainer import Trainer

log = logging.getLogger(__name__)

JOB_ENDS = "KEEL_JOB_ENDS"
"""Environment variable: when the time of the job is over, in seconds since 1970."""


PROVENANCE = ("commit", "versions", "python", "host", "manifest_hash")
"""What of run.json tells which code made the run from what; trackers show it."""


@dataclass(frozen=True)
class Outside:
    """What a run is told and given from outside of it."""

    stop: StopRequest
    console: TextIO | None = None  # where rank 0 draws progress
    abort: Callable[[], object] = os.abort  # ends this process at once when it hangs
    began: float = field(default_factory=time.time)  # seconds since 1970


@dataclass(frozen=True)
class Start:
    """Where an attempt begins."""

    progress: Progress
    health: dict[str, Any]  # state of `Health`
    save: bool = False  # at once: it isn't where any checkpoint stands


def attempts(folder: RunFolder, config: RunConfig, here: Processes, outside: Outside) -> StopReason:
    """Train until done or stopped; collective. Raises `RunError` where the run is too sick to go on."""
    number = 0
    try:
        plan = Plan.of(config)
        processes.seed(config.run.seed)
        objective = plan.objective(here.world_size)
        config.train.require_possible(
            objective, device=config.run.device
        )  # a job was prepared on another machine than this
        beginning.begin(objective, folder, config.encoder)
        engine = make_engine(objective, plan, here)
        processes.seed(config.run.seed, per_rank=True)
        left, ill = config.train.health.rollbacks, None
        try:
            while True:
                # Claimed first: from here on an older attempt that still lives publishes no checkpoint.
                number = from_main(folder.claim_attempt)
                from_main(partial(checkpoint.sweep, folder.root, number))
                resume = partial(_resume, number=number) if ill is None else partial(_go_back, ill=ill)
                start = resume(folder, engine, plan)
                try:
                    return _attempt(folder, plan, here, outside, engine, objective, number, start)
                except TroubleError as error:
                    ill = error
                    helps = from_main(partial(trouble.record, folder.root, plan, number, error))
                    if config.train.health.then == "stop" or not left or not helps:
                        raise RunError(trouble.message(folder.root, plan, number, error)) from None
                    left -= 1
        finally:
            engine.close()
    except Exception as error:
        if here.main and number in (0, folder.newest_attempt()):  # not when another has taken over
            with trying("run.json couldn't be told of it"):
                folder.update_state(status="failed", heartbeat=now(), error=_first_line(error))
        raise


def _first_line(error: Exception) -> str:
    known = fault_of_place(error) if isinstance(error, OSError) else None
    lines = str(known or error).splitlines() if isinstance(known or error, UserError) else [repr(error)]
    return lines[0] if lines else ""


@contextmanager
def trying(what: str) -> Iterator[None]:
    """What is done on the way out of an error mustn't hide that error by another one: it is logged."""
    try:
        yield
    except Exception as error:
        log.warning("%s: %r", what, error)


def _attempt(
    folder: RunFolder,
    plan: Plan,
    here: Processes,
    outside: Outside,
    engine: Engine,
    objective: Objective,
    number: int,
    start: Start,
) -> StopReason:
    config, batch_size, progress = plan.config, plan.config.train.batch_size, start.progress
    told = {"attempt": number, "from_step": progress.step, "from_samples": progress.samples}
    told |= {"world_size": here.world_size, "zero_stage": config.train.zero_stage}
    told |= {"micro_batch_size": config.micro_batch(here.world_size)[0]}
    losses = MeanLater() if config.train.health.spike else None
    health = Health(config.train.health, batch_size, losses, start.health)
    loader = plan.loader(here.rank, here.world_size, progress.samples, folder.root / "quarantine.jsonl")
    listeners: list[Listener] = []
    watch = Watchdog(
        config.train.health, partial(_hung, folder, here, outside), first_steps=processes.TIMEOUT
    )
    try:
        listeners += _listeners(folder, plan, engine, here, told, start, loader, outside.console, health)
        saver = next(each for each in listeners if isinstance(each, checkpoint.Checkpointer))
        if start.save:
            saver.saved = None
            saver.save(progress)
        trainer = Trainer(
            engine=engine,
            objective=objective,
            batches=loader,
            batch_size=batch_size,
            accumulate=accumulate_for(objective, told["micro_batch_size"], device_half(plan.views)),
            schedule=config.optimizer.schedule_for(batch_size, progress.dataset_size, progress.total_steps),
            stopping=_stopping(plan, outside, progress, saver),
            health=health,
            listeners=listeners,
            enter=watch.enter,
        )
        with watch:
            return trainer.fit(progress)[1]
    except BaseException as error:
        _abandon(listeners, error)
        raise
    finally:
        loader.close()


def _abandon(listeners: Sequence[Listener], error: BaseException) -> None:
    ill = isinstance(error, TroubleError)  # the same on every rank, and the run may go on
    for each in listeners:
        with nullcontext() if ill else trying(f"{type(each).__name__} couldn't be ended"):
            if isinstance(each, tracking.Track):
                each.fail("given up" if ill else "failed")
            elif ill and isinstance(each, checkpoint.Checkpointer):
                each.settle()
            elif isinstance(each, Heartbeat):
                each.end_attempt(error.kind if isinstance(error, TroubleError) else "failed")


def _hung(folder: RunFolder, here: Processes, outside: Outside, message: str) -> None:
    dump(f"rank {here.rank}: {message}", folder.logs / f"nccl-rank-{here.rank:05d}.json")
    outside.abort()


def _stopping(plan: Plan, outside: Outside, start: Progress, saver: checkpoint.Checkpointer) -> Stopping:
    """With the earlier of `train.time_limit` and the end of the job."""
    train, ends = plan.config.train, []
    if train.time_limit is not None:
        ends.append(outside.began + 60 * train.time_limit.amount)
    if JOB_ENDS in os.environ:
        ends.append(float(os.environ[JOB_ENDS]))
    limit = TimeLimit(min(ends), lambda: saver.longest) if ends else None
    return Stopping(outside.stop, Agreement(), train.stop_after, start, train.batch_size, limit)


def _resume(folder: RunFolder, engine: Engine, plan: Plan, number: int) -> Start:
    """Load the newest valid checkpoint, if any; gives where to go on from."""
    newest = from_main(lambda: checkpoint.latest(folder.root))
    if newest is None:
        if number > 1 and from_main(lambda: "parent" in folder.read_state()):
            raise RunError(f"{folder.root}: the checkpoint that it was forked with is gone; fork it again")
        if number > 1:
            log.warning("no attempt before this one came as far as a checkpoint: starting from the beginning")
        return Start(plan.start(), {})
    extra = load(newest, engine)
    log.info("resuming from %s", newest)
    return Start(Progress(extra["step"], extra["samples"], plan.total_steps, plan.samples), extra["health"])


def load(path: Path, engine: Engine) -> dict[str, Any]:
    """Load a checkpoint into the engine; gives what lay beside. Raises `RunError` for another data order."""
    extra = engine.load(path)
    if extra["order_version"] != ORDER_VERSION:
        raise RunError(
            f"{path}: was made with order version {extra['order_version']}, this keel has {ORDER_VERSION}; "
            "finish the run with the keel that began it"
        )
    return extra


def _go_back(folder: RunFolder, engine: Engine, plan: Plan, ill: TroubleError) -> Start:
    """Load the last checkpoint from before the trouble; the data go on after it."""
    path = from_main(partial(trouble.checkpoint_before, folder.root, ill))
    assert path is not None
    extra = load(path, engine)
    from_main(partial(trouble.undo_evaluations, folder.root, extra["step"]))
    last = ill.samples[1]
    ranges = extra["health"]["ranges"]
    add_range(ranges, extra["samples"], last)
    log.warning("rolled back to %s; samples %d to %d are left out", path.name, extra["samples"], last)
    return Start(Progress(extra["step"], last, plan.total_steps, plan.samples), {"ranges": ranges}, save=True)


def make_engine(objective: Objective, plan: Plan, here: Processes) -> deepspeed.DeepSpeedEngine:
    """The objective behind the engine that its config asks for; collective."""
    config = plan.config
    micro_batch, accumulation = config.micro_batch(here.world_size)
    log.info(
        "%s: %d parameters; %s; batch %d = %d ranks x %d x %d; %d steps",
        config.objective.name,
        encoders.parameter_count(objective),
        config.optimizer.stated(config.train.batch_size),
        config.train.batch_size,
        here.world_size,
        accumulation,
        micro_batch,
        plan.total_steps,
    )
    return deepspeed.initialize(
        objective,
        config.optimizer.make,
        here,
        micro_batch=micro_batch,
        # A whole-batch loss cuts its micro-batches itself, inside of one forward.
        accumulation=1 if isinstance(objective, WholeBatchObjective) else accumulation,
        zero_stage=config.train.zero_stage,
        gradient_clip=config.train.gradient_clip,
        precision=config.train.precision,
        tf32=config.train.tf32,
        activation_checkpointing=config.train.activation_checkpointing,
        compile_backend="inductor" if config.train.compile else None,
        offload_optimizer=config.train.offload is not None,
        expects_saves=True,
        regroup=config.optimizer.regroup,
    )


def _listeners(
    folder: RunFolder,
    plan: Plan,
    engine: Engine,
    here: Processes,
    attempt: dict[str, Any],
    start: Start,
    loader: Loader | StreamLoader,
    console: TextIO | None,
    health: Health,
) -> list[Listener]:
    """In the order they act after a step; at the end they finish in reverse.

    A step's row is written before its checkpoint, so that no resume can lose one.
    """
    config, sizes = plan.config, (plan.config.train.batch_size, plan.samples)
    track = _track(folder, plan, here, attempt["attempt"], start.progress, console)
    track.beside = lambda: {
        **{f"data/{name}": value for name, value in loader.metrics().items()},
        "skipped_batches": health.skipped_batches,
    }
    listeners: list[Listener] = [Heartbeat(folder, attempt)] if here.main else []
    listeners += [Stragglers(config.track.every.steps(*sizes), folder.root, track.tell), track]
    hearers: list[Callable[[Progress, Scores], None]] = [track.evaluated]
    if config.evaluate:
        view = evaluation_view(plan.views[0], config.encoder.crop)
        look = partial(
            trained_subject, engine, view=view, tokenizer=plan.data.tokenizer, workers=config.data.workers
        )
        record = folder.root / "evaluations.jsonl"
        listeners.append(
            Evaluate(
                config.evaluate, look, record,
                batch_size=sizes[0], dataset_size=sizes[1],
                tell=lambda *told: [hear(*told) for hear in hearers].clear(),
            )
        )  # fmt: skip
    saver = checkpoint.Checkpointer(
        config.checkpoint,
        folder.root,
        engine,
        attempt=attempt["attempt"],
        start=start.progress,
        batch_size=sizes[0],
        extra=partial(_state_beside, plan, health),
        tell=track.tell,
    )
    if config.checkpoint.best is not None:
        best = KeepBest(config.checkpoint, config.evaluate, folder.root, saver, sizes)
        hearers.append(best.hear)
        listeners.append(best)
    return [*listeners, saver]


def _track(
    folder: RunFolder, plan: Plan, here: Processes, attempt: int, start: Progress, console: TextIO | None
) -> tracking.Track:
    config = plan.config
    trackers = []
    if here.main:
        state = folder.read_state()
        trackers = tracking.build(
            config.track,
            folder.root,
            run_id=state["id"],
            start=start,
            settings=config.model_dump(mode="json"),
            console=console,
            provenance={name: state.get(name) for name in PROVENANCE},
            evaluations=partial(read_evaluations, folder.root / "evaluations.jsonl"),
        )
    every = config.track.every.steps(config.train.batch_size, plan.samples)
    return tracking.Track(trackers, every_steps=every, attempt=attempt, start=start)


def _state_beside(plan: Plan, health: Health, progress: Progress) -> dict[str, Any]:
    """What a checkpoint holds besides the engine's state: JSON values."""
    return {
        "step": progress.step,
        "samples": progress.samples,
        "order_version": ORDER_VERSION,
        "health": health.state(),
        **plan.data.identity,
        "config": plan.config.model_dump(mode="json"),
    }
