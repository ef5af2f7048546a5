"""The account of an indexing: what members and shards were left out, and what looks wrong about the rest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from configs.errors import DataError
from data_pipeline.books import Books, LeftOut
from data_pipeline.fields import IMAGE_FIELDS
from data_pipeline.members import FOLDER

NO_PICTURE = "samples have no picture"
MORE_PICTURES = "samples have more than one picture, of which one is read"
APART = (
    "samples have the key of an earlier one in their shard; the members of a sample have to follow each "
    "other (tar --sort=name)"
)
AGAIN = "samples begin where a field came a second time within one, which webdataset refuses"
NO_LABEL = "samples have no label"
BAD_LABEL = "samples have a label that can't be used"
SAME_BYTES = "shards hold the same bytes as one before"

_HINTS = {
    NO_LABEL: "; a label is a field of its own (cls, or --label-field), not a key inside a JSON field",
    BAD_LABEL: "; a label is written as a number from 0 on, the place of its class in --classes",
}
_FIELDS_SHOWN = 6


@dataclass
class Account:
    """Members and shards are each taken or left out for a reason; `doubts` are about what was taken."""

    members: Books = field(default_factory=lambda: Books("members"))
    shards: Books = field(default_factory=lambda: Books("shards"))
    doubts: dict[str, LeftOut] = field(default_factory=dict)

    def doubt(self, what: str, examples: Iterable[str], count: int) -> None:
        """Enter `count` samples or shards of which `what` is true."""
        if count:
            self.doubts.setdefault(what, LeftOut()).add(examples, count)

    def add(self, other: Account) -> None:
        """Enter another account into this one."""
        self.members.add(other.members)
        self.shards.add(other.shards)
        for what, seen in other.doubts.items():
            self.doubt(what, seen.examples, seen.count)

    def lines(self, fields: Sequence[str] = ()) -> list[str]:
        """One line for each reason and doubt; the set's `fields` give a hint where pictures are missing."""
        lines = [*self.shards.lines(), *self.members.lines()]
        for what, seen in sorted(self.doubts.items()):
            more = ", ..." if seen.count > len(seen.examples) else ""
            hint = _hint(fields) if what == NO_PICTURE else _HINTS.get(what, "")
            lines.append(f"{seen.count} {what} (for instance {', '.join(seen.examples)}{more}){hint}")
        return lines

    def require_nothing_left_out(self, source: str, fields: Sequence[str] = ()) -> None:
        """What `--strict` asks for: raises `DataError` with every reason on a line.

        Entries of folders are no reason: they hold nothing.
        """
        strict = Account(self.members, self.shards, self.doubts)
        strict.members = Books("members", left_out={**self.members.left_out})
        strict.members.left_out.pop(FOLDER, None)
        lines = strict.lines(fields)
        if lines:
            raise DataError("\n".join(f"{source}: {line} (an error because of --strict)" for line in lines))

    def as_dict(self) -> dict[str, Any]:
        """As it stands in a manifest's `about`."""
        return {
            "members": self.members.as_dict(),
            "shards": self.shards.as_dict(),
            "doubts": {
                what: {"count": seen.count, "examples": seen.examples}
                for what, seen in sorted(self.doubts.items())
            },
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Account:
        """The inverse of `as_dict`."""
        doubts = {
            what: LeftOut(seen["count"], list(seen["examples"])) for what, seen in content["doubts"].items()
        }
        return cls(Books.from_dict(content["members"]), Books.from_dict(content["shards"]), doubts)


def some(fields: Sequence[str]) -> str:
    """A list of fields for a message: thousands, where names have dots, are cut short."""
    more = f" and {len(fields) - _FIELDS_SHOWN} more" if len(fields) > _FIELDS_SHOWN + 1 else ""
    return ", ".join(fields[: _FIELDS_SHOWN if more else None]) + more


def _hint(fields: Sequence[str]) -> str:
    """What to do where pictures are there under other names."""
    looking = [name for name in fields if "." in name and name.rpartition(".")[2] in IMAGE_FIELDS]
    if not looking:
        return ""
    if len(looking) <= _FIELDS_SHOWN:
        taken = f"if it is in {' or '.join(looking)}, index with --picture-field"
    else:
        taken = f"there are {len(looking)} fields with endings of pictures"
    return f"; {taken}; if names have dots of their own, with --split-at last"
