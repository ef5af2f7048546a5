"""Sweeps from file to runs: what is submitted, what is left alone, what is refused before anything starts."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from configs.errors import ConfigError, RunError
from launch.cli.main import main
from launch.slurm.cluster import ClusterConfig
from launch.sweeps import sweep as sweeps
from launch.sweeps.sweep import load_sweep, make_ready, plan, run_here, start


@pytest.fixture(scope="module")
def digits(digits: Path) -> Path:
    """The manifest to train on."""
    return digits / "train" / "manifest.json"


@pytest.fixture
def file(tmp_path: Path, digits: Path) -> Callable[..., str]:
    """Write a sweep file: six members, two at a time."""

    def write(**changes: Any) -> str:
        sweep = {
            "dir": str(tmp_path / "sweep"), "configs": ["smoke/mae"], "parallel": 2,
            "overrides": {"data.manifest": str(digits), "train.duration": "4 steps"},
            "grid": {"optimizer.lr": [1e-3, 2e-3, 3e-3], "run.seed": [0, 1]},
        }  # fmt: skip
        path = tmp_path / "sweep.yaml"
        path.write_text(yaml.safe_dump(sweep | changes))
        return str(path)

    return write


def ended(folder: Path, **changes: Any) -> None:
    state = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(state | changes))


def test_only_what_is_missing_or_has_failed_is_submitted_again(
    file: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[tuple[list[str], int | None]] = []

    def submit(folders: list[Path], cluster: ClusterConfig, *, parallel: int | None = None) -> list[str]:
        sent.append(([folder.name for folder in folders], parallel))
        return [f"7_{number}" for number in range(len(folders))]

    monkeypatch.setattr(sweeps, "submit", submit)
    sweep = load_sweep(file())
    first = plan(sweep)
    assert [one.state for one in first] == ["missing"] * 6
    said: list[str] = []
    make_ready(first, ranks=1)
    assert start(sweep, first, cluster=ClusterConfig(), say=said.append) == 0
    names = [one.member.name for one in first]
    assert sent == [(names, 2)]
    assert said == [f"{name}: job 7_{number}" for number, name in enumerate(names)]
    record = json.loads((sweep.dir / "sweep.json").read_text())
    assert record["runs"][names[0]] == {"config": "smoke/mae", "optimizer.lr": 1e-3, "run.seed": 0}
    assert "lr: 0.001\n" in (first[0].folder / "config.yaml").read_text()

    attempt = {"attempt": 1, "reason": "early_stop"}
    ended(first[0].folder, status="done")
    ended(first[1].folder, status="failed", error="x")
    ended(first[2].folder, status="stopped", attempts=[attempt])
    ended(first[3].folder, status="stopped", attempts=[attempt | {"reason": "preempted"}])
    ended(first[4].folder, status="running", attempts=[{}], heartbeat="2020-01-01T00:00:00+00:00")
    again = plan(load_sweep(file(grid={"optimizer.lr": [1e-3, 2e-3, 3e-3], "run.seed": [0, 1, 2]})))
    states = {one.member.name: (one.state, one.due) for one in again}
    assert [states[name][0] for name in names] == ["done", "failed", "stopped", "stopped", "lost", "new"]
    assert [states[name][1] for name in names] == [False, True, False, True, True, True]
    assert sum(one.due for one in again) == 4 + 3


def test_every_member_is_checked_before_the_first_is_made(file: Callable[..., str], tmp_path: Path) -> None:
    bad = {"train.batch_size": [32, -1], "optimizer.lr": [1e-3, "quick"]}
    with pytest.raises(ConfigError) as raised:
        plan(load_sweep(file(grid=bad)))
    lines = str(raised.value).splitlines()
    assert len(lines) == 2  # each problem once, with a member that has it
    assert "train.batch_size: found -1" in str(raised.value) and "optimizer.lr: found 'quick'" in str(
        raised.value
    )
    assert all(" (in smoke-mae-" in line for line in lines)
    odd = load_sweep(file(grid={"train.batch_size": [32, 33]}))
    with pytest.raises(ConfigError, match="33 can't be shared equally by 2 ranks"):
        make_ready(plan(odd), ranks=2)
    assert not (tmp_path / "sweep").exists()


def test_a_dry_run_shows_the_script_of_what_is_due(
    file: Callable[..., str], tmp_path: Path, keel: Callable[..., tuple[int, str, str]]
) -> None:
    asked = ("sweep", file(parallel=3), "+nodes=2", "--cluster", "clusters/slurm", "--dry-run")
    code, out, _ = keel(*asked)
    listed, _, script = out.partition("3 at a time\n")
    assert code == 0 and listed.count("-> submit") == 6
    assert script.startswith("#!/bin/bash\n") and "\n#SBATCH --array=0-5%3\n" in script
    assert "\n#SBATCH --nodes=2\n" in script and "\n#SBATCH --job-name=keel-sweep\n" in script
    first, *_, last = [line for line in script.splitlines() if line.startswith("# SLURM_ARRAY_TASK_ID")]
    assert first.startswith(
        "# SLURM_ARRAY_TASK_ID 0: each of the 2 tasks is rank SLURM_PROCID of Train(root="
    )
    assert f"{tmp_path / 'sweep'}/smoke-mae-lr=0.003,seed=1-" in last
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    code, out, err = keel(*asked, "--json")
    assert len(json.loads(out)) == 6 and "#SBATCH --array=0-5%3" in err
    code, _, err = keel(*asked, "+nodes=5")
    assert (code, "32 can't be shared equally by 5 ranks" in err) == (2, True)
    assert not (tmp_path / "sweep").exists()


def finished(path: str) -> None:
    """Make the sweep's members, and have them be done."""
    sweep = load_sweep(path)
    planned = plan(sweep)
    make_ready(planned, ranks=1)
    sweeps.write_record(sweep, planned)
    for one in planned:
        ended(one.folder, status="done")


def made_otherwise(tmp_path: Path, digits: Path, what: str) -> dict[str, Any]:
    """What of a sweep's file, or of what it names, makes other runs of the same names."""
    own = tmp_path / "o" / "own.yaml"
    overrides = {"data.manifest": str(digits), "train.duration": "4 steps"}
    if what == "overrides":
        return {"overrides": overrides | {"train.duration": "8 steps"}}
    if what == "another sweep, one name the same":
        return {"overrides": overrides | {"objective.mask_ratio": 0.9}, "grid": {"run.seed": [0, 7]}}
    if what == "another sweep, no name the same":
        return {"overrides": overrides | {"train.duration": "8 steps"}, "grid": {"run.seed": [8, 9]}}
    if what == "a base config":
        own.write_text(own.read_text().replace("0.6", "0.7"))
    elif what == "the base of a config":
        (tmp_path / "o" / "base.yaml").write_text("base: [mae.yaml]\ntrain: {gradient_clip: 0.25}\n")
        own.write_text("base: base.yaml\n" + own.read_text().partition("\n")[2])
    elif what == "the data":
        shutil.rmtree(tmp_path / "data")
        shutil.copytree(digits.parents[1] / "val", tmp_path / "data")
    elif what == "the config is gone":
        own.unlink()
        return {"configs": ["smoke/mae"], "grid": {"run.seed": [8, 9]}}
    return {}


@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("overrides", "train.duration: found '8 steps', but it was '4 steps' (in o-own-seed=0-"),
        ("another sweep, one name the same", "objective.mask_ratio: found 0.9, but it was 0.6"),
        ("another sweep, no name the same", "train.duration: found '8 steps', but it was '4 steps'"),
        ("a base config", "objective.mask_ratio: found 0.7, but it was 0.6 (in o-own-seed=0-"),
        ("the base of a config", "train.gradient_clip: found 0.25, but it was"),
        ("the data", "data: the manifest there was "),
        ("the config is gone", "can't be made with today's settings: "),
    ],
)  # fmt: skip
def test_a_folder_holds_one_sweep_and_finished_members_are_compared_as_well(
    file: Callable[..., str], tmp_path: Path, digits: Path, what: str, line: str,
    keel: Callable[..., tuple[int, str, str]],
) -> None:  # fmt: skip
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "mae.yaml").write_text((Path("configs/smoke/mae.yaml")).read_text())
    (tmp_path / "o" / "own.yaml").write_text("base: mae.yaml\nobjective: {mask_ratio: 0.6}\n")
    own = str(tmp_path / "o" / "own")
    manifest = digits
    if what == "the data":
        shutil.copytree(digits.parent, tmp_path / "data")
        manifest = tmp_path / "data" / "manifest.json"
    asked = {"configs": [own], "grid": {"run.seed": [0, 1]},
             "overrides": {"data.manifest": str(manifest), "train.duration": "4 steps"}}  # fmt: skip
    finished(file(**asked))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.json")}
    grown = file(**asked | {"grid": {"run.seed": [0, 1, 2]}})
    assert [one.due for one in plan(load_sweep(grown))] == [False, False, True]  # growing is fine
    code, out, err = keel("sweep", file(**asked | made_otherwise(tmp_path, digits, what)))
    assert (code, out) == (2, "") and line in err, err
    assert f"dir: {tmp_path / 'sweep'} holds members" in err or what == "the config is gone"
    assert all(path.read_bytes() == data for path, data in before.items() if path.parent.name != "data")


def test_a_finished_member_whose_state_is_torn_isnt_submitted_again(file: Callable[..., str]) -> None:
    path = file(grid={"run.seed": [0, 1]})
    finished(path)
    torn = plan(load_sweep(path))[0].folder / "run.json"
    torn.write_text(torn.read_text()[:20])
    with pytest.raises(RunError, match=r"seed=0-\w+: run\.json: is torn, or no JSON\nrestore them"):
        plan(load_sweep(path))


@pytest.mark.parametrize("name", sorted(path.stem for path in Path("configs/sweeps").glob("*.yaml")))
def test_shipped_sweeps_compare_what_can_be_compared(name: str, tmp_path: Path) -> None:
    sweep = load_sweep(f"sweeps/{name}", [f"dir={tmp_path}"])
    assert sweeps.remarks(sweep, plan(sweep)) == []


def test_a_loss_over_other_things_is_remarked(
    file: Callable[..., str], keel: Callable[..., tuple[int, str, str]]
) -> None:
    rule = {"rule": "median", "metric": "loss"}
    path = file(grid={"objective.mask_ratio": [0.5, 0.75]}, early_stop=rule)
    code, _, err = keel("sweep", path, "--dry-run")
    assert code == 0 and "note: early_stop.metric: objective.mask_ratio differs among the members" in err


def test_so_many_of_those_that_are_due_and_the_rest_another_time(
    file: Callable[..., str], keel: Callable[..., tuple[int, str, str]]
) -> None:
    code, out, _ = keel("sweep", file(), "--dry-run", "--at-most", 2)
    assert code == 0 and out.count("-> submit") == 2 and "6 runs, 2 to submit" in out


def test_what_a_resumed_run_may_change_a_sweep_may_too(file: Callable[..., str], digits: Path) -> None:
    finished(file(grid={"run.seed": [0]}))
    overrides = {"data.manifest": str(digits), "train.duration": "4 steps", "data.workers": 0}
    assert [one.due for one in plan(load_sweep(file(grid={"run.seed": [0]}, overrides=overrides)))] == [False]


def test_one_run_under_two_names_is_refused(file: Callable[..., str]) -> None:
    twice = file(configs=["smoke/mae", "configs/smoke/mae.yaml"], grid={"run.seed": [0]})
    with pytest.raises(ConfigError, match=r"members: smoke-mae-seed=0-\w+ and smoke-mae-seed=0-\w+ are the"):
        plan(load_sweep(twice))
    with pytest.raises(ConfigError, match="are the same run; leave one of them out"):
        plan(load_sweep(file(grid={"run.seed": [0, "0"]})))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"grid": {"optimizer.lr": 1e-3}}, "grid.optimizer.lr: found 0.001; input should be a valid list"),
        ({"configs": []}, "configs: found []; a list should have at least 1 item"),
        ({"early_stop": {"rule": "median", "rungs": 0.5}}, "early_stop.rungs: found 0.5; input should be a "
         "valid list"),
    ],
)  # fmt: skip
def test_messages_speak_of_what_yaml_has(
    file: Callable[..., str], changes: dict[str, Any], line: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(line)):
        load_sweep(file(**changes))


@pytest.mark.parametrize("record", ["", "[]", '{"runs": [1]}', '{"runs": {"a": 1}}', "\0\0"])
def test_a_torn_record_of_a_sweep_is_named(file: Callable[..., str], tmp_path: Path, record: str) -> None:
    path = file(grid={"run.seed": [0]})
    finished(path)
    (tmp_path / "sweep" / "sweep.json").write_text(record)
    with pytest.raises(RunError, match=r"sweep\.json: can't be read as a sweep's record"):
        plan(load_sweep(path))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"configs": ["smoke/mae", "smoke/moco"]}, "loss of mae and moco can't be compared"),
        ({"early_stop": {"rule": "median", "metric": "knn/top1"}}, "has no evaluation knn with an `every`"),
    ],
)
def test_a_rule_that_can_compare_nothing_is_refused(
    file: Callable[..., str], changes: dict[str, Any], line: str
) -> None:
    asked = {"early_stop": {"rule": "halving", "metric": "loss"}, "grid": {"run.seed": [0, 1]}} | changes
    with pytest.raises(ConfigError, match=line):
        plan(load_sweep(file(**asked)))


class Training:
    """Stands for `keel train`: counts how many run at once, and ends as the run's name says."""

    def __init__(self, root: Path) -> None:
        self.root, self.most, self.running = root, 0, list[subprocess.Popen[bytes]]()

    def __call__(self, folder: Path, nproc: int) -> subprocess.Popen[bytes]:
        ways = {
            "bad": (1, "failed", None),
            "early": (3, "stopped", "early_stop"),
            "asked": (3, "stopped", "terminated"),
        }
        code, status, reason = ways.get(folder.name, (0, "done", "done"))
        state = {"status": status, "attempts": [{"reason": reason}], "error": "by intention"}
        script = (
            f"import json, sys; open({str(folder / 'run.json')!r}, 'w').write({json.dumps(state)!r}); "
            f"sys.exit({code})"
        )
        process = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.DEVNULL)
        self.running = [one for one in self.running if one.poll() is None] + [process]
        self.most = max(self.most, len(self.running))
        return process


@pytest.mark.parametrize(
    ("names", "code"), [(["a", "early", "b"], 0), (["a", "bad", "b", "asked"], 1), (["a", "asked"], 3)]
)
def test_here_they_run_so_many_at_a_time_and_one_failure_stops_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: list[str], code: int
) -> None:
    for name in names:
        (tmp_path / name / "logs").mkdir(parents=True)
        (tmp_path / name / "config.yaml").write_text("")
    training = Training(tmp_path)
    monkeypatch.setattr(sweeps, "_train", training)
    said: list[str] = []
    assert run_here([tmp_path / name for name in names], 1, 2, said.append) == code
    assert sorted(line.partition(":")[0] for line in said) == sorted(names)
    assert training.most == 2
    if "bad" in names:
        assert "bad: failed (by intention)" in said


def test_a_sweep_runs_here_and_its_members_give_themselves_up(
    file: Callable[..., str],
    tmp_path: Path,
    digits: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Two real runs that find themselves worse than others, a table of them, and nothing left to do."""
    rule = {"rule": "halving", "metric": "loss", "rungs": [0.0005]}
    overrides = {"data.manifest": str(digits), "train.duration": "20000 steps", "data.workers": 0}
    path = file(grid={"run.seed": [0, 1]}, early_stop=rule, overrides=overrides)

    def keel(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["keel", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capfd.readouterr()
        assert not ended.value.code, said
        return said.out

    assert [run["submit"] for run in json.loads(keel("sweep", path, "--dry-run", "--json"))] == [True, True]
    root = tmp_path / "sweep"
    assert not root.exists()
    for number in range(3):  # so many that both are stopped, whichever comes to the rung first
        (root / f"unbeatable-{number}").mkdir(parents=True)
        (root / f"unbeatable-{number}" / "early_stop.json").write_text(
            '{"rungs": {"0.0005": {"value": 0.0, "metric": "loss"}}}'
        )
    keel("sweep", path)
    runs = json.loads(keel("runs", str(root), "--json"))
    assert [(run["state"], run["note"], run["objective"]) for run in runs] == [
        ("stopped", "early_stop", "mae")
    ] * 2
    for run in runs:
        assert 10 < run["step"] < 20_000
        assert list((Path(run["path"]) / "checkpoints").glob(f"step-{run['step']:08d}-a01"))
        assert json.loads((Path(run["path"]) / "early_stop.json").read_text())["rungs"]["0.0005"]["stopped"]
    assert "2 runs, 0 to submit" in keel("sweep", path)
