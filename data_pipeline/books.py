"""What went in, what came out, and why the rest didn't: books that balance.

Whatever `keel data pack` and `index` are given is entered once: as taken, or as left out for a reason. The
balance is printed, stands in the manifest under `about`, and is an error where the user asked for strictness.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from configs.errors import DataError

_EXAMPLES = 3  # kept of each reason: enough to find the others, small enough to print


@dataclass
class LeftOut:
    """How many things were left out for one reason, and the first few of them."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, examples: Iterable[str], count: int) -> None:
        self.count += count
        self.examples += list(examples)[: _EXAMPLES - len(self.examples)]


@dataclass
class Books:
    """The account of one packing or indexing. `what` names the things counted: "files", "members", "rows"."""

    what: str
    offered: int = 0
    taken: int = 0
    left_out: dict[str, LeftOut] = field(default_factory=dict)

    def take(self, count: int = 1) -> None:
        """Enter `count` things as used."""
        self.offered += count
        self.taken += count

    def leave_out(self, reason: str, *examples: str, count: int | None = None) -> None:
        """Enter things as left out for `reason`: the `examples`, or `count` things of which they are some."""
        count = len(examples) if count is None else count
        self.offered += count
        if count:
            self.left_out.setdefault(reason, LeftOut()).add(examples, count)

    def add(self, other: Books) -> None:
        """Enter another account of the same kind of things into this one."""
        assert self.what == other.what, (self.what, other.what)
        self.take(other.taken)
        for reason, left in other.left_out.items():
            self.leave_out(reason, *left.examples, count=left.count)

    @property
    def balance(self) -> bool:
        """Whether everything that was offered is accounted for; a break of it is a fault of keel's own."""
        return self.offered == self.taken + sum(left.count for left in self.left_out.values())

    def lines(self) -> list[str]:
        """One line for each reason, the most frequent first: count, reason, examples."""
        ordered = sorted(self.left_out.items(), key=lambda entry: (-entry[1].count, entry[0]))
        return [f"{left.count} {self.what} left out: {reason}{_shown(left)}" for reason, left in ordered]

    def require_nothing_left_out(self, source: str) -> None:
        """What `--strict` asks for. Raises `DataError` with every reason on a line."""
        if self.left_out:
            raise DataError(
                "\n".join(f"{source}: {line} (an error because of --strict)" for line in self.lines())
            )

    def as_dict(self) -> dict[str, Any]:
        """As it stands in a manifest's `about`."""
        return {
            "what": self.what,
            "offered": self.offered,
            "taken": self.taken,
            "left_out": {
                reason: {"count": left.count, "examples": left.examples}
                for reason, left in sorted(self.left_out.items())
            },
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Books:
        """The inverse of `as_dict`."""
        left_out = {
            reason: LeftOut(left["count"], list(left["examples"]))
            for reason, left in content["left_out"].items()
        }
        return cls(content["what"], content["offered"], content["taken"], left_out)


def _shown(left: LeftOut) -> str:
    if not left.examples:
        return ""
    more = ", ..." if left.count > len(left.examples) else ""
    return f" (for instance {', '.join(left.examples)}{more})"
