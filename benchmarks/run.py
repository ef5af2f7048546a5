"""`make bench`: every benchmark of this folder in a process of its own, one after the other.

    python benchmarks/run.py [name ...]

A benchmark is a script here that prints its result and exits with 0. Each gets as many threads as it sets
itself, and nothing runs beside it.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent


def names() -> list[str]:
    """The benchmarks there are: scripts with a main part, this one left out."""
    scripts = (path for path in sorted(HERE.glob("*.py")) if path.stem != "run")
    return [path.stem for path in scripts if '__name__ == "__main__"' in path.read_text()]


def main(wanted: list[str]) -> int:
    """Run those wanted, or all; gives 1 where one failed, 2 where one isn't there."""
    unknown = sorted(set(wanted) - set(names()))
    if unknown:
        print(
            f"error: no benchmark named {', '.join(unknown)}; there are: {', '.join(names())}",
            file=sys.stderr,
        )
        return 2
    failed = []
    for name in wanted or names():
        print(f"==> {name}", flush=True)
        began = time.monotonic()
        code = subprocess.run([sys.executable, str(HERE / f"{name}.py")]).returncode
        how = f"exit code {code}" if code else "done"
        print(f"<== {name}: {how} in {time.monotonic() - began:.0f} s\n")
        if code:
            failed.append(name)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
