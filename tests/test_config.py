"""Configurations that must be refused; kinds of runs and their defaults; paths, flags and the way back from a file."""

import functools
import shlex
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from surefoot import DPO, PPO, SFT, RewardModel, TextTask
from surefoot.config import (
    AdapterConfig,
    Config,
    DPOConfig,
    GenerationConfig,
    RewardModelConfig,
    SFTConfig,
    absolute_paths,
    dump_config,
    field_table,
    load_config,
    make_config,
    nested,
    setting_keys,
    with_sampling,
)
from surefoot.config.kinds import KINDS, SUPERVISED, foreign_sections
from surefoot.config.tables import LEAST, default_text, defaults_of
from surefoot.errors import InputError
from tests.golden import check
from tests.inputs import model_folder, refusal

ROOT = Path(__file__).parent.parent


def refuse(path: Path | str, *names: str, flags: dict[str, str] | None = None) -> str:
    with pytest.raises(InputError) as caught:
        load_config(path, flags)
    assert len(str(caught.value)) < 300
    return check(str(caught.value), *names)


@pytest.mark.parametrize(
    ("text", "wrong", "nearest"),
    [
        ("sede: 1", "sede", "seed"),
        ("clip_range: 1", "clip_range", "ppo.clip_range"),  # right name, section forgotten
        ("ppo: {temperature: 1.0}", "ppo.temperature", "generation.temperature"),  # right name, wrong section
        ("ppo: {every: 3}", "ppo.every", "evaluate.every"),  # though ppo.vf_coef looks more like it as a whole
        ("generation: {horizn: 3}", "generation.horizn", "kl.horizon"),  # wrong section and misspelt
        ("policy: {critic: {kynd: shared}}", "policy.critic.kynd", "policy.critic.kind"),
        ("zzz: 1", "zzz", "surefoot ppo --help lists them"),  # like no other: no guess
        ("task: {prompts: p, rewards: r}", "task.rewards", "task.reward"),  # the misspelt key is also a missing one
    ],
)
def test_an_unknown_key_at_any_depth_is_named_with_the_nearest_real_one(written, text, wrong, nearest):
    refuse(written(text), f"c.yaml: unknown key '{wrong}'; ", nearest)


# Of another type, as nothing is coerced, or beyond the limits of its field.
WRONG: list[str] = ["seed=-1", "seed=9223372036854775808", "device=tpu", "kl.coef=-0.1", "kl.coef=low", "kl.coef='0.1'"]
WRONG += ["kl.coef=[1,2]", "ppo.learning_rate=0", "ppo.learning_rate=.nan", "ppo.clip_range=.inf", "ppo.gamma=1.01"]
WRONG += ["ppo.n_epochs=0", "ppo.dual_clip=1.0", "ppo.batch_size=8.0", "ppo.batch_size=true"]
WRONG += ["rollout.total_episodes=10000000000", "run.keep_checkpoints=1", "generation.temperature=11"]
WRONG += ["generation.stop_token_ids=[-1]", "generation.stop=['']", "generation.stop=x", "generation.stop=[a,1]"]
WRONG += ["run.name=7", "run.name=no", "run.name=2024-01-31", "ppo=3", "policy.adapter=lora"]
WRONG += ["policy.adapter.targets=q_proj", "policy.adapter.targets=[]", "policy.adapter.targets=[1]", 'run.folder="a\\0b"']
WRONG += ['policy.model="a\\0b"']


@pytest.mark.parametrize("wrong", [*WRONG, f"policy.model={'x' * 300}"])
def test_a_value_that_a_field_cannot_have_is_refused_by_name(written, wrong):
    key, _, value = wrong.partition("=")
    *sections, leaf = key.split(".")
    text = f"{leaf}: {value}"
    for section in reversed(sections):
        text = f"{section}: {{{text}}}"
    refuse(written(text), f"c.yaml: {key}")


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("task: {prompts: p, reward: r, held_out: 1.0}", ["c.yaml: task.held_out"]),
        ("task: {prompts: p, reward: r, chat: 1}", ["c.yaml: task.chat"]),
        ("task: {prompts: p.jsonl}", ["c.yaml: task.reward is missing"]),
        ('task: {prompts: "", reward: r}', ["c.yaml: task.prompts"]),
        ("generation: {top_p: 0.9}", ["generation.top_p"]),
        ("generation: {top_k: 50}", ["generation.top_k"]),
        ("generation: {temperature: 0}", ["generation.temperature"]),
        ("kl: {target: 6.0, coef: 0}", ["kl.target", "kl.coef"]),
        ("kl: {target: 6.0, coef: 0.1, horizon: 12.8}", ["kl.horizon (12.8)", "kl.coef"]),
        ("ppo: {batch_size: 24}", ["ppo.batch_size (24)", "rollout.episodes_per_update (64)", "try 16"]),
        ("rollout: {episodes_per_update: 1000000000}\nppo: {batch_size: 7}", ["try 8"]),  # found at once
        ("group: {size: 12}", ["group.size (12)", "try 8"]),
        ("ppo: {advantage: grpo}", ["ppo.advantage: grpo", "group.size"]),
        ("ppo: {advantage: remax, clip_range_vf: 0.2}", ["ppo.clip_range_vf", "remax"]),
        ("ppo: {advantage: remax, gamma: 0.9}", ["ppo.gamma", "remax"]),
        ("ppo: {advantage: remax}\npolicy: {critic: {gae_lambda: 1.0}}", ["policy.critic.gae_lambda", "remax"]),
        ("ppo: {advantage: reinforce_pp}\nshaping: {whiten: true}", ["shaping.whiten", "reinforce_pp"]),
        ("ppo: {clip_range_high: 0.3, clip_schedule: linear}", ["ppo.clip_schedule", "ppo.clip_range_high"]),
        ("group: {skip_zero_variance: true}", ["group.skip_zero_variance", "ppo.advantage"]),
        ("policy: {critic: {warmup_updates: 5}}", ["policy.critic.warmup_updates", "policy.critic.stop_gradient"]),
        ("policy: {critic: {kind: adapter, model: m}}", ["policy.critic: model", "separate"]),
        ("policy: {critic: {learning_rate: 0.1}}", ["policy.critic: learning_rate"]),
        ("policy: {critic: {kind: separate, stop_gradient: true}}", ["policy.critic: stop_gradient", "shared"]),
        ("policy: {adapter: null, critic: {kind: adapter}}", ["critic.kind: adapter", "policy.adapter"]),
        ("env: {id: x}\nppo: {advantage: reinforce_pp}", ["ppo.advantage", "text"]),
        ("env: {id: x}\nppo: {loss_aggregation: sequence}", ["ppo.loss_aggregation", "text"]),
        ("env: {id: x}\nppo: {policy_loss: cispo}", ["ppo.policy_loss", "text"]),
        ("env: {id: x}\nppo: {importance_sampling_level: sequence}", ["ppo.importance_sampling_level", "text"]),
        ("env: {id: x}\nppo: {mask_truncated: true}", ["ppo.mask_truncated", "text"]),
        ("ppo: {policy_loss: cispo, dual_clip: 3.0}", ["ppo.dual_clip", "ppo.policy_loss"]),
        ("env: {id: x}\npolicy: {critic: {kind: separate}}", ["policy.critic", "policy.network.share"]),
        ("env: {id: x}\nevaluate: {every: 5}", ["evaluate.every", "evaluate.episodes"]),
        ("env: {id: x}\npolicy: {model: gpt2}", ["policy.model", "MlpPolicy"]),
        ("env: {id: x}\npolicy: {model: MlpLstmPolicy}\nppo: {batch_size: 100}", ["ppo.batch_size (100)", "env.n_steps (128)"]),
        ("sft: {data: x.jsonl}\npolicy: {critic: {kind: separate}}", ["policy.critic", "sft"]),
        ("reward_model: {data: x.jsonl}\npolicy: {critic: {kind: adapter}}", ["policy.critic", "reward_model"]),
        ("new_model: {vocab: 100}\nsft: {data: x.jsonl}", ["new_model: vocab is 100"]),
        ("env: {id: x}\nsft: {data: d.jsonl}", ["task, env, sft, reward_model, dpo", "env and sft"]),
    ],
)
def test_sections_that_make_no_run_and_settings_that_contradict_each_other_are_refused(written, text, names):
    refuse(written(text), *names)


@pytest.mark.parametrize("kind", KINDS)
def test_a_section_that_a_kind_of_run_does_not_have_is_refused_by_name(written, kind):
    least = LEAST["text" if kind == "task" else kind]
    foreign = foreign_sections(kind) - {*KINDS}
    assert foreign and load_config(written(yaml.safe_dump(least))).kind == kind
    for name in foreign:
        refuse(written(yaml.safe_dump(least | {name: {}})), f"c.yaml: {name}: ", "leave it out")


@pytest.mark.parametrize("text", ["3e-4", "3.0e-4", "3E-4", ".3e-3", "+3e-4", "0.0003"])
def test_3e_minus_4_is_a_number_in_the_file_and_in_a_flag(written, text):
    # YAML 1.1, which PyYAML reads, takes the first of them for a string.
    assert load_config(written(f"ppo: {{learning_rate: {text}}}")).ppo.learning_rate == 3e-4
    assert load_config(written(""), {"ppo.learning-rate": text}).ppo.learning_rate == 3e-4


BOMB = "!!python/object/apply:os.system ['touch canary']"


@pytest.mark.parametrize("place", ["{}", "seed: {}", "kl: {{coef: {}}}", "run: {{name: {}}}"])
@pytest.mark.parametrize("bomb", [BOMB, BOMB.replace("apply", "new"), "!!python/name:os.system", "!!python/module:os"])
def test_yaml_that_would_run_code_is_refused_and_not_run_and_as_a_flag_is_text(written, tmp_path, place, bomb):
    refuse(written(place.format(bomb)), "c.yaml, line 1: not valid, safe YAML")
    refuse(written(""), "--kl.coef: should be a number", flags={"kl.coef": bomb})
    assert not (tmp_path / "canary").exists()


LAUGHS = ["a0: &a0 [lol]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
EXHAUSTING = {"\n".join(LAUGHS): "c.yaml, line 2", "[" * 20_000: "", "{a: " * 20_000: "", "seed: " + "9" * 5_000: ""}


@pytest.mark.parametrize("text", EXHAUSTING, ids=lambda text: text[:9])
def test_a_file_made_to_exhaust_the_reader_is_refused_at_once(written, text):
    started = time.perf_counter()
    refuse(written(text), "c.yaml", EXHAUSTING[text])
    assert time.perf_counter() - started < 5


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("- ppo", "c.yaml: expected sections such as 'ppo:' at the top, found ['ppo']"),
        (b"seed: 1\nrun: {name: \xff\xfe}\n", "c.yaml, line 2: not UTF-8; save the file as UTF-8"),
        ("seed: 1\n\tdevice: cpu", "c.yaml, line 2: not valid, safe YAML"),
        ("seed: 1\n---\nseed: 2", "c.yaml, line 2: not valid, safe YAML"),
        ("run: {name: 2024-02-30}", "c.yaml: not valid, safe YAML: day is out of range for month"),
        ("ppo: {no: 2}", "c.yaml, line 1: not valid, safe YAML: a key here is not a name"),
        # YAML lets the last one win: a second `ppo:` would throw the first away unseen.
        ("seed: 1\nseed: 2", "c.yaml, line 2: not valid, safe YAML: 'seed' is there twice"),
        ("ppo: {n_epochs: 1}\nseed: 3\nppo: {gamma: 0.5}", "c.yaml, line 3: not valid, safe YAML: 'ppo' is there twice"),
        ("ppo: {gamma: 1,\n gamma: 0}", "c.yaml, line 2: not valid, safe YAML: 'gamma' is there twice"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused_with_its_line(written, content, said):
    refuse(written(content), said)


def test_a_huge_file_is_not_read(written):
    # It might be the prompts, or have no end at all.
    refuse(written("#" * 1_000_000 + "\n"), "c.yaml: larger than 1,000,000 bytes")
    assert load_config(written("#" * 999_999 + "\n")) == Config()


def test_a_file_that_is_not_there_or_no_file_is_named(tmp_path):
    refuse(tmp_path / "no.yaml", f"{tmp_path / 'no.yaml'}: no such file")
    refuse(tmp_path, f"{tmp_path}: cannot be read")
    with pytest.raises(InputError, match="cannot be read"):
        load_config("a\0b.yaml")


@pytest.mark.parametrize("content", ["", "# nothing yet\n", "ppo:\nrun:\n", b"\xef\xbb\xbf", b"\xef\xbb\xbfseed: 0\r\n"])
def test_an_empty_file_or_section_means_the_defaults(written, content):
    assert load_config(written(content)) == Config()


@pytest.mark.parametrize("name", ["../up", "..", ".", "a/b", "/abs", "a\\\\b", "a\\0b", "a\\nb", "", "x" * 201, "ä" * 101])
def test_a_run_name_that_is_no_plain_folder_name_is_refused(written, name):
    refuse(written(f'run: {{name: "{name}"}}'), "c.yaml: run.name: ")


@pytest.fixture
def places(tmp_path, monkeypatch):
    """A file's folder and another, in which we are, both with prompts, rewards and a model of the same names."""
    for folder in (tmp_path / "project", tmp_path / "elsewhere"):
        (folder / "model").mkdir(parents=True)
        for name in ("prompts.jsonl", "mine", "reward.py"):
            (folder / name).touch()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (tmp_path / "project" / "c.yaml").write_text(yaml.safe_dump(ALL_PATHS))
    return tmp_path


TASK = {"prompts": "prompts.jsonl", "reward": "reward.py:reward", "metric": "./reward.py:metric"}
CRITIC = {"kind": "separate", "model": "model"}
ALL_PATHS = {"run": {"folder": "runs"}, "policy": {"model": "model", "critic": CRITIC}, "task": TASK}
AT = {"run.folder": "runs", "policy.model": "model", "policy.critic.model": "model", "task.prompts": "prompts.jsonl"}
AT |= {"task.reward": "reward.py:reward", "task.metric": "reward.py:metric"}


def paths_of(config: Config) -> list[Path]:
    return [Path(functools.reduce(getattr, key.split("."), config)).resolve() for key in AT]


def test_relative_paths_in_a_file_are_relative_to_the_file_and_in_flags_to_the_working_directory(places, monkeypatch):
    expected = [places / "project" / name for name in AT.values()]
    for file in (places / "project" / "c.yaml", "../project/c.yaml"):
        assert paths_of(load_config(file)) == expected
    assert paths_of(load_config("../project/c.yaml", AT)) == [places / "elsewhere" / name for name in AT.values()]
    # Absolute paths mean the same wherever they are read.
    Path("copy.yaml").write_text(dump_config(absolute_paths(load_config("../project/c.yaml"))))
    monkeypatch.chdir("/")
    assert paths_of(load_config(places / "elsewhere" / "copy.yaml")) == expected


@pytest.mark.parametrize("prompts", ["new.jsonl", "data/new", "./new", "mine"])
def test_prompts_are_the_files_own_even_where_they_are_not_there_yet(places, prompts):
    Path("new.jsonl").touch()  # must not be found here by accident; `mine` is there, and no asset
    (places / "project" / "c.yaml").write_text(f"task: {{prompts: {prompts}, reward: 'reward.py:reward'}}")
    task = load_config("../project/c.yaml").task
    assert task is not None and Path(task.prompts).resolve() == (places / "project" / prompts).resolve()


def test_names_of_assets_hub_ids_and_modules_stay_names(places):
    task = {"prompts": "movie-reviews", "reward": "package.rewards:reward"}
    (places / "project" / "c.yaml").write_text(yaml.safe_dump({"policy": {"model": "org/model"}, "task": task}))
    config = load_config("../project/c.yaml")
    assert config.policy.model == "org/model" and config.task is not None
    assert (config.task.prompts, config.task.reward) == tuple(task.values())


def test_a_tilde_is_the_home_folder_in_files_and_flags(written, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for config in (load_config(written("run: {folder: ~/runs}")), load_config(written(""), {"run.folder": "~/runs"})):
        assert config.run.folder == str(tmp_path / "home/runs")


def test_a_flag_changes_one_field_and_leaves_its_neighbors(written):
    config = load_config(written("kl: {coef: 0.5, horizon: 9e3}"), {"kl.coef": "0.25", "ppo.vf-coef": "1", "ppo.n_epochs": "3"})
    assert (config.kl.coef, config.kl.horizon, config.ppo.vf_coef, config.ppo.n_epochs) == (0.25, 9e3, 1, 3)
    # It can bring back a section that the file turned off.
    assert load_config(written("policy: {adapter: null}")).policy.adapter is None
    adapter = load_config(written("policy: {adapter: null}"), {"policy.adapter.rank": "4"}).policy.adapter
    assert adapter == AdapterConfig(rank=4)


@pytest.mark.parametrize(
    ("key", "text", "said"),
    [
        ("kl.coeff", "1", "unknown flag '--kl.coeff'; did you mean '--kl.coef'?"),
        ("kl-coef", "1", "unknown flag '--kl-coef'; it is '--kl.coef'"),
        ("kl.coef", "-1", "--kl.coef: should be greater than or equal to 0, got -1"),
        ("kl.coef", "", "--kl.coef: the value is empty; write null for none"),
        ("kl.coef.x", "1", "--kl.coef.x: coef is 0.5 in the file, not a section"),
        ("run.name", "../x", "--run.name: '../x' is not a plain folder name"),
        ("..", "1", "--.. is not a flag"),
        ("ppo.", "1", "--ppo. is not a flag"),
    ],
)
def test_a_wrong_flag_is_called_by_its_name_as_a_flag(written, key, text, said):
    assert refuse(written("kl: {coef: 0.5}"), flags={key: text}).startswith(said)


def test_a_wrong_value_in_the_file_is_not_blamed_on_another_flag(written):
    refuse(written("kl: {coef: -1}"), "c.yaml: kl.coef: ", flags={"ppo.gamma": "0.5", "seed": "3"})


NAMES = ["7", "3e-4", "no", "2024-01-31", "a: b", "[x", "0x1f", "1_000", "1:30", "on", "~", "=", "<<"]


@pytest.mark.parametrize("name", [*NAMES, "null"])
def test_a_name_that_looks_like_something_else_is_one_on_the_command_line_and_in_what_is_written(written, name):
    named = make_config({"run": {"name": name}}, where="test")
    assert load_config(written(dump_config(named))).run.name == name
    given = load_config(written("run: {name: x}"), {"run.name": name}).run.name
    assert given == (None if name in ("null", "~") else name)


YAMLS = sorted([ROOT / "src/surefoot/cli/demo.yaml", *ROOT.glob("recipes/**/*.yaml"), *ROOT.glob("examples/**/*.yaml")])
SWEEPS = [path for path in YAMLS if path.name.startswith("sweep")]
PIPELINES = [path for path in YAMLS if path.name.startswith("pipeline")]


@pytest.mark.parametrize("path", sorted({*YAMLS} - {*SWEEPS, *PIPELINES}), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_yaml_in_the_repository_is_a_whole_configuration(path):
    config = load_config(path)
    named = config.task.reward if config.task else config.env.id if config.env else config.sft.data if config.sft else None
    assert named is not None
    file = named.rsplit(":", 1)[0]
    assert not file.endswith(".py") or Path(file).is_file()


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_variant_of_a_sweep_is_a_whole_configuration(path):
    sweep = yaml.safe_load(path.read_text())
    assert len(sweep["variants"]) > 1 and len(sweep["seeds"]) >= 3
    for flags in sweep["variants"].values():
        words = shlex.split(flags or "")
        load_config(path.parent / sweep["base"], {key[2:]: value for key, value in zip(words[::2], words[1::2], strict=True)})


def test_what_is_written_reads_back_the_same(written):
    sections = {
        "seed": 2**63 - 1,
        "run": {"name": "größe-1", "folder": "/runs"},
        "policy": {"model": "org/model", "adapter": {"targets": ["q_proj", "v_proj"]}},
        "task": {"prompts": "/p.jsonl", "reward": "package.module:reward"},
        "generation": {"stop": ["\n\n", "# ", "null", "1e3", "ä"], "stop_token_ids": [0, 2]},
        "ppo": {"learning_rate": 1e-7, "adam_epsilon": 1e-8, "target_kl": 0.1 + 0.2},
        "kl": {"horizon": 1e22},
        "evaluate": {"every": None},
    }
    for config in (make_config(sections, where="test"), absolute_paths(Config())):
        assert load_config(written(dump_config(config))) == config
    assert "run:" not in dump_config(Config(), exclude={"run"}) and "ppo:" in dump_config(Config(), exclude={"run"})


def test_flat_setting_names_are_unique_across_sections():
    keys = setting_keys()
    assert Counter(keys.values()).most_common(1)[0][1] == 1
    foreign, whole = {"task", "new_model", "rejection_sampling", *SUPERVISED}, {"kl", "group", "shaping", "ptx"}
    parts = [key.split(".") for key, *_ in field_table()]
    inner = [part for part in parts if len(part) == 2 and part[0] not in foreign | whole and part[1] != "chat"]
    is_prefixed = {("env", "id"), ("env", "kwargs"), *(tuple(part) for part in inner if part[0] in ("run", "evaluate"))}
    plain = Counter("_".join(part) if tuple(part) in is_prefixed else part[1] for part in inner)
    assert max(plain.values()) == 1
    assert {*plain, "seed", "device", "adapter", "critic", "network", "self_play", *whole} == set(keys)
    assert {key.split(".")[0] for key in keys.values()} == {name for name in Config.model_fields if name not in foreign}


@pytest.mark.parametrize(("name", "model"), [("sft", SFTConfig), ("reward_model", RewardModelConfig), ("dpo", DPOConfig)])
def test_flat_settings_of_a_supervised_run_are_its_own_sections(name, model):
    keys = setting_keys(name)
    assert (keys["learning_rate"], keys["run_name"], keys["adapter"]) == (f"{name}.learning_rate", "run.name", "policy.adapter")
    assert {key.split(".")[0] for key in keys.values()} == {"seed", "device", "run", "policy", name, "generation", "evaluate"}
    assert set(keys) >= model.model_fields.keys() - {"data"} and "data" not in keys
    assert ("max_tokens" in keys) == (name == "sft")


@pytest.mark.parametrize(
    ("kind", "name", "said"),
    [
        ("task", "learning_rat", "did you mean 'learning_rate'?"),
        ("task", "name", "did you mean 'run_name'?"),
        ("task", "chat", "it is TextTask's"),
        ("task", "kl_coef", "it is kl={'coef': ...}"),
        ("task", "missing_eos_penalty", "it is shaping={'missing_eos_penalty': ...}"),
        ("task", "samples_per_prompt", "it is group={'size': ...}"),
        *((kind, "kl_coef", "kl is for PPO with language models") for kind in ("env", *SUPERVISED)),
        ("env", "max_new_token", "docs/config.md lists them"),  # and not `max_new_tokens`, which would be refused
    ],
)
def test_an_unknown_setting_is_named_with_what_works_in_that_kind_of_run(kind, name, said):
    refusal(lambda: nested({name: 1}, kind), f"unknown setting '{name}'; {said}")


SAMPLING = [("max_new_tokens", 0), ("max_new_tokens", 2.5), ("temperature", -1.0), ("temperature", float("nan"))]
SAMPLING += [("top_k", 0), ("top_p", 0.0), ("top_p", 1.5), ("top_q", 1)]


def test_wrong_sampling_settings_are_refused_and_writing_text_may_be_greedy_and_truncated():
    for name, value in SAMPLING:
        refusal(lambda name=name, value=value: with_sampling(GenerationConfig(), {name: value}), name)
    changed = with_sampling(GenerationConfig(slots=3), {"temperature": 0, "top_k": 5, "top_p": 0.5})
    assert (changed.temperature, changed.top_k, changed.top_p, changed.slots) == (0, 5, 0.5, 3)


def leaves(node: dict[str, Any], models: dict[str, Any], prefix: str = "") -> set[str]:
    """Every field of a JSON schema that is not itself a section, found apart from `field_table`."""
    found: set[str] = set()
    for name, field in node["properties"].items():
        references = [option["$ref"] for option in (field, *field.get("anyOf", [])) if "$ref" in option]
        inner = [leaves(models[reference.rsplit("/", 1)[-1]], models, f"{prefix}{name}.") for reference in references[:1]]
        found |= inner[0] if inner else {prefix + name}
    return found


def test_the_table_of_fields_has_each_once_with_type_default_and_description():
    schema = Config.model_json_schema()
    assert Counter(key for key, *_ in field_table()) == Counter(leaves(schema, schema["$defs"]))
    for key, kind, default, description in field_table():
        assert kind and default and description.endswith((".", ";")), key
        assert "<" not in kind and "\n" not in default, key
    assert default_text("task.reward") == "required"


# --- defaults by kind of run ---
@pytest.mark.parametrize("kind", LEAST)
def test_every_default_of_the_table_can_be_given_as_a_flag_and_changes_nothing(written, kind):
    data = LEAST[kind] | {"text": {"ptx": {}, "rejection_sampling": {}}, "sft": {"new_model": {}}}.get(kind, {})
    data = {name: part | ({"self_play": {}} if name == "env" else {}) for name, part in data.items()}
    file = written(yaml.safe_dump(data))
    expected, given = load_config(file).model_dump(), {f"{name}.{leaf}" for name, part in data.items() for leaf in part}
    for key, *_ in field_table():
        default = defaults_of(key).get(kind)
        if default not in (None, "required") and key not in given:
            assert load_config(file, {key.replace("_", "-"): default}).model_dump() == expected, key


ROWS = [{"chosen": f"good {number}", "rejected": f"bad {number}"} for number in range(60)]
STARTS = {
    "text": lambda: PPO(model_folder(), TextTask([f"the {n}" for n in range(40)], lambda prompts, **_: [0.0] * len(prompts))),
    "env": lambda: PPO("MlpPolicy", "CartPole-v1"),
    "recurrent": lambda: PPO("MlpLstmPolicy", "CartPole-v1"),
    "sft": lambda: SFT(model_folder(), [f"the end {number}" for number in range(40)]),
    "reward_model": lambda: RewardModel(model_folder(), ROWS),
    "dpo": lambda: DPO(model_folder(), ROWS),
}


@pytest.mark.parametrize("kind", STARTS)
def test_a_run_with_nothing_set_has_the_defaults_that_the_table_shows(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("surefoot.train.loop.run", lambda training: None)
    model = STARTS[kind]().learn()
    found = yaml.safe_load((model.run_folder / "config.yaml").read_text())
    assert found.keys() & foreign_sections(model.config.kind) == set()
    compared = 0
    for key, *_ in field_table():
        value: Any = found
        *path, leaf = key.split(".")
        for name in path:
            value = (value or {}).get(name)
        if value is not None and key not in ("policy.model", "env.id", "run.folder"):  # given, or made absolute
            defaults = defaults_of(key)
            assert value[leaf] == yaml.safe_load(defaults.get(kind, defaults.get("env", ""))), key
            compared += 1
    assert compared > 40


def test_help_names_the_settings_with_their_defaults():
    for cls, algorithm in ((PPO, "ppo"), (SFT, "sft"), (RewardModel, "reward_model"), (DPO, "dpo")):
        lines = [line.strip() for line in (cls.__doc__ or "").splitlines()]
        settings = lines[lines.index("Settings, and their defaults:") + 2 :]
        assert [line.partition(": ")[0] for line in settings if line] == list(setting_keys(algorithm))
        assert max(map(len, settings)) <= 104
    assert "gamma: Discount per step (of text: per completion token) [1.0 (text); 0.99 (env)]" in str(PPO.__doc__)
