"""The one error a user may see: bad input, said in a line.

    UserError                 exit code 2, printed without a traceback
    ├── ConfigError           a config file or override (configs/loading.py)
    ├── DataError             a manifest, shard or sample (data_pipeline/)
    └── RunError              a run folder, checkpoint or export (pretrain/, launch/)

Everything else that is raised is our own mistake and keeps its traceback. A place that can't be written to or
read is nobody's mistake in the code either: `fault_of_place` makes a line of what the system says of it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping


class UserError(Exception):
    """Bad input. The message names the setting or file, what was found, what is allowed and what to do."""


class ConfigError(UserError):
    """One or more settings are wrong; the message has one line for each."""


class DataError(UserError):
    """A manifest, shard or sample cannot be used."""


class RunError(UserError):
    """A run folder, checkpoint or export cannot be used as asked."""


_PLACES: Mapping[int, str] = {
    errno.ENOSPC: "free some space there",
    errno.EDQUOT: "free some space there, or have the quota raised",
    errno.EFBIG: "choose a place that takes large files",
    errno.EROFS: "choose a place that isn't mounted read-only",
    errno.EACCES: "look at its owner and permissions, or choose another place",
    errno.EPERM: "look at its owner and permissions, or choose another place",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOTDIR: "a part of this path is a file; choose another place",
    errno.EISDIR: "this is a folder; name a file",
    errno.ELOOP: "its links lead in a circle",
    errno.EIO: "the disk or its server fails; look at the system's log",
    errno.ESTALE: "its server has lost it; mount it again",
}
"""What a system says of places, and what to do. ENOENT isn't among them: that may be our own mistake."""

_WITHOUT_NAME = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO})
"""A write says no file name; these can only be its."""


def fault_of_place(error: OSError) -> UserError | None:
    """A disk that is full, a place that can't be written to, as a user's error; None for any other."""
    number = error.errno or 0
    if number not in _PLACES or (error.filename is None and number not in _WITHOUT_NAME):
        return None
    place = "a file that was being written" if error.filename is None else os.fsdecode(error.filename)
    if error.filename2 is not None:  # of a rename
        place = os.fsdecode(error.filename2)
    return UserError(f"{place}: {error.strerror}; {_PLACES[number]}")
