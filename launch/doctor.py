"""`keel doctor`: what would go wrong hours after submission, looked at in seconds before it.

Each check is a line: pass, warn or fail, what was found, and what to do about it. Nothing is left behind: the
only file written is a probe of the disk's speed, which is removed.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from configs.errors import UserError
from configs.loading import difference, load
from data_pipeline.decode import DecodeError, decode
from data_pipeline.manifest import Manifest
from data_pipeline.prepare import lacks_demo, require_own_places
from data_pipeline.read import Reader
from data_pipeline.remote import size_of
from launch.runs import queue
from launch.runs.files import tail
from launch.runs.registry import look
from launch.slurm import executor
from launch.slurm.cluster import ClusterConfig
from launch.slurm.network import interfaces
from pretrain.config import RunConfig, refused_changes
from pretrain.encoders import torchvision_compat
from pretrain.engines.processes import MemoryEstimate, memory_estimate
from pretrain.run import starting_weights, trained
from pretrain.run.plan import Plan
from pretrain.tracking.wandb import has_key

SHARDS, SAMPLES = 64, 16
"""How many shards are looked at, and how many samples decoded, of each data set."""

PROBE = 64 << 20
"""Bytes written to learn how quick the disk is."""

Verdict = Literal["pass", "warn", "fail"]


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    verdict: Verdict
    found: str
    fix: str = ""  # what to do; empty where all is well


@dataclass(frozen=True)
class Patient:
    """What is examined: a config that is well formed, with where it is to run."""

    config: RunConfig
    cluster: ClusterConfig | None
    nproc: int

    @property
    def ranks(self) -> int:
        return self.cluster.ranks if self.cluster else self.nproc

    @property
    def waits_for_demo(self) -> bool:
        """Whether its data are made only when training starts."""
        return self.config.data.manifest is not None and lacks_demo(self.config.data)

    @property
    def disk(self) -> Path:
        """The run folder, or what there is of the way to it."""
        folder = self.config.run.dir
        return next(path for path in (folder, *folder.parents) if path.is_dir())


def examine(
    config: str, overrides: Sequence[str] = (), cluster: ClusterConfig | None = None, nproc: int = 1
) -> list[Check]:
    """Every check of a run of `config`, on `cluster` or with `nproc` ranks here; raises no `UserError`."""
    try:
        patient = Patient(load(config, RunConfig, overrides).placed(), cluster, nproc)
    except UserError as error:
        return [_failed("config", error)]
    found = [Check("config", "pass", f"{config} is well formed")]
    for name, check in _CHECKS.items():
        try:
            found += check(patient)
        except UserError as error:
            failed = _failed(name, error)
            if failed.found not in {other.found for other in found}:  # several need the same manifest
                found.append(failed)
    return found


def _failed(name: str, error: UserError) -> Check:
    """Our errors say themselves what to do, behind the semicolon."""
    found, _, fix = str(error).replace("\n", " | ").partition("; ")
    return Check(name, "fail", found, fix)


def _data(patient: Patient) -> Iterator[Check]:
    """Manifests load, and shards lie there with their sizes."""
    require_own_places(patient.config.data, patient.config.run.dir)
    if patient.waits_for_demo:
        yield Check("data", "pass", f"demo data will be made in {patient.config.data.first_manifest.parent}")
        return
    plan = Plan.of(patient.config)
    facts = f"{plan.samples} samples an epoch, {plan.total_steps} steps"
    plan.data.require(patient.config.objective.needs, world_size=patient.ranks, seed=patient.config.run.seed)
    chance = np.random.default_rng(patient.config.run.seed)
    for manifest in plan.data.manifests:
        numbers = chance.permutation(len(manifest.shards))[:SHARDS]
        wrong = [text for number in numbers if (text := _wrong_shard(manifest, int(number)))]
        if wrong:
            looked = f"{len(wrong)} of {len(numbers)} shards looked at"
            yield Check("data", "fail", f"{looked}: {wrong[0]}", f"keel data verify {manifest.path}")
    yield Check("data", "pass", facts)


def _wrong_shard(manifest: Manifest, number: int) -> str | None:
    shard = manifest.shards[number]
    if shard.remote:
        size = size_of(shard.name)
    else:
        path = manifest.shard_path(number)
        size = path.stat().st_size if path.is_file() and os.access(path, os.R_OK) else None
    if size is None:
        return f"{shard.name} can't be read from here"
    return f"{shard.name} has {size} bytes, not {shard.bytes}" if size != shard.bytes else None


def _samples(patient: Patient) -> Iterator[Check]:
    """Random pictures are read and decoded."""
    if patient.waits_for_demo:
        return
    chance = np.random.default_rng(patient.config.run.seed)
    for source in patient.config.data.sources:
        manifest = Manifest.load(source.manifest)
        local = [number for number, shard in enumerate(manifest.shards) if not shard.remote]
        if not local:
            yield Check("samples", "warn", f"{manifest.path}: shards are remote, none was fetched",
                        f"keel data verify {manifest.path}")  # fmt: skip
            continue
        reader, broken = Reader(manifest), []
        for number in chance.choice(local, SAMPLES):
            shard = manifest.shards[number]
            try:
                ((_, data),) = reader.read(
                    int(number), int(chance.integers(shard.samples)), [manifest.pictures]
                )
                decode(data, patient.config.data.max_pixels)
            except (UserError, DecodeError) as error:
                broken.append(str(error))
        reader.close()
        if broken:
            share = f"{len(broken)} of {SAMPLES} random samples can't be used: {broken[0]}"
            yield Check("samples", "fail", share, f"keel data verify {manifest.path}")
        else:
            yield Check("samples", "pass", f"{SAMPLES} random ones of {manifest.path} decode")


def _batch(patient: Patient) -> Iterator[Check]:
    """The batch is cut equally; streams and processors suffice."""
    config, ranks = patient.config, patient.ranks
    micro, accumulation = config.micro_batch(ranks)
    yield Check("batch", "pass", f"{config.train.batch_size} = {ranks} ranks x {accumulation} x {micro}")
    nodes = patient.cluster.nodes if patient.cluster else 1
    parts, who = (nodes, "node") if nodes > 1 else (ranks, "rank")
    for source in () if patient.waits_for_demo else config.data.sources:
        streams = min(config.data.streams, len(Manifest.load(source.manifest).shards))
        if streams % parts:
            yield Check(
                "shards", "warn", f"{streams} streams of {source.manifest} for {parts} {who}s: some shards "
                f"are read by more than one {who}",
                f"set data.streams to a multiple of {parts}, or pack into more shards",
            )  # fmt: skip
    needed = 1 + config.data.workers
    there = patient.cluster.cpus_per_task if patient.cluster else (os.cpu_count() or 1) / patient.nproc
    if slow := config.slow_optimizer:
        yield Check("offload", "warn", *slow)
    if needed > there:
        yield Check(
            "processors", "warn", f"{there:g} for a rank and its {config.data.workers} data workers",
            "lower data.workers, or " + ("raise cpus_per_task" if patient.cluster else "lower --nproc"),
        )  # fmt: skip


def _model(patient: Patient) -> Iterator[Check]:
    """Parameters, what can't be done where it runs, and memory for each ZeRO stage."""
    if patient.waits_for_demo:
        yield Check("model", "pass", "isn't counted before its data are made")
        return
    plan, train = Plan.of(patient.config), patient.config.train
    with torch.device("meta"):
        objective = plan.objective(patient.ranks)
        whole = sum(p.numel() for p in objective.parameters())
        encoder = sum(p.numel() for p in objective.encoder.parameters())
    yield Check(
        "model", "pass", f"{whole / 1e6:.2f} M parameters, {encoder / 1e6:.2f} M of them the encoder's"
    )
    gpu = None if patient.cluster is None else patient.cluster.gpu
    patient.config.require_devices(patient.ranks, gpu)
    train.require_possible(objective, gpu, patient.config.run.device)
    stages = [
        memory_estimate(lambda: plan.objective(patient.ranks), stage, patient.ranks) for stage in range(4)
    ]
    told = ", ".join(f"stage {stage} {_size(one.total)}" for stage, one in enumerate(stages))
    own = _on_device(stages[train.zero_stage], train.offload is not None)
    total = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
    text = f"state of a rank, without activations: {told}; stage {train.zero_stage} is chosen"
    if total is not None and own > total:
        fitting = [stage for stage, one in enumerate(stages) if one.total < total]
        fix = f"set train.zero_stage={fitting[0]}" if fitting else "use more ranks or train.offload=optimizer"
        yield Check("memory", "fail", f"{text}; a GPU here has {_size(total)}", fix)
    elif total is not None and own > 0.7 * total:
        yield Check("memory", "warn", f"{text}; a GPU here has {_size(total)}",
                    "lower train.micro_batch_size, or take a higher stage")  # fmt: skip
    else:
        yield Check("memory", "pass", text)


def _weights(patient: Patient) -> Iterator[Check]:
    """The weights that a new run is to start from open and fit."""
    encoder, root = patient.config.encoder, patient.config.run.dir
    if encoder.weights is None:
        return
    if (root / "config.yaml").is_file():
        yield Check("weights", "pass", f"{encoder.weights}: the run has begun, and they aren't read again")
        return
    opened = starting_weights.opened(encoder, trained.image_size(patient.config))
    assert opened is not None
    yield Check("weights", "pass", f"{encoder.weights}: {opened[1]}")


def _on_device(estimate: MemoryEstimate, offloaded: bool) -> int:
    return estimate.total - (estimate.optimizer if offloaded else 0)


def _folder(patient: Patient) -> Iterator[Check]:
    """The run folder can be made, and what is there goes on with this config."""
    root = patient.config.run.dir
    if not _writable(patient.disk) or (root.exists() and not root.is_dir()):
        yield Check("run folder", "fail", f"{patient.disk} can't be written to", "choose another run.dir")
        return
    if not (root / "config.yaml").is_file():
        yield Check("run folder", "pass", f"{root} will be made")
        return
    refused = refused_changes(difference(load(root / "config.yaml", RunConfig), patient.config))
    (run,) = look([root])
    if refused:
        listed = ", ".join(f"{path} {new!r} (was {old!r})" for path, (old, new) in refused.items())
        yield Check("run folder", "fail", f"{root} was begun otherwise: {listed}", "choose another run.dir")
    elif run.active:
        yield Check("run folder", "warn", f"{root}: is {run.state}", "let it run, or keel cancel it")
    else:
        yield Check("run folder", "pass", f"{root}: is {run.state} at step {run.step}, and goes on")


def _writable(folder: Path) -> bool:
    """By trying: permissions don't tell of read-only mounts and quotas."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _checkpoints(patient: Patient) -> Iterator[Check]:
    """They fit on the disk, and one can be written between the signal and the end of the job."""
    if patient.waits_for_demo or not _writable(patient.disk):
        return
    plan, config = Plan.of(patient.config), patient.config.checkpoint
    whole = memory_estimate(lambda: plan.objective(patient.ranks), 0, 1)
    size = whole.parameters + whole.optimizer
    free, needed = shutil.disk_usage(patient.disk).free, (config.keep + 1) * size
    text = f"{_size(size)} each, {config.keep} kept and one being written; {_size(free)} are free"
    verdict: Verdict = "fail" if free < 2 * size else "warn" if free < needed else "pass"
    yield Check(
        "checkpoints", verdict, text, "" if verdict == "pass" else "lower checkpoint.keep, or free some"
    )
    if patient.cluster is None or patient.cluster.executor != "slurm":
        return
    seconds, how = _save_seconds(patient, size)
    delay = patient.cluster.signal_delay
    text = f"a save takes about {seconds:.0f} s ({how}); the signal comes {delay} s before the end"
    fix = f"set signal_delay to {max(60, round(4 * seconds))} or more"
    late: Verdict = "fail" if seconds > delay - 15 else "warn" if seconds > delay / 2 else "pass"
    yield Check("time to save", late, text, "" if late == "pass" else fix)


def _save_seconds(patient: Patient, size: int) -> tuple[float, str]:
    """(seconds, how that is known): the run's own figure, or the size over the disk's speed measured now."""
    rows = tail(patient.config.run.dir / "metrics.jsonl", size=1 << 20)
    wrote = [float(row["checkpoint_write"]) for row in rows if row.get("checkpoint_write")]
    if wrote:
        return max(wrote), "as this run has measured"
    try:
        with tempfile.NamedTemporaryFile(dir=patient.disk, prefix=".keel-doctor-") as probe:
            block, began = os.urandom(1 << 20), time.perf_counter()
            for _ in range(PROBE >> 20):
                probe.write(block)
            probe.flush()
            os.fsync(probe.fileno())
            speed = PROBE / (time.perf_counter() - began)
    except OSError as error:
        raise UserError(f"{patient.disk}: can't be written to: {error.strerror}; free some space") from None
    return size / speed, f"at {_size(speed)}/s as written from here"


def _wandb(patient: Patient) -> Iterator[Check]:
    wanted = patient.config.track.wandb
    if wanted in ("off", "offline"):
        yield Check("W&B", "pass", f"track.wandb is {wanted}")
    elif has_key():
        yield Check("W&B", "pass", "a key is there")
    else:
        text = f"no key, and track.wandb is {wanted}" + (
            ": the run will be offline" if wanted == "auto" else ""
        )
        yield Check("W&B", "fail" if wanted == "online" else "warn", text, "wandb login, or track.wandb=off")


def _torchvision(patient: Patient) -> Iterator[Check]:
    """What an export is opened by: timm, and so torchvision, in a process that imports nothing of keel."""
    if (problem := torchvision_compat.problem()) is not None:
        found, _, fix = problem.partition("; ")
        yield Check("torchvision", "warn", f"{found}; training works, keel export won't", fix)
    elif torchvision_compat.installed():
        hook = Path(str(sys.modules[torchvision_compat.HOOK].__file__)).with_suffix(".pth")
        text = (
            f"a CUDA build beside a CPU torch, which every process of this environment can import by {hook}"
        )
        yield Check("torchvision", "pass", text)
    else:
        yield Check("torchvision", "pass", "fits this torch")


def _network(patient: Patient) -> Iterator[Check]:
    """The interfaces that nodes are to talk over exist."""
    if patient.cluster is not None and patient.cluster.nodes > 1:
        for fine, found, fix in interfaces(patient.cluster):
            yield Check("network", "pass" if fine else "warn", found, fix)


def _queue(patient: Patient) -> Iterator[Check]:
    """SLURM would take the job."""
    cluster = patient.cluster
    if cluster is None or cluster.executor != "slurm":
        return
    folder = patient.config.run.dir
    script = executor.script(cluster, folder=folder / "submitit", code=folder / "code", name="keel-doctor")
    taken, said = queue.would_accept(script)
    if taken is None:
        yield Check("queue", "warn", said, "run keel doctor where jobs are submitted from")
    else:
        yield Check("queue", "pass" if taken else "fail", said, "" if taken else "change the cluster's file")


_CHECKS: dict[str, Callable[[Patient], Iterator[Check]]] = {
    "data": _data, "samples": _samples, "batch": _batch, "model": _model, "weights": _weights,
    "run folder": _folder, "checkpoints": _checkpoints, "W&B": _wandb, "torchvision": _torchvision,
    "network": _network, "queue": _queue,
}  # fmt: skip


def _size(count: float) -> str:
    """Bytes as a person reads them."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
