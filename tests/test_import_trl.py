"""TRL's settings and checkpoints as ours: hand-worked mappings, nothing lost, nothing run."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from surefoot import PPO, InputError, TextTask
from surefoot.config import field_table, load_config, make_config
from surefoot.migrate.trl.files import Found
from surefoot.migrate.trl.settings import KINDS
from surefoot.migrate.trl.settings import OLD as OLD_PPO
from surefoot.migrate.trl.translate import Imported, import_settings, translate
from surefoot.migrate.trl.value_head import import_value_head
from tests.inputs import run_cli, write_project
from tests.tiny import FAMILIES, tiny_lm, tiny_tokenizer

OLD = """
config = PPOConfig(
    model_name="lvwerra/gpt2-imdb", learning_rate=2e-5, batch_size=64, mini_batch_size=8, gradient_accumulation_steps=2,
    ppo_epochs=3, init_kl_coef=0.1, target=5, horizon=2000, cliprange=0.3, score_clip=2.5, use_score_scaling=True, seed=7,
    log_with="wandb",
)
model = AutoModelForCausalLMWithValueHead.from_pretrained(config.model_name)
generation_kwargs = {"min_length": -1, "top_k": 0.0, "top_p": 1.0, "do_sample": True, "max_new_tokens": 20}
"""


def imported(folder: Path, text: str, name: str = "train.py") -> Imported:
    (folder / name).write_text(text)
    return import_settings(folder / name)


def settings(folder: Path, text: str, name: str = "train.py") -> dict[str, Any]:
    return imported(folder, text, name).settings


def test_a_script_of_the_old_api(tmp_path):
    assert settings(tmp_path, OLD) == {
        "seed": 7,
        "policy.model": "lvwerra/gpt2-imdb",
        "policy.adapter": None,
        "generation.max_new_tokens": 20,
        "rollout.episodes_per_update": 64,
        "ppo.batch_size": 16,  # 8 rows, twice
        "ppo.n_epochs": 3,
        "ppo.learning_rate": 2e-5,
        "ppo.adam_epsilon": 1e-8,
        "ppo.max_grad_norm": 1e9,
        "kl.coef": 0.1,
        "kl.target": 5,
        "kl.horizon": 2000,
        "kl.placement": "reward",
        "ppo.clip_range": 0.3,
        "shaping.clip": 2.5,
        "shaping.scale": "running_std",
        # TRL's own defaults, which are not ours
        "ppo.clip_range_vf": 0.2,
        "ppo.vf_coef": 0.1,
        "ppo.gamma": 1.0,
        "ppo.gae_lambda": 0.95,
        "shaping.whiten": False,
    }


def test_a_script_of_the_newer_api(tmp_path):
    script = """
args = PPOConfig(output_dir="out", per_device_train_batch_size=16, gradient_accumulation_steps=1, num_mini_batches=4,
                 total_episodes=10_000, missing_eos_penalty=1.0, stop_token="eos", sft_model_path="sft", kl_coef=0.03)
peft = LoraConfig(r=32, lora_alpha=16, target_modules=["q_proj", "v_proj"])
"""
    assert settings(tmp_path, script) == {
        "seed": 42,
        "run.folder": "out",
        "policy.model": "sft",
        "policy.adapter": {"rank": 32, "alpha": 16, "targets": ["q_proj", "v_proj"]},
        "generation.max_new_tokens": 53,
        "generation.temperature": 0.7,
        "rollout.total_episodes": 10_000,
        "rollout.episodes_per_update": 16,
        "ppo.batch_size": 4,
        "ppo.n_epochs": 4,
        "ppo.learning_rate": 3e-6,
        "ppo.lr_schedule": "linear",
        "ppo.adam_epsilon": 1e-8,
        "ppo.max_grad_norm": 1e9,
        "kl.coef": 0.03,
        "kl.placement": "reward",
        "shaping.missing_eos_penalty": 1.0,
        "ppo.clip_range": 0.2,
        "ppo.clip_range_vf": 0.2,
        "ppo.vf_coef": 0.1,
        "ppo.gamma": 1.0,
        "ppo.gae_lambda": 0.95,
        "shaping.whiten": False,
    }


@pytest.mark.parametrize(
    ("arguments", "per_update", "step"),
    [
        # The steps that accelerate took for these, counted with accelerate 1.15 and TRL 1.12's loop: 4, 1, 1, 2, 1 an epoch.
        ("per_device_train_batch_size=8, num_mini_batches=4", 8, 2),
        ("per_device_train_batch_size=2, gradient_accumulation_steps=4, num_mini_batches=4", 8, 8),
        ("per_device_train_batch_size=2, gradient_accumulation_steps=4, num_mini_batches=2", 8, 8),
        ("per_device_train_batch_size=4, gradient_accumulation_steps=2, num_mini_batches=4", 8, 4),
        ("per_device_train_batch_size=2, gradient_accumulation_steps=4", 8, 8),
    ],
)
def test_the_newer_ppo_steps_as_often_as_trl_does(tmp_path, arguments, per_update, step):
    found = settings(tmp_path, f"PPOConfig(num_ppo_epochs=1, {arguments})")
    assert (found["rollout.episodes_per_update"], found["ppo.batch_size"]) == (per_update, step)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"scale_rewards": "group", "loss_type": "grpo"}, ("grpo", "sequence")),
        ({"scale_rewards": False, "loss_type": "dr_grpo"}, ("dr_grpo", "constant")),
        ({"scale_rewards": "none", "loss_type": "bnpo"}, ("dr_grpo", "token")),
        ({}, ("grpo", "token")),
    ],
)
def test_grpo_and_its_relatives(tmp_path, given, expected):
    words = ", ".join(f"{name}={value!r}" for name, value in given.items())
    found = settings(
        tmp_path,
        f"GRPOConfig({words}{', ' if words else ''}num_generations=4, beta=0.04, epsilon_high=0.28, delta=3.0, max_steps=50, "
        "per_device_train_batch_size=8, gradient_accumulation_steps=2, steps_per_generation=4, num_iterations=2)\n"
        "GRPOTrainer(model='Qwen/Qwen2-0.5B', reward_funcs=f)",
    )
    assert (found["ppo.advantage"], found["ppo.loss_aggregation"]) == expected
    assert (found["group.size"], found["kl.coef"], found["kl.placement"]) == (4, 0.04, "loss")
    assert (found["ppo.clip_range"], found["ppo.clip_range_high"], found["ppo.dual_clip"]) == (0.2, 0.28, 3.0)
    # 8 × 4 answers from one policy, in steps of 8 × 2, each taken twice: 50 steps are 400 answers.
    assert [
        found[name] for name in ("rollout.episodes_per_update", "ppo.batch_size", "ppo.n_epochs", "rollout.total_episodes")
    ] == [
        32,
        16,
        2,
        400,
    ]
    assert found["policy.model"] == "Qwen/Qwen2-0.5B"


@pytest.mark.parametrize(
    ("call", "names"),
    [
        ("PPOConfig(ppo_epochs=1, init_kl_coef=0.0, target=5, horizon=100)", ["target", "horizon"]),
        ("PPOConfig(ppo_epochs=1, adap_kl_ctrl=False, target=5, horizon=100)", ["target", "horizon"]),
        ("PPOConfig(ppo_epochs=1, early_stopping=False, target_kl=0.3)", ["target_kl"]),
        ("GRPOConfig(num_generations=8, max_steps=100.5)", ["max_steps"]),
        ("GRPOConfig(num_generations=8, lora_r=8, lora_alpha=16)", ["lora_r", "lora_alpha"]),
    ],
)
def test_what_other_settings_leave_without_use_is_said(tmp_path, call, names):
    (tmp_path / "train.py").write_text(call)
    imported = import_settings(tmp_path / "train.py")
    for name in names:
        assert any(line.startswith(f"{name} ") and "not carried over" in line for line in imported.no_counterpart), name


def test_grpo_that_generates_more_often_than_it_steps_is_one_update_a_step(tmp_path):
    found = settings(tmp_path, "GRPOConfig(gradient_accumulation_steps=4, steps_per_generation=1, num_generations=8)")
    assert (found["rollout.episodes_per_update"], found["ppo.batch_size"]) == (32, 32)


def test_rloo_of_both_apis(tmp_path):
    new = settings(tmp_path, "RLOOConfig(num_generations=4, beta=0.1, reward_clip_range=(-5.0, 5.0))")
    old = settings(tmp_path, "RLOOConfig(rloo_k=4, kl_coef=0.1, cliprange=0.3, per_device_train_batch_size=16)")
    for found in (new, old):
        assert [found[name] for name in ("ppo.advantage", "group.size", "kl.coef", "kl.placement")] == [
            "rloo",
            4,
            0.1,
            "reward",
        ]
    assert (new["shaping.clip"], new["ppo.n_epochs"], new["ppo.clip_range"]) == (5.0, 1, 0.2)
    assert (old["ppo.clip_range"], old["ppo.n_epochs"], old["generation.temperature"]) == (0.3, 4, 0.7)


@pytest.mark.parametrize(
    ("text", "expected", "absent"),
    [
        ("PPOConfig(ppo_epochs=1, adap_kl_ctrl=False)", {"kl.coef": 0.2}, ["kl.target", "kl.horizon"]),
        ("PPOConfig(ppo_epochs=1, init_kl_coef=0)", {"kl.coef": 0}, ["kl.target"]),
        ("PPOConfig(ppo_epochs=1, early_stopping=True, target_kl=0.2)", {"ppo.target_kl": pytest.approx(0.3)}, []),
        ("PPOConfig(ppo_epochs=1, target_kl=0.2)", {}, ["ppo.target_kl"]),
        ("PPOConfig(ppo_epochs=1, forward_batch_size=32)", {"ppo.batch_size": 32}, []),
        ("PPOConfig(num_ppo_epochs=1, stop_token_id=13)", {"generation.stop_token_ids": [13]}, []),
        ("PPOConfig(num_ppo_epochs=1, warmup_steps=0.1)", {"ppo.lr_warmup": 0.1}, []),
        ("PPOConfig(num_ppo_epochs=1, bf16=True)", {"policy.dtype": "bfloat16"}, []),
        ("GRPOConfig(max_grad_norm=0)", {"ppo.max_grad_norm": 1e9}, []),
        ("GRPOConfig(lr_scheduler_type='constant_with_warmup', warmup_ratio=0.1)", {"ppo.lr_schedule": "constant"}, []),
    ],
)
def test_what_comes_from_a_setting_in_a_way_of_its_own(tmp_path, text, expected, absent):
    found = settings(tmp_path, text)
    assert {name: found[name] for name in expected} == expected
    assert not found.keys() & set(absent)


@pytest.mark.parametrize(
    ("text", "listed"),
    [
        (
            "PPOConfig(ppo_epochs=1, kl_penalty='full', use_score_norm=True, ratio_threshold=5.0)",
            ["kl_penalty", "use_score_norm", "ratio_t"],
        ),
        (
            "PPOConfig(num_ppo_epochs=1, kl_estimator='k3', weight_decay=0.1)",
            ["kl_estimator", "weight_decay", "stop_token", "value_model"],
        ),
        ("GRPOConfig(loss_type='cispo', scale_rewards='batch', top_p=0.9)", ["loss_type", "scale_rewards", "top_p"]),
        ("GRPOConfig(importance_sampling_level='sequence', something_new=3)", ["importance_sampling_level", "something_new 3"]),
        ("GRPOConfig(beta=0.1)\nGRPOTrainer(callbacks=[Mine()])", ["callbacks, [Mine()] at line 2"]),
        ("RLOOConfig(num_generations=2, reward_clip_range=(0, 5))", ["reward_clip_range [0, 5]"]),
        ("GRPOConfig(beta=0.1)\nLoraConfig(lora_dropout=0.05)", ["lora_dropout"]),
        (
            "GRPOConfig(beta=0.1)\nLoraConfig(use_rslora=True, modules_to_save=['lm_head'], layers_to_transform=[0])",
            [
                "LoraConfig.use_rslora, True at line 2: LoRA's scale is alpha / rank",
                "LoraConfig.modules_to_save, ['lm_head'] at line 2: not known here",
                "LoraConfig.layers_to_transform, [0]",
            ],
        ),
        (
            "GRPOConfig(beta=0.1)\nGRPOTrainer(optimizers=(a, None), rollout_func=f, num_shared_layers=6)",
            ["optimizers, (a, None) at line 2: Adam", "rollout_func, f at line 2", "num_shared_layers, 6 at line 2"],
        ),
        (
            "PPOConfig(ppo_epochs=1)\n"
            "x = generation_kwargs = dict(min_length=5, repetition_penalty=1.2, do_sample=False, eos_token_id=-1)",
            [
                "generation_kwargs.min_length, 5 at line 2: not known here",
                "generation_kwargs.repetition_penalty, 1.2 at line 2",
                "generation_kwargs.do_sample, False at line 2: answers are always drawn",
                "generation_kwargs.eos_token_id, -1 at line 2",
            ],
        ),
        (
            "GRPOConfig(something_new=0, something_else=0.0)",
            ["something_new 0: not known here", "something_else 0.0: not known"],
        ),
    ],
)
def test_what_has_no_counterpart_is_listed(tmp_path, text, listed):
    report = imported(tmp_path, text).no_counterpart
    for start in listed:
        assert any(entry.startswith(start) for entry in report), (start, report)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_every_setting_of_the_table_is_in_the_report_when_it_is_given(kind):
    for row in kind.rows:
        values = {row.theirs: 3} | ({"use_peft": True} if row.theirs.startswith("lora") else {})
        values |= {"early_stopping": True} if row.theirs == "target_kl" else {}
        values |= {"adap_kl_ctrl": False} if row.theirs == "adap_kl_ctrl" else {}
        done = translate(Found("here", kind, values))
        told = [entry for entry in (*done.mapped, *done.by_hand, *done.no_counterpart) if row.theirs in entry]
        assert told, row.theirs
        assert any("3" in entry or "false" in entry for entry in told) or row.ours == "ppo.target_kl", (row.theirs, told)
    done = translate(Found("here", kind, {"not_in_the_table": 3, "logging_steps": 5}))
    assert "not_in_the_table 3: not known here" in done.no_counterpart and done.aside == ["logging_steps"]


def test_a_value_that_is_no_literal_is_left_to_the_user_with_its_line(tmp_path):
    script = """lr = 1e-5
config = PPOConfig(
    ppo_epochs=2,
    learning_rate=lr,
    batch_size=args.size,
    **more,
)
config.gamma = 0.9
"""
    found = imported(tmp_path, script)
    assert "ppo.learning_rate: TRL's learning_rate is the expression lr at line 4" in found.by_hand
    assert "rollout.episodes_per_update: TRL's batch_size is the expression args.size at line 5" in found.by_hand
    assert "settings in **more at line 6 are not seen" in found.by_hand
    assert "ppo.gamma: TRL's gamma is set again by config.gamma = 0.9 at line 8" in found.by_hand
    assert not found.settings.keys() & {"ppo.learning_rate", "rollout.episodes_per_update", "ppo.batch_size", "ppo.gamma"}


def test_what_is_usual_and_asks_for_nothing_is_not_listed(tmp_path):
    script = OLD + (
        "LoraConfig(r=8, bias='none', task_type='CAUSAL_LM', use_dora=False, layers_to_transform=None)\n"
        "trainer = PPOTrainer(config=config, model=model, ref_model=None, tokenizer=tokenizer, dataset=data, data_collator=c)\n"
    )
    assert imported(tmp_path, script).no_counterpart == []


@pytest.mark.parametrize(
    "change",
    [
        "c.learning_rate *= 3",
        "x = c.learning_rate = 7",
        "c.gamma, c.learning_rate = 1, 2",
        "c.learning_rate: float = 7",
        "setattr(c, 'learning_rate', 7)",
    ],
)
def test_a_value_that_is_changed_later_is_not_written_as_it_was(tmp_path, change):
    found = imported(tmp_path, f"c = PPOConfig(ppo_epochs=1, learning_rate=1e-6)\n{change}")
    assert "ppo.learning_rate" not in found.settings
    assert any(entry.startswith("ppo.learning_rate: TRL's learning_rate is set again by ") for entry in found.by_hand)
    assert any(entry.endswith("at line 2") for entry in found.by_hand)


@pytest.mark.parametrize(
    ("script", "remark"),
    [
        ("LoraConfig(**more)", "settings in **more at line 2 are not seen"),
        ("LoraConfig()\nLoraConfig(r=4)", "LoraConfig(r=4) at line 3: a second LoraConfig, which is not read"),
        ("PPOTrainer(c, **more)", "settings in **more at line 2 are not seen"),
        ("generation_kwargs = {'top_k': 0, **more}", "settings in **more at line 2 are not seen"),
        ("generation_kwargs = make()", "generation_kwargs: make() at line 2 is not seen"),
        ("generation_kwargs['top_k'] = 5", "generation_kwargs: set again by generation_kwargs['top_k'] = 5 at line 2"),
    ],
)
def test_what_cannot_be_seen_is_left_to_the_user(tmp_path, script, remark):
    assert remark in imported(tmp_path, f"c = PPOConfig(ppo_epochs=1)\n{script}").by_hand


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("value", ["1", ["a", "b"], [], -1.5, {"a": 1}, True], ids=str)
def test_any_value_is_taken_or_refused_in_one_line(tmp_path, kind, value):
    switches = {"early_stopping": True} if kind is OLD_PPO else {}
    for row in kind.rows:
        found = Found("here", kind, switches | {row.theirs: value})
        try:
            make_config(yaml.safe_load(translate(found).yaml()) | {"task": None}, where="here")
        except InputError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"ppo_epochs": 1, "early_stopping": True, "target_kl": "1"}, "target_kl has '1'; a number is needed"),
        ({"num_generations": 2, "reward_clip_range": ["a", "b"]}, "reward_clip_range has 'a'; a number is needed"),
    ],
)
def test_text_where_a_number_is_needed_is_one_line(tmp_path, data, said):
    (tmp_path / "a.json").write_text(json.dumps(data))
    assert run_cli("import-trl", tmp_path / "a.json").complaint.endswith(f"a.json: {said}")


def test_a_lora_target_is_a_name_all_linear_or_a_pattern(tmp_path):
    def of(targets: str) -> Imported:
        return imported(tmp_path, f"trl grpo --beta 0.1 --use_peft --lora_target_modules {targets}", "grpo.sh")

    assert of("q_proj").settings["policy.adapter"]["targets"] == ["q_proj"]
    assert of("all-linear").settings["policy.adapter"]["targets"] == "all-linear"
    pattern = of("'.*q_proj'")
    assert "targets" not in pattern.settings["policy.adapter"]
    said = "policy.adapter.targets: TRL's lora_target_modules is the pattern '.*q_proj'; list the layers it fits"
    assert said in pattern.by_hand


def test_a_script_is_read_and_not_run(tmp_path):
    trap = f"open({str(tmp_path / 'was_run')!r}, 'w')\nraise SystemExit\nimport trl, nothing_of_this_name\n"
    script = trap + f"PPOConfig(num_ppo_epochs=1, seed=open({str(tmp_path / 'was_run')!r}, 'w'))"
    assert settings(tmp_path, script)["ppo.n_epochs"] == 1
    assert not (tmp_path / "was_run").exists()


COMMAND = """#!/bin/bash
LR=1e-5
accelerate launch --num_processes 2 --config_file zero.yaml examples/scripts/ppo/ppo.py \\
    --learning_rate 3e-6 --adam_epsilon $EPS --num_ppo_epochs=1 --per-device-train-batch-size 8 \\
    --total_episodes 10000 --missing_eos_penalty None --stop_token eos --use_peft \\
    --lora_target_modules q_proj v_proj > log.txt  # and so on
"""


def test_a_command_line(tmp_path):
    found = imported(tmp_path, COMMAND, "train.sh")
    assert found.kind is KINDS["PPO"]
    expected = {
        "ppo.learning_rate": 3e-6,
        "ppo.n_epochs": 1,
        "rollout.episodes_per_update": 16,  # 8 on each of 2
        "ppo.batch_size": 16,
        "rollout.total_episodes": 10_000,
        "policy.adapter": {"rank": 16, "alpha": 32, "targets": ["q_proj", "v_proj"]},
    }
    assert {name: found.settings[name] for name in expected} == expected
    assert "shaping.missing_eos_penalty" not in found.settings
    assert "ppo.adam_epsilon: TRL's adam_epsilon is the expression $EPS at line 3" in found.by_hand


def test_quotes_hide_what_ends_a_command(tmp_path):
    command = """trl grpo --eos_token "<|im_end|>" --beta 0.3 --run_name 'a > b; c' --delta 4.0 \\
    2>log.txt --num_generations 4 # --beta 9
trl grpo-again | tee --epsilon 0.1 2>&1; x --max_steps $(nproc | head) --output_dir a\\;b"""
    found = imported(tmp_path, command, "grpo.sh")
    assert found.aside == ["run_name"] and "eos_token '<|im_end|>': not known here" in found.no_counterpart
    expected = {"kl.coef": 0.3, "ppo.dual_clip": 4.0, "group.size": 4, "ppo.clip_range": 0.1}
    assert {name: found.settings[name] for name in expected} == expected
    assert found.settings["run.folder"] == "a;b"
    assert any("is the expression $(nproc | head) at line 3" in entry for entry in found.by_hand)


def test_what_no_one_has_looked_at_is_not_called_harmless(tmp_path):
    unseen = ("config_of_mine", "project_rewards", "label_weight", "torch_dtype", "do_sample", "log_ratio_clip")
    known = {"logging_steps": 5, "project": "p", "torch_compile": True, "vllm_mode": "colocate", "save_steps": 1, "lr": 3}
    data = {"scale_rewards": "none"} | dict.fromkeys(unseen, 3) | known
    found = imported(tmp_path, json.dumps(data), "grpo.json")
    assert found.no_counterpart == [f"{name} 3: not known here" for name in (*unseen, "lr")]
    assert found.aside == [name for name in known if name != "lr"]
    cap = {"scale_rewards": "none", "vllm_importance_sampling_cap": 3.0}
    assert imported(tmp_path, json.dumps(cap), "grpo.json").no_counterpart == []
    listed = imported(tmp_path, json.dumps(cap | {"use_vllm": True}), "grpo.json").no_counterpart
    assert listed == ["vllm_importance_sampling_cap 3.0: generation.tis_cap is the like, for each token"]


def test_a_settings_file_that_a_command_names_is_told_of(tmp_path):
    found = imported(tmp_path, "trl grpo --config a.yaml --scale_rewards none", "a.sh")
    assert "settings in --config a.yaml at line 1 are not seen; import that too" in found.by_hand


def test_none_is_a_word_of_grpos(tmp_path):
    found = settings(tmp_path, "trl grpo --scale_rewards none --report_to none --epsilon_high None", "a.sh")
    assert found["ppo.advantage"] == "dr_grpo" and "ppo.clip_range_high" not in found


def test_yaml_and_json(tmp_path):
    data = {"num_generations": 4, "loss_type": "dr_grpo", "beta": 0.01, "report_to": "none", "hub_model_id": None}
    from_yaml, from_json = (
        settings(tmp_path, text, name) for text, name in ((yaml.safe_dump(data), "a.yaml"), (json.dumps(data), "a.json"))
    )
    assert from_yaml == from_json and from_yaml["ppo.loss_aggregation"] == "constant" and from_yaml["kl.coef"] == 0.01
    # Without a word that one kind alone has, the file's name decides.
    both = {"num_generations": 4, "beta": 0.01}
    assert imported(tmp_path, json.dumps(both), "my_rloo.json").kind is KINDS["RLOO"]
    assert imported(tmp_path, json.dumps(both), "grpo.json").kind is KINDS["GRPO"]


def test_a_token_that_transformers_hides_is_not_taken_for_its_value(tmp_path):
    found = imported(tmp_path, json.dumps({"num_ppo_epochs": 1, "lam": 0.9, "stop_token": "<STOP_TOKEN>"}), "a.json")
    assert any(entry.startswith("stop_token: ") and "hidden" in entry for entry in found.by_hand)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        (
            "a.py",
            "SFTConfig()",
            "builds no GRPOConfig, PPOConfig, PPOv2Config, RLOOConfig; where its settings come from the command",
        ),
        (
            "a.py",
            "PPOConfig()\n\nx = GRPOConfig()",
            "several configurations, PPOConfig at line 1, GRPOConfig at line 3; keep one",
        ),
        ("a.py", "PPOConfig(", "a.py, line 1: not Python that can be parsed"),
        ("a.py", "PPOConfig(batch_size=0, ppo_epochs=1)", "batch_size is 0; a whole number above 0 is needed"),
        ("a.py", "PPOConfig(batch_size=10, mini_batch_size=3, ppo_epochs=1)", "ppo.batch_size (3) does not divide"),
        ("a.py", "PPOConfig(ppo_epochs=1, cliprange=-1)", "in our words: ppo.clip_range: should be greater than 0, got -1"),
        ("a.json", "[1]", "a.json: expected TRL's settings by name, found [1]"),
        ("a.json", "{", "a.json: not valid JSON"),
        ("a.json", "{}", "a.json: no setting of TRL's PPO, GRPO or RLOO in it"),
        (
            "a.yaml",
            "num_generations: 4",
            "fits GRPOConfig and RLOOConfig of TRL 0.22 and later alike; put ppo, grpo or rloo into",
        ),
        ("a.sh", "echo hello", "a.sh: no setting of TRL's PPO, GRPO or RLOO in it"),
        ("a.sh", "python ppo.py --seed 1\npython ppo.py --seed 2", "line 2: --seed is there twice; keep one training command"),
        ("a.sh", "python ppo.py 'x", "line 1: no command that can be read"),
        ("a.toml", "", "expected a .py or .sh script, a .yaml or .json file, or the folder of a checkpoint"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    assert said in run_cli("import-trl", tmp_path / name).complaint
    assert run_cli("import-trl", tmp_path / "none.py").complaint.endswith("none.py: no such file")


def test_a_pickle_is_refused_unread_with_the_way_around_it(tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "was_run",))

    (tmp_path / "training_args.bin").write_bytes(pickle.dumps(Trap()))
    said = run_cli("import-trl", tmp_path / "training_args.bin").complaint
    assert "a pickle, which is not read" in said and "to_json_string()" in said and not (tmp_path / "was_run").exists()


def test_the_command_writes_yaml_that_ppo_takes(tmp_path):
    write_project(tmp_path)
    (tmp_path / "train.py").write_text(OLD.replace("lvwerra/gpt2-imdb", "model"))
    shown = run_cli("import-trl", tmp_path / "train.py")
    assert shown.code == 0 and "set by hand:" in shown.err and "task.reward" in shown.err and "mapped:" in shown.err
    written = run_cli("import-trl", tmp_path / "train.py", "--output", tmp_path / "ppo.yaml")
    assert written.out == "" and (tmp_path / "ppo.yaml").read_text() == shown.out
    assert (
        "exists; name a new file" in run_cli("import-trl", tmp_path / "train.py", "--output", tmp_path / "ppo.yaml").complaint
    )
    flags = {"task.prompts": str(tmp_path / "prompts.jsonl"), "task.reward": f"{tmp_path / 'reward.py'}:reward"}
    config = load_config(tmp_path / "ppo.yaml", flags)
    assert (config.kl.target, config.ppo.batch_size, config.policy.adapter) == (5.0, 16, None)
    assert Path(config.policy.model) == tmp_path / "model" and config.task is not None
    bare = run_cli("ppo", tmp_path / "ppo.yaml").complaint  # what is unknown is not made up
    assert "no task (task.prompts and task.reward)" in bare


def test_settings_need_no_torch(tmp_path):
    (tmp_path / "train.py").write_text(OLD)
    command = [sys.executable, "-X", "importtime", "-m", "surefoot.cli.main", "import-trl", str(tmp_path / "train.py")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert ended.returncode == 0 and "surefoot.migrate.trl.translate" in ended.stderr
    assert not [name for name in ("| torch", "| transformers", "| numpy") if name in ended.stderr]


def test_the_table_names_settings_that_exist():
    keys = {key for key, *_ in field_table()} | {"policy.adapter"}
    for kind in KINDS.values():
        names = [row.theirs for row in kind.rows]
        assert len(names) == len(set(names))
        assert {row.ours for row in kind.rows if row.ours} | kind.always.keys() <= keys
        assert all(row.note for row in kind.rows if not row.ours)


# The checkpoints of AutoModelForCausalLMWithValueHead.


def value_head_folder(
    folder: Path, family: str = "llama", *, prefix: str = "", dtype: torch.dtype = torch.float32
) -> tuple[Any, nn.Linear]:
    """A checkpoint as TRL writes it, and what it is made of. TRL's head: dropout, then `summary`, one linear layer."""
    lm = tiny_lm(family).eval().to(dtype)
    generator = torch.Generator().manual_seed(3)
    summary = nn.Linear(lm.get_output_embeddings().weight.shape[1], 1).to(dtype)
    with torch.no_grad():
        summary.weight.copy_(0.3 * torch.randn(summary.weight.shape, generator=generator))
        summary.bias.fill_(0.5)
    lm.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    tensors = {prefix + name: tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    head = {f"v_head.summary.{name}": p.detach().clone() for name, p in summary.named_parameters()}
    save_file(tensors | head, folder / "model.safetensors", metadata={"format": "pt"})
    return lm, summary


@torch.no_grad()
def trl_says(lm: Any, summary: nn.Linear, tokens: Tensor) -> tuple[Tensor, Tensor]:
    out = lm(input_ids=tokens, output_hidden_states=True)
    return out.logits.float(), summary(out.hidden_states[-1]).squeeze(-1).float()


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "lstm"])  # which TRL has not
@pytest.mark.parametrize("prefix", ["", "pretrained_model."], ids=["plain", "prefixed"])
def test_a_value_head_checkpoint_gives_the_same_logits_and_values(tmp_path, family, prefix):
    lm, summary = value_head_folder(tmp_path / "trl", family, prefix=prefix)
    outcome = run_cli("import-trl", tmp_path / "trl", "--output", tmp_path / "ours")
    assert outcome.code == 0 and outcome.out.startswith(f"model: {tmp_path / 'ours'}\n")
    policy = PPO.load(tmp_path / "ours", verbose=0, dtype="float32").policy
    tokens = torch.randint(4, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    logits, values = trl_says(lm, summary, tokens)
    with torch.no_grad():
        torch.testing.assert_close(policy.lm(input_ids=tokens).logits, logits)
        for end in (3, 9):
            ours = policy.value_at_end(tokens[:, :end], torch.tensor([end, end]))
            torch.testing.assert_close(ours, values[:, end - 1], rtol=1e-4, atol=1e-5)


def test_a_shorter_number_format_and_shards_lose_nothing(tmp_path):
    _, summary = value_head_folder(tmp_path / "trl", dtype=torch.bfloat16)
    tensors = load_file(tmp_path / "trl" / "model.safetensors")
    (tmp_path / "trl" / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {name: f"model-0000{1 + (i % 2)}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        part = {name: tensors[name] for name in names if files[name] == file}
        save_file(part, tmp_path / "trl" / file, metadata={"format": "pt"})
    (tmp_path / "trl" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    # What an earlier save left is no part of the model.
    stale = {"lm_head.weight": torch.zeros(1), "stale": torch.zeros(1)}
    save_file(stale, tmp_path / "trl" / "model-00009-of-00009.safetensors")
    (tmp_path / "ours.tmp").mkdir()
    import_value_head(tmp_path / "trl", tmp_path / "ours")
    assert {path.name for path in tmp_path.iterdir()} == {"trl", "ours", "ours.tmp"}
    critic = PPO.load(tmp_path / "ours", verbose=0, dtype="float32").policy.value_head
    assert critic.weight.dtype == torch.float32 and torch.equal(critic.weight.detach(), summary.weight.detach().float())
    written = load_file(tmp_path / "ours" / "model.safetensors")
    assert written.keys() == {name for name in names if not name.startswith("v_head.")}
    assert all(torch.equal(written[name], tensors[name]) for name in written)


def test_an_imported_checkpoint_is_trained_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    value_head_folder(tmp_path / "trl")
    import_value_head(tmp_path / "trl", tmp_path / "ours")
    task = TextTask(["the film", "a band"], lambda prompts, completions: [float(len(text)) for text in completions])
    sizes = {"episodes_per_update": 4, "batch_size": 4, "total_episodes": 4, "max_new_tokens": 3}
    model = PPO.load("ours", task, verbose=0, dtype="float32", **sizes)
    assert model.policy.value_head.bias.item() == 0.5
    model.learn()
    assert model.policy.value_head.bias.item() != 0.5


def drop_head(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {n: t for n, t in tensors.items() if not n.startswith("v_head")},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )


def widen_head(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"v_head.summary.weight": torch.zeros(1, 33)}, folder / "model.safetensors", metadata={"format": "pt"})


def only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


def half(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def linked_weights(folder: Path) -> None:
    target = folder / "elsewhere"
    (folder / "model.safetensors").rename(target)
    (folder / "model.safetensors").symlink_to(target)


def linked_text(folder: Path) -> None:
    (folder / "notes.txt").symlink_to(Path(__file__))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (drop_head, "no v_head.summary in its weights; without a value head it is a model as it is: policy.model"),
        (widen_head, "surefoot_critic.safetensors does not fit this model"),
        (only_pickle, "pytorch_model.bin is a pickle and is not loaded"),
        (adapter, "an adapter with its value head in a pickle"),
        (half, "half-written"),
        (linked_weights, "model.safetensors: a link, which is not followed; where you trust the folder, copy it: cp -rL"),
        (linked_text, "notes.txt: a link, which is not followed"),
    ],
)
def test_a_checkpoint_that_cannot_be_taken_is_refused_and_leaves_nothing(tmp_path, damage, said):
    value_head_folder(tmp_path / "trl")
    damage(tmp_path / "trl")
    complaint = run_cli("import-trl", tmp_path / "trl", "--output", tmp_path / "ours").complaint
    assert said in complaint and str(tmp_path / "ours") not in complaint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["trl"]


def test_a_folder_needs_a_new_folder(tmp_path):
    value_head_folder(tmp_path / "trl")
    assert "a folder is written; name a new one with --output" in run_cli("import-trl", tmp_path / "trl").complaint
    shutil.copytree(tmp_path / "trl", tmp_path / "taken")
    said = run_cli("import-trl", tmp_path / "trl", "--output", tmp_path / "taken").complaint
    assert said == f"--output {tmp_path / 'taken'}: exists; name a new folder"


def test_errors_are_of_the_kind_that_python_users_catch(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        import_settings(tmp_path / "none.py")
    assert make_config({}, where="nothing").kl.coef == 0.05  # ours; TRL's old 0.2 is written out above
