"""Tokens are drawn by inverting the cumulative distribution.

With evenly spaced uniforms every count is known to within one, so frequencies are checked without chance.
"""

import math

import pytest
import torch
from torch import Tensor

from surefoot.generation.sampling import BLOCK, request_uniforms, sample
from surefoot.types import SamplingParams

LAST_UNIFORM = 1 - 2.0**-53  # the largest that torch.rand can give in float64
PLAIN = SamplingParams()


def even_counts(logits_V: Tensor, params: SamplingParams = PLAIN, count: int = 20_000) -> Tensor:
    """How often each token is drawn by `count` evenly spaced uniforms."""
    uniforms = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    tokens = torch.cat([sample(logits_V.expand(len(part), -1), part, params)[0] for part in uniforms.split(2000)])
    return torch.bincount(tokens, minlength=len(logits_V))


def only(weights: dict[int, float], vocabulary: int) -> Tensor:
    """Logits that give the tokens named these weights and all others none."""
    logits = torch.full((vocabulary,), float("-inf"))
    for token, weight in weights.items():
        logits[token] = math.log(weight)
    return logits


def drawn(logits_V: Tensor, uniform: float, params: SamplingParams = PLAIN) -> tuple[int, float, float]:
    """One token, its log-prob and the entropy."""
    token, logprob, entropy = sample(logits_V[None], torch.tensor([uniform], dtype=torch.float64), params)
    return int(token), logprob.item(), entropy.item()


def random_logits(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(shape[-1]))


SIZES = [1, 2, 61, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 700]


@pytest.mark.parametrize(("vocabulary", "temperature"), [*((size, 1.0) for size in SIZES), (61, 0.6)])
def test_every_token_is_drawn_as_often_as_its_probability_says(vocabulary, temperature):
    logits = 2 * random_logits(vocabulary)
    expected = 20_000 * torch.softmax(logits.double() / temperature, -1)
    assert (even_counts(logits, SamplingParams(temperature=temperature)) - expected).abs().max() <= 1.01


@pytest.mark.parametrize("params", [SamplingParams(temperature=t) for t in (1.0, 0.6, 1.7, 0.0)])
def test_log_probs_and_entropies_are_those_of_the_distribution(params):
    logits = 3 * random_logits(50, 613)
    tokens, logprobs, entropies = sample(logits, torch.rand(50, dtype=torch.float64), params)
    expected = torch.distributions.Categorical(logits=logits.double() / (params.temperature or 1.0))
    assert torch.allclose(logprobs.double(), expected.log_prob(tokens), atol=1e-5)
    assert torch.allclose(entropies.double(), expected.entropy(), atol=1e-5)
    assert params.temperature > 0 or torch.equal(tokens, logits.argmax(-1))  # greedy, whatever the uniform


@pytest.mark.parametrize("last", [0, 60, BLOCK - 1, BLOCK, 2 * BLOCK - 1, 2 * BLOCK + 40])
@pytest.mark.parametrize("first_weight", [1e-6, 0.1, 0.3, 1.0, 1e6])
def test_the_smallest_and_the_largest_uniform_take_the_first_and_the_last_token_that_has_weight(last, first_weight):
    logits = only({0: first_weight, last: 1.0}, 2 * BLOCK + 88)
    assert drawn(logits, LAST_UNIFORM)[0] == last and drawn(logits, 0.0)[0] == 0
    assert drawn(only({last: first_weight, 2 * BLOCK + 87: 1.0}, 2 * BLOCK + 88), 0.0)[0] == last


def test_rounding_at_a_block_edge_never_leads_to_a_token_without_weight():
    # Every block ends in tokens without weight, and uniforms stand as close to the blocks' ends as float64 allows.
    blocks = 40
    weights = torch.rand(blocks, BLOCK, generator=torch.Generator().manual_seed(3))
    weights[:, -3:] = 0
    logits = weights.flatten().log()
    weights_as_sampled = torch.exp(logits - logits.max()).view(blocks, BLOCK)
    edges = weights_as_sampled.sum(-1).double().cumsum(-1)
    uniforms = torch.cat([edges / edges[-1] * (1 + i * 2.0**-52) for i in range(-4, 1)]).clamp(max=LAST_UNIFORM)
    tokens = sample(logits.expand(len(uniforms), -1), uniforms, PLAIN)[0]
    assert (weights.flatten()[tokens] > 0).all()


def test_a_token_far_below_rounding_of_float32_still_has_its_share():
    # 1e-9 beside 1 vanishes in a float32 sum, yet its slice of the unit interval must belong to it.
    logits = only({3: 1.0, BLOCK + 4: 1e-9}, 2 * BLOCK)
    assert [drawn(logits, 1 - below)[0] for below in (0.5e-9, 2e-9)] == [BLOCK + 4, 3]


def test_top_k_keeps_k_tokens_and_renormalizes():
    logits = random_logits(300)
    kept = logits.topk(7).indices
    expected = torch.zeros(300).scatter(0, kept, torch.softmax(logits[kept], -1))
    counts = even_counts(logits, SamplingParams(top_k=7))
    assert set(counts.nonzero().flatten().tolist()) == set(kept.tolist())
    assert (counts - 20_000 * expected).abs().max() <= 1.01
    token, *reported = drawn(logits, 0.9, SamplingParams(top_k=7))
    entropy = torch.distributions.Categorical(probs=expected).entropy()
    assert reported == pytest.approx([expected[token].log().item(), entropy.item()], abs=1e-5)
    assert torch.equal(even_counts(logits, SamplingParams(top_k=500)), even_counts(logits))


def test_top_p_keeps_the_token_that_crosses_p_at_the_temperature():
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    cases = {0.3: [1], 0.5: [1, 3], 0.69: [1, 3], 0.75: [1, 2, 3], 0.95: [0, 1, 2, 3], 1.0: [0, 1, 2, 3]}
    for top_p, kept in cases.items():
        assert even_counts(logits, SamplingParams(top_p=top_p), count=1000).nonzero().flatten().tolist() == kept, top_p
    counts = even_counts(logits, SamplingParams(top_p=0.5))
    assert counts.tolist() == pytest.approx([0, 20_000 * 4 / 7, 0, 20_000 * 3 / 7], abs=1.01)
    assert drawn(logits, 0.99, SamplingParams(top_p=1e-9)) == (1, 0.0, 0.0)  # one token is always left
    token, logprob, _ = drawn(torch.full((300,), float("nan")), 0.7)  # a model that has diverged
    assert 0 <= token < 300 and math.isnan(logprob)
    # At temperature 1 the first token alone holds 0.6; at 3 it holds less and a second one is needed.
    logits = torch.tensor([0.6, 0.2, 0.2]).log() + torch.tensor([0.0, 0.1, 0.0])
    for temperature, more in ((1.0, False), (3.0, True)):
        assert bool(even_counts(logits, SamplingParams(temperature=temperature, top_p=0.55), count=100)[1]) == more


def test_uniforms_depend_on_the_seed_alone_and_not_on_the_length_limit():
    state = torch.random.get_rng_state()
    assert torch.equal(request_uniforms(7, 5), request_uniforms(7, 40)[:5])
    assert not torch.equal(request_uniforms(7, 5), request_uniforms(8, 5))
    assert torch.equal(torch.random.get_rng_state(), state)
