"""`keel report`: one self-contained page that shows how runs went, for looking rather than reading.

reading.py reads run folders, curves.py makes lines of long columns, charts.py decides what is drawn, page.py
fills the page. Nothing is computed by a model here: the pictures are those that were drawn while training.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from configs.errors import RunError
from pretrain.folder import write_atomically
from pretrain.report.page import render
from pretrain.report.reading import read


def report(runs: Sequence[Path], out: Path) -> None:
    """Write the page about `runs` to `out`, replacing what is there.

    Raises `RunError` where a folder is no run or `out` can't be written; then nothing is.
    """
    page = render(read(runs))
    if out.is_dir():
        raise RunError(f"{out}: is a folder; name a file, such as -o {out / 'report.html'}")
    try:
        write_atomically(out, page)
    except OSError as error:
        raise RunError(f"{out}: can't be written ({error.strerror}); choose another place with -o") from error
