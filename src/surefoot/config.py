"""The whole configuration as typed, strict models. Imports no torch.

A run is one `Config`: read from YAML, overridden by flags, checked here before anything heavy starts, and written back
whole into the run folder. Every field's description is the text of `docs/config.md` and of `--help`.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from surefoot import strict_yaml
from surefoot.errors import InputError
from surefoot.wording import as_flag, first_problem, short, suggestion


def _usable_path(text: str) -> str:
    if not text or "\0" in text or any(len(os.fsencode(part)) > 255 for part in text.split("/")):
        raise ValueError(f"{short(text)} is no name of a file or folder")
    return os.path.expanduser(text)


Positive = Annotated[int, Field(gt=0, le=10**9)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
PathText = Annotated[str, AfterValidator(_usable_path)]


class Section(BaseModel):
    """A strict part of the configuration: unknown keys are errors, values are not coerced, instances are frozen."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class RunConfig(Section):
    """Where the run leaves what it makes."""

    name: str | None = Field(None, description="Name of the run's folder; default: `ppo-1`, `ppo-2`, … the first free one.")
    folder: PathText = Field("runs", description="Folder that holds run folders; the default is in the working directory.")
    checkpoint_every: Positive = Field(10, description="Updates between two checkpoints.")
    keep_checkpoints: int = Field(2, ge=2, description="How many of the newest checkpoints stay (the best one stays besides).")

    @field_validator("name")
    @classmethod
    def _safe_name(cls, name: str | None) -> str | None:
        if name is not None and (
            not name.isprintable() or ".." in name or name in {"", "."} or set(name) & set("/\\") or len(name.encode()) > 200
        ):
            raise ValueError(f"{short(name)} is not a plain folder name; leave out slashes and '..', at most 200 bytes")
        return name


class AdapterConfig(Section):
    """A LoRA adapter (Hu et al. 2021, arXiv:2106.09685). The reference model is the same weights with it switched off."""

    rank: Positive = Field(16, description="Rank of the adapter.")
    alpha: float = Field(32.0, gt=0, description="Scale: the adapter's output is multiplied by alpha / rank.")
    targets: str | list[str] = Field("all-linear", description="List of module names to adapt, or `all-linear`.")

    @field_validator("targets")
    @classmethod
    def _names(cls, targets: str | list[str]) -> str | list[str]:
        if not targets or (isinstance(targets, str) and targets != "all-linear"):
            raise ValueError(f"write all-linear or a list of module names such as [q_proj, v_proj], not {short(targets)}")
        return targets


class CriticConfig(Section):
    """The value function."""

    kind: Literal["shared"] = Field(
        "shared", description="`shared`: a linear fp32 head on the policy's last hidden state, zero at the start."
    )
    stop_gradient: bool = Field(False, description="Keep the value loss's gradient out of the shared trunk.")


class PolicyConfig(Section):
    """The model that is trained."""

    model: PathText = Field(
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

    prompts: PathText = Field(description="JSONL file of prompts, or a name `surefoot fetch` knows.")
    reward: PathText = Field(description="Reward function as `file.py:function` or `package.module:function`.")
    metric: PathText | None = Field(
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
    stop: list[Annotated[str, Field(min_length=1)]] = Field(
        default_factory=list, description="Strings that end an answer; the string stays part of it."
    )
    stop_token_ids: list[Annotated[int, Field(ge=0)]] = Field(
        default_factory=list, description="End tokens besides the model's own."
    )
    slots: Positive = Field(64, description="Rows decoded at once; waiting prompts take the place of finished rows.")


class PPOConfig(Section):
    """The algorithm (Schulman et al. 2017, arXiv:1707.06347; for language models Ziegler et al. 2019, arXiv:1909.08593)."""

    total_episodes: Positive = Field(2000, description="Episodes in the whole run; rounded up to whole updates.")
    episodes_per_update: Positive = Field(64, description="Episodes collected for one update.")
    batch_size: Positive = Field(16, description="Episodes in a minibatch (one optimiser step). Divides episodes_per_update.")
    n_epochs: Positive = Field(2, description="Passes over the episodes of an update.")
    learning_rate: float = Field(3e-4, gt=0, description="Adam's step size at its highest.")
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

    every: Positive | None = Field(10, description="Updates between evaluations; `null`: only at start and end.")
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
        if ppo.missing_eos_mode == "replace" and ppo.missing_eos_penalty is None:
            raise ValueError("ppo.missing_eos_mode: replace needs a ppo.missing_eos_penalty to put in the score's place")
        return self


def _nearest_divisor(whole: int, wanted: int) -> int:
    small = [d for d in range(1, math.isqrt(whole) + 1) if whole % d == 0]
    return min((*small, *(whole // d for d in small)), key=lambda d: (abs(d - wanted), d))


def load_config(path: Path | str, overrides: Mapping[str, str] | None = None) -> Config:
    """Read a YAML file, apply `overrides` (dotted key -> YAML scalar, as from flags), check everything.

    Relative paths in the file are relative to the file; those in overrides to the working directory.
    Raises InputError with one line: what, where, how to mend it.
    """
    path = Path(path)
    data = strict_yaml.read(path)
    data = {} if data is None else data
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected sections such as 'ppo:' at the top, found {short(data)}")
    data = {key: value for key, value in data.items() if value is not None}  # a section whose lines are all comments
    _make_paths_relative_to(path.parent, data)
    flags = {key.replace("-", "_"): text for key, text in (overrides or {}).items()}
    for key, text in flags.items():
        _set(data, key, text)
    return make_config(data, where=str(path), flags=flags)


def make_config(data: dict[str, Any], *, where: str, flags: Collection[str] = ()) -> Config:
    """Check nested `data` against the models. Raises InputError naming the key, and the nearest real one.

    `flags` are the dotted keys that came from the command line: a problem with one of them names the flag.
    """
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise InputError(first_problem(error.errors(), where=where, kinds=_kinds(), flags=flags)) from None


def dump_config(config: Config, *, exclude: Collection[str] = ()) -> str:
    """The resolved configuration as YAML, without the sections in `exclude`."""
    return strict_yaml.dump(config.model_dump(mode="json", exclude=set(exclude)))


def absolute_paths(config: Config) -> Config:
    """The same configuration with its local files named from the root: it means the same wherever it is read."""
    data = config.model_dump()
    _make_paths_relative_to(Path.cwd(), data)
    return make_config(data, where="config")


def with_sampling(generation: GenerationConfig, changes: Mapping[str, Any]) -> GenerationConfig:
    """`generation` with other settings for writing text. Raises InputError for an unknown name or a wrong value."""
    allowed = ("max_new_tokens", "temperature", "top_k", "top_p")
    for name in changes:
        if name not in allowed:
            raise InputError(f"unknown sampling setting {name!r}; there are {', '.join(allowed)}")
    try:
        return GenerationConfig.model_validate(generation.model_dump() | dict(changes))
    except ValidationError as error:
        raise InputError(first_problem(error.errors(), where="generate", kinds=_kinds())) from None


def setting_keys() -> dict[str, str]:
    """Flat setting name -> dotted key, for keyword arguments: `{"learning_rate": "ppo.learning_rate", "seed": "seed", …}`."""
    keys: dict[str, str] = {}
    for name, section in ((name, info.annotation) for name, info in Config.model_fields.items()):
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
            is_the_tasks = name in TaskConfig.model_fields
            hint = "; it is TextTask's" if is_the_tasks else suggestion(name, keys, "docs/config.md lists them")
            raise InputError(f"unknown setting {name!r}{hint}")
        section, _, leaf = keys[name].rpartition(".")
        target = data.setdefault(section, {}) if section else data
        target[leaf] = value.model_dump() if isinstance(value, Section) else value
    return data


def _set(data: dict[str, Any], key: str, text: str) -> None:
    """Set `section.field` from a command-line string."""
    if not text.strip():
        raise InputError(f"{as_flag(key)}: the value is empty; write null for none")
    value = strict_yaml.scalar(text)
    if "str" in _kinds().get(key, "") and not isinstance(value, (str, list, type(None))):
        value = text  # a run may be called 7
    *parents, leaf = key.split(".")
    if not all((*parents, leaf)):
        raise InputError(f"{as_flag(key)} is no flag; surefoot ppo --help lists them")
    for parent in parents:
        if data.get(parent) is None:
            data[parent] = {}
        data = data[parent]
        if not isinstance(data, dict):
            raise InputError(f"{as_flag(key)}: {parent} is {short(data)} in the file, not a section")
    data[leaf] = value


def _make_paths_relative_to(folder: Path, data: dict[str, Any]) -> None:
    """Rewrite relative paths in place. Names of assets, hub ids and modules stay."""
    for section, key in (("run", "folder"), ("policy", "model"), ("task", "prompts"), ("task", "reward"), ("task", "metric")):
        values = data.get(section)
        value = values.get(key) if isinstance(values, dict) else None
        if values and isinstance(value, str) and value[:1] not in ("", "~") and _is_path(key, value, folder):
            values[key] = os.path.normpath(folder / value)


def _is_path(key: str, value: str, folder: Path) -> bool:
    if key in {"reward", "metric"}:
        return ".py:" in value
    # A prompt file that is not there yet must not be found elsewhere by accident.
    is_file_name = key == "prompts" and ("/" in value or ".json" in value)
    return key == "folder" or is_file_name or value.startswith(".") or os.path.exists(folder / value)


@functools.cache
def _kinds() -> dict[str, str]:
    """Type of every field by its dotted key; a section's is empty."""
    kinds = {key: kind for key, kind, _, _ in field_table()}
    sections = {key.rsplit(".", depth)[0] for key in kinds for depth in range(1, key.count(".") + 1)}
    return kinds | dict.fromkeys(sections, "")


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
            default = "required" if info.is_required() else strict_yaml.dump(info.get_default(call_default_factory=True))
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
