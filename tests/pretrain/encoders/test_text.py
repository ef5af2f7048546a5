"""The text tower: causal, read at EOT, laid out as open_clip's."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from pretrain.encoders.text import TextConfig, TextTower

CONFIG = TextConfig(vocabulary=50, context=12, width=16, depth=2, heads=4)


def tower(activation: str = "gelu") -> TextTower:
    torch.manual_seed(0)
    return TextTower(CONFIG.model_copy(update={"activation": activation}), embedding=6)


def test_what_follows_eot_does_not_matter() -> None:
    tokens = torch.tensor([[1, 7, 9, 49, 0, 0]])
    changed = torch.tensor([[1, 7, 9, 49, 13, 5]])
    torch.testing.assert_close(tower()(tokens), tower()(changed))
    earlier = torch.tensor([[1, 8, 9, 49, 0, 0]])
    assert (tower()(tokens) - tower()(earlier)).abs().max() > 1e-4


def test_length_does_not_matter() -> None:
    tokens = torch.tensor([[1, 7, 9, 49]])
    padded = functional.pad(tokens, (0, 8))
    torch.testing.assert_close(tower()(tokens), tower()(padded))


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_it_equals_the_formula(activation: str) -> None:
    """One head at a time, in float64, from the parameters alone."""
    model, tokens = tower(activation).double(), torch.tensor([[1, 7, 9, 49, 0]])
    state = model.state_dict()
    x = state["token_embedding.weight"][tokens[0]] + state["positional_embedding"][:5]
    for number in range(2):
        p = {k.removeprefix(f"transformer.resblocks.{number}."): v for k, v in state.items()}
        y = functional.layer_norm(x, (16,), p["ln_1.weight"], p["ln_1.bias"])
        q, k, v = (y @ p["attn.in_proj_weight"].T + p["attn.in_proj_bias"]).chunk(3, dim=1)
        heads = []
        for h in range(4):
            part = slice(4 * h, 4 * h + 4)
            weights = q[:, part] @ k[:, part].T / 2
            weights = weights.masked_fill(torch.ones(5, 5).triu(1).bool(), float("-inf")).softmax(1)
            heads.append(weights @ v[:, part])
        x = x + torch.cat(heads, 1) @ p["attn.out_proj.weight"].T + p["attn.out_proj.bias"]
        y = functional.layer_norm(x, (16,), p["ln_2.weight"], p["ln_2.bias"])
        y = y @ p["mlp.c_fc.weight"].T + p["mlp.c_fc.bias"]
        y = functional.gelu(y) if activation == "gelu" else y / (1 + (-1.702 * y).exp())
        x = x + y @ p["mlp.c_proj.weight"].T + p["mlp.c_proj.bias"]
    x = functional.layer_norm(x, (16,), state["ln_final.weight"], state["ln_final.bias"])
    torch.testing.assert_close(model(tokens)[0], x[3] @ state["text_projection"])


def test_names_are_open_clips() -> None:
    names = set(tower().state_dict())
    assert {
        "token_embedding.weight", "positional_embedding", "ln_final.weight", "text_projection",
        "transformer.resblocks.1.attn.in_proj_weight", "transformer.resblocks.1.mlp.c_fc.bias",
    } <= names  # fmt: skip
    assert "attn_mask" not in names
