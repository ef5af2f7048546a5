"""Waits of tests: long enough for a busy machine, and a failing one says what for."""

from __future__ import annotations

import time
from collections.abc import Callable

PATIENCE = 240.0
"""Seconds. Less than a test's own limit, so that the wait fails by its name and not the test by the clock."""


def wait_for(what: str, condition: Callable[[], object], seconds: float = PATIENCE) -> None:
    """Until `condition` holds. Fails after `seconds`, telling `what` was waited for."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds:.0f} s in vain for {what}"
        time.sleep(0.01)
