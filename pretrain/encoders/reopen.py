"""Run by path in a fresh process: opens an export as any user of timm would.

    python -P export_reopen.py NAME INPUTS.safetensors OUTPUTS.safetensors [MODULE...]

NAME is timm's: local-dir:FOLDER or hf-hub:OWNER/NAME. MODULES are those that register an architecture which
isn't timm's own. Imports nothing of keel, and mends nothing: where this process can't import timm, its user
can't.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

KEEL = ("configs", "data_pipeline", "pretrain", "launch")


def tokens(model: Any, images: Any) -> Any:
    """What `forward_features` gives, as one tensor; (0,) of a model that has none or gives several."""
    found = model.forward_features(images) if hasattr(model, "forward_features") else None
    return found if hasattr(found, "contiguous") else images.new_zeros(0)


def main(name: str, inputs: str, outputs: str, *modules: str) -> None:
    """Save {"features": (B, D), "tokens": forward_features} float32 for {"images": (B, channels, H, W)}."""
    import timm
    import torch
    from safetensors.torch import load_file, save_file

    for module in modules:
        importlib.import_module(module)
    model = timm.create_model(name, pretrained=True).eval()
    images = load_file(inputs)["images"]
    with torch.no_grad():
        results = {"features": model(images), "tokens": tokens(model, images)}
    save_file({name: value.contiguous() for name, value in results.items()}, outputs)
    ours = sorted(name for name in sys.modules if name.split(".")[0] in KEEL)
    if ours:
        raise SystemExit(f"the check is void: it imported {', '.join(ours)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
