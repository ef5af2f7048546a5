"""Lets a CUDA build of torchvision be imported beside a CPU build of torch.

The plain torchvision wheel links libtorch_cuda.so, which a CPU torch doesn't have. Its pure-Python parts
(what timm and open_clip use) work all the same, but the import fails as `torchvision/_meta_registrations.py`
names two operators that the compiled library would have declared. Declaring their schemas is enough; the
operators themselves stay unusable. Beside a matching build nothing is done.

keel's own processes call `ensure_torchvision` before `import timm`. Everybody else's are served by a file in
the environment: `python torchvision_compat.py`, which is what `make setup` runs, puts a copy of this one into
site-packages, named in a `.pth` file so that each interpreter runs `install` as it starts. That costs one
entry in `sys.meta_path`; torch is imported when torchvision is, not before.
"""

from __future__ import annotations

# Every interpreter of the environment runs the top of this file: it imports nothing that isn't there already.
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from pathlib import Path
    from types import ModuleType

HOOK = "keel_torchvision"
"""Name of the copy and of the `.pth` file in site-packages."""

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def ensure_torchvision() -> None:
    """Make `import torchvision` work in this process; does nothing where it already does."""
    if "torchvision" not in sys.modules and (package := _package()) is not None:
        declare_missing(package)


def _package() -> Path | None:
    """Folder of torchvision; None where it isn't here."""
    import importlib.util
    from pathlib import Path

    spec = importlib.util.find_spec("torchvision")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def declare_missing(package: Path) -> None:
    """Declare what torchvision's compiled library in the folder `package` would have, where it can't load."""
    import torch

    if hasattr(torch, "_keel_torchvision_schemas") or compiled_part_loads(package):
        return
    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for schema in _SCHEMAS:
        library.define(schema)  # type: ignore[no-untyped-call]
    # The schemas live only as long as this object does; it is kept on torch, whose registry it belongs to.
    torch._keel_torchvision_schemas = library  # type: ignore[attr-defined]


def compiled_part_loads(package: Path) -> bool:
    """Whether torchvision's own library in the folder `package` is there and fits this torch."""
    import torch

    found = sorted(package.glob("_C*.so"))
    for compiled in found:
        try:
            torch.ops.load_library(str(compiled))  # type: ignore[no-untyped-call]
        except OSError:
            return False
    return bool(found)


class Finder:
    """In front of the other finders: has torchvision's module declare what is missing before it runs."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "torchvision":
            return None
        for finder in sys.meta_path:
            find = None if isinstance(finder, Finder) else getattr(finder, "find_spec", None)
            spec = find(name, path, target) if find is not None else None
            if spec is not None:
                if spec.origin is not None and spec.loader is not None:
                    # Of this one loader only: who just looks whether torchvision is here imports no torch.
                    spec.loader.exec_module = _declaring(spec.origin, spec.loader.exec_module)
                return spec  # type: ignore[no-any-return]
        return None


def _declaring(origin: str, run: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
    def exec_module(module: ModuleType) -> None:
        from pathlib import Path

        declare_missing(Path(origin).parent)
        run(module)

    return exec_module


def install() -> None:
    """Called by the `.pth` file in every process of the environment as it starts."""
    sys.meta_path.insert(0, Finder())


def installed() -> bool:
    """Whether this process, and so every one of its environment, was given the hook as it started."""
    return HOOK in sys.modules


def problem() -> str | None:
    """Why a process that imports nothing of keel can't import torchvision here; None where it can."""
    package = _package()
    if package is None:
        return "torchvision isn't here; install the build that goes with this torch"
    if installed() or compiled_part_loads(package):
        return None
    return (
        f"`import torchvision`, and so `import timm`, fails in a fresh process: {package} was built for "
        f"another torch; install the build that goes with this one, or run {sys.executable} {__file__}"
    )


def main() -> None:
    """Write the hook into this interpreter's site-packages where it is needed; else take it away."""
    import subprocess
    import sysconfig
    from pathlib import Path

    site = Path(sysconfig.get_paths()["purelib"])
    module, hook = site / f"{HOOK}.py", site / f"{HOOK}.pth"
    package = _package()
    if package is None or compiled_part_loads(package):
        for left in (hook, module):
            left.unlink(missing_ok=True)
        return
    _write(module, Path(__file__).read_text())  # first: the other one names it
    _write(hook, f"import {HOOK}; {HOOK}.install()\n")
    if subprocess.run([sys.executable, "-c", "import torchvision"], cwd=site, check=False).returncode:
        sys.exit("torchvision can't be imported, not even with its missing operators declared")
    print(f"torchvision is a CUDA build beside a CPU torch: {hook} makes it importable all the same")


def _write(path: Path, text: str) -> None:
    """Whole or not at all: interpreters start meanwhile."""
    beside = path.with_name(f".{path.name}.part")
    beside.write_text(text)
    beside.replace(path)


if __name__ == "__main__":
    main()
elif __name__ != HOOK:
    ensure_torchvision()
