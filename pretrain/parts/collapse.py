"""Numbers in which a collapse shows: representations that say less and less while the loss looks well."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def spread(embeddings: Tensor) -> dict[str, Tensor]:
    """How far (B, D) unit embeddings fill their space; () float32 tensors, no wait for the device.

    mean_cosine: mean over pairs, 1 where all are one point. embedding_std: mean over dimensions of the
    standard deviation, times sqrt(D): about 1 where they fill the sphere, 0 where collapsed (SimSiam,
    arXiv:2011.10566 §4.1). effective_rank: participation ratio tr(C)^2 / tr(C^2) of the covariance, 1 to D.
    """
    x = embeddings.float()
    count, width = x.shape
    total = x.sum(dim=0)
    pairs = max(count * (count - 1), 1)
    centred = x - total / count
    covariance = centred.T @ centred
    trace = covariance.diagonal().sum()
    return {
        "mean_cosine": (total.square().sum() - x.square().sum()) / pairs,
        "embedding_std": (centred.square().mean(dim=0)).sqrt().mean() * width**0.5,
        "effective_rank": trace.square() / covariance.square().sum().clamp(min=1e-12),
    }


@torch.no_grad()
def pairs(similarity: Tensor) -> dict[str, Tensor]:
    """The pretext task in figures, of a (B, B) matrix of cosines whose diagonal holds the positives.

    positive_similarity and negative_similarity: means of the diagonal and of the rest; top1: percent of rows
    whose own column is the largest. () float32 tensors, no wait for the device.
    """
    count = len(similarity)
    own, largest = similarity.diagonal(), similarity.argmax(dim=1)
    right = largest == torch.arange(count, device=similarity.device)
    return {
        "positive_similarity": own.mean(),
        "negative_similarity": (similarity.sum() - own.sum()) / max(count * count - count, 1),
        "top1": right.float().mean() * 100,
    }
