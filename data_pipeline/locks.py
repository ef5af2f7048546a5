"""Locks between processes, on file systems that may not have any."""

from __future__ import annotations

import errno
import fcntl
from typing import IO, Any

_UNKNOWN = frozenset({errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK})
"""What file systems without flock say: Lustre mounted so, some in user space, NFS without its daemon."""


def locked(file: IO[Any], *, wait: bool = True) -> bool | None:
    """Lock an open file until it is closed; False where another has it, None where there are no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _UNKNOWN:
            raise
        return None
    return True
