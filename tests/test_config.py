"""Configurations that must be refused; kinds of runs and their defaults; paths, flags and the way back from a file."""

from __future__ import annotations

import shlex
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from surefoot import PPO, SFT, RewardModel, TextTask
from surefoot.config import (
    AdapterConfig,
    Config,
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
from surefoot.config.kinds import foreign_sections
from surefoot.config.tables import LEAST, default_text, defaults_of
from surefoot.errors import InputError
from tests.golden import check
from tests.inputs import model_folder, refusal

ROOT = Path(__file__).parent.parent


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Write YAML text, or bytes, as `c.yaml` in the working directory."""
    monkeypatch.chdir(tmp_path)

    def write(content: str | bytes) -> Path:
        path = Path("c.yaml")
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def refuse(path: Path | str, *names: str, flags: dict[str, str] | None = None) -> str:
    with pytest.raises(InputError) as caught:
        load_config(path, flags)
    assert len(str(caught.value)) < 300
    return check(str(caught.value), *names)


@pytest.mark.parametrize(
    ("text", "wrong", "nearest"),
    [
        ("sede: 1", "sede", "seed"),
        ("polcy: {model: x}", "polcy", "policy"),
        ("kl: {coeff: 1}", "kl.coeff", "kl.coef"),
        ("clip_range: 1", "clip_range", "ppo.clip_range"),  # right name, section forgotten
        ("ppo: {temperature: 1.0}", "ppo.temperature", "generation.temperature"),  # right name, wrong section
        ("ppo: {every: 3}", "ppo.every", "evaluate.every"),  # though ppo.vf_coef looks more like it as a whole
        ("generation: {horizn: 3}", "generation.horizn", "kl.horizon"),  # wrong section and misspelt
        ("policy: {adapter: {rnk: 4}}", "policy.adapter.rnk", "policy.adapter.rank"),
        ("policy: {critic: {kynd: shared}}", "policy.critic.kynd", "policy.critic.kind"),
        ("task: {prompts: p, rewards: r}", "task.rewards", "task.reward"),  # the misspelt key is also a missing one
    ],
)
def test_an_unknown_key_at_any_depth_is_named_with_the_nearest_real_one(written, text, wrong, nearest):
    refuse(written(text), f"c.yaml: unknown key '{wrong}'", f"'{nearest}'")


def test_a_key_like_no_other_is_refused_without_a_guess(written):
    refuse(written("zzz: 1"), "c.yaml: unknown key 'zzz'; surefoot ppo --help lists them")


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("seed: -1", "seed"),
        ("seed: 9223372036854775808", "seed"),
        ("device: tpu", "device"),
        ("kl: {coef: -0.1}", "kl.coef"),
        ("ppo: {learning_rate: 0}", "ppo.learning_rate"),
        ("ppo: {learning_rate: .nan}", "ppo.learning_rate"),
        ("ppo: {clip_range: .inf}", "ppo.clip_range"),
        ("ppo: {gamma: 1.01}", "ppo.gamma"),
        ("ppo: {n_epochs: 0}", "ppo.n_epochs"),
        ("ppo: {dual_clip: 1.0}", "ppo.dual_clip"),
        ("rollout: {total_episodes: 10000000000}", "rollout.total_episodes"),
        ("run: {keep_checkpoints: 1}", "run.keep_checkpoints"),
        ("task: {prompts: p, reward: r, held_out: 1.0}", "task.held_out"),
        ("generation: {temperature: 11}", "generation.temperature"),
        ("generation: {stop_token_ids: [-1]}", "generation.stop_token_ids"),
        ("generation: {stop: ['']}", "generation.stop"),  # would end every completion at once
        # Of another type: nothing is coerced.
        ("kl: {coef: low}", "kl.coef: should be a number, got 'low'"),
        ("kl: {coef: '0.1'}", "kl.coef"),
        ("kl: {coef: [1, 2]}", "kl.coef"),
        ("ppo: {batch_size: 8.0}", "ppo.batch_size"),
        ("ppo: {batch_size: true}", "ppo.batch_size"),
        ("task: {prompts: p, reward: r, chat: 1}", "task.chat"),
        ("run: {name: 7}", "run.name: should be text, got 7; put it in quotes"),
        ("run: {name: no}", "run.name"),
        ("run: {name: 2024-01-31}", "run.name"),
        ("generation: {stop: x}", "generation.stop: should be a list, got 'x'; write [a, b]"),
        ("generation: {stop: [a, 1]}", "generation.stop"),
        ("ppo: 3", "ppo"),
        ("policy: {adapter: lora}", "policy.adapter"),
        ("policy: {adapter: {targets: q_proj}}", "policy.adapter.targets"),
        ("policy: {adapter: {targets: []}}", "policy.adapter.targets"),
        ("policy: {adapter: {targets: [1]}}", "policy.adapter.targets"),
        ("task: {prompts: p.jsonl}", "task.reward is missing"),
        ('run: {folder: "a\\0b"}', "run.folder"),
        ('policy: {model: "a\\0b"}', "policy.model"),
        ('task: {prompts: "", reward: r}', "task.prompts"),
        (f"policy: {{model: {'x' * 300}}}", "policy.model"),
    ],
)
def test_a_value_that_a_field_cannot_have_is_refused_by_name(written, text, key):
    refuse(written(text), f"c.yaml: {key}")


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("generation: {top_p: 0.9}", ["generation.top_p"]),
        ("generation: {top_k: 50}", ["generation.top_k"]),
        ("generation: {temperature: 0}", ["generation.temperature"]),
        ("kl: {target: 6.0, coef: 0}", ["kl.target", "kl.coef"]),
        ("kl: {target: 6.0, coef: 0.1, horizon: 12.8}", ["kl.horizon (12.8)", "kl.coef"]),
        ("ppo: {batch_size: 24}", ["ppo.batch_size (24)", "rollout.episodes_per_update (64)", "try 16"]),
        ("rollout: {episodes_per_update: 8}", ["ppo.batch_size (16)", "try 8"]),
        ("group: {size: 12}", ["group.size (12)", "try 8"]),
        ("ppo: {advantage: grpo}", ["ppo.advantage: grpo", "group.size"]),
        ("ppo: {advantage: dr_grpo}", ["ppo.advantage: dr_grpo", "group.size"]),
        ("ppo: {advantage: rloo}", ["ppo.advantage: rloo", "group.size"]),
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
        ("env: {id: x}\npolicy: {critic: {kind: separate}}", ["policy.critic", "policy.network.share"]),
        ("env: {id: x}\npolicy: {critic: {warmup_updates: 5}}", ["policy.critic"]),
        ("env: {id: x}\npolicy: {model: gpt2}", ["policy.model", "MlpPolicy"]),
        ("env: {id: x}\npolicy: {model: MlpLstmPolicy}\nppo: {batch_size: 100}", ["ppo.batch_size (100)", "env.n_steps (128)"]),
        ("sft: {data: x.jsonl}\npolicy: {critic: {kind: separate}}", ["policy.critic", "sft"]),
        ("reward_model: {data: x.jsonl}\npolicy: {critic: {kind: adapter}}", ["policy.critic", "reward_model"]),
        ("new_model: {vocab: 100}\nsft: {data: x.jsonl}", ["new_model: vocab is 100"]),
        ("env: {id: x}\nsft: {data: d.jsonl}", ["task, env, sft, reward_model", "env and sft"]),
    ],
)
def test_settings_that_contradict_each_other_are_refused(written, text, names):
    refuse(written(text), *names)


@pytest.mark.parametrize("kind", ["task", "env", "sft", "reward_model"])
def test_a_section_that_a_kind_of_run_does_not_have_is_refused_by_name(written, kind):
    least = LEAST["text" if kind == "task" else kind]
    foreign = foreign_sections(kind) - {"task", "env", "sft", "reward_model"}
    assert foreign and load_config(written(yaml.safe_dump(least))).kind == kind
    for name in foreign:
        refuse(written(yaml.safe_dump(least | {name: {}})), f"c.yaml: {name}: ", "leave it out")


def test_the_divisor_that_is_proposed_is_found_at_once(written):
    started = time.perf_counter()
    refuse(written("rollout: {episodes_per_update: 1000000000}\nppo: {batch_size: 7}"), "try 8")
    assert time.perf_counter() - started < 1


@pytest.mark.parametrize("text", ["3e-4", "3.0e-4", "3E-4", ".3e-3", "+3e-4", "0.0003"])
def test_3e_minus_4_is_a_number_in_the_file_and_in_a_flag(written, text):
    # YAML 1.1, which PyYAML reads, takes the first of them for a string.
    assert load_config(written(f"ppo: {{learning_rate: {text}}}")).ppo.learning_rate == 3e-4
    assert load_config(written(""), {"ppo.learning-rate": text}).ppo.learning_rate == 3e-4


@pytest.mark.parametrize("place", ["{}", "seed: {}", "kl: {{coef: {}}}", "run: {{name: {}}}"])
@pytest.mark.parametrize(
    "bomb",
    [
        "!!python/object/apply:os.system ['touch canary']",
        "!!python/object/new:os.system ['touch canary']",
        "!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path [canary]]",
        "!!python/name:os.system",
        "!!python/module:os",
    ],
)
def test_yaml_that_would_run_code_is_refused_and_not_run(written, tmp_path, place, bomb):
    refuse(written(place.format(bomb)), "c.yaml, line 1: not valid, safe YAML")
    assert not (tmp_path / "canary").exists()


def test_a_flag_that_would_run_code_is_text(written, tmp_path):
    bomb = "!!python/object/apply:os.system ['touch canary']"
    refuse(written(""), "--kl.coef: should be a number", flags={"kl.coef": bomb})
    assert not (tmp_path / "canary").exists()


def test_a_billion_laughs_are_refused_at_once(written):
    lines = ["a0: &a0 [lol]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    started = time.perf_counter()
    refuse(written("\n".join(lines)), "c.yaml, line 2", "*a0")
    assert time.perf_counter() - started < 1


@pytest.mark.parametrize("text", ["[" * 20_000, "{a: " * 20_000, "seed: " + "9" * 5_000])
def test_a_file_made_to_exhaust_the_reader_is_refused(written, text):
    started = time.perf_counter()
    refuse(written(text), "c.yaml")
    assert time.perf_counter() - started < 5


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("- ppo", "c.yaml: expected sections such as 'ppo:' at the top, found ['ppo']"),
        ("ppo", "c.yaml: expected sections such as 'ppo:' at the top, found 'ppo'"),
        ("7", "c.yaml: expected sections such as 'ppo:' at the top, found 7"),
        (b"seed: 1\nrun: {name: \xff\xfe}\n", "c.yaml, line 2: not UTF-8; save the file as UTF-8"),
        ("seed: 1".encode("utf-16"), "c.yaml, line 1: not UTF-8"),
        ("seed: 1\n\tdevice: cpu", "c.yaml, line 2: not valid, safe YAML"),
        ("seed: 1\nkl: {coef: 1", "c.yaml, line 2: not valid, safe YAML"),
        ("seed: 1\n---\nseed: 2", "c.yaml, line 2: not valid, safe YAML"),
        ("run: {name: 2024-02-30}", "c.yaml: not valid, safe YAML: day is out of range for month"),
        ("1: 2", "c.yaml, line 1: not valid, safe YAML: a key here is not a name"),
        ("ppo: {no: 2}", "c.yaml, line 1: not valid, safe YAML: a key here is not a name"),
        ("? [a]\n: 3", "c.yaml, line 1: not valid, safe YAML: a key here is not a name"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused_with_its_line(written, content, said):
    refuse(written(content), said)


def test_a_huge_file_is_not_read(written):
    # It might be the prompts, or have no end at all.
    refuse(written("#" * 1_000_000 + "\n"), "c.yaml: larger than 1,000,000 bytes")
    assert load_config(written("#" * 999_999 + "\n")) == Config()


@pytest.mark.parametrize(
    "text", ["seed: 1\nseed: 2", "ppo: {n_epochs: 1}\nseed: 3\nppo: {gamma: 0.5}", "ppo: {gamma: 1,\n gamma: 0}"]
)
def test_a_key_said_twice_is_refused_and_not_forgotten(written, text):
    # YAML lets the last one win: a second `ppo:` would throw the first away unseen.
    refuse(written(text), "c.yaml, line", "twice")


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
    """A file's folder and another working directory, both with prompts, rewards and a model of the same names."""
    for name in ("project", "elsewhere"):
        (tmp_path / name / "model").mkdir(parents=True)
        (tmp_path / name / "prompts.jsonl").touch()
        (tmp_path / name / "mine").touch()
        (tmp_path / name / "reward.py").touch()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path


ALL_PATHS = """
run: {folder: runs}
policy: {model: model}
task: {prompts: prompts.jsonl, reward: "reward.py:reward", metric: "./reward.py:metric"}
"""


def paths_of(config: Config) -> list[Path]:
    assert config.task is not None and config.task.metric is not None
    functions = [config.task.reward.removesuffix(":reward"), config.task.metric.removesuffix(":metric")]
    return [Path(p).resolve() for p in (config.run.folder, config.policy.model, config.task.prompts, *functions)]


NAMES = ["runs", "model", "prompts.jsonl", "reward.py", "reward.py"]


@pytest.mark.parametrize("given", ["absolute", "relative"])
def test_relative_paths_in_a_file_are_relative_to_the_file(places, given):
    (places / "project" / "c.yaml").write_text(ALL_PATHS)
    file = places / "project" / "c.yaml" if given == "absolute" else "../project/c.yaml"
    assert paths_of(load_config(file)) == [(places / "project" / name).resolve() for name in NAMES]


def test_relative_paths_in_flags_are_relative_to_the_working_directory(places):
    (places / "project" / "c.yaml").write_text(ALL_PATHS)
    overrides = {
        "run.folder": "runs",
        "policy.model": "model",
        "task.prompts": "prompts.jsonl",
        "task.reward": "reward.py:reward",
        "task.metric": "reward.py:metric",
    }
    loaded = load_config(places / "project" / "c.yaml", overrides)
    assert paths_of(loaded) == [(places / "elsewhere" / name).resolve() for name in NAMES]


@pytest.mark.parametrize("prompts", ["new.jsonl", "data/new", "./new"])
def test_prompts_that_are_not_there_yet_are_not_looked_for_elsewhere(places, prompts):
    (places / "elsewhere" / "new.jsonl").touch()
    (places / "project" / "c.yaml").write_text(f"task: {{prompts: {prompts}, reward: 'reward.py:reward'}}")
    task = load_config(places / "project" / "c.yaml").task
    assert task is not None and Path(task.prompts).resolve() == (places / "project" / prompts).resolve()


def test_names_of_assets_hub_ids_and_modules_stay_names(places):
    text = "policy: {model: org/model}\ntask: {prompts: movie-reviews, reward: 'package.rewards:reward'}"
    (places / "project" / "c.yaml").write_text(text)
    config = load_config(places / "project" / "c.yaml")
    assert config.task is not None
    assert (config.policy.model, config.task.prompts) == ("org/model", "movie-reviews")
    assert config.task.reward == "package.rewards:reward"


def test_a_local_file_wins_over_an_assets_name(places):
    (places / "project" / "c.yaml").write_text("task: {prompts: mine, reward: 'reward.py:reward'}")
    task = load_config(places / "project" / "c.yaml").task
    assert task is not None and Path(task.prompts).resolve() == (places / "project" / "mine").resolve()


def test_a_tilde_is_the_home_folder_in_files_and_flags(written, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "project").mkdir()
    written("run: {folder: ~/runs}").rename("project/c.yaml")
    assert load_config("project/c.yaml").run.folder == str(tmp_path / "home/runs")
    assert load_config(written(""), {"run.folder": "~/runs"}).run.folder == str(tmp_path / "home/runs")


def test_absolute_paths_mean_the_same_wherever_they_are_read(places, monkeypatch):
    (places / "project" / "c.yaml").write_text(ALL_PATHS)
    config = load_config("../project/c.yaml")
    (places / "elsewhere" / "copy.yaml").write_text(dump_config(absolute_paths(config)))
    expected = paths_of(config)
    monkeypatch.chdir("/")
    assert paths_of(load_config(places / "elsewhere" / "copy.yaml")) == expected


@pytest.mark.parametrize("key", ["ppo.vf-coef", "ppo.vf_coef"])
def test_dashes_in_a_flag_are_underscores(written, key):
    assert load_config(written("ppo: {vf_coef: 0.5}"), {key: "0.25"}).ppo.vf_coef == 0.25


def test_a_flag_changes_one_field_and_leaves_its_neighbours(written):
    config = load_config(written("kl: {coef: 0.5, horizon: 9e3}"), {"kl.coef": "0.25"})
    assert (config.kl.coef, config.kl.horizon) == (0.25, 9e3)


def test_a_flag_can_bring_back_a_section_that_the_file_turned_off(written):
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


@pytest.mark.parametrize("name", ["7", "3e-4", "no", "2024-01-31", "a: b", "[x", "0x1f"])
def test_a_run_can_be_called_anything_on_the_command_line(written, name):
    assert load_config(written(""), {"run.name": name}).run.name == name


def test_null_on_the_command_line_is_none(written):
    assert load_config(written("run: {name: x}"), {"run.name": "null"}).run.name is None


def test_a_list_on_the_command_line_is_yaml(written):
    assert load_config(written(""), {"generation.stop": "[a, 'b c']"}).generation.stop == ["a", "b c"]


YAMLS = sorted([ROOT / "src/surefoot/cli/demo.yaml", *ROOT.glob("recipes/**/*.yaml"), *ROOT.glob("examples/**/*.yaml")])


SWEEPS = [path for path in YAMLS if path.name.startswith("sweep")]
PIPELINES = [path for path in YAMLS if path.name.startswith("pipeline")]


def test_there_are_configurations_to_read():
    assert len(YAMLS) >= 2


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


def test_what_is_written_reads_back_the_same(tmp_path):
    config = make_config(
        {
            "seed": 2**63 - 1,
            "run": {"name": "größe-1", "folder": "/runs"},
            "policy": {"model": "org/model", "adapter": {"targets": ["q_proj", "v_proj"]}},
            "task": {"prompts": "/p.jsonl", "reward": "package.module:reward"},
            "generation": {"stop": ["\n\n", "# ", "null", "1e3", "ä"], "stop_token_ids": [0, 2]},
            "ppo": {"learning_rate": 1e-7, "adam_epsilon": 1e-8, "target_kl": 0.1 + 0.2},
            "kl": {"horizon": 1e22},
            "evaluate": {"every": None},
        },
        where="test",
    )
    (tmp_path / "c.yaml").write_text(dump_config(config), encoding="utf-8")
    assert load_config(tmp_path / "c.yaml") == config
    (tmp_path / "c.yaml").write_text(dump_config(absolute_paths(Config())), encoding="utf-8")
    assert load_config(tmp_path / "c.yaml") == absolute_paths(Config())


@pytest.mark.parametrize(
    "name", ["3e-4", "1e5", "1_000", "0x1f", "1:30", "no", "on", "null", "~", "7", "2024-01-31", "=", "<<"]
)
def test_a_name_that_looks_like_something_else_reads_back_as_a_name(tmp_path, name):
    config = make_config({"run": {"name": name}}, where="test")
    (tmp_path / "c.yaml").write_text(dump_config(config), encoding="utf-8")
    assert load_config(tmp_path / "c.yaml").run.name == name


def test_a_section_can_be_left_out_of_what_is_written():
    assert "run:" not in dump_config(Config(), exclude={"run"}) and "ppo:" in dump_config(Config(), exclude={"run"})


def test_flat_setting_names_are_unique_across_sections():
    keys = setting_keys()
    assert Counter(keys.values()).most_common(1)[0][1] == 1
    foreign = {"task", "sft", "new_model", "reward_model", "rejection_sampling"}
    top = {name for name in Config.model_fields if name not in foreign}
    prefixed, too_plain, whole = {"run", "evaluate"}, {"env.id", "env.kwargs"}, {"kl", "group", "shaping", "ptx"}
    plain = [
        f"{key}_{leaf}" if key in prefixed or f"{key}.{leaf}" in too_plain else leaf
        for key, _, leaf in (k.partition(".") for k, *_ in field_table())
        if leaf and key not in foreign | whole and "." not in leaf
    ]
    assert [name for name, count in Counter(plain).items() if count > 1] == []
    assert set(plain) | {"seed", "device", "adapter", "critic", "network", "self_play"} | whole == set(keys)
    assert {key.split(".")[0] for key in keys.values()} == top


def test_flat_settings_of_a_supervised_run_are_its_own_sections():
    keys = setting_keys("sft")
    assert (
        keys["learning_rate"] == "sft.learning_rate" and keys["run_name"] == "run.name" and keys["adapter"] == "policy.adapter"
    )
    assert {key.split(".")[0] for key in keys.values()} == {"seed", "device", "run", "policy", "sft", "generation", "evaluate"}
    assert set(keys) >= SFTConfig.model_fields.keys() - {"data"} and "data" not in keys


def test_flat_settings_of_a_reward_model_are_its_own():
    keys = setting_keys("reward_model")
    assert keys["center"] == "reward_model.center" and keys["learning_rate"] == "reward_model.learning_rate"
    assert set(keys) >= RewardModelConfig.model_fields.keys() - {"data"} and "data" not in keys and "max_tokens" not in keys


def test_flat_settings_reach_their_fields():
    data = nested(
        {
            "learning_rate": 1e-4,
            "run_name": "x",
            "evaluate_every": 3,
            "seed": 5,
            "adapter": AdapterConfig(rank=3),
            "dtype": "float32",
        }
    )
    config = make_config(data, where="PPO(...)")
    assert (config.ppo.learning_rate, config.run.name, config.evaluate.every, config.seed) == (1e-4, "x", 3, 5)
    assert config.policy.adapter == AdapterConfig(rank=3) and config.policy.dtype == "float32"


@pytest.mark.parametrize(
    ("kind", "name", "said"),
    [
        ("task", "learning_rat", "did you mean 'learning_rate'?"),
        ("task", "name", "did you mean 'run_name'?"),
        ("task", "chat", "it is TextTask's"),
        ("task", "kl_coef", "it is kl={'coef': ...}"),
        ("task", "missing_eos_penalty", "it is shaping={'missing_eos_penalty': ...}"),
        ("task", "samples_per_prompt", "it is group={'size': ...}"),
        *((kind, "kl_coef", "kl is for PPO with language models") for kind in ("env", "sft", "reward_model")),
        ("env", "max_new_token", "docs/config.md lists them"),  # and not `max_new_tokens`, which would be refused
    ],
)
def test_an_unknown_setting_is_named_with_what_works_in_that_kind_of_run(kind, name, said):
    refusal(lambda: nested({name: 1}, kind), f"unknown setting '{name}'; {said}")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: should be greater than 0, got 0"),
        ({"max_new_tokens": 2.5}, "max_new_tokens: should be a whole number, got 2.5"),
        ({"temperature": -1.0}, "temperature: should be greater than or equal to 0, got -1.0"),
        ({"temperature": float("nan")}, "temperature: should be a finite number, got nan"),
        ({"top_k": 0}, "top_k: should be greater than 0, got 0"),
        ({"top_p": 0.0}, "top_p: should be greater than 0, got 0.0"),
        ({"top_p": 1.5}, "top_p: should be less than or equal to 1, got 1.5"),
        ({"top_q": 1}, "unknown sampling setting 'top_q'; there are max_new_tokens, temperature, top_k, top_p"),
    ],
)
def test_wrong_sampling_settings_are_refused(changes, said):
    with pytest.raises(InputError) as caught:
        with_sampling(GenerationConfig(), changes)
    check(str(caught.value), said)


def test_writing_text_may_be_greedy_and_truncated():
    changed = with_sampling(GenerationConfig(slots=3), {"temperature": 0, "top_k": 5, "top_p": 0.5})
    assert (changed.temperature, changed.top_k, changed.top_p, changed.slots) == (0, 5, 0.5, 3)


def leaves(model: type, prefix: str = "") -> set[str]:
    """Every field of a model that is not itself a section, found apart from `field_table`."""
    schema = model.model_json_schema()  # type: ignore[attr-defined]

    def walk(node: dict, prefix: str) -> set[str]:
        found: set[str] = set()
        for name, field in node["properties"].items():
            references = [option["$ref"] for option in (field, *field.get("anyOf", [])) if "$ref" in option]
            if references:
                found |= walk(schema["$defs"][references[0].rsplit("/", 1)[-1]], f"{prefix}{name}.")
            else:
                found.add(prefix + name)
        return found

    return walk(schema, prefix)


def test_the_table_of_fields_covers_each_field_once():
    keys = [key for key, *_ in field_table()]
    assert len(keys) == len(set(keys)) and set(keys) == leaves(Config)


def test_every_field_has_a_type_a_default_and_a_description():
    for key, kind, default, description in field_table():
        assert kind and default and description.endswith((".", ";")), key
        assert "<" not in kind and "\n" not in default, key
    assert default_text("task.reward") == "required"


# --- defaults by kind of run ---


@pytest.mark.parametrize("kind", LEAST)
def test_every_default_of_the_table_can_be_given_as_a_flag_and_changes_nothing(written, kind):
    data = LEAST[kind] | (
        {"ptx": {}, "rejection_sampling": {}} if kind == "text" else {"new_model": {}} if kind == "sft" else {}
    )
    data = {name: part | ({"self_play": {}} if name == "env" else {}) for name, part in data.items()}
    file = written(yaml.safe_dump(data))
    expected, given = load_config(file).model_dump(), {f"{name}.{leaf}" for name, part in data.items() for leaf in part}
    for key, *_ in field_table():
        default = defaults_of(key).get(kind)
        if default not in (None, "required") and key not in given:
            assert load_config(file, {key.replace("_", "-"): default}).model_dump() == expected, key


def text_run() -> Any:
    return PPO(
        model_folder(), TextTask([f"the {number}" for number in range(40)], lambda prompts, completions: [0.0] * len(prompts))
    )


ROWS = [{"chosen": f"good {number}", "rejected": f"bad {number}"} for number in range(60)]
STARTS = {
    "text": text_run,
    "env": lambda: PPO("MlpPolicy", "CartPole-v1"),
    "recurrent": lambda: PPO("MlpLstmPolicy", "CartPole-v1"),
    "sft": lambda: SFT(model_folder(), [f"the end {number}" for number in range(40)]),
    "reward_model": lambda: RewardModel(model_folder(), ROWS),
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
    for cls, algorithm in ((PPO, "ppo"), (SFT, "sft"), (RewardModel, "reward_model")):
        lines = [line.strip() for line in (cls.__doc__ or "").splitlines()]
        settings = lines[lines.index("Settings, and their defaults:") + 2 :]
        assert [line.partition(": ")[0] for line in settings if line] == list(setting_keys(algorithm))
        assert max(map(len, settings)) <= 104
    assert "gamma: Discount per step (of text: per completion token) [1.0 (text); 0.99 (env)]" in str(PPO.__doc__)
