"""Run by path in a fresh process: opens an export as any user of timm would.

    python -P export_reopen.py NAME INPUTS.safetensors OUTPUTS.safetensors

NAME is timm's: local-dir:FOLDER or hf-hub:OWNER/NAME. Imports nothing of keel, and mends
nothing: where this process can't import timm, its user can't.
"""

from __future__ import annotations

import sys

KEEL = ("configs", "data_pipeline", "pretrain", "launch")


def main(name: str, inputs: str, outputs: str) -> None:
    """Save {"features": (B, D), "tokens": forward_features} float32 for {"images": (B, 3, H, W)}."""
    import timm
    import torch
    from safetensors.torch import load_file, save_file

    model = timm.create_model(name, pretrained=True).eval()
    images = load_file(inputs)["images"]
    with torch.no_grad():
        results = {"features": model(images), "tokens": model.forward_features(images)}
    save_file({name: value.contiguous() for name, value in results.items()}, outputs)
    ours = sorted(name for name in sys.modules if name.split(".")[0] in KEEL)
    if ours:
        raise SystemExit(f"the check is void: it imported {', '.join(ours)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
