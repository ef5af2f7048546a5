"""What can't be judged is refused when the run is prepared, by its labels, not at the first evaluation."""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from configs.errors import ConfigError, DataError, UserError
from data_pipeline.indexing import add_shard
from data_pipeline.manifest import Manifest
from data_pipeline.shards import write_shard
from pretrain.evaluators.few_shot import FewShotConfig
from pretrain.evaluators.knn import KNNConfig
from pretrain.evaluators.linear import LinearConfig
from pretrain.evaluators.retrieval import RetrievalConfig
from pretrain.evaluators.zero_shot import ZeroShotConfig
from pretrain.judging.features import Features, fixed_fifth
from pretrain.judging.subject import EvaluatorConfig, Subject

NAMES = ("ant", "bee", "cat")


def make(folder: Path, labels: Sequence[int], classes: Sequence[str] = NAMES, captions: int = 0) -> Path:
    """Pictures in one colour a class, with these labels; the first `captions` of them have one."""
    samples = []
    for number, label in enumerate(labels):
        buffer = io.BytesIO()
        Image.new(
            "RGB", (32, 32), (80 * label % 256 + number % 7, (120 - 40 * label) % 256, number % 50)
        ).save(buffer, "PNG")
        fields = {"png": buffer.getvalue(), "cls": str(label).encode()}
        samples.append((f"{number:04d}", fields | ({"txt": b"one"} if number < captions else {})))
    folder.mkdir(parents=True)
    write_shard(folder / "0.tar", samples)
    made = add_shard(folder, folder / "0.tar", "0.tar")
    Manifest(folder, (made.shard,), tuple(made.fields), tuple(classes)).save()
    return folder / "manifest.json"


def refused_before_and_while(config: EvaluatorConfig, subject: Subject) -> str:
    """What is said when a run is prepared; the evaluation itself must say the same, as of remote sets."""
    with pytest.raises(UserError) as before:
        config.require_data()
    with pytest.raises(UserError) as during:
        config.build()(subject)
    assert str(before.value) == str(during.value) and len(str(before.value).splitlines()) == 1
    return str(before.value)


def test_labels_that_are_identifiers_are_refused_in_a_line(tmp_path: Path, pixels: Subject) -> None:
    data = make(tmp_path / "d", [12, 12, 30_000_000, 30_000_000], classes=())
    for config in (KNNConfig(data=data), LinearConfig(data=data)):
        said = refused_before_and_while(config, pixels)
        assert "has labels up to 30000000, more than it has images" in said and "--labels-as-names" in said
    few = make(tmp_path / "few", [12, 12, 99_999, 99_999], classes=())
    KNNConfig(data=few, k=2).require_data()


def test_a_class_name_of_another_encoding_is_no_prompt(tmp_path: Path) -> None:
    data = make(tmp_path / "d", [0, 1], classes=("bar", "caf\udce9"))
    with pytest.raises(
        ConfigError, match=r"label 1 is called 'caf\\udce9', which isn't UTF-8 text; give a file"
    ):
        ZeroShotConfig(data=data).names(Manifest.load(data))


def test_too_few_labels_of_a_class_name_it(tmp_path: Path, pixels: Subject) -> None:
    data = make(tmp_path / "d", [0] * 20 + [1] * 6 + [2] * 3)
    said = refused_before_and_while(FewShotConfig(data=data, shots=(1, 5)), pixels)
    assert said == (
        "evaluate.few_shot.shots: found 5, but 'cat' has 2 labelled images to learn from; "
        "set shots to 2 or less, or give more images of it"
    )
    said = refused_before_and_while(FewShotConfig(data=data, name="mine"), pixels)
    assert "evaluate.mine.shots: found 10, but 'cat' has 2" in said and "(2 classes have too few)" in said
    FewShotConfig(data=data, shots=(1, 2), draws=1).build()(replace(pixels, _seen={}))


def test_one_image_a_class_leaves_nothing_to_judge(tmp_path: Path, pixels: Subject) -> None:
    data = make(tmp_path / "d", [0, 1, 2])
    for config in (KNNConfig(data=data, k=1), LinearConfig(data=data), FewShotConfig(data=data, shots=(1,))):
        said = refused_before_and_while(config, pixels)
        assert "no class has an image to learn from and another to be judged on" in said and str(data) in said
    both = KNNConfig(
        data=data, labelled=make(tmp_path / "l", [0, 1, 2]), k=1
    )  # a set of its own to learn from
    both.require_data()
    assert both.build()(replace(pixels, _seen={})).values["top1"] == 100


def test_two_images_a_class_can_not_choose_a_rate(tmp_path: Path, pixels: Subject) -> None:
    data = make(tmp_path / "d", [0, 1, 2] * 2)
    said = refused_before_and_while(LinearConfig(data=data), pixels)
    assert said.startswith(
        "evaluate.linear.learning_rates: found 5, but no class has two images to learn from"
    )
    one = LinearConfig(data=data, learning_rates=(0.3,), epochs=3)
    one.require_data()
    assert 0 <= one.build()(replace(pixels, _seen={})).values["top1"] <= 100


def test_more_neighbours_than_images_are_refused(tmp_path: Path, pixels: Subject) -> None:
    data = make(tmp_path / "d", [0, 1, 2] * 4)
    said = refused_before_and_while(KNNConfig(data=data), pixels)
    assert said == (
        "evaluate.knn.k: found 20, but there are 9 labelled images to be neighbours; set k to 9 or less"
    )
    KNNConfig(data=data, k=9).build()(replace(pixels, _seen={}))


def test_what_can_not_be_learnt_or_is_not_judged_is_said(
    tmp_path: Path, pixels: Subject, caplog: pytest.LogCaptureFixture
) -> None:
    """The only image of a class is learnt from; classes without one to learn from count as wrong."""
    data = make(tmp_path / "d", [0] * 5 + [1] + [2] * 5)
    config = KNNConfig(data=data, k=3)
    with caplog.at_level(logging.WARNING):
        config.require_data()
    assert "a class ('bee') with one image only: it is learnt from and not judged" in caplog.text
    learn, judge = fixed_fifth(pixels.features(data))
    assert 1 in learn.labels and 1 not in judge.labels and len(learn) + len(judge) == 11
    caplog.clear()
    apart = KNNConfig(data=data, labelled=make(tmp_path / "l", [0] * 4 + [1] * 4), k=1)
    with caplog.at_level(logging.WARNING):
        apart.require_data()
    assert "a class ('cat') without an image to learn from: each of its images counts as wrong" in caplog.text
    strangers = KNNConfig(data=make(tmp_path / "s", [2, 2]), labelled=apart.labelled, k=1)
    with pytest.raises(DataError, match="no class has an image to learn from"):
        strangers.require_data()


def test_the_fifth_of_larger_classes_is_the_one_it_always_was() -> None:
    """By hand, of generator [0, label]: a published figure stays comparable."""
    labels = torch.tensor([4] * 10)
    _, judge = fixed_fifth(Features(torch.arange(10.0)[:, None], labels))
    assert judge.values.flatten().tolist() == sorted(judge.values.flatten().tolist()) and len(judge) == 2
    import numpy as np

    assert judge.values.flatten().tolist() == sorted(np.random.default_rng([0, 4]).permutation(10)[:2])


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("ant\nbee\nant\n", "labels 0 and 2 are both called 'ant'"),
        ("ant\nbee\n", "names 2 classes, .* has 3"),
    ],
)
def test_a_file_of_class_names_that_can_not_be_is_refused(tmp_path: Path, written: str, said: str) -> None:
    data, names = make(tmp_path / "d", [0, 1, 2]), tmp_path / "names.txt"
    names.write_text(written)
    with pytest.raises(ConfigError, match=f"evaluate.zero_shot.classes: .*names.txt.*{said}"):
        ZeroShotConfig(data=data, classes=names).require_data()


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("ending", [".txt", ".json"])
def test_a_byte_order_mark_is_no_part_of_a_name_or_a_prompt(tmp_path: Path, mark: bytes, ending: str) -> None:
    data = make(tmp_path / "d", [0, 1, 2])
    names, prompts = tmp_path / f"names{ending}", tmp_path / "prompts.txt"
    names.write_bytes(mark + (b'["ant", "bee", "cat"]' if ending == ".json" else b"ant\r\nbee\r\ncat\r\n"))
    prompts.write_bytes(mark + b"{} here\r\n")
    config = ZeroShotConfig(data=data, classes=names, templates=prompts)
    assert tuple(config.names(Manifest.load(data))) == NAMES and list(config.prompts()) == ["{} here"]


def test_labels_beyond_the_names_are_refused(tmp_path: Path) -> None:
    data = make(tmp_path / "d", [0, 1, 3])
    with pytest.raises(DataError, match="has label 3, but only 3 classes are named"):
        ZeroShotConfig(data=data).require_data()


@pytest.mark.parametrize(("captions", "said"), [(0, "found txt, but .* has the fields cls, png"),
                                                (2, "sample '0002' has no caption")])  # fmt: skip
def test_images_without_captions_are_refused(tmp_path: Path, captions: int, said: str) -> None:
    data = make(tmp_path / "d", [0, 1, 2], captions=captions)
    with pytest.raises(UserError, match=said):
        RetrievalConfig(data=data).require_data()
    RetrievalConfig(data=make(tmp_path / "whole", [0, 1, 2], captions=3)).require_data()


def test_a_helper_beside_the_evaluations_is_no_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it is called: only a module that defines a config of its own name is one."""
    import pkgutil
    import sys
    from types import ModuleType, SimpleNamespace

    from pretrain import evaluators

    there = evaluators.kinds()
    helper: Any = ModuleType("pretrain.evaluators.novel")
    helper.Something, helper.KNNConfig = type("Something", (), {}), KNNConfig
    monkeypatch.setitem(sys.modules, "pretrain.evaluators.novel", helper)
    modules = [*pkgutil.iter_modules(evaluators.__path__), SimpleNamespace(name="novel")]
    monkeypatch.setattr(evaluators.pkgutil, "iter_modules", lambda path: modules)
    assert evaluators.kinds() == there and "novel" not in there
    for name in ("novel", "features", "subject"):
        with pytest.raises(ValueError, match="no such evaluation"):
            evaluators.evaluator_config_type(name)
