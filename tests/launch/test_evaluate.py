"""Which evaluations `keel evaluate` runs, and what it prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from configs.errors import ConfigError
from launch.evaluate import chosen, own_evaluations, show
from pretrain.evaluators.knn import KNNConfig
from pretrain.types import Scores


def test_settings_make_an_evaluation(tmp_path: Path) -> None:
    evaluation = chosen(["kind=knn", f"data={tmp_path}", "k=7"])
    assert evaluation == KNNConfig(data=tmp_path, k=7)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["kind=kn", "data=x"], "kind: found 'kn'; no such evaluation; .*did you mean knn"),
        (["data=x"], "kind: found None; no such evaluation; known: .*knn"),
        (["knn"], "knn: a setting reads name=value, such as kind=knn"),
        (["kind=knn"], "evaluate: data: is missing; set it"),
        (["kind=knn", "data=x", "k=none"], "evaluate: k: found 'none'; "),
    ],
)
def test_wrong_settings_are_a_line(settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        chosen(settings)


def test_without_a_run_an_evaluation_must_be_named() -> None:
    with pytest.raises(
        ConfigError, match="resnet18: has no evaluations of its own; name one, such as kind=knn"
    ):
        own_evaluations("resnet18")


def test_json_is_one_list(capsys: pytest.CaptureFixture[str]) -> None:
    show([Scores("knn", {"top1": 61.25}, {"k": 20})], as_json=True)
    assert json.loads(capsys.readouterr().out) == [
        {"name": "knn", "values": {"top1": 61.25}, "details": {"k": 20}}
    ]


def test_the_table_has_every_figure(capsys: pytest.CaptureFixture[str]) -> None:
    show([Scores("few_shot", {"top1_at_1": 40.0, "top1_at_10": 75.125})], as_json=False)
    shown = capsys.readouterr().out
    assert "few_shot" in shown and "top1_at_10" in shown and "75.12" in shown
