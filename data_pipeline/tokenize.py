"""Captions to tokens, and the making of a tokenizer: the only module that knows the `tokenizers` library.

A text is [start] tokens [end] 0 0 ... of a fixed length, as open_clip lays it out: padding is id 0 and `end`
is the highest id of all, because open_clip finds the end of a text as the largest number in it.
"""

from __future__ import annotations

import gzip
import hashlib
import html
import importlib
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import tokenizers
from pydantic import Field, PositiveInt, model_validator
from tokenizers import Regex, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import decoders as token_decoders

from configs.errors import ConfigError, DataError
from configs.loading import Config
from data_pipeline.hashing import Int64s

START, END = "<|startoftext|>", "<|endoftext|>"
LEAST_VOCABULARY = 256 + 2
"""All bytes, start and end."""

_OPENAI_FILE = "bpe_simple_vocab_16e6.txt.gz"  # in the package open_clip
_OPENAI_MERGES = 49_152 - 256 - 2  # the file lists more than CLIP uses
# How CLIP cuts a text into words (Radford et al. 2021, arXiv:2103.00020; OpenAI's simple_tokenizer.py).
_OPENAI_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_LONGEST_TOKEN = 256  # characters: what lies further than context * this is cut before it costs time


class TokenizerConfig(Config):
    """YAML key `data.tokenizer`. What the file holds fixes a run, and so does the rest of this."""

    path: Literal["openai"] | Path  # a tokenizer.json; openai: CLIP's own, from the extra open-clip
    context: int = Field(77, ge=3)  # tokens of a text, start and end included: cut or padded to it
    vocabulary: PositiveInt | None = Field(
        None, ge=LEAST_VOCABULARY
    )  # what the file must have; or be made with
    start: str | None = START  # put before each text; null for none
    end: str = END  # put behind it; must have the highest id
    # What is done to a caption first. clip: encodings mended, HTML entities resolved, runs of blanks made
    # one, as CLIP and every tokenizer that open_clip opens; needs the extra open-clip. strip: blanks at both
    # ends. None: clip for openai, strip for a file.
    cleaning: Literal["strip", "clip"] | None = None

    @model_validator(mode="after")
    def _openai_is_cleaned(self) -> TokenizerConfig:
        if self.path == "openai" and self.cleaning == "strip":
            raise ValueError("cleaning: openai's captions are always cleaned as CLIP's; leave it out")
        return self

    def placed(self) -> TokenizerConfig:
        """The same with an absolute path."""
        if self.path == "openai":
            return self
        return self.model_copy(update={"path": self.path.expanduser().absolute()})


class Tokenizer:
    """Texts to rows of tokens. Plain data: it can be sent to another process."""

    def __init__(self, config: TokenizerConfig, content: bytes):
        """`content`: the bytes of the tokenizer.json, or of OpenAI's list of merges, unpacked."""
        self.config, self._content = config, content
        # Made at once, so that what is wrong with it is said where it is opened.
        self._library = self._opened()

    @property
    def context(self) -> int:
        """Tokens of a text."""
        return self.config.context

    @property
    def end(self) -> int:
        """The id behind each text, the highest of all."""
        return self._ids[1]

    @property
    def vocabulary(self) -> int:
        """Number of ids: rows of an embedding."""
        return self.end + 1

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the tokenizer's content, and of how it cleans where that isn't the plain way."""
        cleaned = self.config.path != "openai" and self.config.cleaning == "clip"
        return hashlib.sha256(self._content + (b"\0clip" if cleaned else b"")).hexdigest()

    def encode(self, text: str) -> Int64s:
        """(context,) int64. Overlong text is cut, its end kept; special tokens in a text are mere text."""
        cleaned = self._clean(text)[: self.context * _LONGEST_TOKEN]
        found = self._library.encode(cleaned, add_special_tokens=False).ids
        start, end = self._ids
        before = [] if start is None else [start]
        row = np.zeros(self.context, np.int64)
        tokens = [*before, *found[: self.context - 1 - len(before)], end]
        row[: len(tokens)] = tokens
        return row

    def encode_all(self, texts: Sequence[str]) -> Int64s:
        """(N, context) int64."""
        return np.stack([self.encode(text) for text in texts])

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[TokenizerConfig, bytes]]:
        return Tokenizer, (self.config, self._content)

    def _opened(self) -> tokenizers.Tokenizer:
        if self.config.path == "openai":
            cleaned = _clip_cleaner("path: openai")
            self._clean: Callable[[str], str] = lambda text: cleaned(text).lower()
            library = _openai(self._content)
        else:
            self._clean = _clip_cleaner("cleaning: clip") if self.config.cleaning == "clip" else str.strip
            library = _from_json(self._content, self.config.path)
        library.no_truncation()
        library.no_padding()
        library.encode_special_tokens = True
        self._ids = self._special(library)
        return library

    def _special(self, library: tokenizers.Tokenizer) -> tuple[int | None, int]:
        """The ids of start and end."""
        start, end, path = self.config.start, self.config.end, self.config.path
        known = library.get_vocab(with_added_tokens=True)
        for setting, token in (("start", start), ("end", end)):
            if token is not None and token not in known:
                raise ConfigError(
                    f"data.tokenizer.{setting}: found {token!r}, which {path} doesn't know; name the token "
                    f"that {setting}s its texts"
                )
        highest = max(known, key=known.__getitem__)
        if known[end] != known[highest]:
            raise ConfigError(
                f"data.tokenizer: {path}: the end {end!r} has id {known[end]}, but {highest!r} has "
                f"{known[highest]}; the end must have the highest: make one with keel data tokenizer, or set "
                "data.tokenizer.end"
            )
        count, wanted = known[end] + 1, self.config.vocabulary
        if wanted is not None and wanted != count:
            raise ConfigError(
                f"data.tokenizer.vocabulary: found {wanted}, but {path} has {count} tokens; set that, or "
                "make another with keel data tokenizer"
            )
        return None if start is None else known[start], known[end]


def open_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """Read the tokenizer that `config` names. Raises `ConfigError` in a line."""
    if config.path == "openai":
        return Tokenizer(config, _openai_merges())
    try:
        return Tokenizer(config, config.path.read_bytes())
    except FileNotFoundError:
        raise ConfigError(
            f"data.tokenizer.path: {config.path}: no such file; make one with keel data tokenizer"
        ) from None
    except IsADirectoryError:
        inside = config.path / "tokenizer.json"
        raise ConfigError(
            f"data.tokenizer.path: {config.path}: is a folder; "
            + (f"name the file in it: {inside}" if inside.is_file() else "there is no tokenizer.json in it")
        ) from None
    except OSError as error:
        raise ConfigError(f"data.tokenizer.path: {config.path}: can't be read: {error.strerror}") from None


def train(captions: Iterable[str], vocabulary: int) -> bytes:
    """A tokenizer.json: byte-level BPE (Sennrich et al. 2016, arXiv:1508.07909) of up to `vocabulary` tokens.

    The same captions give the same bytes. Case is folded, as CLIP does. Few captions may not give so many
    tokens. Raises `DataError` where there is no caption at all.
    """
    if vocabulary < LEAST_VOCABULARY:
        raise DataError(f"a vocabulary of {vocabulary}: at least {LEAST_VOCABULARY} tokens are needed")
    made = tokenizers.Tokenizer(models.BPE())
    made.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    made.decoder = token_decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - 2,
        min_frequency=2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    seen = _Counted(captions)
    made.train_from_iterator(seen, trainer)
    if not seen.count:
        raise DataError("no caption to make a tokenizer from")
    made.add_special_tokens([START, END])  # behind all others: the end gets the highest id
    ids = [(token, made.token_to_id(token)) for token in (START, END)]
    made.post_processor = processors.TemplateProcessing(single=f"{START} $A {END}", special_tokens=ids)
    return made.to_str(pretty=True).encode() + b"\n"


class _Counted:
    def __init__(self, captions: Iterable[str]):
        self._captions, self.count = captions, 0

    def __iter__(self) -> Iterator[str]:
        for caption in self._captions:
            self.count += 1
            yield caption


def _from_json(content: bytes, path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(content.decode())
    except Exception as error:  # the library raises plain Exception
        told = " ".join(str(error).split())
        raise ConfigError(f"data.tokenizer.path: {path}: not a tokenizer.json: {told}") from None


def _openai_merges() -> bytes:
    spec = importlib.util.find_spec("open_clip")  # found, not imported: it would bring all of open_clip
    for folder in (spec.submodule_search_locations or []) if spec else []:
        file = Path(folder) / _OPENAI_FILE
        if file.is_file():
            return gzip.decompress(file.read_bytes())
    raise ConfigError(
        "data.tokenizer.path: openai: its vocabulary comes with the package open_clip_torch, which isn't "
        "here; install keel's extra open-clip, or name a tokenizer.json"
    )


def _openai(content: bytes) -> tokenizers.Tokenizer:
    """CLIP's BPE from its list of merges: bytes, bytes that end a word, one token for each merge."""
    merges = [
        (a, b) for a, b in (line.split() for line in content.decode().split("\n")[1 : _OPENAI_MERGES + 1])
    ]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(letter + "</w>" for letter in letters), *(a + b for a, b in merges)]
    vocabulary = {word: number for number, word in enumerate(words)}
    made = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges, end_of_word_suffix="</w>"))
    split = pre_tokenizers.Split(Regex(_OPENAI_WORDS), behavior="removed", invert=True)
    made.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    made.add_special_tokens([START, END])
    return made


def _clip_cleaner(setting: str) -> Callable[[str], str]:
    """As CLIP and open_clip clean captions: encodings, HTML entities (some are escaped twice), blanks."""
    try:
        fix_text = importlib.import_module("ftfy").fix_text
    except ImportError:
        raise ConfigError(
            f"data.tokenizer.{setting}: needs the package ftfy; install keel's extra open-clip"
        ) from None

    def clean(text: str) -> str:
        return " ".join(html.unescape(html.unescape(fix_text(text))).split())

    return clean
