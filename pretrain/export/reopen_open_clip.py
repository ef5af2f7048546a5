"""Run by path in a fresh process: opens an exported pair as any user of open_clip would.

    python -P export_reopen_open_clip.py FOLDER SCRATCH

SCRATCH has inputs.safetensors {"images": (B, 3, H, W), "tokens": (N, L)} and captions.json;
outputs.safetensors gets the embeddings, and the captions' tokens where open_clip's tokenizer can be had (its
own vocabulary, or transformers installed); where they are missing the export says so. Imports nothing of
keel.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

KEEL = ("configs", "data_pipeline", "pretrain", "launch")


def main(folder: str, scratch: str) -> None:
    import open_clip
    import torch
    from safetensors.torch import load_file, save_file

    name = f"local-dir:{folder}"
    model, _ = open_clip.create_model_from_pretrained(name)
    model.eval()
    inputs = load_file(Path(scratch, "inputs.safetensors"))
    with torch.no_grad():
        results = {
            "images": model.encode_image(inputs["images"], normalize=True),
            "texts": model.encode_text(inputs["tokens"], normalize=True),
        }
    own = not Path(folder, "tokenizer.json").exists()
    if own or importlib.util.find_spec("transformers"):
        captions = json.loads(Path(scratch, "captions.json").read_text())
        results["tokens"] = open_clip.get_tokenizer(name)(captions)
    save_file(
        {key: value.contiguous() for key, value in results.items()}, Path(scratch, "outputs.safetensors")
    )
    ours = sorted(name for name in sys.modules if name.split(".")[0] in KEEL)
    if ours:
        raise SystemExit(f"the check is void: it imported {', '.join(ours)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
