"""One function over many items in several processes, results in order, a progress callback."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from configs.errors import DataError

Item = TypeVar("Item")
Result = TypeVar("Result")
Progress = Callable[[int, int], None]
"""Called with things done and things in all."""


def mapped(
    function: Callable[[Item], Result], items: Sequence[Item], processes: int
) -> Generator[Result, None, None]:
    """`map`, in `processes` fresh processes where that is more than one. The first error ends it.

    Raises `DataError` where the system has killed one of them.
    """
    if processes <= 1 or len(items) <= 1:
        yield from map(function, items)
        return
    # spawn: the caller may have threads, and a forked child could inherit a held lock
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(processes, len(items)), context) as executor:
        try:
            yield from executor.map(function, items)
        except BrokenProcessPool:
            raise DataError(
                f"--processes: found {processes}, and one of them was killed, mostly for want of memory; "
                "start again with fewer (what is finished is kept)"
            ) from None
        except BaseException:
            executor.shutdown(wait=False, cancel_futures=True)
            raise
