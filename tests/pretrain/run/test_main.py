"""Whole runs: the same losses on any number of ranks, after any kill, and bad input said in a line."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from configs.errors import UserError
from configs.loading import load
from data_pipeline import demo
from data_pipeline.demo import DemoConfig
from launch.runs.audit import audit_run
from pretrain.config import RunConfig
from pretrain.health.stopping import StopRequest
from pretrain.run.folder import RunFolder
from pretrain.run.main import prepare, train

Ranks = Callable[..., list[Any]]


def config_for(root: Path, digits: Path, *overrides: str, smoke: str = "mae") -> RunConfig:
    settings = [f"run.dir={root}", f"data.manifest={digits}/train/manifest.json", *overrides]
    return load(f"configs/smoke/{smoke}.yaml", RunConfig, settings)


def metrics(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]


def losses(root: Path) -> list[float]:
    rows = metrics(root)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]


def train_here(root: str) -> str:
    """Run by each forked rank."""
    return train(RunFolder(Path(root)), StopRequest())


def run_on(ranks: Ranks, count: int, config: RunConfig) -> list[float]:
    folder = prepare(config, world_size=count)
    reasons = ranks(count, train_here, root=str(folder.root))
    assert len(set(reasons)) == 1
    return losses(folder.root)


TEN = ("train.duration=10 steps", "optimizer.warmup=2 steps", "data.workers=0")


@pytest.fixture(scope="module")
def one_rank(
    tmp_path_factory: pytest.TempPathFactory, digits: Path, request: pytest.FixtureRequest
) -> list[float]:
    server = request.getfixturevalue("_fork_server")
    return run_on(server.run, 1, config_for(tmp_path_factory.mktemp("one") / "run", digits, *TEN))


@pytest.mark.parametrize(
    ("count", "overrides"),
    [
        (2, ()),
        (1, ("train.micro_batch_size=16",)),
        (2, ("train.micro_batch_size=8", "data.workers=2")),
        (4, ("train.zero_stage=2", "data.workers=1")),
    ],
    ids=["2 ranks", "accumulate 2", "2 ranks x accumulate 2, workers", "4 ranks, stage 2"],
)
def test_the_cut_of_a_batch_does_not_matter(
    ranks: Ranks, one_rank: list[float], tmp_path: Path, digits: Path, count: int, overrides: tuple[str, ...]
) -> None:
    got = run_on(ranks, count, config_for(tmp_path / "run", digits, *TEN, *overrides))
    assert len(got) == 10 and got == pytest.approx(one_rank, rel=1e-4)
    assert len(set(got)) == 10


def test_stopping_and_resuming_changes_nothing(
    ranks: Ranks, one_rank: list[float], tmp_path: Path, digits: Path
) -> None:
    """Twice stopped, at steps where nothing was due, then finished: bit for bit the uninterrupted losses."""
    root = tmp_path / "run"
    for stop in ("train.stop_after=3 steps", "train.stop_after=4 steps"):
        folder = prepare(config_for(root, digits, *TEN, stop), world_size=1)
        assert ranks(1, train_here, root=str(folder.root)) == ["stop_after"]
    assert run_on(ranks, 1, config_for(root, digits, *TEN)) == one_rank
    state = RunFolder(root).read_state()
    assert state["status"] == "done"
    assert [a["from_step"] for a in state["attempts"]] == [0, 3, 7]
    [source] = audit_run(root)
    assert source.seen == metrics(root)[-1]["data/source_0_samples"] == 320


@pytest.mark.parametrize("nproc", [1, 2])
def test_killed_at_a_random_step_is_the_uninterrupted_run(
    ranks: Ranks, tmp_path: Path, digits: Path, nproc: int
) -> None:
    """A kill -9 of `keel train` takes its ranks along; the next start loses and repeats nothing."""
    overrides = ["checkpoint.every=5 steps", "data.workers=1"]
    root, kill_step = tmp_path / "killed", random.randint(2, 22)
    manifest = f"data.manifest={digits}/train/manifest.json"
    command = [
        "train",
        "configs/smoke/mae.yaml",
        "--nproc",
        str(nproc),
        f"run.dir={root}",
        manifest,
        *overrides,
    ]
    with (tmp_path / "output").open("w") as output:
        victim = subprocess.Popen(
            [sys.executable, "-m", "launch", *command], stdout=output, stderr=subprocess.STDOUT
        )
        deadline = time.monotonic() + 120
        while not (root / "metrics.jsonl").exists() or len(metrics(root)) < kill_step:
            assert victim.poll() is None and time.monotonic() < deadline, (tmp_path / "output").read_text()
            time.sleep(0.002)
        victim.kill()
        victim.wait()
    survived = len(metrics(root))
    resumed = run_on(ranks, nproc, config_for(root, digits, *overrides))
    assert len(resumed) == 24 and survived < 24
    assert resumed == run_on(ranks, nproc, config_for(tmp_path / "straight", digits, *overrides))


BAD = {
    "train.batch_size=33": (2, "train.batch_size: 33 can't be shared equally by 2 ranks; use a multiple"),
    "train.micro_batch_size=5": (2, "train.micro_batch_size: 5 doesn't divide a rank's share of 16"),
    "optimizer.warmup=25 steps": (1, "optimizer.warmup: 25 steps is 25 steps"),
    "train.precision=fp16": (1, "train.precision: fp16 needs a GPU"),
    "objective.mask_ratio=0.99": (1, "objective.mask_ratio: 0.99 of 16 patches leaves 0 visible"),
    "encoder.name=resnet18": (1, "encoder.args"),
    "data.image_size=36": (1, "data.image_size: 36 x 36 pixels aren't whole patches of 8 x 8"),
    "evaluate=[{kind: knn, data: /nowhere/digits}]": (1, "/nowhere/digits: no such manifest"),
    "data.manifest=/nowhere/train/manifest.json": (1, "/nowhere/train"),
    "data.manifest=/my-phtos/train/manifest.json": (1, "manifest.json: no such file, and demo"),
}  # fmt: skip


def test_a_place_that_cannot_be_written_is_one_line() -> None:
    with pytest.raises(UserError, match=r"data\.manifest: demo data can't be made in /proc/"):
        prepare(load("configs/smoke/mae.yaml", RunConfig, ["run.dir=/proc/keel"]), world_size=1)


def test_a_folder_that_cannot_be_written_to_is_one_line(tmp_path: Path, digits: Path) -> None:
    (tmp_path / "run" / ".lock").mkdir(parents=True)  # root may write anywhere else
    with pytest.raises(UserError, match=r"run\.dir: .*/run can't be written to: Is a directory; look at"):
        prepare(config_for(tmp_path / "run", digits), world_size=1)
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_fp16_for_a_cluster_with_gpus_is_made_ready_here(tmp_path: Path, digits: Path) -> None:
    folder = prepare(config_for(tmp_path / "run", digits, "train.precision=fp16"), world_size=1, gpu=True)
    assert load(folder.config_file, RunConfig).train.precision == "fp16"
    with pytest.raises(UserError, match="fp16 needs a GPU, and none is here"):
        train(folder, StopRequest())
    assert "fp16 needs a GPU" in folder.read_state()["error"]


@pytest.mark.parametrize("override", BAD)
def test_bad_settings_are_one_line_and_nothing_is_written(
    tmp_path: Path, digits: Path, override: str
) -> None:
    world_size, message = BAD[override]
    extra = ["data.demo=null"] if "nowhere" in override else []
    with pytest.raises(UserError) as caught:
        prepare(config_for(tmp_path / "run", digits, override, *extra), world_size=world_size)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_resume_may_change_how_but_not_what(tmp_path: Path, digits: Path) -> None:
    prepare(config_for(tmp_path / "run", digits), world_size=1)
    allowed = ["train.zero_stage=0", "data.workers=0", "checkpoint.every=1 min", "train.micro_batch_size=8"]
    prepare(config_for(tmp_path / "run", digits, *allowed), world_size=2)
    assert load(tmp_path / "run" / "config.yaml", RunConfig).train.zero_stage == 0
    with pytest.raises(UserError) as caught:
        prepare(config_for(tmp_path / "run", digits, "run.seed=1", "train.batch_size=64"), world_size=1)
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    assert "run.seed: found 1, but" in lines[0] and "was started with 0" in lines[0]
    assert "train.batch_size: found 64" in lines[1]


def test_other_data_are_refused_by_content_not_by_place(tmp_path: Path, digits: Path) -> None:
    config = config_for(tmp_path / "run", digits)
    prepare(config, world_size=1)
    moved = tmp_path / "moved"
    demo.make(DemoConfig(name="digits"), moved)
    prepare(config_for(tmp_path / "run", moved), world_size=1)
    val = config_for(tmp_path / "run", digits, f"data.manifest={digits}/val/manifest.json")
    with pytest.raises(UserError, match=r"data\.manifest: .* holds other data"):
        prepare(val, world_size=1)
