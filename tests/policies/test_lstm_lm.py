"""What the LSTM language model adds to what every family is held to: its equations, and a state that masks leave alone."""

from __future__ import annotations

import pytest
import torch

from tests.tiny import LSTM, random_tokens, tiny_lm, tiny_policy

ROW = random_tokens(5, seed=5)


@pytest.fixture(scope="module")
def lm():
    return tiny_lm(LSTM).eval()


def hidden(lm, tokens, **inputs) -> torch.Tensor:
    with torch.no_grad():
        return lm.model(torch.tensor([tokens]), **inputs).last_hidden_state[0]


def test_the_equations_are_the_lstms(lm):
    """i, f, g, o = W x + U h + b; c = σ(f) c + σ(i) tanh(g); h = σ(o) tanh(c), layer on layer, from zeros."""
    weights = lm.model.lstm.state_dict()
    states = [(torch.zeros(32), torch.zeros(32)) for _ in range(2)]
    for t, token in enumerate(ROW):
        x = lm.model.embed_tokens.weight[token]
        for layer, (h, c) in enumerate(states):
            w, u, b, d = (weights[f"{name}_l{layer}"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
            i, f, g, o = (w @ x + u @ h + b + d).chunk(4)
            now = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            x = torch.sigmoid(o) * torch.tanh(now)
            states[layer] = (x, now)
        assert torch.allclose(hidden(lm, ROW)[t], x, atol=1e-5)


def test_a_masked_step_in_the_middle_changes_no_state(lm):
    mask = torch.tensor([[1, 1, 0, 1, 1]])
    skipped = hidden(lm, ROW, attention_mask=mask)[-1]
    without = hidden(lm, [token for t, token in enumerate(ROW) if t != 2])[-1]
    assert torch.allclose(skipped, without, atol=1e-6)
    assert not torch.allclose(skipped, hidden(lm, ROW)[-1], atol=1e-3)


def test_bfloat16_leaves_the_state_in_float32(lm):
    assert not lm.training and lm.model.lstm.training and lm.model.lstm.dropout == 0  # cuDNN asks for training mode
    exact, rough = (tiny_policy(LSTM, dtype=dtype, moved=True) for dtype in (torch.float32, torch.bfloat16))
    with rough._autocast():
        assert torch.equal(hidden(rough.lm, ROW), hidden(exact.lm, ROW))
