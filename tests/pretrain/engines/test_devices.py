"""Which device a rank computes on, and what is said where there aren't enough. No GPU is needed here."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from configs.errors import ConfigError
from configs.loading import load
from launch.demo import demo
from launch.ranks import local
from pretrain.config import RunConfig, refused_changes
from pretrain.engines import processes
from pretrain.engines.config import EngineConfig, on_gpu, require_devices
from pretrain.run.main import prepare


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with one GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)


def test_more_ranks_than_gpus_are_refused_with_what_to_say_instead(one_gpu: None, tmp_path: Path) -> None:
    said = r"^--nproc: 2 ranks, each with a GPU of its own, and one GPU is here; use --nproc 1, or run.device"
    config = load("smoke/mae", RunConfig, [f"run.dir={tmp_path / 'run'}"])
    with pytest.raises(ConfigError, match=said):
        prepare(config, world_size=2)
    assert not list(tmp_path.iterdir()), "before demo data are made"
    require_devices("auto", 1)
    require_devices("cpu", 8)
    require_devices("auto", 8, gpu=True)  # of a cluster, whose file says how many there are


def test_a_rank_without_a_gpu_of_its_own_says_so(one_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a job's second task where the node shows one GPU only: not `CUDA error: invalid device ordinal`."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ConfigError, match="2 ranks, each with a GPU of its own, and one GPU is here"):
        processes.start()


def test_cuda_where_there_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"^run.device: cuda, and torch sees no GPU here; use auto or cpu"):
        require_devices("cuda", 1)
    with pytest.raises(ConfigError, match=r"^run.device: cuda, and the cluster's gpus_per_node is 0"):
        require_devices("cuda", 4, gpu=False)
    assert not on_gpu("auto")


def test_half_precision_is_refused_by_the_device_that_is_used(one_gpu: None) -> None:
    half = EngineConfig(precision="fp16")
    half.require_device()
    half.require_device(True)
    with pytest.raises(ConfigError, match=r"fp16 needs a GPU, and run.device is cpu"):
        half.require_device(None, "cpu")
    with pytest.raises(ConfigError, match=r"fp16 needs a GPU, and run.device is cpu"):
        half.require_device(True, "cpu")


def test_a_run_may_go_on_on_another_device() -> None:
    assert refused_changes({"run.device": ("auto", "cpu"), "run.seed": (0, 1)}) == {"run.seed": (0, 1)}


def test_ranks_that_are_to_use_the_processor_see_no_gpu(
    one_gpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[str | None] = []

    def supervised(
        command: object, nproc: int, logs: Path, environment: dict[str, str], last: bool
    ) -> tuple[int, bool]:
        seen.append(environment.get("CUDA_VISIBLE_DEVICES"))
        return 0, False

    monkeypatch.setattr(local, "supervised", supervised)
    for device in ("cpu", "auto"):
        folder = prepare(
            load("smoke/mae", RunConfig, [f"run.dir={tmp_path / device}", f"run.device={device}"]),
            world_size=1 if device == "auto" else 2,
        )
        local.launch(folder, 1, apart=True)
    assert seen == ["", None]


@pytest.mark.parametrize(("gpus", "ranks"), [(0, 2), (1, 1), (2, 2), (8, 2)])
def test_the_demo_takes_what_is_there(
    gpus: int, ranks: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    asked: list[int] = []

    def launch(folder: object, nproc: int, *, apart: bool) -> int:
        asked.append(nproc)
        return 1

    monkeypatch.setattr(demo, "launch", launch)
    assert demo.run(tmp_path, configs=("smoke/mae",)) == 1
    assert asked == [ranks]


def test_tests_hide_a_gpu() -> None:
    """DeepSpeed is told to use the processor here; half of a run on a GPU would be neither."""
    assert torch.cuda.device_count() == 0 or "gpu" in sys.argv
