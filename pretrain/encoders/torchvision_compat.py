"""Lets a CUDA build of torchvision be imported beside a CPU build of torch. Must run before `import timm`.

The plain torchvision wheel links libtorch_cuda.so, which a CPU torch doesn't have. Its pure-Python parts
(what timm uses) work all the same, but the import fails as `torchvision/_meta_registrations.py` names two
operators that the compiled library would have declared. Declaring their schemas is enough; the operators
themselves stay unusable.
Beside a matching build this does nothing.
"""

import importlib.util
import pathlib
import sys

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def ensure_torchvision() -> None:
    """Make `import torchvision` work; does nothing where it already does."""
    if "torchvision" in sys.modules or hasattr(torch, "_keel_torchvision_schemas"):
        return
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or _loads(pathlib.Path(spec.origin).parent):
        return
    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for schema in _SCHEMAS:
        library.define(schema)  # type: ignore[no-untyped-call]
    # The schemas live only as long as this object does; it is kept on torch, whose registry it belongs to.
    torch._keel_torchvision_schemas = library  # type: ignore[attr-defined]


def _loads(folder: pathlib.Path) -> bool:
    for compiled in folder.glob("_C*.so"):
        try:
            torch.ops.load_library(str(compiled))  # type: ignore[no-untyped-call]
        except OSError:
            return False
    return True


ensure_torchvision()
