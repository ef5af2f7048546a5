"""Where a sample's captions are, and which of them is taken.

A place is a field (`txt`), or a key inside a JSON field (`json.captions`, `json.text.en`), which leads to one
text or a list of texts. All texts of all places are equally likely, drawn by the sample's own seed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from data_pipeline.tokenize import Tokenizer


@dataclass(frozen=True)
class Place:
    """A field, and the keys that lead to the text inside it where it is JSON."""

    field: str
    keys: tuple[str, ...] = ()

    @property
    def is_json(self) -> bool:
        return bool(self.keys) or self.field.rpartition(".")[2] == "json"


@dataclass(frozen=True)
class TextJob:
    """How the captions of a run become tokens."""

    tokenizer: Tokenizer
    places: tuple[tuple[Place, ...], ...]  # of each source

    def fields(self, source: int) -> tuple[str, ...]:
        return tuple(dict.fromkeys(place.field for place in self.places[source]))


def places(names: Sequence[str], fields: Sequence[str]) -> tuple[Place, ...]:
    """Those of `names` that lead into a set's `fields`. Fields may have dots in their own names."""
    found = []
    for name in names:
        fitting = [field for field in fields if name == field or name.startswith(field + ".")]
        if fitting:
            field = max(fitting, key=len)
            found.append(Place(field, tuple(name[len(field) + 1 :].split(".")) if name != field else ()))
    return tuple(found)


def texts(place: Place, payload: bytes) -> list[str]:
    """The texts at a place, stripped, empty ones left out. Raises ValueError that says what is wrong."""
    try:
        text = payload.decode("utf-8-sig")  # some editors begin a file with a byte order mark
    except UnicodeDecodeError:
        raise ValueError("isn't UTF-8") from None
    if not place.is_json:
        found: list[Any] = [text]
    else:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            raise ValueError("isn't JSON") from None
        for key in place.keys:
            value = value.get(key) if isinstance(value, dict) else None
        found = value if isinstance(value, list) else [] if value is None else [value]
    wrong = [type(one).__name__ for one in found if not isinstance(one, str)]
    if wrong:
        raise ValueError(f"a caption is a text or a list of texts, found {wrong[0]}")
    try:
        "".join(found).encode()
    except UnicodeEncodeError:  # JSON can spell what UTF-8 can't
        raise ValueError("isn't text: half of a surrogate pair") from None
    return [stripped for one in found if (stripped := one.strip())]


def drawn(found: Sequence[str], chance: float) -> str:
    """One of `found`, all equally likely, by a number in [0, 1). Raises ValueError where there is none."""
    if not found:
        raise ValueError("no caption, or only empty ones")
    return found[min(int(chance * len(found)), len(found) - 1)]
