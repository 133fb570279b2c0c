"""TRL's settings and checkpoints as ours: hand-worked mappings, nothing lost, nothing unsafe loaded."""

import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from surefoot import PPO, InputError
from surefoot.config import field_table, load_config, make_config, strict_yaml
from surefoot.core.losses import LossSettings, clipped_surrogate
from surefoot.migrate.trl import settings as table
from surefoot.migrate.trl.translate import Imported, import_settings, translate
from surefoot.migrate.trl.value_head import import_value_head
from tests.golden import refused
from tests.inputs import run_cli, write_project
from tests.tiny import FAMILIES, tiny_lm, tiny_tokenizer
from tests.train.test_checkpoint import poison

ROOT = Path(__file__).parent.parent
# What `json.dump(config.to_dict(), …)` gives of TRL 0.11.
OLD: dict[str, Any] = {
    "model_name": "lvwerra/gpt2-imdb", "learning_rate": 2e-5, "batch_size": 64, "mini_batch_size": 8, "ppo_epochs": 3,
    "gradient_accumulation_steps": 2, "init_kl_coef": 0.1, "target": 5, "horizon": 2000, "cliprange": 0.3, "score_clip": 2.5,
    "use_score_scaling": True, "seed": 7, "log_with": "wandb", "max_grad_norm": None,
}  # fmt: skip
# TRL's own defaults, which are not ours.
TRLS_OWN = {
    "ppo.adam_epsilon": 1e-8, "ppo.max_grad_norm": 1e9, "kl.placement": "reward", "ppo.clip_range_vf": 0.2,
    "ppo.vf_coef": 0.1, "ppo.gamma": 1.0, "ppo.gae_lambda": 0.95, "shaping.whiten": False,
}  # fmt: skip


def of(kind: table.Kind, **given: Any) -> Imported:
    done = Imported("here", kind, given)
    translate(done)
    make_config({n: part for n, part in strict_yaml.parse(done.yaml()).items() if part is not None}, where="here")
    return done


def from_file(folder: Path, data: dict[str, Any], name: str = "trl.json") -> Imported:
    (folder / name).write_text(json.dumps(data, indent=2))
    return import_settings([str(folder / name)])


def picked(done: Imported, *names: str) -> list[Any]:
    return [done.settings[name] for name in names]


def test_the_old_api(tmp_path):
    done = from_file(tmp_path, OLD)
    assert done.kind is table.OLD and done.settings == {
        "seed": 7, "policy.model": "lvwerra/gpt2-imdb", "policy.adapter": None, "policy.dtype": "float32",
        "rollout.episodes_per_update": 64, "ppo.batch_size": 16, "ppo.n_epochs": 3, "ppo.learning_rate": 2e-5,
        "ppo.clip_range": 0.3, "kl.coef": 0.1, "kl.target": 5, "kl.horizon": 2000, "shaping.clip": 2.5,
        "shaping.scale": "running_std",
    } | TRLS_OWN  # fmt: skip
    # What it does not hold is said: the sampling, the LoRA, the task.
    for key in ("task.prompts", "task.reward", "policy.adapter", "rollout.total_episodes", "generation.max_new_tokens"):
        assert any(entry.startswith(key) for entry in done.by_hand), key


def test_the_newer_api(tmp_path):
    given = {
        "output_dir": "out", "per_device_train_batch_size": 16, "num_mini_batches": 4, "total_episodes": 10_000,
        "missing_eos_penalty": 1.0, "stop_token": "eos", "sft_model_path": "sft", "kl_coef": 0.03, "bf16": False,
        "use_peft": True, "lora_r": 32, "lora_alpha": 16, "lora_target_modules": ["q_proj", "v_proj"], "max_grad_norm": 0.5,
    }  # fmt: skip
    done = from_file(tmp_path, given, "ppo.json")
    assert done.kind is table.PPO and done.settings == {
        "seed": 42, "run.folder": "out", "policy.model": "sft", "policy.dtype": "float32",
        "policy.adapter": {"rank": 32, "alpha": 16, "targets": ["q_proj", "v_proj"]}, "generation.max_new_tokens": 53,
        "generation.temperature": 0.7, "rollout.total_episodes": 10_000, "rollout.episodes_per_update": 16,
        "ppo.batch_size": 4, "ppo.n_epochs": 4, "ppo.learning_rate": 3e-6, "ppo.lr_schedule": "linear",
        "kl.coef": 0.03, "shaping.missing_eos_penalty": 1.0, "ppo.clip_range": 0.2,
    } | TRLS_OWN  # fmt: skip
    assert "max_grad_norm 0.5 (docs/from-trl.md says why)" in done.no_counterpart
    assert any(entry.startswith("stop_token none") for entry in of(table.PPO).no_counterpart)


@pytest.mark.parametrize(
    ("rows", "accumulated", "minibatches", "per_update", "step"),
    # The steps that accelerate took for these, counted with accelerate 1.15 and TRL 1.12's loop: 4, 1, 1, 2, 1 an epoch.
    [(8, 1, 4, 8, 2), (2, 4, 4, 8, 8), (2, 4, 2, 8, 8), (4, 2, 4, 8, 4), (2, 4, 1, 8, 8)],
)
def test_the_newer_ppo_steps_as_often_as_trl_does(rows, accumulated, minibatches, per_update, step):
    sizes = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulated, "num_mini_batches": minibatches}
    assert picked(of(table.PPO, **sizes), "rollout.episodes_per_update", "ppo.batch_size") == [per_update, step]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"scale_rewards": "group", "loss_type": "grpo"}, ["grpo", "sequence"]),
        ({"scale_rewards": False, "loss_type": "dr_grpo"}, ["dr_grpo", "constant"]),
        ({"scale_rewards": "none", "loss_type": "bnpo"}, ["dr_grpo", "token"]),
        ({}, ["grpo", "token"]),
    ],
)
def test_grpo_and_its_relatives(given, expected):
    sizes = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "steps_per_generation": 4}
    done = of(table.GRPO, **given, **sizes, num_generations=4, beta=0.04, max_steps=50, num_iterations=2)
    assert picked(done, "ppo.advantage", "ppo.loss_aggregation", "group.size", "kl.coef") == [*expected, 4, 0.04]
    # 8 × 4 completions from one policy, in steps of 8 × 2, each taken twice: 50 steps are 400 completions.
    names = ("rollout.episodes_per_update", "ppo.batch_size", "ppo.n_epochs", "rollout.total_episodes")
    assert picked(done, *names) == [32, 16, 2, 400] and done.settings["kl.placement"] == "loss"
    seldom = of(table.GRPO, gradient_accumulation_steps=4, steps_per_generation=1)  # one update a step
    assert picked(seldom, *names[:2]) == [32, 32]


def test_the_ratios_of_gspo_and_cispo_are_bounded_where_trl_bounds_them():
    """TRL's cispo caps the ratio at epsilon_high, here it is 1 + clip_range_high; the losses: tests/train/test_trl.py."""
    names = ("policy_loss", "importance_sampling_level", "clip_range_high", "loss_aggregation", "mask_truncated")
    given = {"loss_type": "cispo", "epsilon_high": 5.0, "delta": 2.0, "mask_truncated_completions": True}
    found = of(table.GRPO, **given).settings
    assert [found.get(f"ppo.{name}") for name in names] == ["cispo", "token", 4.0, "token", True]
    assert "ppo.dual_clip" not in found
    gspo = {"importance_sampling_level": "sequence", "loss_type": "grpo", "epsilon": 3e-4, "epsilon_high": 4e-4}
    found = of(table.GRPO, **gspo).settings
    assert [found.get(f"ppo.{name}") for name in names] == [None, "sequence", 4e-4, "sequence", False]
    assert found["ppo.clip_range"] == 3e-4


@pytest.mark.parametrize("delta", [1.05, 1.2, 1.28, 1.5, 4.0])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_delta_gives_trls_loss_and_gradient_at_any_ratio(delta, advantage):
    """The package's loss under the settings that were written, and TRL's two-sided one as its grpo_trainer.py has it."""
    found = of(table.GRPO, epsilon=0.2, epsilon_high=0.28, delta=delta).settings
    settings = LossSettings(**{name: found[f"ppo.{name}"] for name in ("clip_range", "clip_range_high", "dual_clip")})
    ours, theirs = (torch.linspace(0.311, 5.007, 97, requires_grad=True) for _ in range(2))
    our = clipped_surrogate(ours, torch.full_like(ours, advantage), settings)
    their = -torch.min(theirs.clamp(max=delta) * advantage, theirs.clamp(0.8, 1.28) * advantage)
    torch.testing.assert_close(our, their)
    torch.testing.assert_close(*torch.autograd.grad(our.sum(), ours), *torch.autograd.grad(their.sum(), theirs))


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"loss_type": "sapo"}, "loss_type 'sapo'"),
        ({"importance_sampling_level": "turn"}, "importance_sampling_level 'turn'"),
        ({"loss_type": "cispo"}, "epsilon_high 0.2"),
        ({"loss_type": "cispo", "epsilon_high": 1.0}, "epsilon_high 1.0"),
        ({"delta": 1.0}, "here: ppo.clip_range_high"),
        ({"delta": "big"}, "delta has 'big'"),
    ],
)
def test_another_loss_is_refused(given, named):
    with refused(named):
        of(table.GRPO, **given)


def test_rloo_of_both_apis():
    new = of(table.RLOO, num_generations=4, beta=0.1, reward_clip_range=[-5.0, 5.0], max_completion_length=100)
    old = of(table.OLD_RLOO, rloo_k=4, kl_coef=0.1, cliprange=0.3, per_device_train_batch_size=16, response_length=50)
    for done in (new, old):
        assert picked(done, "ppo.advantage", "group.size", "kl.coef", "kl.placement") == ["rloo", 4, 0.1, "reward"]
    assert picked(new, "shaping.clip", "ppo.n_epochs", "ppo.clip_range", "policy.dtype") == [5.0, 1, 0.2, "bfloat16"]
    assert picked(old, "ppo.clip_range", "ppo.n_epochs", "policy.dtype") == [0.3, 4, "float32"]
    # The loss is a sum over the completion in TRL, and that over max_new_tokens here; so is its gradient.
    assert picked(new, "ppo.max_grad_norm", "ppo.adam_epsilon") == [0.01, 1e-10]
    assert picked(old, "ppo.max_grad_norm", "ppo.adam_epsilon") == [1e9, 2e-10]
    assert of(table.RLOO, max_grad_norm=0).settings["ppo.max_grad_norm"] == 1e9


@pytest.mark.parametrize(
    ("kind", "given", "expected", "absent"),
    [
        ("OLD", {"adap_kl_ctrl": False}, {"kl.coef": 0.2}, ["kl.target", "kl.horizon"]),
        ("OLD", {"init_kl_coef": 0}, {"kl.coef": 0}, ["kl.target", "ppo.target_kl"]),
        ("OLD", {"early_stopping": True, "target_kl": 0.2}, {"ppo.target_kl": pytest.approx(0.3)}, []),
        ("OLD", {"forward_batch_size": 32}, {"ppo.batch_size": 32}, []),
        ("PPO", {"warmup_steps": 0.1}, {"ppo.lr_warmup": 0.1}, []),
        ("GRPO", {"max_grad_norm": 0}, {"ppo.max_grad_norm": 1e9}, []),
        ("GRPO", {"entropy_coef": 0.01}, {"ppo.ent_coef": 0.01}, []),
        ("GRPO", {"entropy_coef": 0.01, "loss_type": "grpo"}, {}, ["ppo.ent_coef"]),
        ("GRPO", {"lr_scheduler_type": "constant_with_warmup"}, {"ppo.lr_schedule": "constant"}, []),
        ("GRPO", {"use_peft": True}, {"policy.adapter": {"rank": 16, "alpha": 32}}, []),
    ],
)  # fmt: skip
def test_what_comes_from_several_settings(kind, given, expected, absent):
    found = of(getattr(table, kind), **given).settings
    assert {name: found[name] for name in expected} == expected and not found.keys() & set(absent)


@pytest.mark.parametrize(
    ("kind", "given", "listed"),
    [
        ("OLD", {"kl_penalty": "full", "use_score_norm": True, "ratio_threshold": 5.0}, ["kl_penalty", "use_score_norm"]),
        ("OLD", {"adap_kl_ctrl": False, "target": 5, "horizon": 100}, ["target 5: without use", "horizon 100"]),
        ("PPO", {"kl_estimator": "k3", "weight_decay": 0.1, "stop_token_id": 1}, ["kl_est", "weight_d", "stop_t", "value_m"]),
        ("GRPO", {"scale_rewards": "batch", "top_p": 0.9, "optim": "sgd"}, ["scale_rewards", "top_p 0.9", "optim"]),
        ("GRPO", {"lora_r": 8, "lora_dropout": 0.05, "use_rslora": True}, ["lora_r 8: without use", "lora_drop", "use_rslora"]),
        ("GRPO", {"entropy_coef": 0.01, "loss_type": "grpo"}, ["entropy_coef"]),
        ("GRPO", {"something_new": 0, "torch_dtype": "bfloat16"}, ["something_new 0: not known here", "torch_dtype"]),
        ("GRPO", {"use_vllm": True, "vllm_importance_sampling_cap": 3.0}, ["vllm_importance_sampling_cap 3.0"]),
        ("RLOO", {"reward_clip_range": [0, 5]}, ["reward_clip_range [0, 5]", "the ratio"]),
    ],
)  # fmt: skip
def test_what_has_no_counterpart_is_listed(kind, given, listed):
    report = of(getattr(table, kind), **given).no_counterpart
    for start in listed:
        assert any(entry.startswith(start) for entry in report), (start, report)


def test_what_changes_nothing_is_not_listed():
    known = {"logging_steps": 5, "project": "p", "torch_compile": True, "vllm_mode": "colocate", "save_steps": 1}
    rest = {"optim": "adamw_torch_fused", "vllm_importance_sampling_cap": 3.0, "fp16": False, "weight_decay": 0.0}
    assert of(table.GRPO, **known, **rest).no_counterpart == []


@pytest.mark.parametrize("kind", table.KINDS, ids=lambda kind: kind.title)
def test_every_setting_of_the_table_is_in_the_output_and_any_value_is_taken_or_refused(kind):
    known = (*kind.maps, *kind.computed, *kind.without)
    for name in {*known, *table.BY_HAND} - {"loss_type", "importance_sampling_level"}:  # another loss is refused
        done = Imported("here", kind, {name: 3, "use_peft": True} | ({"early_stopping": True} if kind is table.OLD else {}))
        translate(done)
        assert name in done.yaml(), name
    for name, value in itertools.product(known, ["1", ["a", "b"], [], -1.5, {"a": 1}, True]):
        try:
            of(kind, **{name: value, "early_stopping": True})
        except InputError as error:
            assert "\n" not in str(error)


def test_a_command_is_read_as_argparse_reads_it(tmp_path):
    (tmp_path / "base.yaml").write_text("learning_rate: 1e-5\nlam: 0.9\n")
    words = f"""accelerate launch --num_processes 2 --config_file zero.yaml ppo.py --config {tmp_path}/base.yaml
        --learning_rate 3e-6 --num_ppo_epochs=1 --per-device-train-batch-size 8 --stop_token eos --bf16
        --use_peft --lora_target_modules q_proj v_proj"""
    done = import_settings(words.split())
    assert done.kind is table.PPO and done.no_counterpart == list(table.PPO.notes)
    adapter = {"rank": 16, "alpha": 32, "targets": ["q_proj", "v_proj"]}
    names = ("ppo.learning_rate", "ppo.gae_lambda", "ppo.n_epochs", "rollout.episodes_per_update", "policy.adapter")
    assert picked(done, *names) == [3e-6, 0.9, 1, 16, adapter]  # the flag's rather than the file's; 8 on each of 2
    none = import_settings(["trl", "grpo", "--scale_rewards", "none", "--beta", "0.1", "--report_to", "none"])
    assert picked(none, "ppo.advantage", "kl.coef") == ["dr_grpo", 0.1]


def test_the_files_name_decides_between_kinds_that_know_as_much(tmp_path):
    both = {"num_generations": 4, "beta": 0.01}
    assert from_file(tmp_path, both, "my_rloo.json").kind is table.RLOO
    (tmp_path / "grpo.yaml").write_text(yaml.safe_dump(both))
    assert import_settings([str(tmp_path / "grpo.yaml")]).kind is table.GRPO


@pytest.mark.parametrize(
    ("name", "text", "named"),
    [
        ("a.py", "PPOConfig()", ["a.py", "args.to_json_string()", "config.to_dict()"]),
        ("a.sh", "trl grpo", ["a.sh", "surefoot import-trl --"]),
        ("a.json", '{"batch_size": 0, "ppo_epochs": 1}', ["rollout.episodes_per_update"]),
        ("a.json", '{"ppo_epochs": 1, "cliprange": -1}', ["in our words: ppo.clip_range"]),
        ("a.json", "[1]", ["a.json", "[1]"]),
        ("a.json", "{}", ["a.json", "no setting of TRL's PPO, GRPO or RLOO"]),
        ("a.yaml", "num_generations: 4", ["GRPOConfig", "RLOOConfig", "the file's name"]),
        ("a.toml", "", ["a.toml"]),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, name, text, named):
    (tmp_path / name).write_text(text)
    run_cli("import-trl", tmp_path / name).refused(*named)
    run_cli("import-trl", tmp_path / "none.json").refused("none.json")
    run_cli("import-trl", "--", "echo", "--beta", "1").refused("'echo --beta 1'")


def test_a_pickle_is_refused_unread_with_the_way_around_it(tmp_path):
    (tmp_path / "training_args.bin").write_bytes(poison(tmp_path / "canary"))
    run_cli("import-trl", tmp_path / "training_args.bin").refused("a pickle", "to_json_string()")
    assert not (tmp_path / "canary").exists()


def test_the_command_writes_yaml_that_ppo_takes(tmp_path):
    write_project(tmp_path)
    (tmp_path / "trl.json").write_text(json.dumps(OLD | {"model_name": "model"}))
    command = ("import-trl", tmp_path / "trl.json")
    shown, to_file = run_cli(*command), (*command, "--output", tmp_path / "ppo.yaml")
    assert shown.code == 0 and "Set by hand:" in shown.err and "# Set by hand:" in shown.out
    assert run_cli(*to_file).out == "" and (tmp_path / "ppo.yaml").read_text() == shown.out
    run_cli(*to_file).refused("--output", "ppo.yaml")
    flags = {"task.prompts": str(tmp_path / "prompts.jsonl"), "task.reward": f"{tmp_path / 'reward.py'}:reward"}
    config = load_config(tmp_path / "ppo.yaml", flags)
    assert (config.kl.target, config.ppo.batch_size, config.policy.adapter) == (5.0, 16, None)
    assert Path(config.policy.model) == tmp_path / "model" and config.task is not None
    run_cli("ppo", tmp_path / "ppo.yaml").refused("task.prompts", "task.reward")  # what is unknown is not made up


def test_the_table_names_settings_that_exist_and_the_page_has_them_all():
    keys = {key for key, *_ in field_table()} | {"policy.adapter"}
    page = (ROOT / "docs" / "from-trl.md").read_text(encoding="utf-8")
    for kind in table.KINDS:
        assert {ours for ours, _ in kind.maps.values()} | kind.always.keys() | set(table.BY_HAND.values()) <= keys
        assert [n for n in (*kind.maps, *kind.computed, *kind.without) if f"| `{n}` |" not in page] == []
        for theirs, (ours, _) in kind.maps.items():
            assert f"`{ours}`" in "".join(line for line in page.splitlines() if line.startswith(f"| `{theirs}` |")), theirs


# The checkpoints of AutoModelForCausalLMWithValueHead.


def value_head_folder(folder: Path, family: str = "llama", *, prefix: str = "", dtype: Any = torch.float32) -> tuple[Any, Any]:
    """A checkpoint as TRL writes it, and what it is made of. TRL's head: dropout, then `summary`, one linear layer."""
    lm = tiny_lm(family).eval().to(dtype)
    summary = nn.Linear(lm.get_output_embeddings().weight.shape[1], 1).to(dtype)
    torch.nn.init.normal_(summary.weight, std=0.3, generator=torch.Generator().manual_seed(3))
    torch.nn.init.constant_(summary.bias, 0.5)
    lm.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    tensors = {prefix + name: tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    head = {f"v_head.summary.{name}": p.detach().clone() for name, p in summary.named_parameters()}
    save_file(tensors | head, folder / "model.safetensors", metadata={"format": "pt"})
    return lm, summary


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "lstm"])  # which TRL has not
@pytest.mark.parametrize("prefix", ["", "pretrained_model."], ids=["plain", "prefixed"])
def test_a_value_head_checkpoint_gives_the_same_logits_and_values(tmp_path, family, prefix):
    lm, summary = value_head_folder(tmp_path / "trl", family, prefix=prefix)
    outcome = run_cli("import-trl", tmp_path / "trl", "--output", tmp_path / "ours")
    assert outcome.code == 0 and outcome.out.startswith(f"model: {tmp_path / 'ours'}\n")
    policy = PPO.load(tmp_path / "ours", verbose=0).policy  # in float32: the folder's settings say so
    assert policy.lm.dtype == policy.dtype == torch.float32
    tokens = torch.randint(4, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = lm(input_ids=tokens, output_hidden_states=True)
        values = summary(theirs.hidden_states[-1]).squeeze(-1)
        torch.testing.assert_close(policy.lm(input_ids=tokens).logits, theirs.logits)
        for end in (3, 9):
            ours = policy.value_at_end(tokens[:, :end], torch.tensor([end, end]))
            torch.testing.assert_close(ours, values[:, end - 1], rtol=0, atol=1e-6)


def test_a_shorter_number_format_and_shards_lose_nothing(tmp_path):
    _, summary = value_head_folder(tmp_path / "trl", dtype=torch.bfloat16)
    tensors = load_file(tmp_path / "trl" / "model.safetensors")
    (tmp_path / "trl" / "model.safetensors").unlink()
    names, file_of = sorted(tensors), "model-0000{}-of-00002.safetensors".format
    files = {name: file_of(1 + i % 2) for i, name in enumerate(names)}
    parts = {file: {name: tensors[name] for name in names if files[name] == file} for file in files.values()}
    (tmp_path / "trl" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    # What an earlier save left is no part of the model.
    parts["model-00009-of-00009.safetensors"] = {"lm_head.weight": torch.zeros(1), "stale": torch.zeros(1)}
    for file, part in parts.items():
        save_file(part, tmp_path / "trl" / file, metadata={"format": "pt"})
    (tmp_path / "ours.tmp").mkdir()
    import_value_head(tmp_path / "trl", tmp_path / "ours")
    assert {path.name for path in tmp_path.iterdir()} == {"trl", "ours", "ours.tmp"}
    run_cli("import-trl", tmp_path / "trl").refused("--output")  # a folder, and a new one
    run_cli("import-trl", tmp_path / "trl", "--output", tmp_path).refused(f"--output {tmp_path}")
    critic = PPO.load(tmp_path / "ours", verbose=0).policy.value_head
    assert critic.weight.dtype == torch.float32 and torch.equal(critic.weight.detach(), summary.weight.detach().float())
    written = load_file(tmp_path / "ours" / "model.safetensors")
    assert written.keys() == {name for name in names if not name.startswith("v_head.")}
    assert all(torch.equal(written[name], tensors[name]) for name in written)


def rewritten(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Callable[[Path], object]:
    return lambda file: save_file(change(load_file(file)), file, metadata={"format": "pt"})


DAMAGES: dict[str, Callable[[Path], object]] = {  # of the weights
    "no v_head.summary.weight": rewritten(lambda tensors: {n: t for n, t in tensors.items() if not n.startswith("v_head")}),
    "surefoot_critic.safetensors": rewritten(lambda tensors: tensors | {"v_head.summary.weight": torch.zeros(1, 33)}),
    "pytorch_model.bin is a pickle": lambda file: file.rename(file.with_name("pytorch_model.bin")),
    "an adapter": lambda file: file.with_name("adapter_config.json").write_text("{}"),
    "half-written": lambda file: os.truncate(file, 20_000),
    "model.safetensors: a link": lambda file: file.symlink_to(file.rename(file.with_name("elsewhere"))),
    "notes.txt: a link": lambda file: file.with_name("notes.txt").symlink_to(__file__),
}


@pytest.mark.parametrize("named", DAMAGES)
def test_a_checkpoint_that_cannot_be_taken_is_refused_and_leaves_nothing(tmp_path, named):
    value_head_folder(tmp_path / "trl")
    DAMAGES[named](tmp_path / "trl" / "model.safetensors")
    complaint = run_cli("import-trl", tmp_path / "trl", "--output", tmp_path / "ours").refused(named)
    assert str(tmp_path / "ours") not in complaint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["trl"]
