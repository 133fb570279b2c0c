"""Text and messages -> tokens: the one home of chat templates, end tokens and loss masks."""

import os
import re
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any

from surefoot.data.time_limit import limited
from surefoot.errors import InputError, failing_as
from surefoot.types import Demonstration

Tokens = tuple[int, ...]
LONGEST = 2**24  # characters of a rendered chat; no model reads as many
NEAR = 200  # characters of the text before; more cannot matter to tokens, and would cost time
REASONING = ("reasoning_content", "reasoning", "thinking")  # where messages have it, by their templates
Piece = tuple[Tokens, bool]  # part of a chat, and whether it is trained
ALONE = "train on the last message alone (mask_history: true)"


@dataclass(frozen=True)
class TokenizedExample:
    """The tokens of a demonstration, and on which of them the loss falls.

    Example: prompt (504, 2768), completion (314,), end token 2:
    `TokenizedExample((504, 2768, 314, 2), (False, False, True, True))`.
    """

    tokens: Tokens
    loss_mask: tuple[bool, ...]


def encode_text(tokenizer: Any, text: str) -> Tokens:
    """Tokens of a text with what the tokenizer begins one with (BOS), once: a rendered chat has it already.

    What some tokenizers append (EOS, SEP) is left out: nothing could follow it.
    """
    plain, whole = (list(_encode(tokenizer, text, is_whole=is_whole)) for is_whole in (False, True))
    if not plain:  # then nothing tells what stands before from what stands after
        letter = _probe(tokenizer, "a")
        return encode_text(tokenizer, "a")[: -len(letter)] if letter else ()
    places = range(len(whole) - len(plain) + 1)
    begin = next((n for n in places if whole[n : n + len(plain)] == plain), 0)
    before = whole[:begin]
    return tuple(plain if plain[:begin] == before else before + plain)


def encode_prompt(
    tokenizer: Any, prompt: Any, *, chat: bool = False, tools: Any = None, where: str = ""
) -> Tokens:
    """Tokens of a string as the tokenizer makes them, or of messages up to where the assistant's turn begins.

    With `chat` a string is a user's message. `tools` are the functions that messages may call, as the chat
    template takes them. Raises InputError, naming `where` (default: the prompt), for messages that the model
    has no chat template for, or whose template does not take them.
    """
    if isinstance(prompt, str) and not chat:
        return encode_text(tokenizer, prompt)
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    where = where or f"the prompt {str(prompt)[:60]!r}"
    return _encode(tokenizer, render_messages(tokenizer, messages, tools=tools, opens_turn=True, where=where))


def encode_more(tokenizer: Any, text: str, before: str) -> Tokens:
    """Tokens of `text` where it stands after `before`: those that a model writes to continue `before` by it.

    They are made apart from those of `before`, as a model's are. Where the tokenizer begins every text with
    a space that `text` does not have, they are what `text` adds to `before`; or, where the two share a token,
    to a character that they don't share one with.
    """
    before = before[-NEAR:]
    apart, head = _encode(tokenizer, text), _encode(tokenizer, before)
    plain = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    if not before or _decode(tokenizer, (*head, *apart), **plain) == _decode(tokenizer, head, **plain) + text:
        return apart
    for context in (before, "\n", ".", "a", "0"):
        head, whole = _probe(tokenizer, context), _probe(tokenizer, context + text)
        if head and whole[: len(head)] == head:
            return whole[len(head) :]
    return apart


def decode_more(tokenizer: Any, tokens: Sequence[int], before: Sequence[int]) -> str:
    """The text that `tokens` add after the tokens `before`, spaces included; special tokens have none.

    Example: after "The film" the token "▁was" adds " was", though "was" is what it stands for alone.
    """
    alone = _decode(tokenizer, tokens, skip_special_tokens=True)
    if not before:
        return alone
    if _begins_anew(tokenizer, before[-1]):
        is_tokenizers = alone.startswith(" ") and _encode(tokenizer, alone[1:]) == _encode(tokenizer, alone)
        return alone[1:] if is_tokenizers else alone  # its first space
    # A context of some tokens will do, unless it has no text or begins or ends within a character.
    for context in (before[-32:], before):
        head = _decode(tokenizer, context, skip_special_tokens=True)
        if head and "\ufffd" not in head:
            break
    whole = _decode(tokenizer, [*context, *tokens], skip_special_tokens=True)
    return whole[len(_common_prefix(head, whole)) :]


def _begins_anew(tokenizer: Any, token: int) -> bool:
    """Whether text after `token` is tokenized like one that stands alone, first space and all."""
    name = tokenizer.convert_ids_to_tokens(int(token))
    is_alike = bool(name) and _probe(tokenizer, f"{name}a") == (token, *_probe(tokenizer, "a"))
    return is_alike and name in tokenizer.get_added_vocab()


def _common_prefix(one: str, other: str) -> str:
    return os.path.commonprefix([one, other])  # noqa: RUF071 - of characters


def _encode(tokenizer: Any, text: str, *, is_whole: bool = False) -> Tokens:
    with failing_as(
        f"{_name(tokenizer)} cannot read {text[:60]!r}"
    ):  # a vocabulary without an unknown token, say
        tokens = tuple(tokenizer(text, add_special_tokens=is_whole)["input_ids"])
    rows = getattr(tokenizer, "embedding_rows", None)  # the model's; here is the last place before a device
    if rows is not None and tokens and (most := max(tokens)) >= rows:
        name = tokenizer.convert_ids_to_tokens(most)
        found = f"{name!r} as token {most}, and the model embeddings for {rows}"
        how = "take it out of the texts, or give the model more (resize_token_embeddings) and save it"
        raise InputError(f"{_name(tokenizer)} has {found}; {how}")
    return tokens


def _probe(tokenizer: Any, text: str) -> Tokens:
    """`_encode` of text that is none of the user's; () where the tokenizer cannot read it."""
    try:
        return _encode(tokenizer, text)
    except InputError:
        return ()


def _decode(tokenizer: Any, tokens: Sequence[int], **settings: bool) -> str:
    with failing_as(f"{_name(tokenizer)} cannot decode {list(tokens)[:9]}"):
        return str(tokenizer.decode(tokens, **settings))


def _name(tokenizer: Any) -> str:
    return f"the model's tokenizer ({tokenizer.name_or_path or 'made in Python'})"


def render_messages(
    tokenizer: Any, messages: Sequence[Any], *, opens_turn: bool, where: str, tools: Any = None
) -> str:
    """Messages as the model's chat template writes them; with `opens_turn` the assistant's turn is begun."""
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(f"{where}: messages need a chat template; the model's tokenizer has none; use text")
    options = {"add_generation_prompt": opens_turn, "tokenize": False}
    # A template is a program: it may refuse roles or their order in its words, or have no end.
    with failing_as(f"{where}: the model's chat template does not take it"), limited():
        text = str(tokenizer.apply_chat_template(messages, tools=tools or None, **options))
        is_complete = not tools or text != tokenizer.apply_chat_template(messages, **options)
    if len(text) > LONGEST:
        raise InputError(f"{where}: the model's chat template makes {len(text):,} characters of it")
    if not is_complete:
        raise InputError(f"{where}: the model's chat template leaves out the row's tools; drop that column")
    return text


def turn_end(tokenizer: Any) -> int | None:
    """The token by which the chat template ends an assistant's message, if by a special one."""
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "surefoot"}]
    try:
        closed = render_messages(tokenizer, chat, opens_turn=False, where="")
    except InputError:
        return None
    after, added = _probe(tokenizer, closed.rpartition("surefoot")[2]), tokenizer.added_tokens_decoder
    return next((token for token in after if token in added and added[token].special), None)


def check_length(tokens: Sequence[int], text: str, *, context: int, new_tokens: int) -> None:
    """Raise InputError for a prompt that has no tokens, or too many for the model's context."""
    room, name = context - new_tokens, f"the prompt {text[:60]!r}"
    if room <= 0:
        raise InputError(f"max_new_tokens ({new_tokens}) leaves no room in the context of {context} tokens")
    if not tokens:
        raise InputError(f"{name} has no tokens; give it text or drop it")
    if len(tokens) > room:
        many = f"{name}… has {len(tokens)} tokens; the model's context of {context} leaves {room}"
        raise InputError(f"{many}; shorten it, set prompt_tokens or lower max_new_tokens ({new_tokens})")


def with_end_token(tokenizer: Any, tokens: Sequence[int], ends: Set[int], end: int | None = None) -> Tokens:
    """`tokens`, ending with one of the model's end tokens: else `end`, the tokenizer's, the model's lowest.

    Raises InputError if the model has none.
    """
    if not ends:
        raise InputError("policy.model: has no end token, without which no text would end; set its eos_token")
    if tokens and tokens[-1] in ends:
        return tuple(tokens)
    end = tokenizer.eos_token_id if end is None else end
    return (*tokens, min(ends) if end is None else end)


def encode_demonstration(
    tokenizer: Any, example: Demonstration, *, end_tokens: Set[int], mask_history: bool = False
) -> TokenizedExample:
    """Tokens and loss mask of a demonstration, which ends with an end token.

    The loss falls on the text, the completion, or the assistant's messages (with `mask_history` the last of
    them alone), each with its end token, and never on the first token, which nothing predicts. Prompt and
    completion are tokenized apart, as when the model writes the one after the other. Raises InputError for
    messages that cannot be rendered, or whose rendering is not what the model would have to write.
    """
    contents = example.contents
    if "messages" in contents:
        pieces = _assistant_pieces(tokenizer, example, end_tokens, mask_history)
    elif "text" in contents:
        pieces = [(encode_text(tokenizer, contents["text"]), True)]
    else:
        prompt, completion = contents["prompt"], contents["completion"]
        pieces = [(encode_text(tokenizer, prompt), False), (encode_more(tokenizer, completion, prompt), True)]
    tokens = with_end_token(tokenizer, [token for piece, _ in pieces for token in piece], end_tokens)
    loss_mask = [is_target for piece, is_target in pieces for _ in piece]
    loss_mask += [True] * (len(tokens) - len(loss_mask))
    return TokenizedExample(tokens, (False, *loss_mask[1:]))


def encode_scored_text(
    tokenizer: Any, prompt: Any, text: str, *, end_tokens: Set[int], end: int | None, where: str
) -> Tokens:
    """A text as a reward model reads it, with an end token, at which the score is read.

    A string prompt and `text` are one text; messages are rendered with `text` as the assistant's, which the
    chat template ends by `end` (its `turn_end`). Raises InputError for messages that cannot be rendered.
    """
    if prompt is None or isinstance(prompt, str):
        return with_end_token(tokenizer, encode_text(tokenizer, (prompt or "") + text), end_tokens)
    opened = render_messages(tokenizer, prompt, opens_turn=True, where=where)
    tokens = (*_encode(tokenizer, opened), *encode_more(tokenizer, text, opened))
    return with_end_token(tokenizer, tokens, end_tokens, end)


def _assistant_pieces(
    tokenizer: Any, example: Demonstration, end_tokens: Set[int], mask_history: bool
) -> list[Piece]:
    """A chat up to the assistant's last turn."""
    messages, where = example.contents["messages"], example.where
    places = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
    places = places[-1:] if mask_history else places
    pieces: list[Piece] = []
    before = ""
    for number in places:
        opened, written = _turn(tokenizer, messages[: number + 1], example, is_alone=len(places) == 1)
        if not opened.startswith(before):
            what = "the model's chat template changes earlier turns as the chat goes on"
            raise InputError(f"{where}: {what}; {ALONE}")
        others = encode_more(tokenizer, opened[len(before) :], before)
        tokens = encode_more(tokenizer, written, opened)
        # After the end token a template may have a line break, which the policy need not write.
        end = max((n + 1 for n, token in enumerate(tokens) if token in end_tokens), default=0)
        while end > 1 and tokens[end - 2] in end_tokens:  # a turn's end and the text's: the first one stops
            end -= 1
        if not end and number != places[-1]:
            what = "the model's chat template ends no message with an end token, so most would teach to go on"
            raise InputError(f"{where}: {what}; {ALONE}")
        end = end or len(tokens)
        pieces += [(others, False), (tokens[:end], True), (tokens[end:], False)]
        before = opened + written
    return pieces[:-1]  # nor what follows the last one


def _turn(tokenizer: Any, messages: list[Any], example: Demonstration, *, is_alone: bool) -> tuple[str, str]:
    """What a model is given before the last message, an assistant's, and what it would have to write then.

    Raises InputError where the template's rendering of the message is something else.
    """
    where, tools = example.where, example.tools

    def rendered(chat: list[Any], opens_turn: bool = False) -> str:
        return render_messages(tokenizer, chat, tools=tools, opens_turn=opens_turn, where=where)

    opened, closed = rendered(messages[:-1], opens_turn=True), rendered(messages)
    reasoning = [text for key in REASONING if isinstance(text := messages[-1].get(key), str)]
    if any(text.strip() not in closed for text in reasoning):
        what = "the model's chat template leaves out its reasoning"
        raise InputError(f"{where}: {what}; drop that from the row")
    if not closed.startswith(opened):
        # A turn is opened with more than is written of one that is past: with a thinking block, say.
        probe = rendered([*messages[:-1], {"role": "assistant", "content": "surefoot"}])
        header = _common_prefix(opened, probe)
        block = opened[len(header) :]
        is_past = closed.startswith(header) and re.search(r"</[^<>]+>\s*$", block)  # the block: the prompt's
        if not (is_past and is_alone):
            what = f"the model's chat template opens a message with {block.strip()[:40]!r}, but not this one"
            how = ALONE if is_past else "give the row as prompt and completion, the prompt rendered"
            raise InputError(f"{where}: {what}, so what the model would write is unknown; {how}")
        return opened, closed[len(header) :]
    written = closed[len(opened) :]
    block_end = re.match(r"\s*(<\w+>)?\s*(</\w+>)", written)
    if block_end is None or written.strip().startswith(str(messages[-1]["content"]).strip()):
        return opened, written
    if written.count(block_end[2]) > 1 or not (block_end[1] or reasoning):
        what = f"the model's chat template ends its thinking ({block_end[2]}) before it begins"
        raise InputError(f"{where}: {what}; give the message its reasoning_content ('' for none)")
    return opened, written
