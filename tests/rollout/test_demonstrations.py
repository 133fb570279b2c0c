"""From examples to tokens and masks: what the loss falls on, held to transformers' own tokens and its own cross-entropy."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from surefoot.config import SFTConfig
from surefoot.data.demonstrations import Demonstrations
from surefoot.data.render import TokenizedExample, encode_demonstration, encode_prompt
from surefoot.errors import InputError
from surefoot.policies.lm.policy import CausalLMPolicy
from surefoot.rollout.demonstrations import DemonstrationRollout
from surefoot.types import Demonstration
from tests.tiny import CONTEXT, END, VOCABULARY, tiny_policy, tiny_tokenizer

CHAT = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "the end"},
    {"role": "user", "content": "in?"},
    {"role": "assistant", "content": "an hour"},
    {"role": "user", "content": "bye"},
]
LINE_BREAKS = (
    "{% for m in messages %}<{{ m['role'] }}>\n{{ m['content'] }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)
NO_ENDS = LINE_BREAKS.replace("<eos>", "")
FORGETFUL = (
    "{% for m in messages %}{% if loop.last or m['role'] == 'user' %}<{{ m['role'] }}>{{ m['content'] }}<eos>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def encoded(contents: dict[str, Any], tokenizer: Any = None) -> TokenizedExample:
    example = Demonstration("d.jsonl, line 1", contents)
    return encode_demonstration(tokenizer or tiny_tokenizer(chat=True), example, end_tokens=frozenset({END}))


def rollout_of(
    data: Any, policy: CausalLMPolicy | None = None, *, held_out: float = 0.0, **settings: Any
) -> DemonstrationRollout:
    policy = policy or tiny_policy(tokenizer=tiny_tokenizer(chat=True))
    return DemonstrationRollout(policy, Demonstrations(data, held_out=held_out), sft=SFTConfig(**settings), seed=3)


def trained(lesson: TokenizedExample) -> list[int]:
    return [token for token, is_trained in zip(lesson.tokens, lesson.loss_mask, strict=True) if is_trained]


def test_a_text_is_trained_whole_but_for_its_first_token():
    tokens = tiny_tokenizer()("the film")["input_ids"]
    assert encoded({"text": "the film"}) == TokenizedExample((*tokens, END), (False, *[True] * len(tokens)))


def test_of_a_pair_the_completion_and_its_end_token_are_trained():
    tokenizer = tiny_tokenizer()
    # "t" and "he" would be one token, "the", had they not been written one after the other.
    lesson = encoded({"prompt": "in t", "completion": "he end"})
    prompt, completion = tokenizer("in t")["input_ids"], tokenizer("he end")["input_ids"]
    assert lesson.tokens == (*prompt, *completion, END) and trained(lesson) == [*completion, END]
    assert lesson.tokens[: len(prompt)] == encode_prompt(tokenizer, "in t")  # what the model is given when it writes


def test_of_a_chat_the_assistants_turns_are_trained():
    tokenizer = tiny_tokenizer(chat=True)
    lesson = encoded({"messages": CHAT}, tokenizer)
    the_end, an_hour = tokenizer("the end")["input_ids"], tokenizer("an hour")["input_ids"]
    assert trained(lesson) == [*the_end, END, *an_hour, END]
    # The tokens are the template's own, up to the last answer; what is asked is what the model is given when it writes.
    assert list(lesson.tokens) == tokenizer.apply_chat_template(CHAT[:4], tokenize=True, return_dict=True)["input_ids"]
    for turns in (1, 3):
        asked = encode_prompt(tokenizer, CHAT[:turns])
        assert lesson.tokens[: len(asked)] == asked and lesson.loss_mask[len(asked)]


def test_what_a_template_writes_after_the_end_token_is_not_trained():
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.chat_template = LINE_BREAKS
    lesson = encoded({"messages": CHAT}, tokenizer)
    assert trained(lesson) == [*tokenizer("the end")["input_ids"], END, *tokenizer("an hour")["input_ids"], END]
    whole = tokenizer.apply_chat_template(CHAT[:4], tokenize=True, return_dict=True)["input_ids"]
    assert [*lesson.tokens, *tokenizer("\n")["input_ids"]] == whole


def test_a_template_without_end_tokens_gets_one_at_the_end():
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.chat_template = NO_ENDS
    lesson = encoded({"messages": CHAT}, tokenizer)
    assert trained(lesson) == [*tokenizer("the end\n")["input_ids"], *tokenizer("an hour\n")["input_ids"], END]


def test_a_template_that_rewrites_earlier_turns_is_refused():
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.chat_template = FORGETFUL
    with pytest.raises(InputError, match=r"^d.jsonl, line 1: the model's chat template changes earlier turns"):
        encoded({"messages": CHAT}, tokenizer)
    assert trained(encoded({"messages": CHAT[:2]}, tokenizer)) == [*tokenizer("the end")["input_ids"], END]


def test_an_end_token_within_a_text_ends_nothing():
    lesson = encoded({"text": "the<eos>end"})
    assert lesson.tokens.count(END) == 2 and all(lesson.loss_mask[1:])
    assert encoded({"text": "the end<eos>"}).tokens == encoded({"text": "the end"}).tokens


@pytest.mark.parametrize("adapter", [True, False], ids=["adapter", "full"])
@pytest.mark.parametrize(
    "data",
    [
        ["the film was good", "a", "in the end there were two"],
        [{"prompt": "the film", "completion": " was good"}, {"prompt": "a", "completion": " band. and the end"}],
        [{"messages": CHAT}, {"messages": CHAT[2:4]}],
    ],
    ids=["text", "pairs", "chat"],
)
def test_the_loss_is_transformers_own_cross_entropy(data, adapter):
    policy = tiny_policy(adapter=adapter, moved=True, tokenizer=tiny_tokenizer(chat=True))
    # Several micro-batches; the labels are -100 wherever nothing is trained, as transformers has it.
    rollout = rollout_of(data, policy, micro_batch_tokens=24)
    rollout._held_out, rollout.data.held_out = rollout._train, rollout.data.train
    metrics, shown = rollout.evaluate(9)
    total, count = 0.0, 0
    for lesson, example in zip(rollout._train, shown, strict=True):
        labels = [token if is_trained else -100 for token, is_trained in zip(lesson.tokens, lesson.loss_mask, strict=True)]
        with torch.no_grad():
            loss = float(policy.lm(input_ids=torch.tensor([lesson.tokens]), labels=torch.tensor([labels])).loss)
        assert example.nll == pytest.approx(loss, rel=1e-5)
        total, count = total + loss * sum(lesson.loss_mask), count + sum(lesson.loss_mask)
    assert metrics["eval/nll"] == pytest.approx(total / count, rel=1e-5) and metrics["eval/metric"] == -metrics["eval/nll"]


def test_knowing_nothing_has_the_perplexity_of_the_vocabulary():
    policy = tiny_policy()
    torch.nn.init.zeros_(policy.lm.get_output_embeddings().weight)
    rollout = rollout_of([f"the film {n}" for n in range(20)], policy, held_out=0.5)
    metrics, _ = rollout.evaluate(20)
    assert metrics["eval/perplexity"] == pytest.approx(VOCABULARY, rel=1e-5)
    assert metrics["eval/nll"] == pytest.approx(math.log(VOCABULARY), rel=1e-6)


def test_every_epoch_is_a_pass_in_an_order_of_its_own():
    texts = [f"{number} the end" for number in range(10)]
    rollout = rollout_of(texts, batch_size=4)
    tokenizer = tiny_tokenizer()

    def epoch(number: int, seed: int = 3) -> list[str]:
        return [texts[rollout.data.training_index(10 * number + place, seed)] for place in range(10)]

    assert sorted(epoch(0)) == sorted(epoch(1)) == sorted(texts) and len({*map(tuple, (epoch(0), epoch(1), epoch(0, 4)))}) == 3
    # Batches go on where the last one ended, across the end of an epoch too; each call stands alone.
    for first in (0, 4, 8):
        batch = rollout.collect(first=first, count=4)
        rows = [tokenizer.decode(row[row != 0]) for row in batch.observations["tokens"]]
        assert rows == [text + "<eos>" for text in (epoch(0) + epoch(1))[first : first + 4]]
        assert batch.metrics["sft/epoch"] == (first + 4) / 10 and batch.objective == "imitation"


def test_a_batch_is_no_larger_than_the_data():
    assert rollout_of(["a", "the"], batch_size=16).per_update == 2


def test_long_examples_are_cut_and_counted_or_refused():
    rows = [{"prompt": "in the", "completion": " end" * n} for n in (1, 2, 30)]
    rollout = rollout_of(rows, max_tokens=20)
    assert rollout.truncated == 1
    lengths = sorted(len(lesson.tokens) for lesson in rollout._train)
    assert lengths[-1] == 20 and lengths[0] < lengths[1] < 20
    cut = next(lesson for lesson in rollout._train if len(lesson.tokens) == 20)
    assert cut.tokens[-1] != END and cut.loss_mask[-1]  # nobody ended there
    with pytest.raises(InputError, match=rf"^data, row 3: has \d+ tokens, more than the model's context of {CONTEXT}; shorten"):
        rollout_of(rows)
    with pytest.raises(InputError, match=r"^data, row 1: nothing to learn is left of it within 2 tokens; raise sft.max_tokens"):
        rollout_of(rows, max_tokens=2)
    with pytest.raises(InputError, match=rf"^sft.max_tokens \(97\) is more than the model's context of {CONTEXT} tokens"):
        rollout_of(rows, max_tokens=97)


def test_a_chat_without_a_template_or_one_the_template_refuses_is_one_line():
    with pytest.raises(InputError, match=r"^data, row 1: messages need a chat template"):
        rollout_of([{"messages": CHAT}], tiny_policy())
    picky = tiny_tokenizer(chat=True)
    picky.chat_template = "{{ raise_exception('no\nsystem') }}"
    with pytest.raises(InputError, match=r"^data, row 1: the model's chat template does not take it: no system$"):
        rollout_of([{"messages": CHAT}], tiny_policy(tokenizer=picky))


def test_other_examples_than_the_checkpoints_are_refused():
    state = rollout_of(["a", "the"]).state()
    rollout_of(["a", "the"]).restore(state)
    with pytest.raises(InputError, match="not the demonstrations that the run began with"):
        rollout_of(["a", "then"]).restore(state)


def test_a_model_that_names_no_end_token_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    policy = tiny_policy(tokenizer=tokenizer)
    policy.lm.generation_config.eos_token_id = None
    with pytest.raises(InputError, match="has no end token"):
        rollout_of(["a"], policy)
