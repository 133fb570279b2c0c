"""What is said of a problem with a configuration: one line with what, where, and how to fix it."""

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

from pydantic import BaseModel, ValidationError

from surefoot.errors import InputError

Model = TypeVar("Model", bound=BaseModel)
Names: TypeAlias = Collection[str]

# pydantic's error type -> what is said instead, and how to fix it.
_PLAINER = {
    "model_type": ("should be a section with settings", ""),
    "model_attributes_type": ("should be a section with settings", ""),
    "string_type": ("should be text", "; put it in quotes"),
    "string_too_short": ("should not be empty", ""),
    "list_type": ("should be a list", "; write [a, b]"),
    "int_type": ("should be a whole number", ""),
    "int_from_float": ("should be a whole number", ""),
    "float_type": ("should be a number", ""),
    "bool_type": ("should be true or false", ""),
    "invalid_key": ("is not a valid setting", ""),
}


def validated(model: type[Model], data: Any, *, where: str, keys: Names = (), flags: Names = ()) -> Model:
    """`data` as a `model`, whose real keys are `keys` or its fields; `flags` are keys that came as flags.

    Raises InputError: `where` and the key, or the flag, what is wrong with it, and how to fix it.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise InputError(_first_problem(error.errors(), where, keys or model.model_fields, flags)) from None


def _first_problem(problems: Sequence[Mapping[str, Any]], where: str, keys: Names, flags: Names) -> str:
    # A misspelled key is also a missing one: say the former. Of a value's types, the one it comes nearest to.
    problem = min(problems, key=lambda p: (p["type"] != "extra_forbidden", -len(p["loc"])))
    parts = [str(part) for part in problem["loc"]]
    is_key = problem["type"] in {"extra_forbidden", "missing"}
    while len(parts) > 1 and not is_key and ".".join(parts) not in keys:
        parts.pop()  # which entry of a list, which type of several
    key = ".".join(parts)
    is_flag = bool(key) and any(f"{key}.".startswith(f"{f}.") or f"{f}.".startswith(f"{key}.") for f in flags)
    name, start = (as_flag(key), "") if is_flag else (key, f"{where}: ")
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if problem["type"] == "extra_forbidden":
        what, names = ("flag", [as_flag(known) for known in keys]) if is_flag else ("key", keys)
        near = suggestion(name, names, "surefoot ppo --help lists them")
        return f"{start}unknown {what} {short(name)}{near}"
    if problem["type"] == "missing":
        return f"{start}{name} is missing"
    if problem["type"] == "value_error":
        return f"{start}{name}: {message}" if key else f"{start}{message}"
    message, fix = _PLAINER.get(problem["type"], (message, ""))
    return f"{start}{name}: {message}, got {short(problem['input'])}{fix}"


def suggestion(name: str, candidates: Names, otherwise: str) -> str:
    """'; did you mean …?' with the closest candidate, by its last part first, then by the whole."""
    if same := next((known for known in candidates if _words(known) == _words(_leaf(name))), None):
        return f"; it is {same!r}"  # kl_coef is kl.coef
    candidates = [candidate for candidate in candidates if not name.startswith(f"{candidate}.")]
    section = name.rpartition(".")[0]  # of two sections with such a field, the one that was meant
    by_leaf = {_leaf(c): c for c in sorted(candidates, key=lambda c: c.rpartition(".")[0] == section)}

    def like_leaf(cutoff: float) -> list[str]:
        return [by_leaf[leaf] for leaf in difflib.get_close_matches(_leaf(name), by_leaf, 1, cutoff)]

    close = like_leaf(0.75) or difflib.get_close_matches(name, candidates, n=1) or like_leaf(0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; {otherwise}"


def as_flag(key: str) -> str:
    """`ppo.kl_coef` as it stands on the command line."""
    return "--" + key.replace("_", "-")


def short(value: Any) -> str:
    """A value as it would be written in Python, cut to what fits in a line."""
    try:
        text = repr(value)
    except Exception:  # it is the user's, as may be its class
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."


def _words(key: str) -> list[str]:
    return re.findall("[a-z0-9]+", key)


def _leaf(key: str) -> str:
    return key.rsplit(".", 1)[-1].removeprefix("--")
