"""YAML as configurations need it: safe, bounded, and without the surprises of YAML 1.1."""

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from surefoot.errors import InputError

MAX_BYTES = 1_000_000  # far beyond any configuration
FLOAT = re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$")


class _Loader(yaml.SafeLoader):
    """The safe loader, which makes plain data only; `3e-4` is a number, and nothing may be said twice."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # aliases of aliases make a file of a kilobyte as large as the memory
            problem = f"the alias *{event.anchor} is not allowed; write the value out"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        return super().compose_node(parent, index)  # type: ignore[no-any-return]

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:str":
                raise yaml.MarkedYAMLError(problem="a key here is not a name", problem_mark=key.start_mark)
            # YAML lets the last one win, and a whole section can vanish that way.
            if key.value in seen:
                problem = f"{key.value!r} is there twice; keep one of the two"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads: a string that looks like `3e-4` gets quotes."""


for _kind in (_Loader, _Dumper):
    # YAML 1.1 takes 3e-4 for a string, YAML 1.2 and everybody else for a number.
    _kind.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))


def read(path: Path) -> Any:
    """The data in a YAML file, None if it is empty. Raises InputError with path, line and problem."""
    try:
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(text) > MAX_BYTES:
        raise InputError(f"{path}: larger than {MAX_BYTES:,} bytes; this is no configuration")
    try:
        return parse(text.decode())
    except UnicodeDecodeError as error:
        line = text.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}, line {line}: not UTF-8; save the file as UTF-8") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise InputError(f"{path}, line {line}: not valid, safe YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: the 30th of February
        raise InputError(f"{path}: not valid, safe YAML: {' '.join(str(error).split())[:200]}") from None


def parse(text: str) -> Any:
    """The data in YAML text. Raises yaml.YAMLError, ValueError or RecursionError."""
    return yaml.load(text, _Loader)


def scalar(text: str) -> Any:
    """A command-line value: YAML where it is YAML, else the text as it stands."""
    try:
        return parse(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return text


def dump(data: Any) -> str:
    """YAML text that `parse` reads back as the same data."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
