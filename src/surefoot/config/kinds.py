"""Kinds of runs: the sections that each has, and its defaults where they differ from the sections' own."""

from collections.abc import Collection, Mapping
from typing import Any

from surefoot.config.env import EnvConfig

# Sections of runs that learn from rows of data, and the classes that open such runs.
SUPERVISED = {"sft": "SFT", "reward_model": "RewardModel", "dpo": "DPO"}
# The sections by which a run is of a kind. One without any of them is a text task that is given in Python.
KINDS = ("task", "env", *SUPERVISED)
# What each kind has in addition to seed, device, run, policy and evaluate.
SECTIONS = {
    "task": ("task", "generation", "rollout", "ppo", "kl", "group", "shaping", "ptx", "rejection_sampling"),
    "env": ("env", "ppo"),
    "sft": ("sft", "new_model", "generation"),
    "reward_model": ("reward_model", "generation"),
    "dpo": ("dpo", "generation"),
}
# Supervised updates are short: evaluations and checkpoints take a fraction of their time.
_SHORT = {"run": {"checkpoint_every": 25}, "evaluate": {"every": 25, "episodes": 128}}
# Where a kind's default is not the section's, which is a text task's.
DEFAULTS: dict[str, dict[str, dict[str, Any]]] = {
    "task": {},
    # As in Stable-Baselines3, and what control has found to work.
    "env": {
        "policy": {"model": "MlpPolicy"},
        "ppo": {"batch_size": 64, "n_epochs": 10, "max_grad_norm": 0.5, "gamma": 0.99}
        | {"vf_coef": 0.5, "value_loss": "squared"},
        "kl": {"coef": 0.0},  # there is no reference model
        "evaluate": {"every": None, "episodes": 0},
    },
    # With a recurrent policy, in addition: as in sb3-contrib.
    "lstm": {"env": {"n_steps": 128}, "ppo": {"batch_size": 128}},
    "sft": _SHORT,
    "reward_model": _SHORT,
    "dpo": _SHORT,
}
CHECKPOINT_TIMESTEPS = 25_600  # between two checkpoints of an environment's run


def kind_of(given: Collection[str]) -> str:
    """The kind of run that has the sections `given`."""
    return next((name for name in KINDS if name in given), "task")


def foreign_sections(kind: str) -> frozenset[str]:
    """Sections that a run of that kind does not have."""
    return frozenset(name for sections in SECTIONS.values() for name in sections) - {*SECTIONS[kind]}


def with_defaults(data: Mapping[str, Any]) -> dict[str, Any]:
    """Nested `data` of a run with its kind's defaults. Raises ValueError for sections that clash."""
    given = [name for name, value in data.items() if value is not None]
    kinds, kind = [name for name in KINDS if name in given], kind_of(given)
    if len(kinds) > 1:
        raise ValueError(f"a run has one of {', '.join(KINDS)}, not {' and '.join(kinds)}; leave one out")
    if foreign := next((name for name in given if name in foreign_sections(kind)), None):
        who = "a text task" if kind == "task" else f"a run with {kind}"
        raise ValueError(f"{foreign}: {who} has no such section; leave it out")
    filled = _over(DEFAULTS[kind], data)
    policy, env = filled.get("policy"), filled.get("env")
    if kind != "env" or not isinstance(env, dict) or not isinstance(policy, dict):
        return filled
    if "Lstm" in str(policy.get("model")):
        filled = _over(_over(DEFAULTS[kind], DEFAULTS["lstm"]), data)
    run, env = filled.get("run") or {}, filled["env"]
    sizes = [env.get(name, EnvConfig.model_fields[name].default) for name in ("n_envs", "n_steps")]
    if isinstance(run, dict) and all(isinstance(size, int) and size > 0 for size in sizes):
        # A checkpoint is worth losing no more than seconds for: small updates need not have one each.
        every = min(max(CHECKPOINT_TIMESTEPS // (sizes[0] * sizes[1]), 1), 100)
        filled["run"] = {"checkpoint_every": every} | run
    return filled


def _over(defaults: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """`data` over `defaults`, section by section; what is not a section is refused elsewhere."""
    both = dict(data)
    for name, values in defaults.items():
        given = data.get(name)
        if given is None or isinstance(given, dict):
            both[name] = values | (given or {})
    return both
