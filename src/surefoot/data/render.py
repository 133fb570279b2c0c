"""Text and messages -> tokens: the one home of chat templates, end tokens and loss masks."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any

from surefoot.errors import InputError
from surefoot.types import Demonstration

Tokens = tuple[int, ...]
Piece = tuple[Tokens, bool]  # part of a chat, and whether the assistant wrote it


@dataclass(frozen=True)
class TokenizedExample:
    """The tokens of a demonstration, and on which of them the loss falls.

    Example: prompt (504, 2768), completion (314,), end token 2:
    `TokenizedExample((504, 2768, 314, 2), (False, False, True, True))`.
    """

    tokens: Tokens
    loss_mask: tuple[bool, ...]


def encode_prompt(tokenizer: Any, prompt: Any, *, chat: bool = False, where: str = "") -> Tokens:
    """Tokens of a string as the tokenizer makes them, or of messages up to where the assistant's turn begins.

    With `chat` a string is a user's message. Raises InputError, naming `where` (default: the prompt), for
    messages that the model has no chat template for, or whose template does not take them.
    """
    if isinstance(prompt, str) and not chat:
        return tuple(tokenizer(prompt)["input_ids"])
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    where = where or f"the prompt {str(prompt)[:60]!r}"
    return encode_more(tokenizer, render_messages(tokenizer, messages, opens_turn=True, where=where))


def encode_more(tokenizer: Any, text: str) -> Tokens:
    """Tokens of text that stands after other text: without the token that some tokenizers begin with."""
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def render_messages(tokenizer: Any, messages: Sequence[Any], *, opens_turn: bool, where: str) -> str:
    """Messages as the model's chat template writes them; with `opens_turn` the assistant's turn is begun."""
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(f"{where}: messages need a chat template; the model's tokenizer has none; use text")
    try:
        return str(tokenizer.apply_chat_template(messages, add_generation_prompt=opens_turn, tokenize=False))
    except Exception as error:  # a template is a program, and may refuse roles or their order in its words
        said = " ".join(str(error).split())
        raise InputError(f"{where}: the model's chat template does not take it: {said}") from error


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


def with_end_token(tokenizer: Any, tokens: Sequence[int], end_tokens: Set[int]) -> Tokens:
    """`tokens`, ending with one of the model's end tokens, else the tokenizer's (else the model's lowest).

    Raises InputError if the model has none.
    """
    if not end_tokens:
        raise InputError("policy.model: has no end token, without which no text would end; set its eos_token")
    if tokens and tokens[-1] in end_tokens:
        return tuple(tokens)
    return (*tokens, min(end_tokens) if tokenizer.eos_token_id is None else tokenizer.eos_token_id)


def encode_demonstration(tokenizer: Any, example: Demonstration, *, end_tokens: Set[int]) -> TokenizedExample:
    """Tokens and loss mask of a demonstration, which ends with an end token.

    The loss falls on the text, the completion, or the assistant's messages, each with its end token, and
    never on the first token, which nothing predicts. Prompt and completion are tokenized apart, as when the
    model writes the one after the other. Raises InputError for messages that cannot be rendered.
    """
    contents = example.contents
    if "messages" in contents:
        pieces = _assistant_pieces(tokenizer, contents["messages"], end_tokens, example.where)
    elif "text" in contents:
        pieces = [(encode_prompt(tokenizer, contents["text"]), True)]
    else:
        prompt, completion = contents["prompt"], contents["completion"]
        pieces = [(encode_prompt(tokenizer, prompt), False), (encode_more(tokenizer, completion), True)]
    tokens = with_end_token(tokenizer, [token for piece, _ in pieces for token in piece], end_tokens)
    loss_mask = [is_target for piece, is_target in pieces for _ in piece]
    loss_mask += [True] * (len(tokens) - len(loss_mask))
    return TokenizedExample(tokens, (False, *loss_mask[1:]))


def encode_scored_text(tokenizer: Any, prompt: Any, text: str, *, end_tokens: Set[int], where: str) -> Tokens:
    """A text as a reward model reads it, with an end token, at which the score is read.

    A string prompt and `text` are one text; messages are rendered with `text` as the assistant's. Raises
    InputError for messages that cannot be rendered.
    """
    if prompt is None or isinstance(prompt, str):
        tokens = encode_prompt(tokenizer, (prompt or "") + text)
    else:
        tokens = (*encode_prompt(tokenizer, prompt, where=where), *encode_more(tokenizer, text))
    return with_end_token(tokenizer, tokens, end_tokens)


def _assistant_pieces(tokenizer: Any, messages: list[Any], end_tokens: Set[int], where: str) -> list[Piece]:
    """A chat up to the assistant's last turn."""
    pieces: list[Piece] = []
    before = ""
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        opened = render_messages(tokenizer, messages[:number], opens_turn=True, where=where)
        closed = render_messages(tokenizer, messages[: number + 1], opens_turn=False, where=where)
        if not (opened.startswith(before) and closed.startswith(opened)):
            what = "the model's chat template changes earlier turns as the chat goes on"
            raise InputError(f"{where}: {what}; give every assistant message and what is before it a row")
        others = encode_more(tokenizer, opened[len(before) :])
        written = encode_more(tokenizer, closed[len(opened) :])
        # After the end token a template may have a line break, which the policy need not write.
        end = max((n + 1 for n, token in enumerate(written) if token in end_tokens), default=len(written))
        pieces += [(others, False), (written[:end], True), (written[end:], False)]
        before = closed
    return pieces[:-1]  # nor what follows the last one
