"""Work in several processes: the order of results, errors, and a process that the system kills."""

from __future__ import annotations

import os
import signal
import time

import pytest

from configs.errors import DataError
from data_pipeline.parallel import mapped


def work(number: int) -> int:
    if number == 13:
        os.kill(os.getpid(), signal.SIGKILL)
    if number == 7:
        raise DataError("7 is bad")
    time.sleep(0.01 if number % 2 else 0.03)
    return 10 * number


def test_results_come_in_order() -> None:
    assert list(mapped(work, [3, 2, 1, 0], 2)) == [30, 20, 10, 0]


def test_the_first_error_ends_it() -> None:
    with pytest.raises(DataError, match="7 is bad"):
        list(mapped(work, [1, 7, 2, 3], 2))


def test_a_killed_process_is_a_line_that_says_what_to_do() -> None:
    with pytest.raises(DataError, match=r"--processes: found 2, and one .* killed.*start again with fewer"):
        list(mapped(work, [1, 13, 2, 3], 2))
