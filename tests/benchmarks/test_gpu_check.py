"""The FLOPs that the MFU is made of."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu_check import build, mae_flops, main, peak_tflops
from configs.loading import load
from data_pipeline.types import Batch
from pretrain.clock import Progress
from pretrain.config import RunConfig


def test_the_formula_counts_what_torch_counts() -> None:
    """On a small MAE of the same shape; the patch embedding sees all patches there, which the test adds."""
    config = load(
        "configs/mae/vitb16_in1k_800ep.yaml", RunConfig,
        ["encoder.args={embed_dim: 64, depth: 3, num_heads: 4}", "objective.decoder_width=32",
         "objective.decoder_depth=2", "objective.decoder_heads=4", "train.precision=fp32"],
    )  # fmt: skip
    objective = build(config, (64, 64), 8)
    batch = Batch(views=(torch.rand(8, 3, 64, 64),), seeds=torch.arange(8), index=torch.arange(8))
    # the fused attention of CPUs isn't counted
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        objective(batch, Progress(0, 0, 1, 1))
    forward = mae_flops(patches=16, visible=4, patch_values=768, encoder=(64, 3), decoder=(32, 2)) / 3
    hidden_patches_embedded = 2.0 * 12 * 768 * 64
    assert counter.get_total_flops() / 8 == forward + hidden_patches_embedded


def test_the_peak_is_the_device_s() -> None:
    assert peak_tflops("NVIDIA H200") == 989.4
    assert peak_tflops("NVIDIA H100 PCIe") == 756.0
    assert peak_tflops("NVIDIA H100 80GB HBM3") == 989.4
    assert peak_tflops("NVIDIA A10") == 125.0
    assert peak_tflops("Quadro") is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "torch sees no CUDA device here: nothing measured" in capsys.readouterr().out
