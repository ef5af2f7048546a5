"""Judging a model while it trains leaves no trace in its training, whatever the objective keeps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pretrain import checkpoint
from pretrain.engines.storage import Reader, read_model
from pretrain.judging import schedule
from tests.pretrain.run.test_main import Ranks, config_for, losses, run_on

STEPS = ("train.duration=4 steps", "optimizer.warmup=1 steps", "data.workers=0", "checkpoint.every=4 steps")
FEW = "{kind: few_shot, data: DATA/val/manifest.json, every: 1 steps, shots: [1, 5], draws: 1}"
LINEAR = "{kind: linear, data: DATA/val/manifest.json, every: 2 steps, epochs: 2}"
PROMPTS = "{kind: zero_shot, data: DATA, every: 1 steps}"
RETRIEVAL = "{kind: retrieval, data: DATA, every: 3 steps}"
EVALUATIONS = {  # what each leaves alone: MAE its masks, MoCo its queue and statistics, CLIP its text tower
    "mae": (1, ("{kind: heldout, data: DATA, every: 1 steps}", FEW)),
    "moco": (2, (FEW, LINEAR)),
    "clip": (1, (PROMPTS, RETRIEVAL)),
}


@pytest.mark.parametrize("smoke", EVALUATIONS)
def test_evaluations_leave_no_trace(ranks: Ranks, tmp_path: Path, digits: Path, smoke: str) -> None:
    """Losses, weights, teacher, queue, statistics and the place in the data are bit-identical."""
    count, evaluations = EVALUATIONS[smoke]
    overrides = list(STEPS)
    if smoke == "clip":  # needs captions, which it makes
        digits = tmp_path / "data" / "shapes"
        overrides += ["data.demo.samples=128", "data.demo.val_samples=64"]
        overrides += [f"data.tokenizer.path={digits}/words.json"]
    found = {}
    for name in ("plain", "judged"):
        asked = ", ".join(evaluations).replace("DATA", str(digits)) if name == "judged" else ""
        config = config_for(tmp_path / name, digits, *overrides, f"evaluate=[{asked}]", smoke=smoke)
        run_on(ranks, count, config)
        newest = checkpoint.latest(tmp_path / name)
        assert newest is not None
        extra = Reader(newest).state["extra"]
        place = {key: extra[key] for key in ("step", "samples")}
        found[name] = losses(tmp_path / name), place, read_model(newest)
    assert found["plain"][:2] == found["judged"][:2]
    plain, judged = found["plain"][2], found["judged"][2]
    assert plain.keys() == judged.keys()
    assert [key for key, value in plain.items() if not torch.equal(value, judged[key])] == []
    if smoke == "moco":
        assert {"queue.keys", "encoder.bn1.running_mean"} <= plain.keys()
    done = {(row["step"], row["name"]) for row in schedule.read(tmp_path / "judged/evaluations.jsonl")}
    assert len(done) >= 6 and {step for step, _ in done} == {1, 2, 3, 4}
