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

from pydantic import (
    BaseModel,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from surefoot.config import strict_yaml
from surefoot.config.checks import (
    KINDS,
    NETWORKS,
    check_environment,
    check_sections,
    check_supervised,
    check_text,
    foreign_sections,
    kind_of,
)
from surefoot.config.messages import as_flag, first_problem, new_place, short, suggestion
from surefoot.config.rejection import RejectionSamplingConfig
from surefoot.config.sections import (
    AdapterConfig,
    CriticConfig,
    EnvConfig,
    EvaluateConfig,
    GenerationConfig,
    GroupConfig,
    KLConfig,
    NetworkConfig,
    PolicyConfig,
    PPOConfig,
    PTXConfig,
    RolloutConfig,
    RunConfig,
    Section,
    SelfPlayConfig,
    ShapingConfig,
)
from surefoot.config.supervised import NewModelConfig, RewardModelConfig, SFTConfig
from surefoot.config.task import RewardPart, TaskConfig, check_weights
from surefoot.errors import InputError

__all__ = [
    "NETWORKS",
    "SUPERVISED",
    "AdapterConfig",
    "Config",
    "CriticConfig",
    "EnvConfig",
    "EvaluateConfig",
    "GenerationConfig",
    "GroupConfig",
    "KLConfig",
    "NetworkConfig",
    "NewModelConfig",
    "PPOConfig",
    "PTXConfig",
    "PolicyConfig",
    "RejectionSamplingConfig",
    "RewardModelConfig",
    "RewardPart",
    "RolloutConfig",
    "RunConfig",
    "SFTConfig",
    "Section",
    "SelfPlayConfig",
    "ShapingConfig",
    "TaskConfig",
    "absolute_paths",
    "check_weights",
    "config_from",
    "dump_config",
    "field_table",
    "load_config",
    "make_config",
    "make_paths_relative_to",
    "nested",
    "read_sections",
    "sections_for",
    "set_field",
    "setting_keys",
    "with_sampling",
]


class Config(Section):
    """Everything a run needs."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        0, description="Every generator of the run starts from it."
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(
        "auto", description="`auto`: cuda, else mps, else cpu."
    )
    run: RunConfig = Field(default_factory=RunConfig, description=RunConfig.__doc__)
    policy: PolicyConfig = Field(default_factory=PolicyConfig, description=PolicyConfig.__doc__)
    task: TaskConfig | None = Field(None, description=TaskConfig.__doc__)
    env: EnvConfig | None = Field(None, description=EnvConfig.__doc__)
    sft: SFTConfig | None = Field(None, description=SFTConfig.__doc__)
    new_model: NewModelConfig | None = Field(None, description=NewModelConfig.__doc__)
    reward_model: RewardModelConfig | None = Field(None, description=RewardModelConfig.__doc__)
    generation: GenerationConfig = Field(
        default_factory=GenerationConfig, description=GenerationConfig.__doc__
    )
    rollout: RolloutConfig = Field(default_factory=RolloutConfig, description=RolloutConfig.__doc__)
    ppo: PPOConfig = Field(default_factory=PPOConfig, description=PPOConfig.__doc__)
    kl: KLConfig = Field(default_factory=KLConfig, description=KLConfig.__doc__)
    group: GroupConfig = Field(default_factory=GroupConfig, description=GroupConfig.__doc__)
    shaping: ShapingConfig = Field(default_factory=ShapingConfig, description=ShapingConfig.__doc__)
    ptx: PTXConfig | None = Field(None, description=PTXConfig.__doc__)
    rejection_sampling: RejectionSamplingConfig | None = Field(
        None, description=RejectionSamplingConfig.__doc__
    )
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig, description=EvaluateConfig.__doc__)

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_environments(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        check_sections([name for name in cls.model_fields if data.get(name) is not None])
        if any(data.get(name) is not None for name in SUPERVISED):
            return data | {name: _over(values, data.get(name)) for name, values in SFT_DEFAULTS.items()}
        if data.get("env") is None:
            return data
        given = {section: data.get(section) or {} for section in ENV_DEFAULTS}
        if not all(isinstance(part, dict) for part in given.values()):
            return data  # which is refused elsewhere
        return data | {
            section: defaults | given[section] for section, defaults in _defaults_for(given).items()
        }

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if self.supervised is not None:
            check_supervised(self, self.supervised)
        elif self.env is None:
            check_text(self)
        else:
            check_environment(self)
        return self

    @model_serializer(mode="wrap")
    def _own_sections(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        foreign = foreign_sections(kind_of([name for name in KINDS if getattr(self, name) is not None]))
        return {name: value for name, value in dump(self).items() if name not in foreign}

    @property
    def supervised(self) -> Literal["sft", "reward_model"] | None:
        """The section that makes this a supervised run."""
        return "sft" if self.sft is not None else "reward_model" if self.reward_model is not None else None

    @property
    def opener(self) -> str:
        """Name of the class that a run of this kind is opened with."""
        return {
            "ppo": "PPO",
            "sft": "SFT",
            "reward-model": "RewardModel",
            "rejection-sampling": "RejectionSampling",
        }[self.verb]

    @property
    def verb(self) -> str:
        """The command that starts a run of this kind."""
        if self.rejection_sampling is not None:
            return "rejection-sampling"
        return (self.supervised or "ppo").replace("_", "-")



# What control has found to work, and Stable-Baselines3 has as its defaults: used with `env` where nothing else is said.
ENV_DEFAULTS: dict[str, dict[str, Any]] = {
    "run": {},
    "policy": {"model": "MlpPolicy"},
    "env": {},
    "ppo": {
        "batch_size": 64,
        "n_epochs": 10,
        "max_grad_norm": 0.5,
        "gamma": 0.99,
        "vf_coef": 0.5,
        "value_loss": "squared",
    },
    "kl": {"coef": 0.0},
    "evaluate": {"every": None, "episodes": 10},
}
# The sections of supervised runs.
SUPERVISED: tuple[Literal["sft", "reward_model"], ...] = ("sft", "reward_model")
# With these, whose updates are short: a fraction of their time for evaluations and checkpoints.
SFT_DEFAULTS: dict[str, dict[str, Any]] = {
    "run": {"checkpoint_every": 25},
    "evaluate": {"every": 25, "episodes": 128},
}
CHECKPOINT_TIMESTEPS = 25_600  # between two checkpoints
LSTM_DEFAULTS = {"env": {"n_steps": 128}, "ppo": {"batch_size": 128}}  # with memory: sb3-contrib's


def _over(defaults: dict[str, Any], given: Any) -> Any:
    return defaults | given if isinstance(given, dict) else defaults if given is None else given


def _defaults_for(given: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Sections of defaults that suit the environment and network of the sections `given`."""
    defaults = {section: dict(values) for section, values in ENV_DEFAULTS.items()}
    if "Lstm" in str(given["policy"].get("model")):
        for section, values in LSTM_DEFAULTS.items():
            defaults[section] |= values
    env = {"n_envs": 1, "n_steps": EnvConfig.model_fields["n_steps"].default} | defaults["env"] | given["env"]
    sizes = (env["n_envs"], env["n_steps"])
    if all(isinstance(size, int) and size > 0 for size in sizes):
        # A checkpoint is worth losing no more than seconds for: small updates need not have one each.
        defaults["run"]["checkpoint_every"] = min(max(CHECKPOINT_TIMESTEPS // math.prod(sizes), 1), 100)
    return defaults


def load_config(path: Path | str, overrides: Mapping[str, str] | None = None) -> Config:
    """Read a YAML file, apply `overrides` (dotted key -> YAML scalar, as from flags), check everything.

    Relative paths in the file are relative to the file; those in overrides to the working directory.
    Raises InputError with one line: what, where, how to mend it.
    """
    return config_from(read_sections(path), Path(path), overrides)


def read_sections(path: Path | str) -> dict[str, Any]:
    """The sections of a YAML file, unchecked, without those whose lines are all comments. Raises InputError."""
    data = strict_yaml.read(Path(path))
    data = {} if data is None else data
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected sections such as 'ppo:' at the top, found {short(data)}")
    return {key: value for key, value in data.items() if value is not None}


def config_from(
    data: dict[str, Any], path: Path, overrides: Mapping[str, str] | None = None, *, where: str | None = None
) -> Config:
    """`load_config` for sections that were read from the file `path`; messages begin with `where`, by default `path`."""
    make_paths_relative_to(path.parent, data)
    flags = {key.replace("-", "_"): text for key, text in (overrides or {}).items()}
    for key, text in flags.items():
        set_field(data, key, text)
    return make_config(data, where=where or str(path), flags=flags)


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
    make_paths_relative_to(Path.cwd(), data)
    return make_config(data, where="config")


def sections_for(config: Config | None, kind: str) -> dict[str, Any]:
    """What `config` says, as nested data for a run of that `kind`: without the defaults of sections that it does not have."""
    if config is None:
        return {}
    foreign = foreign_sections(kind)
    defaults = Config()
    return {
        name: value
        for name, value in config.model_dump().items()
        if name not in foreign or getattr(config, name) != getattr(defaults, name)
    }


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


# Sections given whole, as a dictionary, and prefixes of those whose fields would be named alike.
WHOLE = ("kl", "group", "shaping", "ptx")
PREFIXES = {"run": "run_", "evaluate": "evaluate_", "env.id": "env_", "env.kwargs": "env_"}


def setting_keys(algorithm: Literal["ppo", "sft", "reward_model"] = "ppo") -> dict[str, str]:
    """Flat setting name -> dotted key, for keyword arguments: `{"learning_rate": "ppo.learning_rate", "kl": "kl", …}`."""
    keys: dict[str, str] = {}
    others = ("task", "new_model", "rejection_sampling", *{"ppo", *SUPERVISED} - {algorithm})
    foreign = {*foreign_sections(algorithm), "env"} if algorithm != "ppo" else ()
    for name, info in Config.model_fields.items():
        if name in (*others, *foreign):
            continue
        section = _section(info.annotation)
        if section is None or name in WHOLE:
            keys[name] = name
            continue
        for inner in section.model_fields:
            key = f"{name}.{inner}"
            if key != f"{algorithm}.data":
                keys[PREFIXES.get(name, PREFIXES.get(key, "")) + inner] = key
    return keys


def _section(annotation: Any) -> type[Section] | None:
    """The model that a field holds, if it is a section."""
    kinds = (annotation, *get_args(annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)


def nested(
    settings: dict[str, Any], algorithm: Literal["ppo", "sft", "reward_model"] = "ppo"
) -> dict[str, Any]:
    """Flat settings -> nested data for `make_config`. Raises InputError for a name that does not exist."""
    keys = setting_keys(algorithm)
    data: dict[str, Any] = {}
    for name, value in settings.items():
        if name not in keys:
            is_the_tasks = algorithm == "ppo" and name in TaskConfig.model_fields
            hint = (
                "; it is TextTask's"
                if is_the_tasks
                else new_place(name, keys) or suggestion(name, keys, "docs/config.md lists them")
            )
            raise InputError(f"unknown setting {name!r}{hint}")
        section, _, leaf = keys[name].rpartition(".")
        target = data.setdefault(section, {}) if section else data
        target[leaf] = value.model_dump() if isinstance(value, Section) else value
    return data


def set_field(data: dict[str, Any], key: str, text: str) -> None:
    """Set `section.field` from a command-line string. Raises InputError for what is no such name."""
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


def make_paths_relative_to(folder: Path, data: dict[str, Any]) -> None:
    """Take the relative paths of `data` to be relative to `folder`, in place. Names of assets, hub ids and modules stay."""
    for *sections, key in (
        ("run", "folder"),
        ("policy", "model"),
        ("policy", "critic", "model"),
        ("task", "prompts"),
        ("task", "reward"),
        ("task", "metric"),
        ("env", "id"),
        ("sft", "data"),
        ("reward_model", "data"),
        ("ptx", "data"),
        ("rejection_sampling", "join"),
    ):
        values: Any = data
        for section in sections:
            values = values.get(section) if isinstance(values, dict) else None
        places = [(values, key)]
        if key == "reward" and isinstance(values, dict) and isinstance(values.get(key), list):
            places = [(part, "name") for part in values[key]]
        for place, name in places:
            value = place.get(name) if isinstance(place, dict) else None
            is_new = (sections, key) == (["policy"], "model") and data.get(
                "new_model"
            ) is not None  # not there yet
            if (
                isinstance(value, str)
                and value[:1] not in ("", "~")
                and (is_new or _is_path(key, value, folder))
            ):
                place[name] = os.path.normpath(folder / value)


def _is_path(key: str, value: str, folder: Path) -> bool:
    if key in {"reward", "metric", "id"}:
        return ".py:" in value or (key != "id" and os.path.isdir(folder / value))  # a reward model
    # A prompt file that is not there yet must not be found elsewhere by accident.
    is_file_name = key in {"prompts", "data", "join"} and ("/" in value or ".json" in value)
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
            if (inner := _section(info.annotation)) is not None:
                rows += walk(inner, f"{prefix}{name}.")
                continue
            kind = _type_name(info.annotation)
            default = (
                "required"
                if info.is_required()
                else strict_yaml.dump(info.get_default(call_default_factory=True))
            )
            rows.append((prefix + name, kind, default.removesuffix("...\n").strip(), info.description or ""))
        return rows

    return walk(Config, "")


def _type_name(annotation: Any) -> str:
    if get_origin(annotation) is Annotated:
        return _type_name(get_args(annotation)[0])
    if get_origin(annotation) is Literal:
        return " | ".join(get_args(annotation))
    if get_origin(annotation) not in (None, list, dict):
        return " | ".join(_type_name(a) for a in get_args(annotation))
    return "null" if annotation is type(None) else getattr(annotation, "__name__", str(annotation))
