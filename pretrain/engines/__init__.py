"""Adapters of the foreign training engines: nothing outside this folder knows DeepSpeed or accelerate."""

import os

import torch

if not torch.cuda.is_available():
    # DeepSpeed would come to the same conclusion at import, with a warning.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
