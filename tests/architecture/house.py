"""Draws the house from the code: `python tests/architecture/house.py` writes docs/architecture.md.

Rooms are what lies directly in a package: a module or a package of its own. Arrows are imports; those that
other arrows imply are left out of the pictures. A test compares the page with the code.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import grimp

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/architecture.md"
PACKAGES = ("launch", "pretrain", "data_pipeline", "configs")
DRAWN = ("launch", "pretrain")
"""Packages whose rooms are drawn. data_pipeline is one river: order, read, make, load."""

HEAD = """# The house

Made by `python tests/architecture/house.py` from the code; a test keeps it current. Why the house stands so
is in [design.md](design.md), the contracts that hold it in `pyproject.toml`.

Imports go one way: `launch → pretrain → data_pipeline → configs`.
"""


def rooms(package: str) -> dict[str, str]:
    """Name to the first line of what its docstring says."""
    found = {}
    for path in sorted((ROOT / package).iterdir()):
        file = path / "__init__.py" if path.is_dir() else path
        if file.suffix == ".py" and file.is_file() and path.name != "__init__.py":
            text = ast.get_docstring(ast.parse(file.read_text())) or ""
            found[path.stem] = text.partition("\n\n")[0].replace("\n", " ")
    return found


def arrows(package: str) -> dict[str, set[str]]:
    """Which rooms each room imports from."""
    graph = grimp.build_graph(package, cache_dir=None, exclude_type_checking_imports=True)
    found: dict[str, set[str]] = {name: set() for name in rooms(package)}
    for module in graph.modules - {package}:
        room = module.split(".")[1]
        for other in graph.find_modules_directly_imported_by(module):
            if "." in other and other.split(".")[1] != room:
                found[room].add(other.split(".")[1])
    return found


def levels(below: Mapping[str, set[str]]) -> list[list[str]]:
    """Rooms by the longest way down from them, the highest first. Raises ValueError for a circle."""
    height: dict[str, int] = {}

    def measure(room: str, above: Sequence[str]) -> int:
        if room in above:
            raise ValueError(f"a circle: {' -> '.join([*above, room])}")
        if room not in height:
            height[room] = max(
                (1 + measure(other, [*above, room]) for other in sorted(below[room])), default=0
            )
        return height[room]

    for room in below:
        measure(room, [])
    return [sorted(r for r in below if height[r] == at) for at in range(max(height.values()), -1, -1)]


def needed(below: Mapping[str, set[str]]) -> list[tuple[str, str]]:
    """The arrows that no others imply."""

    def reached(room: str) -> set[str]:
        return below[room].union(*(reached(other) for other in below[room]))

    return [
        (room, other)
        for room in sorted(below)
        for other in sorted(below[room])
        if not any(other in reached(between) for between in below[room] - {other})
    ]


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for package in PACKAGES:
        parts.append(f"## {package}\n")
        if package in DRAWN:
            below = arrows(package)
            count = sum(map(len, below.values()))
            parts.append(f"{len(below)} rooms, {count} arrows, no circle.\n")
            lines = [f"    {room} --> {other}" for room, other in needed(below)]
            parts.append("\n".join(["```mermaid", "flowchart TD", *lines, "```"]) + "\n")
            order = [room for level in levels(below) for room in level]
        else:
            order = sorted(rooms(package))
        told = rooms(package)
        kind = {room: "/" if (ROOT / package / room).is_dir() else ".py" for room in order}
        parts.append("\n".join(f"- `{room}{kind[room]}`: {told[room]}" for room in order) + "\n")
    return "\n".join(parts)


def main() -> None:
    sys.path.insert(0, str(ROOT))
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
