"""Nothing that was offered is missing from the account, and strictness names every reason."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import DataError
from data_pipeline.books import Books

ENTRIES = st.lists(st.tuples(st.sampled_from(["taken", "ending", "link", "hidden"]), st.text(max_size=4)))


@given(ENTRIES, st.integers(0, 20))
def test_every_entry_is_counted_once(entries: list[tuple[str, str]], cut: int) -> None:
    whole, parts = Books("files"), [Books("files"), Books("files")]
    for number, (reason, name) in enumerate(entries):
        for books in (whole, parts[number < cut]):
            books.take() if reason == "taken" else books.leave_out(reason, name)
    parts[0].add(parts[1])
    for books in (whole, parts[0]):
        assert books.balance
        assert books.offered == len(entries)
        assert books.taken == sum(reason == "taken" for reason, _ in entries)
        for reason in ("ending", "link", "hidden"):
            count = sum(entry == reason for entry, _ in entries)
            assert books.left_out[reason].count if count else reason not in books.left_out
            assert not count or books.left_out[reason].count == count
    assert Books.from_dict(whole.as_dict()) == whole


def test_lines_name_count_reason_and_examples() -> None:
    books = Books("files")
    books.take(3)
    books.leave_out("ending not read", "a.txt", "b.txt", "c.txt", "d.txt")
    books.leave_out("broken link", "e.jpg")
    assert books.lines() == [
        "4 files left out: ending not read (for instance a.txt, b.txt, c.txt, ...)",
        "1 files left out: broken link (for instance e.jpg)",
    ]


def test_strictness_refuses_with_every_reason_and_passes_where_nothing_is_missing() -> None:
    books = Books("members")
    books.take()
    books.require_nothing_left_out("set")
    books.leave_out("sparse", "a")
    books.leave_out("hidden", "b")
    with pytest.raises(
        DataError, match=r"set: 1 members left out: hidden.*\nset: 1 members left out: sparse"
    ):
        books.require_nothing_left_out("set")
