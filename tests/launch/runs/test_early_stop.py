"""When a member of a sweep gives itself up: the rules, what is compared, and the thread beside training."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from benchmarks.registry import make_run, state
from configs.sweep import EarlyStop
from launch.runs import early_stop
from launch.runs.early_stop import Rungs, value_at, worse
from launch.runs.figures import Figures
from launch.runs.files import read_json
from pretrain.health.stopping import StopRequest

LOSS = EarlyStop(rule="halving", metric="loss", rungs=(0.25, 0.5), reduction=2)
TOP1 = EarlyStop(rule="median", metric="knn/top1", rungs=(0.5,), least=3)


@pytest.mark.parametrize(
    ("rule", "value", "others", "expected"),
    [
        # of n so far, the best ceil(n / 2) go on
        (LOSS, 9.0, [], False),
        (LOSS, 9.0, [1.0], True),
        (LOSS, 1.0, [9.0], False),
        (LOSS, 2.0, [1.0, 3.0], False),
        (LOSS, 3.0, [1.0, 2.0], True),
        (LOSS, 2.0, [1.0, 3.0, 4.0], False),
        (LOSS, 3.0, [1.0, 2.0, 4.0], True),
        (LOSS, 1.0, [1.0, 1.0, 1.0], False),
        (LOSS, float("nan"), [], True),
        (LOSS, 1.0, [float("nan"), float("nan"), float("nan")], False),
        (LOSS.model_copy(update={"reduction": 4.0}), 2.0, [1.0, 3.0, 4.0], True),
        # accuracy: more is better; a median wants three others
        (TOP1, 10.0, [50.0, 60.0], False),
        (TOP1, 10.0, [50.0, 60.0, 70.0], True),
        (TOP1, 60.0, [50.0, 60.0, 70.0], False),
        (TOP1, 90.0, [50.0, 60.0, 70.0], False),
        (TOP1, 54.0, [50.0, 60.0, 50.0, 60.0], True),
        # who has diverged has come that far, and is worse than anybody
        (LOSS, 2.0, [float("nan"), 1.0, float("nan")], False),
        (LOSS, float("-inf"), [9.0], True),
        (TOP1, 10.0, [float("nan")] * 3, False),
        # the direction can be told
        (TOP1.model_copy(update={"best_is": "lowest"}), 10.0, [50.0, 60.0, 70.0], False),
        (LOSS.model_copy(update={"best_is": "highest"}), 1.0, [9.0], True),
        # who has diverged is the worst, wherever it stands among the others
        (TOP1, 10.0, [float("nan"), 50.0, 60.0, 70.0], True),
        (TOP1, 10.0, [50.0, 60.0, 70.0, float("nan")], True),
        (TOP1, 10.0, [float("nan"), float("nan"), float("nan")], False),
    ],
)
def test_the_rules(rule: EarlyStop, value: float, others: list[float], expected: bool) -> None:
    assert worse(rule, value, others) is expected


def member(root: Path, name: str, *, rows: int, total: int = 20, **options: Any) -> Path:
    make_run(root / name, run=state(status="running", total_steps=total, step=0), rows=rows, **options)
    return root / name


def test_a_loss_counts_by_its_mean_near_the_rung(tmp_path: Path) -> None:
    run = member(tmp_path, "a", rows=20)
    assert value_at(run, "loss", 10) == pytest.approx((1 / 9 + 1 / 10) / 2)
    assert value_at(run, "loss", 1) == 1
    assert value_at(run, "nothing", 10) is None


def test_an_evaluation_counts_by_its_newest_score(tmp_path: Path) -> None:
    run = member(
        tmp_path, "a", rows=20, evaluations={4: {"top1": 40.0}, 8: {"top1": 30.0}, 12: {"top1": 90.0}}
    )
    assert value_at(run, "knn/top1", 10) == 30
    assert value_at(run, "knn/top1", 3) is None


def test_a_rung_is_decided_once_it_is_behind_and_only_once(tmp_path: Path) -> None:
    good = member(tmp_path, "good", rows=6)
    (tmp_path / "good" / "early_stop.json").write_text(
        json.dumps({"rungs": {"0.25": {"value": 1e-3, "metric": "loss"}}})
    )
    run = member(tmp_path, "run", rows=5)
    assert not Rungs(run, LOSS).stops()  # at the rung, not past it: its evaluation may still be going on
    assert not (run / "early_stop.json").exists()
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 6, "loss": 0.1}) + "\n")
    assert Rungs(run, LOSS).stops()
    assert read_json(run / "early_stop.json")["rungs"] == {
        "0.25": {"value": pytest.approx(1 / 5), "stopped": True, "others": 1, "metric": "loss"}
    }
    assert not Rungs(run, LOSS).stops()  # resumed by hand: this rung is over
    assert not Rungs(good, LOSS).stops()


def test_a_member_compares_itself_with_what_others_have_written(tmp_path: Path) -> None:
    runs = [member(tmp_path, name, rows=12) for name in "abcd"]
    for number, run in enumerate(runs):
        rows = [{"step": step, "loss": 1.0 + number} for step in range(1, 13)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [Rungs(run, LOSS).stops() for run in runs] == [False, True, True, True]
    decided = [read_json(run / "early_stop.json")["rungs"] for run in runs]
    assert [len(rungs) for rungs in decided] == [2, 1, 1, 1]  # nothing is decided beyond the end


def test_training_is_asked_to_stop_and_never_harmed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(early_stop, "POLL", 0.01)
    rule = {"early_stop": LOSS.model_dump(mode="json")}
    run = member(tmp_path, "run", rows=8)
    asked = threading.Event()

    class Request(StopRequest):
        def ask(self, reason: Any) -> None:
            super().ask(reason)
            asked.set()

    stop = Request()
    with early_stop.watching(run, stop):  # no sweep here
        assert "early-stop" not in {thread.name for thread in threading.enumerate()}
    (tmp_path / "sweep.json").write_text(json.dumps(rule))
    with early_stop.watching(run, stop, rank=1):
        assert "early-stop" not in {thread.name for thread in threading.enumerate()}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "early_stop.json").write_text(
        '{"rungs": {"0.25": {"value": 0.0, "metric": "loss"}}}'
    )
    with early_stop.watching(run, stop):
        assert asked.wait(60)
    assert stop.reason == "early_stop"
    assert "early-stop" not in {thread.name for thread in threading.enumerate()}

    def fails(rungs: Rungs) -> bool:
        raise OSError("no such device")

    monkeypatch.setattr(Rungs, "stops", fails)
    with early_stop.watching(member(tmp_path, "broken", rows=0), Request()):
        for thread in threading.enumerate():
            if thread.name == "early-stop":
                thread.join(60)
    assert "can't be decided, so training goes on: OSError('no such device')" in capfd.readouterr().err


def append(file: Path, *rows: dict[str, Any] | str) -> None:
    with file.open("a") as opened:
        opened.writelines((row if isinstance(row, str) else json.dumps(row) + "\n") for row in rows)


def test_a_look_reads_only_what_is_new(tmp_path: Path) -> None:
    run = member(tmp_path, "run", rows=20_000)
    figures, file = Figures(run, "loss"), run / "metrics.jsonl"
    figures.look()
    before = figures.bytes_read
    assert before == file.stat().st_size and figures.at(20_000) == value_at(run, "loss", 20_000)
    figures.look()
    assert figures.bytes_read == before
    append(file, {"step": 20_001, "loss": 5.0}, '{"step": 20002, "lo')
    figures.look()
    assert figures.bytes_read - before < 100 and figures.values[20_001] == 5
    append(file, 'ss": 7.0}\n')
    figures.look()
    assert figures.values[20_002] == 7
    file.write_text(json.dumps({"step": 1, "loss": 3.0}) + "\n")  # rolled back
    figures.look()
    assert figures.values == {1: 3.0}


def test_an_evaluation_that_isnt_there_yet_costs_no_reading_of_metrics(tmp_path: Path) -> None:
    run = member(tmp_path, "run", rows=2000)
    figures = Figures(run, "knn/top1")
    for _ in range(3):
        figures.look()
    assert figures.at(2000) is None and figures.bytes_read == 0
    append(run / "evaluations.jsonl", {"step": 5, "name": "knn", "values": {"top1": 3.0}})
    figures.look()
    assert figures.at(2000) == 3


def test_only_figures_of_one_kind_are_compared(tmp_path: Path) -> None:
    """Another metric of an earlier rule, values that are none, files of another shape."""
    run = member(tmp_path, "run", rows=6)
    written: dict[str, object] = {
        "another-metric": {"rungs": {"0.25": {"value": 1e-9, "metric": "knn/top1"}}},
        "unnamed": {"rungs": {"0.25": {"value": 1e-9}}},
        "list": [1], "rungs": {"rungs": [1]}, "decision": {"rungs": {"0.25": 3}},
        "diverged": {"rungs": {"0.25": {"value": None, "metric": "loss"}}},
    }  # fmt: skip
    for name, content in written.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "early_stop.json").write_text(json.dumps(content))
    assert not Rungs(run, LOSS).stops()
    assert read_json(run / "early_stop.json")["rungs"]["0.25"]["others"] == 1


def test_a_diverged_member_writes_strict_json(tmp_path: Path) -> None:
    run = member(tmp_path, "run", rows=0)
    append(run / "metrics.jsonl", *({"step": step, "loss": float("nan")} for step in range(1, 8)))
    assert Rungs(run, LOSS).stops()
    text = (run / "early_stop.json").read_text()
    decided = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} isn't JSON"))
    assert decided["rungs"]["0.25"]["value"] is None


def test_a_signal_to_come_back_weighs_more() -> None:
    """A member that is preempted while it gives itself up comes back and finds its rung decided."""
    stop = StopRequest()
    stop.ask("early_stop")
    stop.ask("preempted")
    stop.ask("early_stop")
    assert stop.reason == "preempted"
