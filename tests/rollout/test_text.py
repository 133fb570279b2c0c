"""From prompts to a batch with rewards: what the policy wrote, and nothing else, is what is trained."""

from dataclasses import fields
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from surefoot.api.parts import collect
from surefoot.config import GenerationConfig
from surefoot.envs.text import TextTask
from surefoot.generation.engine import TokenEngine
from surefoot.rollout.logprobs import fill_logprobs, sequence_kl
from surefoot.rollout.text import TextRollout, completion_text, distinct_2, text_engine
from surefoot.types import Batch, Completion, Request, StopReason
from tests.fakes import config_of
from tests.golden import refused
from tests.tiny import CONTEXT, END, SPECIAL, TOKENIZERS, USER, plain_scores, tiny_lm, tiny_policy, tiny_tokenizer

PROMPTS = ["the", "a band in the sun.", "1, 2, 3", "who?", "an inner thing and another", "no", "other", "thin ice"]
GENERATION = GenerationConfig(max_new_tokens=9, slots=3)
PPO = config_of(micro_batch_tokens=60, kl={"coef": 0.3})


def letters(prompts, completions, **columns):
    return [len(prompt) + 10.0 * len(completion) for prompt, completion in zip(prompts, completions, strict=True)]


def task(prompts: Any = PROMPTS, reward=letters, **settings: Any) -> TextTask:
    return TextTask(prompts, reward, **{"held_out": 0.0, **settings})


def played(policy=None, env=None, *, episodes=16, first_episode=0, seed=0, generation=GENERATION, ppo=PPO) -> Batch:
    config = ppo.model_copy(update={"generation": generation})
    counted = {"episodes": episodes, "first_episode": first_episode, "seed": seed}
    return collect(policy or tiny_policy(moved=True), env or task(), config=config, **counted)


def text_rollout(policy, env, *, seed=0, engine=None) -> TextRollout:
    config, engine = PPO.model_copy(update={"generation": GENERATION}), engine or text_engine(policy, GENERATION)
    return TextRollout(policy, env, engine=engine, config=config, seed=seed)


def end_often(lm=None, bias: float = 3.0):
    """A model that writes the end token now and then."""
    lm = lm or tiny_lm("phi")
    with torch.no_grad():
        lm.get_output_embeddings().bias[END] = bias
    return lm


ROOM = CONTEXT - GENERATION.max_new_tokens


def test_prompts_that_cannot_be_continued_are_refused_at_the_start():
    long = task(["no", "x" * (ROOM + 1)]), task(["no"], held_out=["x" * CONTEXT])
    dropped = task(["no", "€"])  # a character the tokenizer has not
    for env, said in ((long[0], f"context of {CONTEXT} leaves {ROOM}"), (long[1], "tokens"), (dropped, "no tokens")):
        with refused(said):
            text_rollout(tiny_policy(), env)
    assert played(env=task(["x" * ROOM]), episodes=1).observations["lengths"].item() <= CONTEXT


def test_distinct_2_counts_bigrams_of_tokens_over_all_sequences():
    cases = ([[1, 2, 3], [1, 2]], [[7, 7, 7]], [[1, 2], [2, 1]], [[5], []], [])
    assert [distinct_2(case) for case in cases] == [2 / 3, 1 / 2, 1.0, 0.0, 0.0]


def test_the_completions_text_has_neither_end_token_nor_other_special_ones():
    policy = tiny_policy()
    the, no, question = (policy.tokenizer(text)["input_ids"] for text in ("the", "no", "?"))
    end, limit = StopReason.END_TOKEN, StopReason.LENGTH
    cases = (([*the, END], end), (the, limit), ([*the, USER, *no], limit), ([*no, *question], end), ([END], end))
    written = [Completion(tokens, [], [], [], stop_reason) for tokens, stop_reason in cases]
    texts = [completion_text(policy, Request(tuple(no), seed=0), completion) for completion in written]
    assert texts == ["the", "the", "theno", "no", ""]


def test_the_reward_function_sees_what_is_left_of_a_prompt_that_is_cut_and_messages_as_they_are():
    seen: dict[str, list[Any]] = {}

    def reward(**given):
        seen.update(given)
        return [float(i) for i in range(len(given["prompts"]))]

    # The tokens are a, space, b, and, …
    cut = played(env=task(["a band in the sun."], reward, prompt_tokens=3), episodes=2)
    assert {len(t.prompt_tokens) for t in cut.trajectories} == {3} and seen["prompts"] == ["a b", "a b"]
    messages = [{"role": "user", "content": "who?"}]
    played(tiny_policy(tokenizer=tiny_tokenizer(chat=True)), task([messages], reward), episodes=2)
    assert seen["prompts"] == [messages, messages]


@pytest.mark.parametrize("kind", ["Llama 2", "Metaspace, first", "WordPiece"])
def test_the_reward_function_reads_the_prompt_and_what_was_written_after_it(kind):
    tokenizer = TOKENIZERS[kind]()
    policy = tiny_policy(lm=tiny_lm(vocab_size=len(tokenizer) + 2), tokenizer=tokenizer, moved=True)
    batch = played(policy, task(["the film", "a", "film was"]))
    for t in batch.trajectories:
        whole = tokenizer.decode([*t.prompt_tokens, *t.completion_tokens], skip_special_tokens=True)
        assert whole.strip() == (t.prompt + t.completion_text).strip()
    assert sum(t.completion_text.startswith(" ") for t in batch.trajectories)
    uncut = played(policy, task(["the\nfilm"], prompt_tokens=40), episodes=2)  # nor is a prompt written anew
    assert [t.prompt for t in uncut.trajectories] == ["the\nfilm"] * 2


def test_trained_tokens_are_the_sampled_ones_though_their_text_encodes_to_others():
    policy = tiny_policy(moved=True)
    batch = played(policy, episodes=32)
    encoded_otherwise = 0
    for row, t in enumerate(batch.trajectories):
        assert batch.actions_BT[row][batch.mask_BT[row]].tolist() == t.completion_tokens
        assert batch.observations["tokens"][row][: len(t.prompt_tokens)].tolist() == list(t.prompt_tokens)
        plain = plain_scores(policy, t.prompt_tokens, t.completion_tokens)
        for name in ("logprobs", "values"):
            assert torch.allclose(getattr(batch, f"{name}_BT")[row][batch.mask_BT[row]], plain[name], atol=1e-4)
        plain_tokens = [i for i in t.completion_tokens if i >= len(SPECIAL)]
        encoded_otherwise += policy.tokenizer(t.completion_text)["input_ids"] != plain_tokens
    assert encoded_otherwise > 3  # the trap is there


def test_the_reward_lands_on_the_last_completion_token():
    batch = played(tiny_policy(lm=end_often(bias=6.0), moved=True), episodes=40)
    assert {1, 9} <= set(batch.mask_BT.sum(1).tolist())  # completions of one token, and cut off ones
    expected = torch.zeros(batch.mask_BT.shape)
    for row, t in enumerate(batch.trajectories):
        expected[row, len(t.prompt_tokens) + len(t.completion_tokens) - 1] = t.reward
        assert t.reward == len(t.prompt) + 10 * len(t.completion_text)
    assert torch.equal(batch.rewards_BT, expected) and batch.ends_BT.equal(expected > 0)
    kl = sequence_kl(batch)
    assert kl.abs().min() > 0 and [t.kl for t in batch.trajectories] == pytest.approx(kl.tolist())


def test_an_end_token_that_is_also_the_pad_token_is_trained_like_any_other():
    batches = []
    for pad_is_eos in (True, False):
        tokenizer = tiny_tokenizer(pad_is_eos=pad_is_eos, chat=True)
        assert (tokenizer.pad_token_id == tokenizer.eos_token_id) == pad_is_eos
        policy = tiny_policy(lm=end_often(), tokenizer=tokenizer, moved=True)
        batches.append(played(policy, task(chat=True), episodes=24))  # the prompts hold end tokens too
    assert_same(*batches)
    batch = batches[0]
    ended = torch.tensor([t.stop_reason is StopReason.END_TOKEN for t in batch.trajectories])
    at_end = batch.ends_BT & ended[:, None]
    assert 0 < int(at_end.sum()) < 24 and batch.mask_BT[at_end].all() and (batch.actions_BT[at_end] == END).all()
    assert (batch.logprobs_BT[at_end] < 0).all() and (batch.values_BT[at_end] != 0).all()
    assert ((batch.logprobs_BT - batch.reference_logprobs_BT)[at_end] != 0).all()
    assert int(batch.mask_BT.sum()) == sum(len(t.completion_tokens) for t in batch.trajectories)


def assert_same(one: Batch, other: Batch) -> None:
    for f in fields(Batch):
        a, b = getattr(one, f.name), getattr(other, f.name)
        assert not isinstance(a, torch.Tensor) or torch.equal(a, b), f.name
    assert one.trajectories == other.trajectories


def test_the_same_seed_gives_the_same_batch_and_another_seed_another():
    one, same, other = (played(seed=seed) for seed in (4, 4, 5))
    assert_same(one, same)
    assert [t.completion_tokens for t in one.trajectories] != [t.completion_tokens for t in other.trajectories]
    again = played(env=task(["no"]), episodes=8)  # one prompt, played again, with other randomness
    assert len({tuple(t.completion_tokens) for t in again.trajectories}) > 4


def test_episodes_do_not_depend_on_how_they_are_grouped_or_on_the_speed_settings():
    whole = played(episodes=12)
    halves = [t for first in (0, 6) for t in played(episodes=6, first_episode=first).trajectories]
    wide = played(episodes=12, generation=GENERATION.model_copy(update={"slots": 64}))
    narrow = played(episodes=12, ppo=config_of(PPO, micro_batch_tokens=1))
    expected = [(t.prompt, t.completion_tokens) for t in whole.trajectories]
    assert all([(t.prompt, t.completion_tokens) for t in one] == expected for one in (halves, wide.trajectories))
    for again in (wide, narrow):
        for name in ("logprobs_BT", "reference_logprobs_BT"):
            assert torch.allclose(getattr(again, name), getattr(whole, name), atol=1e-4)


def test_truncated_sampling_is_refused_in_training():
    for name, value in (("top_p", 0.9), ("top_k", 5)):
        with refused(name):
            played(generation=GENERATION.model_copy(update={name: value}))


def test_a_stop_string_ends_the_completion_and_stays_part_of_it():
    free, stop = played(episodes=40), "e"
    batch = played(episodes=40, generation=GENERATION.model_copy(update={"stop": [stop, "never written"]}))
    stopped = [t for t in batch.trajectories if t.stop_reason is StopReason.STOP_STRING]
    assert 0 < len(stopped) < 40
    for t, unstopped in zip(batch.trajectories, free.trajectories, strict=True):
        assert t.completion_tokens == unstopped.completion_tokens[: len(t.completion_tokens)]
        assert (stop in t.completion_text) == (t.stop_reason is StopReason.STOP_STRING)
        assert stop not in tiny_policy().decode(t.completion_tokens[:-1])


def test_the_penalty_for_a_missing_end_is_for_cut_off_completions_alone_with_custom_end_tokens_too():
    # A visible end token in addition to the model's must count as an end.
    question = tiny_tokenizer().convert_tokens_to_ids("?")
    generation = GENERATION.model_copy(update={"stop_token_ids": [question, 20, 30, 40]})
    ppo = config_of(PPO, shaping={"missing_eos_penalty": 100.0})
    batch = played(tiny_policy(lm=end_often(bias=1.0)), episodes=40, generation=generation, ppo=ppo)
    last = {t.completion_tokens[-1] for t in batch.trajectories if t.stop_reason is StopReason.END_TOKEN}
    assert END in last and last & {question, 20, 30, 40}
    assert last <= {END, question, 20, 30, 40}
    paid = [t.reward - 100 * (t.stop_reason is StopReason.LENGTH) for t in batch.trajectories]
    assert batch.rewards_BT.sum(1).tolist() == pytest.approx(paid)


def test_evaluation_reports_the_means_of_its_completions_and_repeats_itself_with_the_weights_of_now():
    env = task(["no"], held_out=PROMPTS, metric=lambda prompts, completions, **columns: [2.0] * len(prompts))
    policy = tiny_policy(lm=end_often(), moved=True)
    engine = TokenEngine(policy, slots=3)
    engine.sync = Mock(side_effect=engine.sync)
    rollout = text_rollout(policy, env, seed=1, engine=engine)
    assert rollout.can_evaluate and not text_rollout(tiny_policy(), task()).can_evaluate
    metrics, trajectories = rollout.evaluate(6, version=4)
    assert [t.prompt for t in trajectories] == PROMPTS[:6] and {t.turns[1].version for t in trajectories} == {4}
    pairs = [(t.prompt_tokens, t.completion_tokens) for t in trajectories]
    total = sum(plain_scores(policy, *pair)["logprobs"].sum() for pair in pairs)
    with policy.adapter.disable_adapter():
        base = sum(plain_scores(policy, *pair)["logprobs"].sum() for pair in pairs)
    rewards = letters([t.prompt for t in trajectories], [t.completion_text for t in trajectories])
    assert metrics == {
        "eval/reward": pytest.approx(sum(rewards) / 6),
        "eval/metric": 2.0,
        "eval/kl": pytest.approx(float((total - base).detach()) / 6, abs=1e-3),
        "eval/distinct_2": distinct_2([tokens for _, tokens in pairs]),
        "eval/length": sum(len(tokens) for _, tokens in pairs) / 6,
        "eval/end_rate": sum(tokens[-1] == END for _, tokens in pairs) / 6,
    }
    rollout.collect(first=0, count=4, version=4)
    assert rollout.evaluate(6, version=5)[0] == metrics
    assert [one.args[1] for one in engine.sync.mock_calls] == [4, 4, 5]  # an engine elsewhere would evaluate stale weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("budget", [1, 50, 10_000])
def test_log_probs_are_filled_in_whatever_the_token_budget(dtype, budget):
    policy = tiny_policy(moved=True, dtype=dtype)
    batch = played(policy)
    written, old = batch.logprobs_BT.clone(), batch.behavior_logprobs_BT
    exact = dtype == torch.float32
    fill_logprobs(policy, batch, token_budget=budget, exact_logprobs=exact)
    assert (batch.behavior_logprobs_BT is None) == exact and (old is None) == exact
    whole = policy.evaluate(batch)
    expected = (whole.logprobs_BT, whole.values_BT, policy.reference_logprobs(batch))
    found = (batch.logprobs_BT, batch.values_BT, batch.reference_logprobs_BT)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4 if exact else 0.05) and (ours[~batch.mask_BT] == 0).all()
    assert torch.allclose(written, batch.logprobs_BT, atol=1e-4 if exact else 0.05)
