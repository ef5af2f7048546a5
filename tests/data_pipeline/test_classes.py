"""Class names are read as they were meant, or refused in a line: their order gives the labels."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.errors import DataError
from data_pipeline.classes import read_classes


@pytest.mark.parametrize(
    "data",
    [
        b"cat\ndog\n",
        b"cat\ndog",
        b"\xef\xbb\xbfcat\r\ndog\r\n\r\n",
        b"cat\rdog\r",
        b" cat \n\tdog\n\n  \n",
        "cat\r\ndog\r\n".encode("utf-16"),
        b"\xfe\xff" + "cat\ndog\n".encode("utf-16-be"),
    ],
)
def test_line_ends_and_marks_are_not_part_of_names(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "c.txt").write_bytes(data)
    assert read_classes(tmp_path / "c.txt") == ("cat", "dog")


def test_names_are_carried_through(tmp_path: Path) -> None:
    names = (
        "bar, pub",
        "crane",
        "crane",
        "caf\u00e9",
        "\u5c71",
        "a\u2028b",
        "x\u0085y",
        "\U0001f415 dog",
        "'q' \"r\" % =",
    )
    (tmp_path / "c.txt").write_bytes("\n".join(names).encode())
    assert read_classes(tmp_path / "c.txt") == names


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (b"bar\ncaf\xe9\n", "line 2 isn't UTF-8: found byte 0xe9; save the file as UTF-8"),
        (b"cat\n\ndog\n", "line 2 is blank"),
        (b"\ncat\n", "line 1 is blank"),
        (b"", "holds no class names"),
        (b"\xef\xbb\xbf\r\n", "holds no class names"),
        (b"\0\0\1\n", "line 1 has a zero byte"),
        (b"\xff\xfec\0a\0t", "line 1 isn't UTF-16"),
        (None, "can't be read: No such file"),
    ],
)
def test_what_is_no_list_of_names_is_refused_in_a_line(
    tmp_path: Path, data: bytes | None, named: str
) -> None:
    path = tmp_path / "c.txt"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(DataError, match=named) as caught:
        read_classes(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
