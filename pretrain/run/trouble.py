"""What is written down of a run in trouble, and from where it may go on. Everything here is rank 0's."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from data_pipeline.files import write_atomically
from pretrain import checkpoint
from pretrain.engines import storage
from pretrain.health.health import TroubleError
from pretrain.judging import schedule
from pretrain.run.plan import Plan

FILE = "trouble.jsonl"


def record(root: Path, plan: Plan, attempt: int, error: TroubleError) -> bool:
    """Append the trouble with the ids of its samples to RUN/trouble.jsonl; gives whether going back helps."""
    row = {
        "time": time.time(),
        "attempt": attempt,
        "kind": error.kind,
        "step": error.step,
        "samples": list(error.samples),
        "batches": sample_ids(plan, *error.samples),
        "replay": replay_command(root, attempt, error),
    }
    with (root / FILE).open("a") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())
    return checkpoint_before(root, error) is not None


def sample_ids(plan: Plan, first: int, last: int) -> list[dict[str, Any]]:
    """Of each global batch in [first, last): its position and the stable numbers of its samples.

    Sorted as they lie over all ranks; a number counts through the sources in the order of their manifests.
    None in stream mode, whose samples have no numbers.
    """
    config, size = plan.config, plan.config.train.batch_size
    if not plan.data.manifests:
        return []
    if config.data.stream is not None:  # its samples have no number of their own
        return [{"position": position} for position in range(first, last, size)]
    order = plan.data.plan(config.run.seed)
    return [
        {"position": position, "index": order.share(position, size, 1, 0).index.tolist()}
        for position in range(first, last, size)
    ]


def replay_command(root: Path, attempt: int, error: TroubleError) -> str:
    """Computes again the step in which the trouble began."""
    return f"keel replay {root} --step {error.step + 1} --attempt {attempt}"


def message(root: Path, plan: Plan, attempt: int, error: TroubleError) -> str:
    """One line for the person whose run ends here."""
    count = (error.samples[1] - error.samples[0]) // plan.config.train.batch_size
    what = {
        "not_finite": f"loss or gradient was not finite for {count} batches in a row after step "
        f"{error.step}, and nothing was applied: lower the learning rate, lengthen optimizer.warmup or set "
        "train.precision=fp32",
        "spike": f"the loss leapt up after step {error.step} and stayed there for {count} batches: lower the "
        "learning rate or clip gradients (train.gradient_clip)",
    }[error.kind]
    advice = ", or train.health.then=roll_back" if plan.config.train.health.then == "stop" else ""
    look = f"the samples are in {root / FILE}; to see that step again: {replay_command(root, attempt, error)}"
    return f"{what}{advice}; {look}"


def checkpoint_before(root: Path, error: TroubleError) -> Path | None:
    """The newest valid checkpoint that has seen none of the samples in question."""
    for each in checkpoint.published(root):
        whole = each.step <= error.step and storage.damage(each.path) is None
        if whole and checkpoint.read_extra(each.path)["samples"] <= error.samples[0]:
            return each.path
    return None


def undo_evaluations(root: Path, step: int) -> None:
    """Move what was found after `step` to evaluations.undone.jsonl: the model there will be another."""
    record_file = root / "evaluations.jsonl"
    rows = schedule.read(record_file)
    undone = [row for row in rows if row["step"] > step]
    if not undone:
        return
    with (root / "evaluations.undone.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in undone)
    kept = [row for row in rows if row["step"] <= step]
    write_atomically(record_file, "".join(json.dumps(row) + "\n" for row in kept))
