"""The whole configuration as typed, strict models. Imports no torch.

A run is one `Config`: read from YAML, overridden by flags, checked here before anything heavy starts, and written back
whole into the run folder. Every field's description is the text of `docs/config.md` and of `--help`.
"""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from surefoot.errors import InputError

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class _Loader(yaml.SafeLoader):
    """The safe loader, but `3e-4` is a number, as YAML 1.2 and everybody expects (YAML 1.1 reads a string)."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789"))


class Section(BaseModel):
    """A strict part of the configuration: unknown keys are errors, values are not coerced, instances are frozen."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class RunConfig(Section):
    """Where the run leaves what it makes."""

    name: str | None = Field(None, description="Name of the run's folder; default: `ppo-1`, `ppo-2`, … the first free one.")
    folder: str = Field("runs", description="Folder that holds run folders.")
    checkpoint_every: Positive = Field(10, description="Updates between two checkpoints.")
    keep_checkpoints: int = Field(2, ge=2, description="How many of the newest checkpoints stay (the best one stays besides).")

    @field_validator("name")
    @classmethod
    def _safe_name(cls, name: str | None) -> str | None:
        if name is not None and (not name or name in {".", ".."} or any(c in name for c in "/\\\0") or ".." in name):
            raise ValueError(f"{name!r} is not a plain folder name; leave out slashes and '..'")
        return name


class AdapterConfig(Section):
    """A LoRA adapter (Hu et al. 2021, arXiv:2106.09685). The reference model is the same weights with it switched off."""

    rank: Positive = Field(16, description="Rank of the adapter.")
    alpha: float = Field(32.0, gt=0, description="Scale: the adapter's output is multiplied by alpha / rank.")
    targets: str | list[str] = Field("all-linear", description="Module names to adapt, or `all-linear`.")


class CriticConfig(Section):
    """The value function."""

    kind: Literal["shared"] = Field(
        "shared", description="`shared`: a linear fp32 head on the policy's last hidden state, zero at the start."
    )
    stop_gradient: bool = Field(False, description="Keep the value loss's gradient out of the shared trunk.")


class PolicyConfig(Section):
    """The model that is trained."""

    model: str = Field(
        "smollm2-135m-instruct", description="A name `surefoot fetch` knows, a local folder, or a Hugging Face hub id."
    )
    adapter: AdapterConfig | None = Field(
        default_factory=AdapterConfig,
        description="LoRA adapter; `null` trains all weights and keeps a frozen copy as the reference.",
    )
    critic: CriticConfig = Field(default_factory=CriticConfig, description="The value function.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Arithmetic. Trained weights are float32 always; `bfloat16` computes under autocast, a frozen base is also stored in it. `auto`: bfloat16 where the processor has it in hardware, else float32.",
    )


class TaskConfig(Section):
    """The prompts and the reward."""

    prompts: str = Field(description="JSONL file of prompts, or a name `surefoot fetch` knows.")
    reward: str = Field(description="Reward function as `file.py:function` or `package.module:function`.")
    metric: str | None = Field(
        None,
        description="A task metric apart from the reward, same form and signature; the best checkpoint is kept by it. Default: the reward.",
    )
    prompt_column: str = Field(
        "prompt", description="Column of the file that holds the prompt; the others go to the reward function."
    )
    chat: bool = Field(
        False,
        description="Put plain-text prompts through the tokenizer's chat template as a user message. Prompts that are message lists always go through it.",
    )
    prompt_tokens: Positive | None = Field(None, description="Keep only the first so many tokens of each prompt.")
    held_out: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.1, description="Fraction of prompts kept for evaluation, chosen by a hash of their text."
    )


class GenerationConfig(Section):
    """How tokens are drawn."""

    max_new_tokens: Positive = Field(24, description="Longest answer, tokens.")
    temperature: float = Field(
        1.0,
        ge=0,
        le=10,
        description="Divides the logits when sampling and when scoring, for policy and reference alike. 0 (greedy) is for generation only.",
    )
    top_k: Positive | None = Field(
        None, description="Sample from the k likeliest tokens. Refused in training: the log-probs are over the full vocabulary."
    )
    top_p: float | None = Field(
        None, gt=0, le=1, description="Sample from the smallest set with this probability. Refused in training, as top_k."
    )
    stop: list[str] = Field(default_factory=list, description="Strings that end an answer; the string stays part of it.")
    stop_token_ids: list[int] = Field(default_factory=list, description="End tokens besides the model's own.")
    slots: Positive = Field(64, description="Rows decoded at once; waiting prompts take the place of finished rows.")


class PPOConfig(Section):
    """The algorithm (Schulman et al. 2017, arXiv:1707.06347; for language models Ziegler et al. 2019, arXiv:1909.08593)."""

    total_episodes: Positive = Field(2000, description="Episodes in the whole run; rounded up to whole updates.")
    episodes_per_update: Positive = Field(64, description="Episodes collected for one update.")
    batch_size: Positive = Field(16, description="Episodes in a minibatch (one optimiser step). Divides episodes_per_update.")
    n_epochs: Positive = Field(2, description="Passes over the episodes of an update.")
    learning_rate: float = Field(3e-4, gt=0, allow_inf_nan=False, description="Adam's step size at its highest.")
    lr_schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="How the learning rate moves over the run."
    )
    lr_warmup: Fraction = Field(0.0, description="Fraction of the run in which the learning rate climbs from 0.")
    adam_epsilon: float = Field(1e-5, gt=0, description="Adam's epsilon.")
    adam_style: Literal["torch", "tf1"] = Field(
        "torch",
        description="Where epsilon stands: `torch` after bias correction, `tf1` before it as in OpenAI's original runs.",
    )
    max_grad_norm: float = Field(1.0, gt=0, description="Global gradient norm is clipped to this.")
    clip_range: float = Field(0.2, gt=0, description="ε of the clipped surrogate.")
    clip_range_vf: float | None = Field(None, gt=0, description="Clip of the value's move; `null` leaves it unclipped.")
    gamma: Fraction = Field(1.0, description="Discount per written token.")
    gae_lambda: Fraction = Field(0.95, description="λ of generalised advantage estimation.")
    normalize_advantage: bool = Field(True, description="Whiten advantages over each minibatch.")
    vf_coef: NonNegative = Field(0.1, description="Weight of the value loss.")
    ent_coef: NonNegative = Field(0.0, description="Weight of the entropy bonus.")
    kl_coef: NonNegative = Field(0.05, description="β of the per-token KL penalty in the reward (k1 against the reference).")
    kl_target: float | None = Field(
        None, gt=0, description="Adapt β to hold the mean sequence KL near this many nats; `null` keeps β fixed."
    )
    kl_horizon: float = Field(10_000.0, gt=0, description="Episodes in which the adaptive β moves by at most 20 %.")
    target_kl: float | None = Field(
        None,
        gt=0,
        description="Trust region δ: the update stops before a step once a minibatch's KL(old‖new) passes this, nats per token; `null`: no stop.",
    )
    missing_eos_penalty: NonNegative | None = Field(
        None, description="Charged when an answer was cut off by the length limit; `null`: nothing."
    )
    missing_eos_mode: Literal["subtract", "replace"] = Field(
        "subtract", description="`subtract` the penalty from the score, or `replace` the score by its negative."
    )
    reward_scale: Literal["none", "running_std"] = Field(
        "none", description="Divide scores by their running standard deviation."
    )
    reward_clip: float | None = Field(None, gt=0, description="Clip scores to ± this, after scaling.")
    whiten_rewards: bool = Field(False, description="Whiten per-token rewards over the update, keeping their mean.")
    micro_batch_tokens: Positive = Field(
        2048,
        description="Most tokens (rows × longest row) in one forward and backward pass. Speed and memory only: the gradient is the minibatch's.",
    )
    max_bad_steps: Positive = Field(5, description="Skipped steps (non-finite loss or gradient) in a row before the run stops.")


class EvaluateConfig(Section):
    """Evaluation on held-out prompts."""

    every: Positive | None = Field(10, description="Updates between two evaluations; `null`: never.")
    episodes: Positive = Field(64, description="Held-out prompts used, the same each time.")


class Config(Section):
    """Everything a run needs."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(0, description="Every generator of the run starts from it.")
    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", description="`auto`: cuda, else mps, else cpu.")
    run: RunConfig = Field(default_factory=RunConfig, description=RunConfig.__doc__)
    policy: PolicyConfig = Field(default_factory=PolicyConfig, description=PolicyConfig.__doc__)
    task: TaskConfig | None = Field(None, description=TaskConfig.__doc__)
    generation: GenerationConfig = Field(default_factory=GenerationConfig, description=GenerationConfig.__doc__)
    ppo: PPOConfig = Field(default_factory=PPOConfig, description=PPOConfig.__doc__)
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig, description=EvaluateConfig.__doc__)

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        ppo, generation = self.ppo, self.generation
        if ppo.episodes_per_update % ppo.batch_size:
            raise ValueError(
                f"ppo.batch_size ({ppo.batch_size}) does not divide ppo.episodes_per_update ({ppo.episodes_per_update}); "
                f"try {_nearest_divisor(ppo.episodes_per_update, ppo.batch_size)}"
            )
        for name in ("top_k", "top_p"):
            if getattr(generation, name) is not None:
                raise ValueError(
                    f"generation.{name} contradicts training: log-probs are over the full vocabulary; leave it out"
                )
        if generation.temperature == 0:
            raise ValueError("generation.temperature 0 is greedy and cannot be trained on; use a positive temperature")
        if ppo.kl_target is not None and ppo.kl_coef == 0:
            raise ValueError("ppo.kl_target adapts ppo.kl_coef, which is 0 and would stay 0; give kl_coef a positive start")
        return self


def _nearest_divisor(whole: int, wanted: int) -> int:
    return min((d for d in range(1, whole + 1) if whole % d == 0), key=lambda d: abs(d - wanted))


def load_config(path: Path | str, overrides: dict[str, str] | None = None) -> Config:
    """Read a YAML file, apply `overrides` (dotted key -> YAML scalar), check everything.

    Relative paths in the file are relative to the file; those in overrides to the working directory.
    Raises InputError with one line: what, where, how to mend it.
    """
    path = Path(path)
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not safe, valid YAML: {' '.join(str(error).split())}") from None
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected sections such as 'ppo:' at the top, found a {type(data).__name__}")
    _make_paths_relative_to(path.parent, data)
    for key, text in (overrides or {}).items():
        _set(data, key, text)
    return make_config(data, where=str(path))


def make_config(data: dict[str, Any], *, where: str) -> Config:
    """Check nested `data` against the models. Raises InputError naming the key, and the nearest real one."""
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise InputError(f"{where}: {_first_problem(error)}") from None


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def setting_keys() -> dict[str, str]:
    """Flat setting name -> dotted key, for keyword arguments: `{"learning_rate": "ppo.learning_rate", "seed": "seed", …}`."""
    keys: dict[str, str] = {}
    for name, info in Config.model_fields.items():
        section = info.annotation
        if isinstance(section, type) and issubclass(section, Section):
            prefix = f"{name}_" if name in ("run", "evaluate") else ""
            keys |= {prefix + inner: f"{name}.{inner}" for inner in section.model_fields}
        elif name != "task":
            keys[name] = name
    return keys


def nested(settings: dict[str, Any]) -> dict[str, Any]:
    """Flat settings -> nested data for `make_config`. Raises InputError for a name that does not exist."""
    keys = setting_keys()
    data: dict[str, Any] = {}
    for name, value in settings.items():
        if name not in keys:
            raise InputError(f"unknown setting {name!r}{_suggest(name, keys)}")
        *parents, leaf = keys[name].split(".")
        target = data
        for parent in parents:
            target = target.setdefault(parent, {})
        target[leaf] = value.model_dump() if isinstance(value, Section) else value
    return data


def _set(data: dict[str, Any], dotted: str, text: str) -> None:
    """Set `section.field` from a command-line string; dashes may stand for underscores."""
    *parents, leaf = dotted.replace("-", "_").split(".")
    for parent in parents:
        inner = data.get(parent)
        if not isinstance(inner, dict):
            inner = data[parent] = {}
        data = inner
    try:
        data[leaf] = yaml.load(text, _Loader)
    except yaml.YAMLError:
        data[leaf] = text


def _make_paths_relative_to(folder: Path, data: dict[str, Any]) -> None:
    """Rewrite the file's relative paths in place. Names that are not files there (assets, modules, hub ids) stay."""

    def rebase(section: str, key: str, suffix: str = "") -> None:
        values = data.get(section)
        value = values.get(key) if isinstance(values, dict) else None
        if values and isinstance(value, str) and (key == "folder" or (folder / value.removesuffix(suffix)).exists()):
            values[key] = os.path.normpath(folder / value)

    rebase("run", "folder")
    rebase("policy", "model")
    rebase("task", "prompts")
    for key in ("reward", "metric"):
        function = data.get("task", {}).get(key) if isinstance(data.get("task"), dict) else None
        if isinstance(function, str) and ".py:" in function:
            rebase("task", key, ":" + function.rsplit(":", 1)[1])


def _first_problem(error: ValidationError) -> str:
    """The first validation error as one line with its dotted key."""
    problem = error.errors(include_url=False)[0]
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location)
    if problem["type"] == "extra_forbidden":
        return f"unknown key {key!r}{_suggest(key, [row[0] for row in field_table()])}"
    if problem["type"] == "missing":
        return f"{key} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    if not key:
        return message
    return f"{key}: {message[0].lower() + message[1:]}, got {problem['input']!r}"


def field_table() -> list[tuple[str, str, str, str]]:
    """Every field that is not a section: (dotted key, type, default, description), in the order of the models."""

    def walk(model: type[BaseModel], prefix: str) -> list[tuple[str, str, str, str]]:
        rows = []
        for name, info in model.model_fields.items():
            inner = [t for t in (info.annotation, *get_args(info.annotation)) if isinstance(t, type) and issubclass(t, Section)]
            if inner:
                rows += walk(inner[0], f"{prefix}{name}.")
                continue
            kind = _type_name(info.annotation)
            default = "required" if info.is_required() else yaml.safe_dump(info.get_default(call_default_factory=True))
            rows.append((prefix + name, kind, default.removesuffix("...\n").strip(), info.description or ""))
        return rows

    return walk(Config, "")


def _type_name(annotation: Any) -> str:
    if get_origin(annotation) is Annotated:
        return _type_name(get_args(annotation)[0])
    if get_origin(annotation) is Literal:
        return " | ".join(get_args(annotation))
    if get_origin(annotation) is not None and get_origin(annotation) is not list:
        return " | ".join(_type_name(a) for a in get_args(annotation))
    return "null" if annotation is type(None) else getattr(annotation, "__name__", str(annotation))


def _suggest(name: str, candidates: Any) -> str:
    """'; did you mean …?' with the closest candidate, comparing the whole key first and its last part second."""
    candidates = list(candidates)
    close = difflib.get_close_matches(name, candidates, n=1, cutoff=0.6)
    if not close:
        by_leaf = {candidate.rsplit(".", 1)[-1]: candidate for candidate in candidates}
        leaf = difflib.get_close_matches(name.rsplit(".", 1)[-1], by_leaf, n=1, cutoff=0.6)
        close = [by_leaf[leaf[0]]] if leaf else []
    return f"; did you mean {close[0]!r}?" if close else "; see docs/config.md for the list"
