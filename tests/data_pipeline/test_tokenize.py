"""Tokens: a fixed length, the end last and highest; the same from the same captions; bad files refused."""

from __future__ import annotations

import hashlib
import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

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


UNCLEAN = [
    "  a   red\tcircle \n", "a red circle &amp; more", "&amp;lt;b&amp;gt; red", "schÃ¶n kaputt", "",
    "a\u00a0red\u200b circle", "\uff57\uff49\uff44\uff45 red", "l\u2019été na\u00efve \ufb01ne",
    "\x1b[31mred\x1b[0m", "a red circle", "&nbsp;",
]  # fmt: skip


def theirs(file: Path, texts: list[str], clean: str = "whitespace") -> list[list[int]]:
    """As open_clip's HFTokenizer does it: its own cleaning, then the file as it is."""
    from open_clip.tokenizer import get_clean_fn

    library = tokenizers.Tokenizer.from_file(str(file))
    library.encode_special_tokens = True
    return [library.encode(get_clean_fn(clean)(text)).ids for text in texts]


def test_captions_are_cleaned_as_open_clip_cleans_them_where_asked(file: Path) -> None:
    tokenizer, plain = opened(file, cleaning="clip", context=64), opened(file, context=64)
    for text, ids in zip(UNCLEAN, theirs(file, UNCLEAN), strict=True):
        assert (
            tokenizer.encode(text)[: len(ids)].tolist() == ids
            and not tokenizer.encode(text)[len(ids) :].any()
        )
    differing = [text for text in UNCLEAN if (tokenizer.encode(text) != plain.encode(text)).any()]
    assert len(differing) >= 6 and "a red circle" not in differing
    assert tokenizer.hash != plain.hash, "a resumed run would see other tokens"
    assert plain.hash == hashlib.sha256(file.read_bytes()).hexdigest(), "as it was before there was a choice"
    assert (
        pickle.loads(pickle.dumps(tokenizer)).encode(UNCLEAN[0]).tolist()
        == tokenizer.encode(UNCLEAN[0]).tolist()
    )


@given(st.text(max_size=40))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_caption_is_cut_as_open_clip_cuts_it(file: Path, text: str) -> None:
    tokenizer = opened(file, cleaning="clip", context=400)
    row = tokenizer.encode(text)
    assert row[: int(row.argmax()) + 1].tolist() == theirs(file, [text])[0]


def test_marks_of_open_clips_own_in_a_caption_are_mere_text() -> None:
    """The one departure from its tokenizer: a caption can't speak of its own start and end."""
    reference = pytest.importorskip("open_clip").get_tokenizer("ViT-B-32")
    row = open_tokenizer(TokenizerConfig(path="openai")).encode("a <end_of_text> b")
    assert ((row == 49407).sum() == 1 and row[:10].max() < 49407) or row.tolist().index(49407) > 5
    assert reference(["a <end_of_text> b"])[0].tolist().count(49407) == 2


def test_openai_cannot_be_left_uncleaned() -> None:
    assert TokenizerConfig(path="openai", cleaning="clip").cleaning == "clip"
    with pytest.raises(ValueError, match="openai's captions are always cleaned as CLIP's; leave it out"):
        TokenizerConfig(path="openai", cleaning="strip")


def test_cleaning_without_the_extra_says_what_to_install(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(ConfigError, match=r"data.tokenizer.cleaning: clip: needs the package ftfy; install"):
        opened(file, cleaning="clip")


def test_without_the_extra_openai_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipeline.tokenize.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"data.tokenizer.path: openai: .*extra open-clip"):
        open_tokenizer(TokenizerConfig(path="openai"))
