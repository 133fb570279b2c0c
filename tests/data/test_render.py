"""Text and messages to tokens and loss masks, held to transformers' own tokens."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from surefoot.data import render, time_limit
from surefoot.data.render import (
    TokenizedExample,
    decode_more,
    encode_demonstration,
    encode_more,
    encode_prompt,
    encode_scored_text,
    turn_end,
    with_end_token,
)
from surefoot.types import Demonstration
from tests.golden import refused
from tests.tiny import ASSISTANT, CHAT_TEMPLATE, END, TOKENIZERS, random_tokens, tiny_tokenizer

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
LLAMA_2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<bos>: {{ m['content'] }} -{% else %} {{ m['content'] }} <eos>"
    "{% endif %}{% endfor %}"
)
FORGETFUL = (
    "{% for m in messages %}{% if loop.last or m['role'] == 'user' %}<{{ m['role'] }}>{{ m['content'] }}<eos>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def encoded(contents: dict[str, Any], tokenizer: Any = None, *, tools: Any = None, **settings: Any) -> TokenizedExample:
    example, settings = Demonstration("d.jsonl, line 1", contents, tools), {"end_tokens": frozenset({END}), **settings}
    return encode_demonstration(tokenizer or tiny_tokenizer(chat=True), example, **settings)


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
    assert trained(encoded({"messages": CHAT[:2]}, tokenizer)) == [*tokenizer("the end\n")["input_ids"], END]
    with refused("d.jsonl, line 1", "end token", "mask_history"):  # of two answers the first would teach to go on
        encoded({"messages": CHAT}, tokenizer)
    alone = encoded({"messages": CHAT}, tokenizer, mask_history=True)
    assert trained(alone) == [*tokenizer("an hour\n")["input_ids"], END] and len(alone.tokens) > 20


def test_a_template_that_rewrites_earlier_turns_is_refused():
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.chat_template = FORGETFUL
    with refused("d.jsonl, line 1", "chat template changes earlier turns", "mask_history"):
        encoded({"messages": CHAT}, tokenizer)
    assert trained(encoded({"messages": CHAT}, tokenizer, mask_history=True)) == [*tokenizer("an hour")["input_ids"], END]
    assert trained(encoded({"messages": CHAT[:2]}, tokenizer)) == [*tokenizer("the end")["input_ids"], END]


def test_a_scored_text_is_prompt_and_text_in_one_and_ends_with_an_end_token():
    tokenizer, ends = tiny_tokenizer(chat=True), frozenset({END})

    def scored(prompt: Any, text: str) -> list[int]:
        return [*encode_scored_text(tokenizer, prompt, text, end_tokens=ends, end=turn_end(tokenizer), where="x")]

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
        encode_scored_text(tokenizer, CHAT[:1], "x", end_tokens=frozenset({END}), end=None, where="data, row 2")
    with refused("the prompt", what):
        encode_prompt(tokenizer, "in", chat=True)


ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(("template", "named"), [(ENDLESS, "no end"), ("{{ 'long ' * 99 }}", "495"), ("{{ 1 // 0 }}", "zero")])
def test_a_template_that_does_not_end_or_makes_too_much_is_one_line(template, named, monkeypatch):
    monkeypatch.setattr(time_limit, "SECONDS", 0)
    monkeypatch.setattr(render, "LONGEST", 400)
    tokenizer = tiny_tokenizer(chat=True)
    expected, tokenizer.chat_template = encode_prompt(tokenizer, CHAT), template
    with refused("d.jsonl, line 1", named):
        encoded({"messages": CHAT}, tokenizer)
    with ThreadPoolExecutor(1) as elsewhere, refused("the prompt", named):  # where no signal is heard
        elsewhere.submit(encode_prompt, tokenizer, CHAT).result()
    tokenizer.chat_template = CHAT_TEMPLATE
    assert encode_prompt(tokenizer, CHAT) == expected


EVERY_TOKENIZER = pytest.mark.parametrize("kind", TOKENIZERS)
RENDERED = "<bos><user>the film<eos><assistant>"


@EVERY_TOKENIZER
def test_a_completion_is_read_as_it_was_written_after_its_prompt(kind):
    tokenizer = TOKENIZERS[kind]()
    for prompt in ("the film", "a", "the film ", RENDERED):
        before = encode_prompt(tokenizer, prompt)
        # WordPiece and characters do not know all of them; after a special token some know no first space.
        texts = ["was good"] + [" was good", " was"] * (prompt[-1] not in " >")
        texts += ["good ", " ", "\nthe film", "é 中!"] * (kind not in ("WordPiece", "characters") and prompt != RENDERED)
        for text in texts if kind != "WordPiece" or prompt != "the film " else ():
            assert decode_more(tokenizer, encode_more(tokenizer, text, prompt), before) == text, (prompt, text)
        for seed in range(5 * (kind != "WordPiece" or prompt != RENDERED)):  # whatever a model writes
            written = tuple(7 * token % (len(tokenizer) + 9) for token in random_tokens(9, seed=seed))
            head, whole = (tokenizer.decode(t, skip_special_tokens=True) for t in (before, before + written))
            is_anew = prompt == RENDERED and whole.startswith(head + " ")  # its first space is the tokenizer's
            assert head + " " * is_anew + decode_more(tokenizer, written, before).removeprefix(" " * is_anew) == whole


@EVERY_TOKENIZER
def test_a_text_begins_as_the_tokenizer_has_it_once_and_ends_open(kind):
    tokenizer = TOKENIZERS[kind]()
    ends = frozenset({END})
    plain = tokenizer("the film", add_special_tokens=False)["input_ids"]
    begins = "BOS" in kind or kind in ("Llama 2", "Llama 2, added tokens", "Metaspace, first", "Gemma", "WordPiece")
    assert encode_prompt(tokenizer, "the film") == (*[tokenizer.bos_token_id] * begins, *plain)
    assert encode_prompt(tokenizer, "") == (tokenizer.bos_token_id,) * begins
    if kind == "characters":
        return
    rendered = tuple(tokenizer(RENDERED, add_special_tokens=False)["input_ids"])
    text = tuple(tokenizer(RENDERED + "was<eos>", add_special_tokens=False)["input_ids"])
    pair = encoded({"prompt": RENDERED, "completion": "was"}, tokenizer)
    rows = ((RENDERED, "was"), (None, RENDERED + "was"))
    scored = [encode_scored_text(tokenizer, *row, end_tokens=ends, end=turn_end(tokenizer), where="x") for row in rows]
    assert encode_prompt(tokenizer, RENDERED) == rendered and rendered.count(tokenizer.bos_token_id) == 1
    assert {pair.tokens, encoded({"text": RENDERED + "was"}, tokenizer).tokens, *scored} == {text}


@EVERY_TOKENIZER
@pytest.mark.parametrize("template", [CHAT_TEMPLATE, LINE_BREAKS, LLAMA_2], ids=["roles", "line breaks", "Llama 2"])
def test_a_chats_tokens_are_those_of_the_templates_own_rendering(kind, template):
    tokenizer, ends = TOKENIZERS[kind](), frozenset({END})
    tokenizer.chat_template = template
    example, asked = encoded({"messages": CHAT}, tokenizer), encode_prompt(tokenizer, CHAT[:3])
    own = tokenizer.apply_chat_template(CHAT[:4], tokenize=True, return_dict=True)["input_ids"]
    size, line_break = len(example.tokens), tokenizer("\n")["input_ids"]
    assert list(example.tokens) == own[:size] and set(own[size:]) <= {*line_break}
    written = example.tokens[len(asked) :]
    assert example.tokens[: len(asked)] == asked and all(example.loss_mask[len(asked) :])
    assert decode_more(tokenizer, written, asked).strip() == "an hour"
    assert encode_scored_text(tokenizer, CHAT[:3], "an hour", end_tokens=ends, end=turn_end(tokenizer), where="x")[-1] == END


CHATML = LINE_BREAKS.replace("<eos>", "<assistant>")  # which no generation config names


def test_the_end_that_the_template_writes_is_the_end_of_every_answer():
    tokenizer = tiny_tokenizer(chat=True)
    assert turn_end(tokenizer) == END and turn_end(tiny_tokenizer()) is None
    tokenizer.chat_template = NO_ENDS
    assert turn_end(tokenizer) is None
    tokenizer.chat_template = CHATML
    assert turn_end(tokenizer) == ASSISTANT
    ends = frozenset({END, ASSISTANT})
    the_end, an_hour = tokenizer("the end")["input_ids"], tokenizer("an hour")["input_ids"]
    assert trained(encoded({"messages": CHAT}, tokenizer, end_tokens=ends)) == [*the_end, ASSISTANT, *an_hour, ASSISTANT]
    assert encode_scored_text(tokenizer, CHAT[:1], "an", end_tokens=ends, end=turn_end(tokenizer), where="x")[-1] == ASSISTANT
    tokenizer.chat_template = LINE_BREAKS.replace("<eos>", "<assistant><eos>")  # the first one stops
    assert trained(encoded({"messages": CHAT}, tokenizer, end_tokens=ends)) == [*the_end, ASSISTANT, *an_hour, ASSISTANT]


def answered(opened: str, written: str) -> str:
    """A template that opens an answer by `opened`, and of one that is there writes `written`."""
    user = "{% if m['role'] == 'user' %}<user>{{ m['content'] }}<eos>"
    turns = f"{{% for m in messages %}}{user}{{% else %}}{written}<eos>{{% endif %}}{{% endfor %}}"
    return f"{turns}{{% if add_generation_prompt %}}{opened}{{% endif %}}"


THOUGHT, CONTENT = "{{ m['reasoning_content'] }}", "{{ m['content'] }}"
THINKING = answered("<assistant><think>\n", f"<assistant><think>\n{THOUGHT}\n</think>\n{CONTENT}")


@pytest.mark.parametrize(
    ("template", "answer", "expected"),
    [
        (THINKING, {"content": "yes", "reasoning_content": "a"}, "a\n</think>\nyes"),
        (THINKING, {"content": "yes", "reasoning_content": ""}, "\n</think>\nyes"),
        (THINKING, {"content": "yes"}, None),  # the empty block would be the template's own
        (THINKING, {"content": "a</think>yes"}, None),
        (answered("<assistant>", CONTENT), {"content": "yes", "reasoning_content": "a film"}, None),  # left out
        # Answers with a block of their own, though empty; with one that the model opens; with what isn't one.
        (answered("<assistant>", f"<assistant><think>{THOUGHT}</think>{CONTENT}"), {"content": "yes"}, "<think></think>yes"),
        (answered("<assistant>", f"<assistant><think></think>{CONTENT}"), {"content": "<think>a</think>yes"}, None),
        (answered("<assistant>", f"<assistant>{CONTENT}"), {"content": "<b></b>yes</b>"}, "<b></b>yes</b>"),
        # Answers are written without the block that opens them: closed there, it is the prompt's; open, nobody knows.
        (answered("<assistant><think></think>", f"<assistant>{CONTENT}"), {"content": "<no"}, "<no"),
        (answered("<assistant><think>", f"<assistant>{CONTENT}"), {"content": "yes"}, None),
    ],
)
def test_a_thinking_block_is_trained_as_the_model_would_have_to_write_it_or_refused(template, answer, expected):
    tokenizer = TOKENIZERS["bytes"]()
    tokenizer.chat_template = template
    chat = [CHAT[0], {"role": "assistant", **answer}]
    if expected is None:
        with refused("d.jsonl, line 1"):
            encoded({"messages": chat}, tokenizer)
        return
    example, asked = encoded({"messages": chat}, tokenizer), encode_prompt(tokenizer, chat[:1])
    mask = tuple(n >= len(asked) for n in range(len(example.tokens)))
    assert example.tokens[: len(asked)] == asked and example.loss_mask == mask
    assert tokenizer.decode(example.tokens[len(asked) :]) == expected + "<eos>"


def test_a_prompts_closed_block_stands_before_the_last_message_alone():
    tokenizer = TOKENIZERS["bytes"]()
    tokenizer.chat_template = answered("<assistant><think></think>", f"<assistant>{CONTENT}")
    with refused("d.jsonl, line 1", "think", "mask_history"):
        encoded({"messages": CHAT}, tokenizer)
    example = encoded({"messages": CHAT}, tokenizer, mask_history=True)
    assert tokenizer.decode(trained(example)) == "an hour<eos>"
    assert example.tokens[: -len(trained(example))] == encode_prompt(tokenizer, CHAT[:3])


def test_tools_reach_the_template_or_are_refused():
    tokenizer, tools = tiny_tokenizer(chat=True), [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    for call in (
        lambda: encode_prompt(tokenizer, CHAT[:1], tools=tools),
        lambda: encoded({"messages": CHAT}, tokenizer, tools=tools),
    ):
        with refused("tools"):
            call()
    tokenizer.chat_template = "{{ tools[0]['function']['name'] if tools else 'no tools' }}" + CHAT_TEMPLATE
    own = tokenizer.apply_chat_template(CHAT[:4], tools=tools, tokenize=True, return_dict=True)["input_ids"]
    assert list(encoded({"messages": CHAT}, tokenizer, tools=tools).tokens) == own
    assert list(encode_prompt(tokenizer, CHAT[:1], tools=tools))[:5] == own[:5] != list(encode_prompt(tokenizer, CHAT[:1]))[:5]
    assert encode_prompt(tokenizer, CHAT[:1], tools=[]) == encode_prompt(tokenizer, CHAT[:1])


def test_a_turn_ends_by_a_special_token_or_by_none() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}<stop>{% endfor %}"
    assert turn_end(tokenizer) is None
    tokenizer.add_tokens(["<stop>"])  # as some vocabularies have runs of spaces
    assert turn_end(tokenizer) is None
    tokenizer.add_special_tokens({"additional_special_tokens": ["<stop>"]})
    assert turn_end(tokenizer) == tokenizer.convert_tokens_to_ids("<stop>")
