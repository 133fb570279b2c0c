"""What TRL's users have, read without running it: scripts as trees, command lines, YAML and JSON. Literals only."""

from __future__ import annotations

import ast
import json
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surefoot.config import strict_yaml
from surefoot.config.messages import short
from surefoot.errors import InputError
from surefoot.migrate.trl.settings import KINDS, OLD, Kind

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
AS_JSON = "import torch; print(torch.load('training_args.bin', weights_only=False).to_json_string())"
GENERATION_NAMES = ("generation_kwargs", "gen_kwargs")
SAMPLING = ("max_new_tokens", "temperature", "top_k", "top_p")
# peft's LoraConfig: its keyword -> (ModelConfig's name for it, peft's default).
LORA: dict[str, tuple[str, Any]] = {
    "r": ("lora_r", 8),
    "lora_alpha": ("lora_alpha", 8),
    "lora_dropout": ("lora_dropout", 0.0),
    "target_modules": ("lora_target_modules", None),
}
# What changes nothing that is learned, of a LoraConfig, of generation_kwargs and of a trainer; and what else is told of.
LORA_ASIDE = ("task_type", "inference_mode", "base_model_name_or_path")
GENERATION_ASIDE = ("pad_token_id", "return_prompt", "batch_size", "use_cache")
TRAINER_ASIDE = (
    *(
        "args",
        "config",
        "model",
        "tokenizer",
        "processing_class",
        "peft_config",
        "dataset",
        "eval_dataset",
        "data_collator",
    ),
    *("reward_model", "value_model", "reward_processing_classes"),
)
# Values by which nothing is asked for.
NOTHING = {
    "bias": ("'none'",),
    "do_sample": ("True",),
    "min_length": ("-1", "0"),
    "repetition_penalty": ("1", "1.0"),
}
# In a shell's line: what is quoted or escaped, a comment, and what ends a command or its arguments.
SHELL = re.compile(r"""('[^']*'|"(?:\\.|[^"\\])*"|\\.|\$\([^()]*\))|(?<!\S)\#.*|(?<!\S)\d+[<>]+&?|[;&|<>]+""")
END = "\0"  # no word of a shell


@dataclass
class Found:
    """What a file says: values by TRL's names, what is no literal in words, and remarks for the user."""

    where: str
    kind: Kind = OLD
    values: dict[str, Any] = field(default_factory=dict)
    expressions: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    def nearest(self, kinds: Sequence[Kind]) -> list[Kind]:
        """Those that know the most of the settings; all of them if they know none."""
        given = self.values.keys() | self.expressions.keys()
        known = [len({row.theirs for row in kind.rows} & given) for kind in kinds]
        return [kind for kind, count in zip(kinds, known, strict=True) if count == max(known)]


def read(path: Path) -> Found:
    """The settings in a file of TRL's user. Raises InputError with the path, and the way where there is one."""
    if path.suffix in PICKLES:
        raise InputError(
            f"{path}: a pickle, which is not read since reading one can run code; where you trust it and TRL is installed: "
            f'python -c "{AS_JSON}" > training_args.json, then import that'
        )
    if path.suffix == ".py":
        return _script(_text(path), path)
    if path.suffix in (".sh", ".bash"):
        text = _text(path)
        return _of_any_kind(_command(text, path), f"{path.name} {text}")
    if path.suffix in (".yaml", ".yml"):
        data = strict_yaml.read(path)
    elif path.suffix == ".json":
        try:
            data = json.loads(_text(path))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: not valid JSON: {error}") from None
    else:
        raise InputError(
            f"{path}: expected a .py or .sh script, a .yaml or .json file, or the folder of a checkpoint"
        )
    if not isinstance(data, dict) or not all(isinstance(name, str) for name in data):
        raise InputError(f"{path}: expected TRL's settings by name, found {short(data)}")
    values = {name: value for name, value in data.items() if value is not None}
    found = Found(str(path), values=values)
    for name in [
        name for name, value in values.items() if value == f"<{name.upper()}>"
    ]:  # transformers does so to every …_token
        found.expressions[name] = f"{found.values.pop(name)}, hidden when the file was written"
    return _of_any_kind(found, path.name)


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(strict_yaml.MAX_BYTES + 1)
        if len(raw) > strict_yaml.MAX_BYTES:
            raise InputError(f"{path}: larger than {strict_yaml.MAX_BYTES:,} bytes; this is no configuration")
        return raw.decode()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _of_any_kind(found: Found, hint: str) -> Found:
    """Settings that no class name stands before: of the kind that knows the most of them, else the one `hint` names."""
    best = found.nearest(tuple(KINDS.values()))
    if len(best) == len(KINDS):
        raise InputError(f"{found.where}: no setting of TRL's PPO, GRPO or RLOO in it")
    if len(best) > 1:
        titles = " and ".join(kind.title for kind in best)
        best = [kind for kind in best if re.search(rf"(?<![a-z]){kind.word}(?![a-z])", hint.lower())]
        if len(best) != 1:
            raise InputError(
                f"{found.where}: fits {titles} alike; put ppo, grpo or rloo into the file's name"
            )
    found.kind = best[0]
    return found


def _script(text: str, path: Path) -> Found:
    """The one configuration that a script builds, and what stands around it."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = getattr(error, "lineno", None) or 1
        raise InputError(
            f"{path}, line {line}: not Python that can be parsed: {getattr(error, 'msg', error)}"
        ) from None
    kept = (ast.Call, ast.Assign, ast.AnnAssign, ast.AugAssign)
    nodes = sorted((node for node in ast.walk(tree) if isinstance(node, kept)), key=lambda node: node.lineno)
    known = {name for kind in KINDS.values() for name in kind.calls}
    builds = [node for node in nodes if isinstance(node, ast.Call) and _name(node.func) in known]
    if not builds:
        raise InputError(
            f"{path}: builds no {', '.join(sorted(known))}; where its settings come from the command line, give the shell "
            "script or the YAML file that has them"
        )
    if len(builds) > 1:
        lines = ", ".join(f"{_name(node.func)} at line {node.lineno}" for node in builds)
        raise InputError(
            f"{path}: builds several configurations, {lines}; keep one of them in a copy of the script"
        )
    build = builds[0]
    found = Found(f"{path}, line {build.lineno}")
    found.remarks += [f"{_at(value)} is given without its name" for value in build.args]
    _take(found, [(k.arg, k.value) for k in build.keywords])
    best = found.nearest([kind for kind in KINDS.values() if _name(build.func) in kind.calls])
    # A script of the old API has its critic on the model; one that says nothing is taken for the newest.
    found.kind = OLD if OLD in best and (len(best) == 1 or "ValueHead" in text) else best[-1]
    for node in nodes:
        _read_call(found, node) if isinstance(node, ast.Call) else _read_assignment(found, node)
    return found


def _read_call(found: Found, node: ast.Call) -> None:
    """A LoraConfig, the trainer's own arguments, or a change by `setattr`."""
    if _name(node.func) == "LoraConfig":
        if "use_peft" in found.values:
            found.remarks.append(f"{_at(node)}: a second LoraConfig, which is not read")
            return
        found.values |= {"use_peft": True} | {
            theirs: default for theirs, default in LORA.values() if default is not None
        }
        named = [(LORA[k.arg][0] if k.arg in LORA else k.arg, k.value) for k in node.keywords]
        _take(found, [(name, value) for name, value in named if name is None or name.startswith("lora_")])
        _take_others(
            found,
            "LoraConfig",
            [pair for pair in named if pair[0] and not pair[0].startswith("lora_")],
            LORA_ASIDE,
        )
    elif _name(node.func).endswith("Trainer"):
        for keyword in node.keywords:
            if keyword.arg == "model" and isinstance(keyword.value, ast.Constant):
                found.values.setdefault("model_name_or_path", keyword.value.value)
            elif keyword.arg in ("reward_funcs", "train_dataset"):
                found.expressions[keyword.arg] = _at(keyword.value)
            elif keyword.arg is None:
                found.remarks.append(f"settings in **{_at(keyword.value)} are not seen")
            elif keyword.arg not in TRAINER_ASIDE and ast.unparse(keyword.value) != "None":
                found.expressions[keyword.arg] = _at(keyword.value)
    elif _name(node.func) == "setattr" and len(node.args) == 3 and isinstance(node.args[1], ast.Constant):
        _set_again(found, str(node.args[1].value), node)


def _read_assignment(found: Found, node: ast.Assign | ast.AnnAssign | ast.AugAssign) -> None:
    """Sampling settings, or a change made to the configuration after it was built."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    names = {_name(target) for target in targets}
    if names & set(GENERATION_NAMES) and found.kind is OLD and node.value is not None:
        _read_generation(found, node.value)
    for part in (part for target in targets for part in ast.walk(target)):
        if isinstance(part, ast.Subscript) and _name(part.value) in GENERATION_NAMES:
            found.remarks.append(f"generation_kwargs: set again by {_at(node)}")
        elif isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store):
            _set_again(found, part.attr, node)


def _read_generation(found: Found, value: ast.expr) -> None:
    """What TRL's old scripts give to `generate`: a literal dictionary, or `dict(...)`."""
    pairs: list[tuple[str | None, ast.expr]] = []
    if isinstance(value, ast.Dict):
        for key, inner in zip(value.keys, value.values, strict=True):
            pairs.append((str(key.value) if isinstance(key, ast.Constant) else None, inner))
    elif isinstance(value, ast.Call) and _name(value.func) == "dict" and not value.args:
        pairs = [(keyword.arg, keyword.value) for keyword in value.keywords]
    else:
        found.remarks.append(f"generation_kwargs: {_at(value)} is not seen")
    _take(found, [(name, inner) for name, inner in pairs if name is None or name in SAMPLING])
    _take_others(
        found,
        "generation_kwargs",
        [pair for pair in pairs if pair[0] and pair[0] not in SAMPLING],
        GENERATION_ASIDE,
    )


def _take_others(
    found: Found, of: str, pairs: list[tuple[str | None, ast.expr]], aside: tuple[str, ...]
) -> None:
    """Settings that are known to have no row in the table, by their full names: all that ask for something."""
    for name, node in pairs:
        if name not in aside and ast.unparse(node) not in ("None", *NOTHING.get(str(name), ("False",))):
            found.expressions[f"{of}.{name}"] = _at(node)


def _set_again(found: Found, name: str, node: ast.expr | ast.stmt) -> None:
    name = LORA.get(name, (name,))[0]
    if any(name == row.theirs for row in found.kind.rows):
        found.values.pop(name, None)
        found.expressions[name] = f"set again by {_at(node)}"


def _take(found: Found, pairs: list[tuple[str | None, ast.expr]]) -> None:
    for name, node in pairs:
        if name is None:
            found.remarks.append(f"settings in **{_at(node)} are not seen")
            continue
        found.values.pop(name, None)
        try:
            value = ast.literal_eval(node)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            found.expressions[name] = f"the expression {_at(node)}"
            continue
        if value is not None:
            found.values[name] = list(value) if isinstance(value, (tuple, set)) else value


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _at(node: ast.expr | ast.stmt) -> str:
    text = " ".join(ast.unparse(node).split())
    return f"{text if len(text) <= 80 else text[:77] + '...'} at line {node.lineno}"


def _command(text: str, path: Path) -> Found:
    """The flags of the training command in a shell script."""
    found = Found(str(path))
    for command in re.finditer(r"(?:\\\r?\n|[^\n])+", text):  # a line, or several that are joined
        number = text.count("\n", 0, command.start()) + 1
        try:
            line = re.sub(r"\\\r?\n", " ", command[0])
            words = shlex.split(SHELL.sub(lambda match: match[1] or f" {END} ", line))
        except ValueError as error:
            raise InputError(f"{path}, line {number}: no command that can be read: {error}") from None
        for name, values in _flags(words):
            if name == "config":
                found.remarks.append(
                    f"settings in --config {' '.join(values)} at line {number} are not seen; import that too"
                )
                continue
            if name in found.values or name in found.expressions:
                raise InputError(f"{path}, line {number}: --{name} is there twice; keep one training command")
            if any(set("$`") & set(value) for value in values):
                found.expressions[name] = f"the expression {' '.join(values)} at line {number}"
            else:
                read = [
                    None if v == "None" else strict_yaml.scalar(v) for v in values
                ]  # `none` is a word of TRL's
                found.values[name] = True if not read else read[0] if len(read) == 1 else read
    found.values = {name: value for name, value in found.values.items() if value is not None}
    return found


def _flags(words: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Flags with what follows each, up to the end of the command."""
    name, values = "", list[str]()
    for word in [*words, END]:
        is_end = word == END
        is_flag = word.startswith("--") and len(word) > 2
        if (is_end or is_flag) and name:
            yield name, values
        if is_end:
            name = ""
        elif is_flag:
            name, equals, value = word[2:].partition("=")
            name, values = name.replace("-", "_"), [value] if equals else []
        else:
            values.append(word)
