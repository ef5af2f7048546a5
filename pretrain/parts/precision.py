"""Mixed precision as one context: parameters stay fp32, matrix products run in half precision."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    """Autocast to `dtype` on `device`; None trains in fp32.

    Used *inside* `forward`: DeepSpeed disables an autocast that is entered outside of it on CUDA.
    """
    if dtype is None:
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype)
