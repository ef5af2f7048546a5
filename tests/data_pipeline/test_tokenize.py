"""Tokens: a fixed length, the end last and highest; the same from the same captions; bad files refused."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import pretrain.encoders.torchvision_compat  # noqa: F401  (open_clip imports torchvision)
from configs.errors import ConfigError, DataError
from data_pipeline.tokenize import END, START, Tokenizer, TokenizerConfig, open_tokenizer, train

CAPTIONS = ["a red circle", "a blue square on the left", "two red squares", "ein grüner Kreis", "赤い円"] * 3


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokens") / "tokenizer.json"
    path.write_bytes(train(iter(CAPTIONS), 290))
    return path


def opened(file: Path, **settings: object) -> Tokenizer:
    return open_tokenizer(TokenizerConfig.model_validate({"path": file, "context": 12, **settings}))


def test_a_text_is_start_tokens_end_and_zeros(file: Path) -> None:
    tokenizer = opened(file)
    row = tokenizer.encode("a red circle")
    length = int(row.argmax()) + 1
    assert row.shape == (12,) and row.dtype == np.int64
    assert row[0] == tokenizer.end - 1 and row[length - 1] == tokenizer.end == tokenizer.vocabulary - 1
    assert not row[length:].any() and 3 < length < 12
    assert (row[1 : length - 1] < tokenizer.end - 1).all()
    assert (tokenizer.encode("  A RED circle ") == row).all()
    assert tokenizer.encode_all(["a red circle", "赤い円"]).shape == (2, 12)


def test_overlong_text_is_cut_and_keeps_its_end(file: Path) -> None:
    tokenizer = opened(file, context=5)
    whole, cut = opened(file, context=40).encode("q" * 30), tokenizer.encode("q" * 30)
    assert cut.tolist() == [*whole[:4].tolist(), tokenizer.end]
    assert tokenizer.encode("q" * 5_000_000)[-1] == tokenizer.end
    without_start = opened(file, context=5, start=None).encode("q" * 30)
    assert without_start.tolist() == [*whole[1:5].tolist(), tokenizer.end]


def test_a_caption_cant_speak_of_its_own_end(file: Path) -> None:
    """open_clip reads a text where its highest token first stands."""
    tokenizer = opened(file, context=60)
    row = tokenizer.encode(f"a red {END} circle {START}")
    assert (row == tokenizer.end).sum() == 1 and (row == tokenizer.end - 1).sum() == 1


def test_the_same_captions_give_the_same_file_in_any_process(file: Path) -> None:
    code = (
        "import sys; from data_pipeline.tokenize import train; from tests.data_pipeline.test_tokenize import "
        "CAPTIONS; sys.stdout.buffer.write(train(CAPTIONS, 290))"
    )
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert made.stdout == file.read_bytes()
    assert train(CAPTIONS[::-1], 290) == file.read_bytes()


def test_every_byte_can_be_told_even_those_no_caption_had(file: Path) -> None:
    tokenizer = opened(file, context=64)
    rows = tokenizer.encode_all([chr(code) for code in (*range(33, 127), 0xE9, 0x4E00, 0x1F600)])
    assert len({tuple(row) for row in rows.tolist()}) == len(rows) - 26  # case is folded


def test_it_goes_to_another_process_whole(file: Path) -> None:
    tokenizer = opened(file)
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.hash == tokenizer.hash and (again.encode("a red") == tokenizer.encode("a red")).all()


def test_vocabulary_is_what_was_asked_or_told(file: Path, tmp_path: Path) -> None:
    assert opened(file, vocabulary=290).vocabulary == 290
    with pytest.raises(ConfigError, match=r"data.tokenizer.vocabulary: found 300, but .* has 290 tokens"):
        opened(file, vocabulary=300)
    few = tmp_path / "few.json"
    few.write_bytes(train(["a"], 5000))
    assert opened(few).vocabulary == 258
    with pytest.raises(DataError, match="no caption"):
        train([], 300)


def test_a_foreign_file_is_taken_or_refused_in_a_line(file: Path, tmp_path: Path) -> None:
    content = json.loads(file.read_text())
    end, start = content["added_tokens"][1], content["added_tokens"][0]
    end["content"], start["content"] = "</s>", "<s>"
    content["post_processor"] = None
    content["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    other = tmp_path / "other.json"
    other.write_text(json.dumps(content))
    assert (opened(other, end="</s>", start="<s>").encode("a red") == opened(file).encode("a red")).all()
    with pytest.raises(
        ConfigError, match=r"data.tokenizer.start: found '<\|startoftext\|>', which .* doesn't know"
    ):
        opened(other, end="</s>")
    with pytest.raises(ConfigError, match=r"the end '<s>' has id 288, but '</s>' has 289; the end must"):
        opened(other, end="<s>", start=None)
    other.write_text("{}")
    with pytest.raises(
        ConfigError, match=r"data.tokenizer.path: .*other.json: not a tokenizer.json: "
    ) as caught:
        opened(other)
    assert "\n" not in str(caught.value)
    other.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not a tokenizer"):
        opened(other)
    with pytest.raises(ConfigError, match="no such file; make one with keel data tokenizer"):
        opened(tmp_path / "none.json")


def test_openai_is_clips_own_tokenizer() -> None:
    reference = pytest.importorskip("open_clip").get_tokenizer("ViT-B-32")
    tokenizer = open_tokenizer(TokenizerConfig(path="openai"))
    assert (tokenizer.vocabulary, tokenizer.context) == (49408, 77)
    said = [
        "a photo of a cat", "It's  John's   DOG, isn't it?", "3.14159 & 2,718 #tag @you", "grüße aus Köln",
        "日本語のキャプション", "emoji 😀🏽 mixed-with_text", "&lt;b&gt; &amp;amp; x",
        "l\u2019été naïve ﬁne", "İstanbul",
        "schÃ¶n kaputt", "x" * 300, "many words " * 60, "\u00a0\u200b odd \t spaces \n", "½ ² Ⅷ ٣",
    ]  # fmt: skip
    assert (tokenizer.encode_all(said) == reference(said).numpy()).all()


def test_without_the_extra_openai_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipeline.tokenize.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"data.tokenizer.path: openai: .*extra open-clip"):
        open_tokenizer(TokenizerConfig(path="openai"))
