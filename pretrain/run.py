"""A run from its config to its end: checks and folder first, then every part built and the loop started."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch

from configs import loading
from configs.errors import ConfigError, RunError, UserError
from data_pipeline.facts import Facts, facts_of
from data_pipeline.load import Loader, build_loader
from data_pipeline.order import ORDER_VERSION
from data_pipeline.prepare import make_missing
from data_pipeline.transform import device_half
from data_pipeline.types import ViewSpec
from pretrain import checkpoint, encoders, tracking
from pretrain.accumulation import accumulate_for
from pretrain.collectives import Agreement, from_main
from pretrain.config import RunConfig, refused_changes
from pretrain.engines import deepspeed, processes
from pretrain.engines.processes import Processes
from pretrain.evaluators.schedule import Evaluate, trained_subject
from pretrain.evaluators.subject import evaluation_view
from pretrain.folder import Heartbeat, RunFolder, now, provenance, write_atomically
from pretrain.health import SkippedUpdates, Stopping, StopRequest
from pretrain.trainer import Trainer
from pretrain.types import (
    BuildContext,
    Engine,
    Listener,
    Objective,
    Progress,
    StopReason,
    WholeBatchObjective,
)

log = logging.getLogger(__name__)
DemoProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Plan:
    """A config with the facts of its data: all that can be known before a process group starts."""

    config: RunConfig
    data: Facts
    image_size: tuple[int, int]
    total_steps: int

    @classmethod
    def of(cls, config: RunConfig) -> Plan:
        """Raises `UserError` where a manifest or a tokenizer can't be used."""
        data = facts_of(config.data)
        size = config.data.image_size
        return cls(
            config=config,
            data=data,
            image_size=size if isinstance(size, tuple) else (size, size),
            total_steps=config.train.duration.steps(config.train.batch_size, data.samples),
        )

    @property
    def samples(self) -> int:
        """Size of one epoch: of all sources together."""
        return self.data.samples

    @property
    def views(self) -> Sequence[ViewSpec]:
        return self.config.objective.views(self.image_size)

    def start(self) -> Progress:
        return Progress(0, 0, self.total_steps, self.samples)

    def objective(self, world_size: int = 1) -> Objective:
        """The objective with random weights, from torch's current generator and on its current device."""
        config, tokenizer = self.config, self.data.tokenizer
        context = BuildContext(
            encoder=encoders.build(config.encoder, self.image_size),
            image_size=self.image_size,
            dataset_size=self.samples,
            batch_size=config.train.batch_size,
            autocast=config.train.autocast,
            world_size=world_size,
            accumulation=config.micro_batch(world_size)[1],
            vocabulary=tokenizer.vocabulary if tokenizer else None,
            text_length=tokenizer.context if tokenizer else None,
        )
        return config.objective.build(context)


def prepare(config: RunConfig, *, world_size: int, progress: DemoProgress | None = None) -> RunFolder:
    """Check all that can be checked without a process group, then make or open the run folder.

    Nothing is written before everything holds. Raises `UserError`.
    """
    config = config.placed()
    config.micro_batch(world_size)
    if config.train.precision == "fp16" and not torch.cuda.is_available():
        raise ConfigError("train.precision: fp16 needs a GPU, and none is here; use bf16 or fp32")
    folder = RunFolder(config.run.dir)
    if folder.exists():
        _refuse_another_run(folder, config)
    make_missing(config.data, progress)
    plan = Plan.of(config)
    plan.data.require(config.objective.needs)
    state = folder.read_state() if folder.exists() else {}
    _refuse_other_data(folder, state, plan.data)
    config.optimizer.schedule_for(config.train.batch_size, plan.samples, plan.total_steps)
    with torch.device("meta"):
        plan.objective(world_size)
    folder.create()
    with folder.lease():
        write_atomically(folder.config_file, loading.dump(config))
        if not state:
            identity = {"id": secrets.token_hex(4), "created": now(), "status": "new"}
            data = {**plan.data.identity, "total_steps": plan.total_steps}
            folder.update_state(**identity, **data)
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


def train(folder: RunFolder, stop: StopRequest, console: TextIO | None = None) -> StopReason:
    """Train the run of `folder` as the rank that the environment describes; collective.

    The future of the run follows from its newest valid checkpoint and RUN/config.yaml alone. `console` is
    where rank 0 draws progress.
    """
    config = loading.load(folder.config_file, RunConfig)
    torch.set_num_threads(config.run.threads)
    here = processes.start()
    try:
        with folder.lease() if here.main else nullcontext():
            try:
                return _train(folder, Plan.of(config), here, stop, console)
            except Exception as error:
                if here.main:
                    last = str(error).splitlines()[:1] if isinstance(error, UserError) else [repr(error)]
                    folder.update_state(status="failed", heartbeat=now(), error=last[0] if last else "")
                raise
    finally:
        processes.stop()


def _train(
    folder: RunFolder, plan: Plan, here: Processes, stop: StopRequest, console: TextIO | None
) -> StopReason:
    config, batch_size = plan.config, plan.config.train.batch_size
    micro_batch, _ = config.micro_batch(here.world_size)
    processes.seed(config.run.seed)
    objective = plan.objective(here.world_size)
    engine = _engine(objective, plan, here)
    processes.seed(config.run.seed, per_rank=True)
    # Claimed first: from here on an older attempt that still lives can't publish another checkpoint.
    number = from_main(folder.claim_attempt)
    from_main(partial(checkpoint.sweep, folder.root, number))
    start = _resume(folder, engine, plan)
    attempt = {
        "attempt": number,
        "from_step": start.step,
        "world_size": here.world_size,
        "zero_stage": config.train.zero_stage,
    }
    loader = build_loader(
        config.data,
        plan.views,
        needs=config.objective.needs,
        seed=config.run.seed,
        batch_size=batch_size,
        rank=here.rank,
        world_size=here.world_size,
        position=start.samples,
        quarantine=folder.root / "quarantine.jsonl",
    )
    listeners: list[Listener] = []
    try:
        listeners += _listeners(folder, plan, engine, here, attempt, start, loader, console)
        trainer = Trainer(
            engine=engine,
            objective=objective,
            batches=loader,
            batch_size=batch_size,
            accumulate=accumulate_for(objective, micro_batch, device_half(plan.views)),
            schedule=config.optimizer.schedule_for(batch_size, start.dataset_size, start.total_steps),
            stopping=Stopping(stop, Agreement(), config.train.stop_after, start, batch_size),
            skipped=SkippedUpdates(),
            listeners=listeners,
        )
        return trainer.fit(start)[1]
    except Exception:
        for track in (listener for listener in listeners if isinstance(listener, tracking.Track)):
            track.fail()
        raise
    finally:
        loader.close()
        engine.close()


def _engine(objective: Objective, plan: Plan, here: Processes) -> deepspeed.DeepSpeedEngine:
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
    )


def _resume(folder: RunFolder, engine: Engine, plan: Plan) -> Progress:
    """Load the newest valid checkpoint, if any; gives where to go on from."""
    newest = from_main(lambda: checkpoint.latest(folder.root))
    if newest is None:
        return plan.start()
    extra = engine.load(newest)
    if extra["order_version"] != ORDER_VERSION:
        raise RunError(
            f"{newest}: was made with order version {extra['order_version']}, this keel has {ORDER_VERSION}; "
            "finish the run with the keel that began it"
        )
    log.info("resuming from %s", newest)
    return Progress(extra["step"], extra["samples"], plan.total_steps, plan.samples)


def _listeners(
    folder: RunFolder,
    plan: Plan,
    engine: Engine,
    here: Processes,
    attempt: dict[str, Any],
    start: Progress,
    loader: Loader,
    console: TextIO | None,
) -> list[Listener]:
    """In the order they act after a step; at the end they finish in reverse.

    A step's row is written before its checkpoint, so that no resume can lose one.
    """
    config, sizes = plan.config, (plan.config.train.batch_size, plan.samples)
    trackers = []
    if here.main:
        trackers = tracking.build(
            config.track,
            folder.root,
            run_id=folder.read_state()["id"],
            start=start,
            settings=config.model_dump(mode="json"),
            console=console,
        )
    track = tracking.Track(
        trackers,
        every_steps=config.track.every.steps(*sizes),
        attempt=attempt["attempt"],
        start=start,
        beside=lambda: {f"data/{name}": value for name, value in loader.metrics().items()},
    )
    listeners: list[Listener] = [Heartbeat(folder, attempt)] if here.main else []
    listeners.append(track)
    if config.evaluate:
        view = evaluation_view(plan.views[0], config.encoder.crop)
        look = partial(trained_subject, engine, view=view, pooling=config.encoder.pooling)
        record = folder.root / "evaluations.jsonl"
        listeners.append(
            Evaluate(
                config.evaluate, look, record,
                batch_size=sizes[0], dataset_size=sizes[1], tell=track.evaluated,
            )
        )  # fmt: skip
    listeners.append(
        checkpoint.Checkpointer(
            config.checkpoint,
            folder.root,
            engine,
            attempt=attempt["attempt"],
            start=start,
            batch_size=sizes[0],
            extra=partial(_state_beside, plan),
            tell=track.tell,
        )
    )
    return listeners


def _state_beside(plan: Plan, progress: Progress) -> dict[str, Any]:
    """What a checkpoint holds besides the engine's state: JSON values."""
    return {
        "step": progress.step,
        "samples": progress.samples,
        "order_version": ORDER_VERSION,
        **plan.data.identity,
        "config": plan.config.model_dump(mode="json"),
    }


def open_run(path: str | Path) -> RunFolder:
    """An existing run folder; raises `RunError` where there is none."""
    folder = RunFolder(Path(path).expanduser().absolute())
    if not folder.exists():
        raise RunError(f"{path}: not a run folder (no config.yaml in it); train one with keel train")
    return folder
