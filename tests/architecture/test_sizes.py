"""A function fits on a page, a file on a few, a name says what is inside, nothing points at one machine."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("configs", "data_pipeline", "pretrain", "launch", "benchmarks")
FILE_LINES, FUNCTION_LINES = 400, 60
DRAWERS = frozenset({"utils", "util", "helpers", "misc", "common"})
TEXT = frozenset({".py", ".md", ".toml", ".yaml", ".yml", ".txt", ".sh", ""})
# Written in halves, so that this file passes its own test.
UNFINISHED = re.compile("TO" + "DO|FIX" + "ME|pytest.mark.ski" + r"p\(")
PRIVATE = re.compile("/wo" + "rk/|/ho" + r"me/\w|/ro" + r"ot/\w|/Us" + r"ers/\w|/opt/whe" + "els")


def sources(*folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from sorted((ROOT / folder).rglob("*.py"))


def texts() -> Iterator[Path]:
    """What is handed out: the packages, tests, docs and the files beside them."""
    for folder in (*PACKAGES, "tests", "docs", ".ci"):
        yield from (p for p in (ROOT / folder).rglob("*") if p.is_file() and p.suffix in TEXT)
    yield from (p for p in ROOT.iterdir() if p.is_file() and p.suffix in TEXT and p.name != "LICENSE")


def test_files_and_functions_are_short() -> None:
    too_long = []
    for path in sources(*PACKAGES, "tests"):
        text = path.read_text()
        if text.count("\n") > FILE_LINES and not path.is_relative_to(ROOT / "tests"):
            too_long.append(f"{path.relative_to(ROOT)}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                if length > FUNCTION_LINES:
                    too_long.append(f"{path.relative_to(ROOT)}: {node.name} has {length} lines")
    assert not too_long


def test_no_drawer_for_odds_and_ends() -> None:
    assert not [path for path in sources(*PACKAGES) if path.stem in DRAWERS]


def test_every_module_says_what_it_is() -> None:
    assert not [path for path in sources(*PACKAGES) if not ast.get_docstring(ast.parse(path.read_text()))]


def test_nothing_is_left_unfinished_or_private() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in texts()
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1)
        if UNFINISHED.search(line) or PRIVATE.search(line)
    ]
    assert not found
