"""Which evaluations `keel evaluate` runs, and what it prints."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.errors import ConfigError, RunError
from launch.cli import evaluate as launch_evaluate
from launch.cli.evaluate import chosen, own_evaluations, save_pictures, show, wanted
from pretrain.evaluators.few_shot import FewShotConfig
from pretrain.evaluators.knn import KNNConfig
from pretrain.export.timm_folder import export
from pretrain.finetune import start_of
from pretrain.ports import Scores
from tests.places import FullDisk
from tests.pretrain.run.test_main import config_for, run_on

Said = tuple[int, str, str]
Keel = Callable[..., Said]
FIGURE = re.compile(r"│ *(\w+) *│ *(\w+) *│ *([\d.]+) *│")
"""A row of the table: evaluation, figure, value."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, digits: Path, request: pytest.FixtureRequest) -> Path:
    """Four steps of MAE, with checkpoints at two and four."""
    root = tmp_path_factory.mktemp("runs") / "run"
    steps = ("train.duration=4 steps", "optimizer.warmup=1 steps", "checkpoint.every=2 steps")
    run_on(request.getfixturevalue("_fork_server").run, 1, config_for(root, digits, "data.workers=0", *steps))
    return root


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
        (["kind=knn", "data=x", "k=["], r"k: found '\[', which isn't a value"),
        (["kind=knn", "kind=linear"], "kind: is given twice, as knn and as linear"),
    ],
)
def test_wrong_settings_are_a_line(settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        chosen(settings)


def test_options_are_settings_too(tmp_path: Path) -> None:
    folder = tmp_path / "a: folder=1"
    assert wanted("x", ["k=7"], ["knn"], folder) == [KNNConfig(data=folder, k=7)]
    assert wanted("x", ["kind=knn"], (), folder) == [KNNConfig(data=folder)]
    both = [KNNConfig(data=tmp_path), FewShotConfig(data=tmp_path)]
    assert wanted("x", [], ["knn", "few_shot"], tmp_path) == both


def test_device_and_workers_reach_every_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told: list[tuple[str, Any]] = []

    def judge(source: str, evaluations: Any, **options: Any) -> list[Scores]:
        told.append((source, (str(options["device"]), options["workers"])))
        return []

    monkeypatch.setattr(launch_evaluate, "opener", lambda source, step: source)
    monkeypatch.setattr(launch_evaluate, "judge", judge)
    launch_evaluate.evaluate(["a", "b"], [], device="cpu", workers=3)
    assert told == [("a", ("cpu", 3)), ("b", ("cpu", 3))]
    launch_evaluate.evaluate(["a"], [])
    assert 1 <= told[-1][1][1] <= launch_evaluate.MOST_WORKERS
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="--device: found cuda, but there is no GPU here; use auto or cpu"):
        launch_evaluate.evaluate(["a"], [], device="cuda")


def test_pictures_that_can_not_be_written_are_a_line_and_leave_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    drawn = [Scores("pictures", {}, {}, {"größe": torch.rand(3, 8, 8), "other": torch.rand(3, 8, 8)})]
    with FullDisk(tmp_path) as disk:
        assert save_pictures("resnet18", drawn) == [
            Path("pictures") / f"pictures-{n}.png" for n in ("größe", "other")
        ]
    shutil.rmtree("pictures")
    for at in range(disk.calls):
        with FullDisk(tmp_path, at), pytest.raises(RunError, match=r"\.png: can't be written: No space left"):
            save_pictures("resnet18", drawn)
        left = [each.name for each in Path("pictures").glob("*")]
        assert set(left) <= {"pictures-größe.png"}, disk.log[at]
        shutil.rmtree("pictures", ignore_errors=True)


def test_without_a_run_an_evaluation_must_be_named() -> None:
    with pytest.raises(
        ConfigError, match="resnet18: has no evaluations of its own; name one, such as --kind knn"
    ):
        own_evaluations("resnet18")


def test_json_is_one_list(capsys: pytest.CaptureFixture[str]) -> None:
    show({"runs/x": [Scores("knn", {"top1": 61.25}, {"k": 20})]}, as_json=True)
    assert json.loads(capsys.readouterr().out) == [
        {"source": "runs/x", "name": "knn", "values": {"top1": 61.25}, "details": {"k": 20}}
    ]


def test_the_table_has_every_figure(capsys: pytest.CaptureFixture[str]) -> None:
    show({"runs/x": [Scores("few_shot", {"top1_at_1": 40.0, "top1_at_10": 75.125})]}, as_json=False)
    shown = capsys.readouterr().out
    assert "few_shot" in shown and "top1_at_10" in shown and "75.12" in shown and "runs/x" not in shown


def test_sources_stand_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    show({"ours": [Scores("knn", {"top1": 61.0})], "theirs": [Scores("knn", {"top1": 58.5})]}, as_json=False)
    header, row = [line for line in capsys.readouterr().out.splitlines() if "top1" in line or "ours" in line]
    assert header.index("ours") < header.index("theirs") and row.index("61") < row.index("58.5")


def test_a_run_and_its_export_print_the_same_figures(
    keel: Keel, run: Path, digits: Path, tmp_path: Path
) -> None:
    """However the evaluation is asked for, and beside any model of timm's."""
    backbone = export(run, tmp_path / "backbone").folder
    asked = ("--data", digits, "--kind", "knn", "--kind", "effective_rank")
    code, of_run, err = keel("evaluate", run, *asked)
    assert code == 0, err
    figures = FIGURE.findall(of_run)
    assert [row[:2] for row in figures] == [
        ("knn", "top1"), ("knn", "top5"), ("effective_rank", "effective_rank"),
    ]  # fmt: skip
    assert keel("evaluate", backbone, *asked)[1] == of_run
    _, in_short, _ = keel("evaluate", run, "kind=knn", f"data={digits}")
    assert FIGURE.findall(in_short) == figures[:2]
    code, said, err = keel("evaluate", run, "--against", backbone, *asked, "--json")
    assert code == 0, err
    rows = json.loads(said)
    assert [row["source"] for row in rows] == [str(run)] * 2 + [str(backbone)] * 2
    assert [row["values"] for row in rows[:2]] == [row["values"] for row in rows[2:]]
    own, exported = start_of(str(run)), start_of(str(backbone))  # fine-tuning starts alike, too
    assert replace(own, weights={}) == replace(exported, weights={})
    assert own.weights.keys() == exported.weights.keys()
    assert all(torch.equal(value, exported.weights[name]) for name, value in own.weights.items())


def test_what_cannot_be_judged_is_a_line(keel: Keel, run: Path, digits: Path, tmp_path: Path) -> None:
    """Nothing is written, neither beside the run nor where a classifier was to go."""
    cut = Path(shutil.copytree(run, tmp_path / "cut"))
    for shard in cut.glob("checkpoints/*/rank-00000.safetensors"):
        shard.write_bytes(shard.read_bytes()[:-100])
    before = sorted(tmp_path.rglob("*"))
    knn = ("--kind", "knn", "--data", digits)
    for source, arguments, part in (
        (run, (*knn, "--step", 3), "no checkpoint at step 3; there are: 2, 4"),
        (cut, (*knn, "--step", 4), "rank-00000.safetensors: has "),
        (cut, knn, f"2 checkpoints are damaged; newest: {cut}/checkpoints/step-00000004"),
        (run, ("--kind", "knn", "--data", tmp_path / "none"), "none: no such manifest"),
        (run, ("--kind", "zero_shot", "--data", digits), "needs a run whose objective embeds"),
    ):
        code, out, err = keel("evaluate", source, *arguments)
        assert code == 2 and part in err and not out, err
        assert len(err.splitlines()) == 1 and err.startswith("error: ")
    for source, step, part in ((run, 3, "no checkpoint at step 3"), (cut, 4, "rank-00000.safetensors: has ")):
        code, _, err = keel("finetune", source, "--data", digits, "--step", step, "--to", tmp_path / "to")
        assert code == 2 and part in err and len(err.splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before
