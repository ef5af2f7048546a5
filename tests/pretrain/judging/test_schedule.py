"""Evaluations come when the config says so, once each, also across a restart."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pydantic
import pytest

from configs.errors import ConfigError
from pretrain.clock import Duration, Progress
from pretrain.evaluators import evaluator_config_type, kinds
from pretrain.evaluators.heldout import HeldOutConfig
from pretrain.evaluators.knn import KNNConfig
from pretrain.judging.features import NotFiniteError
from pretrain.judging.schedule import Evaluate, read, write
from pretrain.judging.subject import EvaluatorConfig, Subject
from pretrain.ports import Scores


class Counting(EvaluatorConfig):
    """Scores the number of times anyone was judged by it."""

    kind: str = "counting"

    def build(self) -> Any:
        return lambda subject: Scores(self.title, {"seen": float(subject.looks)})


class Looking:
    def __init__(self) -> None:
        self.looks = 0

    @contextmanager
    def __call__(self) -> Iterator[Any]:
        self.looks += 1
        yield SimpleNamespace(looks=self.looks)


def at(step: int) -> Progress:
    return Progress(step=step, samples=10 * step, total_steps=10, dataset_size=40)


def listener(record: Path, *evaluations: EvaluatorConfig, **options: Any) -> Evaluate:
    return Evaluate(evaluations, Looking(), record, batch_size=10, dataset_size=40, **options)


def walk(evaluate: Evaluate, first: int, last: int) -> None:
    for step in range(first, last + 1):
        evaluate.after_step(SimpleNamespace(progress=at(step)))  # type: ignore[arg-type]


EVERY_EPOCH = Counting(data=Path("x"), every=Duration.parse("1 epochs"))  # 4 steps
AT_THE_END = Counting(data=Path("x"), name="last")


def test_each_when_it_is_due_and_all_at_the_end(tmp_path: Path) -> None:
    told: list[tuple[int, str]] = []
    evaluate = listener(
        tmp_path / "e.jsonl",
        EVERY_EPOCH,
        AT_THE_END,
        tell=lambda at, scores: told.append((at.step, scores.kind)),
    )
    walk(evaluate, 1, 8)
    assert told == [(4, "counting"), (8, "counting")]
    walk(evaluate, 9, 10)
    evaluate.finish(at(10), "done")
    assert told[2:] == [(10, "counting"), (10, "last")]
    rows = read(tmp_path / "e.jsonl")
    assert [(row["step"], row["samples"], row["name"]) for row in rows] == [(s, 10 * s, n) for s, n in told]
    assert [row["values"]["seen"] for row in rows] == [1, 2, 3, 3], "one look serves all that are due"


def test_a_run_that_was_stopped_is_not_judged_at_the_end(tmp_path: Path) -> None:
    evaluate = listener(tmp_path / "e.jsonl", AT_THE_END)
    for reason in ("preempted", "stop_after", "time_limit", "interrupted"):
        evaluate.finish(at(5), reason)  # type: ignore[arg-type]
    assert not read(tmp_path / "e.jsonl")


def test_a_restart_repeats_nothing_and_survives_a_torn_line(tmp_path: Path) -> None:
    record = tmp_path / "e.jsonl"
    walk(listener(record, EVERY_EPOCH), 1, 6)
    with record.open("a") as file:
        file.write('{"step": 8, "na')
    again = listener(record, EVERY_EPOCH)
    walk(again, 3, 8)
    assert [row["step"] for row in read(record)] == [4, 8]
    again.finish(at(8), "done")
    assert [row["step"] for row in read(record)] == [4, 8]


def test_a_figure_that_is_not_finite_is_null_in_the_file_and_nan_when_read(tmp_path: Path) -> None:
    record = tmp_path / "e.jsonl"
    write(record, at(4), Scores("heldout", {"error": float("nan"), "other": 2.0, "third": float("inf")}))

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    [row] = [json.loads(line, parse_constant=refuse) for line in record.read_text().splitlines()]
    assert row["values"] == {"error": None, "other": 2.0, "third": None}
    [row] = read(record)
    assert math.isnan(row["values"]["error"]) and row["values"]["other"] == 2.0


@pytest.mark.parametrize("line", ["[]", "3", "null", '{"step": null, "name": "a", "values": {}}',
                                  '{"step": 1, "name": "a", "values": []}', '{"step": 1, "values": {}}',
                                  '{"step": "x", "name": "a", "values": {}}'])  # fmt: skip
def test_valid_json_that_is_no_score_is_passed_over(tmp_path: Path, line: str) -> None:
    record = tmp_path / "e.jsonl"
    record.write_text(line + '\n{"step": 4, "samples": 40, "name": "counting", "values": {"seen": 1}}\n')
    assert [row["step"] for row in read(record)] == [4]


class Diverged(Counting):
    """Can't be made: what the model gives isn't finite."""

    kind: str = "diverged"

    def build(self) -> Any:
        def judge(subject: Any) -> Scores:
            raise NotFiniteError("features: 3 of 4 aren't finite numbers")

        return judge


def test_a_diverged_model_is_told_and_left_to_the_watch_over_losses(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    evaluate = listener(
        tmp_path / "e.jsonl", Diverged(data=Path("x"), every=Duration.parse("1 epochs")), EVERY_EPOCH
    )
    walk(evaluate, 1, 4)
    assert [(row["step"], row["name"]) for row in read(tmp_path / "e.jsonl")] == [(4, "counting")]
    assert "step 4: no figure of diverged: features: 3 of 4" in caplog.text


def test_two_evaluations_need_two_names(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"evaluate\.1\.name: counting is taken"):
        listener(tmp_path / "e.jsonl", EVERY_EPOCH, EVERY_EPOCH)


def test_minutes_cannot_schedule_an_evaluation() -> None:
    with pytest.raises(pydantic.ValidationError, match="every so many steps, samples or epochs"):
        KNNConfig(data=Path("x"), every="10 min")  # type: ignore[arg-type]


def test_the_folder_is_the_registry() -> None:
    assert {"few_shot", "heldout", "knn"} <= set(kinds())
    assert evaluator_config_type("knn") is KNNConfig
    with pytest.raises(ValueError, match=r"known: .*few_shot, heldout, knn.*did you mean knn"):
        evaluator_config_type("knm")
    with pytest.raises(ValueError, match="no such evaluation"):
        evaluator_config_type("subject")


def test_a_bare_encoder_has_no_pretext_task(pixels: Subject) -> None:
    with pytest.raises(ConfigError, match=r"evaluate\.heldout: an encoder alone has no objective"):
        HeldOutConfig(data=Path("x")).build()(pixels)
