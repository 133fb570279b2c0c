"""The engine against transformers' own forward pass, and against a twin without cache, batch or padding."""

from __future__ import annotations

import functools
import random
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from surefoot.data.render import decode_more
from surefoot.generation.engine import TokenEngine, generate
from surefoot.generation.sampling import request_uniforms
from surefoot.policies.lm.kv_cache import SlotCache
from surefoot.policies.lm.lstm import StateCache
from surefoot.policies.lm.policy import CausalLMPolicy
from surefoot.types import Completion, Request, SamplingParams, StopReason
from tests.tiny import END, FAMILIES, LSTM, TOKENIZERS, plain_scores, random_tokens, tiny_lm, tiny_policy, written_batch

# Short and long by turns; the longest come late, when the columns in use are narrower than they are.
LENGTHS = (3, 1, 7, 2, 5, 9, 1, 4, 26, 6, 21, 1, 8)
REQUESTS = tuple(Request(random_tokens(n, seed=n + i), seed=100 + i) for i, n in enumerate(LENGTHS))
PARAMS = SamplingParams(max_new_tokens=9)
ENDS = frozenset({END, 7, 19, 33, 48})  # enough of them that rows end at all lengths


@functools.cache
def policy_of(family: str) -> CausalLMPolicy:
    return tiny_policy(family, moved=True)


def run(policy, requests=REQUESTS, *, params=PARAMS, ends=ENDS, slots=3) -> list[Completion]:
    engine = TokenEngine(policy, slots=slots, end_tokens=ends)
    return generate(engine, [replace(request, params=params) for request in requests])


def texts(completions: list[Completion]) -> list[list[int]]:
    return [completion.tokens for completion in completions]


def naive_twin(policy, request: Request, params: SamplingParams = PARAMS, ends: frozenset[int] = ENDS) -> list[int]:
    """The same request with a whole forward pass for every token and a cumulative sum over all probabilities."""
    tokens: list[int] = []
    for uniform in request_uniforms(request.seed, params.max_new_tokens):
        with torch.no_grad():
            logits = policy.lm(input_ids=torch.tensor([[*request.prompt, *tokens]]), use_cache=False).logits[0, -1]
        cumulative = torch.softmax(logits.double() / params.temperature, -1).cumsum(-1)
        tokens.append(int((cumulative <= uniform).sum()))
        if tokens[-1] in ends:
            break
    return tokens


class Watched(CausalLMPolicy):
    """A policy that counts what the engine asks of it, and whose text is a stroke for every token."""

    @classmethod
    def of(cls, policy: CausalLMPolicy) -> Watched:
        watched = cls.__new__(cls)
        watched.__dict__.update(policy.__dict__, prefills=[], decoded_rows=[])
        return watched

    def step(self, tokens_BT, positions_BT, attention_BS, cache):
        (self.decoded_rows if cache.window.end or cache.window.begin else self.prefills).append(len(tokens_BT))
        return super().step(tokens_BT, positions_BT, attention_BS, cache)

    def decode(self, tokens, before=()):
        return "|" * len(tokens)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_engine_reports_is_what_a_full_forward_pass_computes(family):
    policy = policy_of(family)
    completions = run(policy)
    view = policy.evaluate(written_batch((r.prompt, c.tokens) for r, c in zip(REQUESTS, completions, strict=True)))
    for row, (request, completion) in enumerate(zip(REQUESTS, completions, strict=True)):
        written = slice(len(request.prompt), len(request.prompt) + len(completion.tokens))
        plain = plain_scores(policy, request.prompt, completion.tokens)
        for name in ("logprobs", "values", "entropies"):
            for expected in (plain[name], getattr(view, f"{name}_BT")[row, written]):
                assert torch.allclose(torch.tensor(getattr(completion, name)), expected, atol=1e-4), (name, row)


@pytest.mark.parametrize(("family", "kind"), [("llama", SlotCache), (LSTM, StateCache)])
def test_the_requests_above_exercise_every_move_of_the_cache(monkeypatch, family, kind):
    seen = {"moved": 0, "shifted": 0, "widened": 0, "reused": 0}

    def watch(name, counter, happened):
        original = getattr(kind, name)

        def watched(cache, *args):
            seen[counter] += bool(happened(cache, *args))
            return original(cache, *args)

        monkeypatch.setattr(kind, name, watched)

    def widens(cache, other, first, rows):
        return first > 0 and other.window.end > cache.window.end - cache.window.begin

    watch("move_rows", "moved", lambda cache, sources, targets: sources)
    watch("shift_to", "shifted", lambda cache, end: cache.window.end > end)
    watch("copy_from", "reused", lambda cache, other, first, rows: cache.window.begin < cache.window.end)
    watch("copy_from", "widened", widens)
    completions = run(policy_of(family))
    assert all(seen.values()) and len({len(c.tokens) for c in completions}) > 3, seen
    assert {c.stop_reason for c in completions} == {StopReason.END_TOKEN, StopReason.LENGTH}


@pytest.mark.parametrize("family", ["gpt2", "gemma2", LSTM])
def test_a_request_gets_the_same_tokens_whatever_its_neighbours_order_and_slots(family):
    policy = policy_of(family)
    expected = run(policy)
    backwards = run(policy, REQUESTS[::-1], slots=4)[::-1]
    for others in (run(policy, slots=1), run(policy, slots=64), backwards):
        for one, other in zip(expected, others, strict=True):
            assert (other.tokens, other.stop_reason) == (one.tokens, one.stop_reason)
            assert other.logprobs == pytest.approx(one.logprobs, abs=1e-4)
            assert other.values == pytest.approx(one.values, abs=1e-4)
    assert run(policy, REQUESTS[8:9])[0].tokens == expected[8].tokens


TWINS = [(family, 1.0) for family in ("llama", "gpt2", "mistral", "phi", LSTM)] + [("qwen3", 0.6)]


@pytest.mark.parametrize(("family", "temperature"), TWINS)
def test_a_twin_without_cache_or_batch_writes_the_same(family, temperature):
    policy, params = policy_of(family), replace(PARAMS, temperature=temperature)
    assert texts(run(policy, params=params)) == [naive_twin(policy, request, params) for request in REQUESTS]


def test_generation_stops_at_the_end_token_and_not_at_the_limit():
    """Nor is a stop string looked for then."""
    lm = tiny_lm("phi")
    with torch.no_grad():
        lm.get_output_embeddings().bias[END] = 1e4  # written with probability 1
    policy, requests = Watched.of(tiny_policy(lm=lm)), [replace(request, stop=("|",)) for request in REQUESTS]
    for completion in run(policy, requests, params=replace(PARAMS, max_new_tokens=50)):
        assert completion.tokens == [END] and completion.stop_reason is StopReason.END_TOKEN
        assert completion.logprobs == pytest.approx([0.0], abs=1e-6)
    assert policy.decoded_rows == []  # nothing is computed after the end


def test_each_of_several_end_tokens_ends_its_row_and_no_forward_pass_is_spent_after_it():
    policy, requests = Watched.of(policy_of("llama")), [Request((9, 8), seed) for seed in range(60)]
    completions = run(policy, requests, slots=16)
    assert sum(policy.prefills) == len(requests) and max(policy.decoded_rows) <= 16
    assert sum(policy.decoded_rows) == sum(len(c.tokens) - 1 for c in completions)
    assert len({c.tokens[-1] for c in completions if c.stop_reason is StopReason.END_TOKEN}) > 1
    for completion in completions:
        assert ENDS.isdisjoint(completion.tokens[:-1])
        assert (completion.tokens[-1] in ENDS) == (completion.stop_reason is StopReason.END_TOKEN)


def test_a_stop_string_is_looked_for_in_the_text_so_far_and_ends_only_its_own_row():
    requests = [replace(r, stop=("never", "|" * 4) if i % 2 else ()) for i, r in enumerate(REQUESTS)]
    completions = run(Watched.of(policy_of("llama")), requests, ends=frozenset())
    free = run(policy_of("llama"), ends=frozenset())
    for i, completion in enumerate(completions):
        expected = (4, StopReason.STOP_STRING) if i % 2 else (9, StopReason.LENGTH)
        assert (len(completion.tokens), completion.stop_reason) == expected
        assert completion.tokens == free[i].tokens[: expected[0]]
    # At the very last token it still counts.
    at_limit = run(Watched.of(policy_of("llama")), [replace(r, stop=("|" * 9,)) for r in REQUESTS], ends=frozenset())
    assert {c.stop_reason for c in at_limit} == {StopReason.STOP_STRING}


@pytest.mark.parametrize(("family", "early"), [("llama", 1), ("llama", 8), ("mistral", 5), (LSTM, 5)])
def test_what_is_submitted_while_others_are_written_is_written_the_same(family, early):
    expected = run(policy_of(family), slots=64)
    engine = TokenEngine(policy_of(family), slots=4, end_tokens=ENDS)
    requests = [replace(request, params=PARAMS) for request in REQUESTS]
    numbers, found = engine.submit(requests[:early]), {}
    late = iter(requests[early:])  # the longest prompts do not fit into the cache that was made before they came
    while len(found) < len(REQUESTS):
        found |= {c.request_id: c.tokens for c in engine.poll()}
        numbers += engine.submit([request for request in [next(late, None)] if request])
    assert [found[number] for number in numbers] == texts(expected)
    assert engine.poll() == []


def test_requests_that_are_sampled_differently_wait_for_their_turn():
    engine = TokenEngine(policy_of("llama"), slots=4, end_tokens=ENDS)
    changes = ({"max_new_tokens": 1}, {}, {"temperature": 0.0}, {"top_k": 1})
    kinds = [replace(PARAMS, **change) for change in changes]
    mixed = generate(engine, [replace(r, params=kinds[i % 4]) for i, r in enumerate(REQUESTS)])
    alone = [run(policy_of("llama"), params=params) for params in kinds]
    assert texts(mixed) == [alone[i % 4][i].tokens for i in range(len(REQUESTS))]
    assert texts(alone[2]) == texts(alone[3]) != texts(alone[1]) and {sum(c.entropies) for c in alone[3]} == {0.0}
    for c in mixed[::4]:
        assert [len(column) for column in (c.tokens, c.logprobs, c.values, c.entropies)] == [1] * 4


def test_a_completion_carries_the_version_of_the_weights_that_wrote_it():
    policy = policy_of("llama")
    engine = TokenEngine(policy, end_tokens=frozenset())
    assert engine.exact_logprobs and not TokenEngine(tiny_policy(dtype=torch.bfloat16)).exact_logprobs
    assert {c.version for c in generate(engine, REQUESTS)} == {0}
    engine.sync(policy, 3)
    engine.submit(REQUESTS[:2])
    engine.sync(policy, 4)  # none is begun yet
    engine.poll()
    for other, error in ((policy, RuntimeError), (policy_of("gpt2"), ValueError)):
        with pytest.raises(error, match="sync: "):
            engine.sync(other, 5)
    engine.abort()
    engine.sync(policy, 5)
    assert engine.poll() == []
    assert {c.version for c in generate(engine, REQUESTS)} == {5}


def test_poll_can_abandon_the_work_between_two_steps_and_nothing_is_left_of_it():
    poll = iter([None, None])
    engine, fresh = (TokenEngine(policy_of("llama")) for _ in range(2))
    with pytest.raises(StopIteration):
        generate(engine, REQUESTS, poll=lambda: next(poll))
    assert texts(generate(engine, REQUESTS[:2])) == texts(generate(fresh, REQUESTS[:2]))
    with pytest.raises(ValueError, match="no tokens"):
        generate(engine, [Request((5,), 0), Request((), 0)])
    assert generate(engine, []) == []


def test_a_context_of_exactly_prompt_and_completion_is_enough():
    # Learned positions end where the context ends; the last token written is never fed and needs none.
    policy = tiny_policy("gpt2", max_position_embeddings=12)
    completions = run(policy, [Request(random_tokens(n, seed=n), n) for n in (3, 1, 2, 3)], ends=frozenset(), slots=2)
    assert policy.context_length == 12 and [len(tokens) for tokens in texts(completions)] == [9] * 4


def test_memory_that_was_never_written_does_not_leak_into_attention(monkeypatch):
    # A masked column is multiplied by probability 0; were it NaN, as fresh memory may be, the sum would be NaN.
    expected = run(policy_of("llama"))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *size, **_: self.new_full(*size, float("nan")))
    assert texts(run(policy_of("llama"))) == texts(expected)


class Scripted:
    """A model that writes `script`, one token after the other, and counts the tokens that are decoded."""

    exact_logprobs, device, model_end_tokens = True, torch.device("cpu"), frozenset()

    def __init__(self, tokenizer, prompt, script):
        self.tokenizer, self.prompt, self.script, self.decoded = tokenizer, prompt, script, 0

    def decode(self, tokens, before=()):
        self.decoded += len(tokens)
        return decode_more(self.tokenizer, tokens, before)

    def new_cache(self, *, slots, columns):
        return Mock(window=SimpleNamespace(begin=0, end=0, columns=columns))

    def step(self, tokens_BT, positions_BT, attention_BS, cache):
        logits_BV = torch.full((1, len(self.tokenizer) + 9), -1e4)
        logits_BV[0, self.script[int(positions_BT[0, -1]) + 1 - len(self.prompt)]] = 0.0
        return logits_BV, torch.zeros(1)

    def written(self, stop: tuple[str, ...]) -> int:
        request = Request(self.prompt, 0, SamplingParams(len(self.script)), stop)
        return len(generate(TokenEngine(self, slots=1), [request])[0].tokens)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_stop_strings_end_at_the_token_that_completes_one_and_cost_a_window_of_tokens_each(kind):
    tokenizer, drawn = TOKENIZERS[kind](), random.Random(0)
    prompt, text = tuple(tokenizer("the film")["input_ids"]), " was é good. 中文 the film,\n" * 4
    words = tokenizer(text, add_special_tokens=False)["input_ids"]
    for n in range(4):  # text, and every fourth token anything at all
        script = [drawn.randrange(len(tokenizer) + 9) if n and drawn.random() < 0.25 else token for token in words]
        texts = [decode_more(tokenizer, script[:end], prompt) for end in range(len(script) + 1)]
        for length in (1, 2, 5, 12, 30):
            begin = 0 if length == 5 else drawn.randrange(len(texts[-1]) - length)
            stop = texts[-1][begin : begin + length]
            if "\ufffd" not in stop:
                expected = next(end for end, text in enumerate(texts) if stop in text)
                assert Scripted(tokenizer, prompt, script).written(("~~~", stop)) == expected, stop
    model = Scripted(tokenizer, prompt, words * 8)
    assert model.written(("~~~", "no such string")) == len(model.script) and model.decoded < 150 * len(model.script)
