"""The doctor: a line for each thing that would go wrong later, with what to do, and an exit code."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from configs.loading import dump, load
from launch import doctor
from launch.cli.main import main
from launch.doctor import Check, examine
from launch.runs import queue
from launch.slurm.cluster import ClusterConfig
from pretrain import encoders
from pretrain.config import RunConfig
from pretrain.engines.processes import MemoryEstimate

Said = tuple[int, str, str]
Look = Callable[..., dict[str, Check]]


class Free(NamedTuple):
    """Of shutil.disk_usage, what is asked for."""

    free: int


@pytest.fixture
def base(tmp_path: Path, digits: Path) -> list[str]:
    return [f"run.dir={tmp_path / 'run'}", f"data.manifest={digits / 'train' / 'manifest.json'}"]


@pytest.fixture
def look(base: list[str], monkeypatch: pytest.MonkeyPatch) -> Look:
    """Examine the smoke config; gives the checks by their names, the worst where there are several."""
    monkeypatch.setattr(doctor, "PROBE", 1 << 20)
    monkeypatch.setattr(queue, "would_accept", lambda script: (True, "Job 5 to start at once"))

    def examined(*overrides: str, cluster: ClusterConfig | None = None, nproc: int = 1) -> dict[str, Check]:
        found = examine("smoke/mae", [*base, *overrides], cluster, nproc)
        rising = sorted(found, key=lambda check: ("pass", "warn", "fail").index(check.verdict))
        assert all(check.fix for check in found if check.verdict != "pass")
        return {check.name: check for check in rising}

    return examined


def verdicts(found: dict[str, Check]) -> dict[str, str]:
    return {name: check.verdict for name, check in found.items() if check.verdict != "pass"}


def test_a_healthy_run_passes_and_nothing_is_left_behind(look: Look, tmp_path: Path) -> None:
    found = look()
    assert verdicts(found) == {}
    assert found["data"].found == "1438 samples an epoch, 24 steps"
    assert found["batch"].found == "32 = 1 ranks x 1 x 32"
    assert found["model"].found.startswith("0.13 M parameters, 0.11 M of them")
    assert "stage 1 2.68 MB" in found["memory"].found and "stage 1 is chosen" in found["memory"].found
    assert list(tmp_path.iterdir()) == []
    assert verdicts(look(cluster=ClusterConfig())) == {"processors": "warn"}
    assert list(tmp_path.iterdir()) == []


def test_a_bad_config_is_the_only_line() -> None:
    (check,) = examine("smoke/mae", ["train.batchsize=3"])
    assert (check.name, check.verdict) == ("config", "fail")
    assert "train.batchsize: no such setting" in check.found
    assert check.fix == "did you mean batch_size?"


def test_demo_data_that_are_not_made_yet_are_fine(tmp_path: Path) -> None:
    found = examine("smoke/mae", [f"run.dir={tmp_path / 'run'}"])
    assert {check.verdict for check in found} == {"pass"}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("overrides", "options", "expected"),
    [
        (
            ["data.manifest=/nowhere/manifest.json", "data.demo=null"],
            {},
            {"data": "/nowhere/manifest.json: no such"},
        ),
        (
            ["data.manifest=/my-phtos/train/manifest.json"],
            {},
            {"data": "/my-phtos/train/manifest.json: no such file, and demo data are only made in"},
        ),
        (["train.batch_size=33"], {"nproc": 2}, {"batch": "33 can't be shared"}),
        (["train.micro_batch_size=5"], {}, {"batch": "5 doesn't divide"}),
        (["run.dir=/proc/none"], {}, {"run folder": "/proc can't be written to"}),
        (["track.wandb=online"], {}, {"W&B": "no key, and track.wandb is online"}),
        (["train.precision=fp16"], {}, {"model": "fp16 needs a GPU"}),
        (["encoder.weights=/nowhere.pth"], {}, {"weights": "/nowhere.pth is neither a file"}),
    ],
)
def test_what_is_wrong_fails_with_what_to_do(
    look: Look,
    monkeypatch: pytest.MonkeyPatch,
    overrides: list[str],
    options: dict[str, Any],
    expected: dict[str, str],
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setattr(doctor, "has_key", lambda: False)
    found = look(*overrides, **options)
    for name, part in expected.items():
        assert found[name].verdict == "fail"
        assert part in found[name].found


def test_fp16_is_judged_by_where_it_runs(look: Look) -> None:
    gpus = ClusterConfig(gpus_per_node=1, cpus_per_task=8)
    assert look("train.precision=fp16", cluster=gpus)["model"].verdict == "pass"
    refused = look("train.precision=fp16", cluster=ClusterConfig())["model"]
    assert (refused.verdict, refused.found) == (
        "fail", "train.precision: fp16 needs a GPU, and the cluster's gpus_per_node is 0"
    )  # fmt: skip


def test_weights_to_start_from_are_opened(look: Look, tmp_path: Path) -> None:
    config = load("smoke/mae", RunConfig)
    encoder = encoders.build(config.encoder, (32, 32))
    torch.save({"model": encoder.state_dict() | {"mask_token": torch.ones(1)}}, tmp_path / "mae.pth")
    found = look(f"encoder.weights={tmp_path / 'mae.pth'}")["weights"]
    assert found.found.startswith(f"{tmp_path / 'mae.pth'}: read as MAE or plain, left out: mask_token")
    assert "weights" not in look()


def test_shards_and_samples_are_looked_at(look: Look, digits: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(digits / "train", broken)
    (shard,) = broken.glob("*.tar")
    whole = shard.read_bytes()
    shard.write_bytes(b"\0" * len(whole))
    asked = f"data.manifest={broken / 'manifest.json'}"
    found = look(asked)
    assert (found["data"].verdict, found["samples"].verdict) == ("pass", "fail")
    assert "16 of 16 random samples can't be used" in found["samples"].found
    assert found["samples"].fix == f"keel data verify {broken / 'manifest.json'}"
    shard.write_bytes(whole[:5000])
    assert "has 5000 bytes, not" in look(asked)["data"].found
    shard.unlink()
    assert "can't be read from here" in look(asked)["data"].found


def test_a_run_that_was_begun_otherwise_is_refused(look: Look, base: list[str], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(dump(load("smoke/mae", RunConfig, base).placed()))
    assert look("train.zero_stage=2")["run folder"].verdict == "pass"
    found = look("run.seed=7")["run folder"]
    assert (found.verdict, "run.seed 7 (was 0)" in found.found) == ("fail", True)


def test_memory_disk_and_time_are_weighed(
    look: Look, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def estimate(build: Any, stage: int, ranks: int) -> MemoryEstimate:
        return MemoryEstimate(parameters=10 << 30, gradients=10 << 30, optimizer=(40 << 30) >> stage)

    class Gpu:
        total_memory = 36 << 30

    monkeypatch.setattr(doctor, "memory_estimate", estimate)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Gpu())
    monkeypatch.setattr(doctor, "_size", lambda count: f"{count / (1 << 30):.0f} GiB")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Free(120 << 30))
    found = look("train.zero_stage=1")
    assert (found["memory"].verdict, found["memory"].fix) == ("fail", "set train.zero_stage=2")
    assert look("train.zero_stage=2")["memory"].verdict == "warn"
    assert look("train.zero_stage=1", "train.offload=optimizer")["memory"].verdict == "pass"
    assert found["checkpoints"].verdict == "warn"  # 50 GiB each: two fit, four don't
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Free(90 << 30))
    assert look()["checkpoints"].verdict == "fail"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "checkpoint_write": 80.0}\n')
    late = look(cluster=ClusterConfig(signal_delay=120))["time to save"]
    assert (late.verdict, late.fix) == ("warn", "set signal_delay to 320 or more")
    assert look(cluster=ClusterConfig(signal_delay=90))["time to save"].verdict == "fail"
    assert look(cluster=ClusterConfig(signal_delay=400))["time to save"].verdict == "pass"


@pytest.mark.parametrize(
    ("given", "gloo", "nccl"),
    [
        (None, "warn", "warn"),
        ("lo", "pass", "pass"),
        ("ib0,lo", "pass", "pass"),
        ("=lo", "warn", "pass"),
        ("=l", "warn", "warn"),
        ("l", "warn", "pass"),
        ("ib0", "warn", "warn"),
        ("^docker0", "warn", "pass"),
    ],
)
def test_nodes_need_an_interface_to_talk_over(
    monkeypatch: pytest.MonkeyPatch, given: str | None, gloo: str, nccl: str
) -> None:
    """Gloo's as well where NCCL does the work: saving and agreements go by it."""
    monkeypatch.setattr("socket.if_nameindex", lambda: [(1, "lo"), (2, "eth0")])
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    environment = {} if given is None else dict.fromkeys(names, given)

    def checks(**settings: Any) -> list[str]:
        cluster = ClusterConfig(environment=environment, **settings)
        patient = doctor.Patient(load("configs/smoke/mae.yaml", RunConfig), cluster, 1)
        return [check.verdict for check in doctor._network(patient)]

    assert checks(nodes=2) == [gloo]
    assert checks(nodes=2, gpus_per_node=2, tasks_per_node=2) == [gloo, nccl]
    assert checks(gpus_per_node=2, tasks_per_node=2) == []


def test_an_optimizer_on_one_thread_of_the_host_is_said() -> None:
    offloaded = ["train.offload=optimizer", "train.zero_stage=1"]
    slow = load("configs/smoke/mae.yaml", RunConfig, offloaded)
    found = [check for check in doctor._batch(doctor.Patient(slow, None, 1)) if check.name == "offload"]
    assert [(check.verdict, check.fix) for check in found] == [
        ("warn", "set run.threads to the processors that a rank has")
    ]
    quick = load(
        "configs/smoke/mae.yaml",
        RunConfig,
        ["train.offload=optimizer", "train.zero_stage=1", "run.threads=4"],
    )
    assert slow.slow_optimizer is not None and quick.slow_optimizer is None


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ((True, "Job 5"), "pass"),
        ((False, "invalid partition"), "fail"),
        ((None, "sbatch isn't here"), "warn"),
    ],
)
def test_slurm_is_asked_whether_it_would_take_the_job(
    look: Look, monkeypatch: pytest.MonkeyPatch, answer: tuple[bool | None, str], verdict: str
) -> None:
    scripts: list[str] = []
    monkeypatch.setattr(queue, "would_accept", lambda script: scripts.append(script) or answer)
    found = look(cluster=ClusterConfig(partition="gpu"))["queue"]
    assert (found.verdict, found.found) == (verdict, answer[1])
    assert "#SBATCH --partition=gpu" in scripts[0]


def test_the_command_tells_by_its_exit_code(
    base: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def keel(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["keel", "doctor", "smoke/mae", *base, *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), capfd.readouterr().out

    code, out = keel()
    assert code == 0
    assert all(line.startswith("pass  ") for line in out.splitlines())
    code, out = keel("train.batch_size=33", "--nproc", "2", "--json")
    assert code == 2
    assert {check["name"]: check["verdict"] for check in json.loads(out)}["batch"] == "fail"
