"""Text and messages to tokens and loss masks, held to transformers' own tokens."""

from __future__ import annotations

from typing import Any

import pytest

from surefoot.data.render import TokenizedExample, encode_demonstration, encode_prompt, encode_scored_text, with_end_token
from surefoot.types import Demonstration
from tests.golden import refused
from tests.tiny import END, tiny_tokenizer

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


def trained(example: TokenizedExample) -> list[int]:
    return [token for token, is_target in zip(example.tokens, example.loss_mask, strict=True) if is_target]


def test_a_text_is_target_whole_but_for_its_first_token():
    tokens = tiny_tokenizer()("the film")["input_ids"]
    assert encoded({"text": "the film"}) == TokenizedExample((*tokens, END), (False, *[True] * len(tokens)))
    example = encoded({"text": "the<eos>end"})  # an end token within it ends nothing
    assert example.tokens.count(END) == 2 and all(example.loss_mask[1:])
    assert encoded({"text": "the end<eos>"}).tokens == encoded({"text": "the end"}).tokens


def test_of_a_pair_the_completion_and_its_end_token_are_trained():
    tokenizer = tiny_tokenizer()
    # "t" and "he" would be one token, "the", had they not been written one after the other.
    example = encoded({"prompt": "in t", "completion": "he end"})
    prompt, completion = tokenizer("in t")["input_ids"], tokenizer("he end")["input_ids"]
    assert example.tokens == (*prompt, *completion, END) and trained(example) == [*completion, END]
    assert example.tokens[: len(prompt)] == encode_prompt(tokenizer, "in t")  # what the model is given when it writes


def test_of_a_chat_the_assistants_turns_are_trained():
    tokenizer = tiny_tokenizer(chat=True)
    example = encoded({"messages": CHAT}, tokenizer)
    the_end, an_hour = tokenizer("the end")["input_ids"], tokenizer("an hour")["input_ids"]
    assert trained(example) == [*the_end, END, *an_hour, END]
    # The tokens are the template's own, up to the last answer; what is asked is what the model is given when it writes.
    assert list(example.tokens) == tokenizer.apply_chat_template(CHAT[:4], tokenize=True, return_dict=True)["input_ids"]
    for turns in (1, 3):
        asked = encode_prompt(tokenizer, CHAT[:turns])
        assert example.tokens[: len(asked)] == asked and example.loss_mask[len(asked)]


def test_what_a_template_writes_after_the_end_token_is_not_trained_and_one_is_added_where_there_is_none():
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.chat_template = LINE_BREAKS
    example = encoded({"messages": CHAT}, tokenizer)
    assert trained(example) == [*tokenizer("the end")["input_ids"], END, *tokenizer("an hour")["input_ids"], END]
    whole = tokenizer.apply_chat_template(CHAT[:4], tokenize=True, return_dict=True)["input_ids"]
    assert [*example.tokens, *tokenizer("\n")["input_ids"]] == whole
    tokenizer.chat_template = NO_ENDS
    ended = trained(encoded({"messages": CHAT}, tokenizer))
    assert ended == [*tokenizer("the end\n")["input_ids"], *tokenizer("an hour\n")["input_ids"], END]


def test_a_template_that_rewrites_earlier_turns_is_refused():
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.chat_template = FORGETFUL
    with refused("d.jsonl, line 1", "chat template changes earlier turns"):
        encoded({"messages": CHAT}, tokenizer)
    assert trained(encoded({"messages": CHAT[:2]}, tokenizer)) == [*tokenizer("the end")["input_ids"], END]


def test_a_scored_text_is_prompt_and_text_in_one_and_ends_with_an_end_token():
    tokenizer, ends = tiny_tokenizer(chat=True), frozenset({END})

    def scored(prompt: Any, text: str) -> list[int]:
        return [*encode_scored_text(tokenizer, prompt, text, end_tokens=ends, where="x")]

    assert scored("in t", "he end") == scored(None, "in the end") == [*tokenizer("in the end")["input_ids"], END]
    rendered = tokenizer.apply_chat_template(CHAT[:2], tokenize=True, return_dict=True)["input_ids"]
    assert scored(CHAT[:1], "the end") == rendered and scored(None, "the end<eos>") == scored(None, "the end")


def test_the_end_token_is_the_tokenizers_or_the_models_lowest():
    tokenizer = tiny_tokenizer()
    assert with_end_token(tokenizer, (5,), frozenset({7, END})) == (5, END)
    assert with_end_token(tokenizer, (5, 7), frozenset({7, END})) == (5, 7)
    tokenizer.eos_token = None
    assert with_end_token(tokenizer, (), frozenset({9, 7})) == (7,)
    with refused("policy.model", "no end token"):
        with_end_token(tokenizer, (5,), frozenset())


@pytest.mark.parametrize("chat", [False, True], ids=["no template", "one that refuses"])
def test_messages_that_cannot_be_rendered_are_one_line(chat):
    tokenizer = tiny_tokenizer(chat=chat)
    if chat:
        tokenizer.chat_template = "{{ raise_exception('no\nsystem') }}"
    what = "no system" if chat else "chat template"
    with refused("d.jsonl, line 1", what):
        encoded({"messages": CHAT}, tokenizer)
    with refused("data, row 2", what):
        encode_scored_text(tokenizer, CHAT[:1], "x", end_tokens=frozenset({END}), where="data, row 2")
    with refused("the prompt", what):
        encode_prompt(tokenizer, "in", chat=True)
