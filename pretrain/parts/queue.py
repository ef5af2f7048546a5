"""A ring of past keys, the same on every rank."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Queue(nn.Module):
    """The last `size` keys in the order of the global samples they came from (MoCo, arXiv:1911.05722 §3.1).

    Any size and any batch go together: writing wraps around, and of a batch larger than the queue the last
    keys stay. A part of the checkpoint, float32.
    """

    keys: Tensor  # (K, D) float32, unit length
    written: Tensor  # [1] int64: keys ever written; the next goes to written % K

    def __init__(self, size: int, width: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        noise = torch.randn(size, width, generator=generator)
        self.register_buffer("keys", functional.normalize(noise, dim=1))
        self.register_buffer("written", torch.zeros(1, dtype=torch.int64))

    def __len__(self) -> int:
        return len(self.keys)

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Write (B, D) keys; every rank writes the same."""
        count, kept = len(keys), keys[-len(self) :].to(self.keys.dtype)
        first = self.written + count - len(kept)
        places = (first + torch.arange(len(kept), device=kept.device)) % len(self)
        self.keys.index_copy_(0, places, kept)
        self.written += count

    def age(self, keys_a_step: int) -> Tensor:
        """() float32: steps since the oldest of its real keys was made."""
        return self.written[0].clamp(max=len(self)).float() / keys_a_step

    def filled(self) -> Tensor:
        """() float32: share of the ring that holds real keys and not the random ones it began with."""
        return (self.written[0] / len(self)).clamp(max=1.0).float()
