"""`keel report`: one self-contained page that shows how runs went, for looking rather than reading.

reading.py reads run folders, curves.py makes lines of long columns, charts.py decides what is drawn, page.py
fills the page. Nothing is computed by a model here: the pictures are those that were drawn while training.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from configs.errors import RunError
from data_pipeline.files import write_whole
from pretrain.report.page import render
from pretrain.report.reading import read


def report(
    runs: Sequence[Path], out: Path, states: Mapping[Path, tuple[str, str]] | None = None
) -> Sequence[tuple[str, str]]:
    """Write the page about `runs`, or all runs in folders of runs, to `out`, replacing what is there.

    `states`: see `reading.read`. Gives what was left out, and why. Raises `RunError` where no run is found or
    `out` can't be written; then nothing is.
    """
    if os.path.isdir(out):  # noqa: PTH112  # Path's raises for a name that is too long
        raise RunError(f"{out}: is a folder; name a file, such as -o {out / 'report.html'}")
    found = read(runs, states)
    try:
        if not out.parent.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{out.parent} is no folder")
        write_whole(out, render(found).encode(errors="replace"))  # a name may be no UTF-8
    except OSError as error:
        raise RunError(f"{out}: can't be written ({error.strerror}); choose another place with -o") from error
    return found.left_out
