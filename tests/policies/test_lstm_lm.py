"""The LSTM language model against itself: one pass, step by step, padded, beside other rows, saved and loaded."""

from __future__ import annotations

import pytest
import torch
import transformers

from surefoot.config import PolicyConfig
from surefoot.policies.lm.policy import load_policy
from tests.tiny import END, LSTM, random_tokens, tiny_lm, tiny_policy, tiny_tokenizer

LENGTHS = (5, 1, 9, 3)
ROWS = [random_tokens(length, seed=length) for length in LENGTHS]


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
    for t, token in enumerate(ROWS[0]):
        x = lm.model.embed_tokens.weight[token]
        for layer, (h, c) in enumerate(states):
            w, u, b, d = (weights[f"{name}_l{layer}"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
            i, f, g, o = (w @ x + u @ h + b + d).chunk(4)
            now = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            x = torch.sigmoid(o) * torch.tanh(now)
            states[layer] = (x, now)
        assert torch.allclose(hidden(lm, ROWS[0])[t], x, atol=1e-5)


def test_step_by_step_is_one_pass(lm):
    cache = lm.new_cache(slots=1, columns=9)
    steps = [hidden(lm, [token], past_key_values=cache, attention_mask=torch.ones(1, t + 1)) for t, token in enumerate(ROWS[2])]
    assert torch.allclose(torch.cat(steps), hidden(lm, ROWS[2]), atol=1e-6)


def test_padding_to_the_left_leaves_every_state_as_the_row_alone_would(lm):
    tokens = torch.tensor([[9] * (9 - len(row)) + list(row) for row in ROWS])
    mask = torch.tensor([[0] * (9 - len(row)) + [1] * len(row) for row in ROWS])
    cache = lm.new_cache(slots=len(ROWS), columns=9)
    with torch.no_grad():
        lm.model(tokens, attention_mask=mask, past_key_values=cache)
    for row, alone in enumerate(ROWS):
        single = lm.new_cache(slots=1, columns=9)
        hidden(lm, alone, past_key_values=single)
        assert torch.allclose(cache.states[:, :, row], single.states[:, :, 0], atol=1e-6)
        assert cache.states[:, :, row].abs().max() > 0.1


def test_padding_to_the_right_and_other_rows_are_never_read(lm):
    batch = torch.tensor([[*row, *[9] * (9 - len(row))] for row in ROWS])
    with torch.no_grad():
        found = lm.model(batch).last_hidden_state
    for row, alone in enumerate(ROWS):
        assert torch.allclose(found[row, : len(alone)], hidden(lm, alone), atol=1e-6)


def test_a_masked_step_in_the_middle_changes_no_state(lm):
    mask = torch.tensor([[1, 1, 0, 1, 1]])
    skipped = hidden(lm, ROWS[0], attention_mask=mask)[-1]
    without = hidden(lm, [token for t, token in enumerate(ROWS[0]) if t != 2])[-1]
    assert torch.allclose(skipped, without, atol=1e-6)
    assert not torch.allclose(skipped, hidden(lm, ROWS[0])[-1], atol=1e-3)


def test_moving_a_row_moves_its_state_and_leaves_its_neighbours(lm):
    cache = lm.new_cache(slots=3, columns=9)
    with torch.no_grad():
        lm.model(torch.tensor([random_tokens(4, seed=seed) for seed in range(3)]), past_key_values=cache)
    before = cache.states.clone()
    cache.move_rows([2], [0])
    assert torch.equal(cache.states[:, :, 0], before[:, :, 2]) and torch.equal(cache.states[:, :, 1], before[:, :, 1])


def test_bfloat16_leaves_the_state_in_float32():
    exact, rough = (tiny_policy(LSTM, dtype=dtype, moved=True) for dtype in (torch.float32, torch.bfloat16))
    with rough._autocast():
        assert torch.equal(hidden(rough.lm, ROWS[2]), hidden(exact.lm, ROWS[2]))


def test_it_is_trained_in_evaluation_mode_also_where_cudnn_asks_for_training_mode(lm):
    assert not lm.training and lm.model.lstm.training and lm.model.lstm.dropout == 0


def test_a_folder_of_it_opens_as_any_other_with_the_same_weights(tmp_path):
    lm = tiny_lm(LSTM)
    lm.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.glob("*.*")) == [
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"
    ]  # fmt: skip
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    loaded = load_policy(str(tmp_path), PolicyConfig(adapter=None, dtype="float32"))
    for other in (opened, loaded.lm):
        assert lm.state_dict().keys() == other.state_dict().keys()
        assert all(torch.equal(value, other.state_dict()[name]) for name, value in lm.state_dict().items())
    assert loaded.model_end_tokens == {END}
