"""PPO mixed with the likelihood of demonstrations: the gradient of the sum, who is imitated when, resume, and bad input."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from surefoot import PPO, TextTask
from surefoot.config import Config, PTXConfig
from surefoot.core.losses import LossStats
from surefoot.data.batches import demonstration_batch, micro_batches
from surefoot.policies.lm.policy import CausalLMPolicy
from surefoot.train import checkpoint, loop
from surefoot.train.update import TokenBudget, accumulate_gradient, advantages, make_optimizer, update
from surefoot.types import Batch
from tests.fakes import CPU, config_of, padded
from tests.inputs import model_folder, refusal, run_cli
from tests.inputs import write_project as write_inputs
from tests.tiny import random_tokens, tiny_policy, written_batch
from tests.train.small_run import rows, weights

ANSWERS = ((3, 5), (2, 1), (4, 3), (3, 7))  # (prompt, answer), tokens
DEMONSTRATIONS = ((9, 3), (4, 2), (6, 1))  # (all, those before what is imitated), tokens
ROWS = torch.arange(len(ANSWERS))
COEF = 0.7
STEP = "surefoot.train.update:take_step"
PAIRS = [{"prompt": f"{word} {number}", "completion": f" {word}"} for word in ("the", "an", "in") for number in range(8)]


def settings(ptx: PTXConfig | None = None, **changes: Any) -> Config:
    return config_of(**{"batch_size": 4, "episodes_per_update": 4, "n_epochs": 1, "kl": {"coef": 0.0}, "ptx": ptx} | changes)


def demonstrations() -> Batch:
    lessons = [(random_tokens(n, seed=20 + b), [t >= asked for t in range(n)]) for b, (n, asked) in enumerate(DEMONSTRATIONS)]
    return demonstration_batch(lessons, device=CPU)


def answers(policy: CausalLMPolicy, config: Config) -> Batch:
    """Two answers to each of two prompts, rewarded at random, a little away from what the policy would write now."""
    batch = written_batch([(random_tokens(p, seed=b), random_tokens(a, seed=10 + b)) for b, (p, a) in enumerate(ANSWERS)])
    generator = torch.Generator().manual_seed(1)
    shape = batch.mask_BT.shape
    with torch.no_grad():
        view = policy.evaluate(batch)
    batch.logprobs_BT = view.logprobs_BT + 0.1 * torch.randn(shape, generator=generator)
    batch.values_BT = view.values_BT
    batch.rewards_BT = torch.where(batch.ends_BT, torch.randn(shape, generator=generator), 0.0)
    batch.groups_B, batch.baselines_B = torch.tensor([0, 0, 1, 1]), torch.tensor([0.1, 0.1, -0.2, -0.2])
    batch.step_limit = 8
    return advantages(batch, config)


def mixed(batch: Batch, examples: Batch | None = None) -> Batch:
    return dataclasses.replace(batch, demonstrations=lambda step: demonstrations() if examples is None else examples)


def gradient(
    policy: CausalLMPolicy, batch: Batch, config: Config, budget: TokenBudget | None = None
) -> tuple[dict[str, Tensor], LossStats]:
    optimizer = make_optimizer(policy, config)
    rows = torch.arange(len(batch))
    budget = budget or TokenBudget(10**6)
    stats = accumulate_gradient(policy, batch, rows, config=config, optimizer=optimizer, budget=budget)
    found = {name: p.grad.clone() for name, p in policy.named_parameters_to_train() if p.grad is not None}
    optimizer.zero_grad(set_to_none=True)
    return found, stats


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys() and found
    for name, value in expected.items():
        assert float((found[name] - value).norm()) <= 2e-5 * float(value.norm()), name  # the order of sums


# --- the gradient ---


@pytest.mark.parametrize("adapter", [True, False], ids=["adapter", "full"])
@pytest.mark.parametrize("kind", ["gae", "grpo", "dr_grpo", "rloo", "reinforce_pp", "remax"])
def test_the_gradient_is_the_sum_of_both(kind: str, adapter: bool) -> None:
    config = settings(advantage=kind, group={"size": 2}, ent_coef=0.01, loss_aggregation="sequence")
    policy = tiny_policy(adapter=adapter, moved=True)
    batch, examples = answers(policy, config), demonstrations()
    alone, stats_alone = gradient(policy, batch, config)
    # transformers' own loss, a mean over the labelled tokens.
    labels = examples.actions_BT.masked_fill(~examples.mask_BT, -100)
    attention = torch.arange(labels.shape[1]) < examples.observations["lengths"][:, None]
    loss = policy.lm(input_ids=examples.actions_BT, attention_mask=attention.long(), labels=labels).loss
    loss.backward()
    taught = {name: p.grad.clone() for name, p in policy.named_parameters_to_train() if p.grad is not None}
    assert float(sum(value.norm() ** 2 for value in taught.values())) > 0.1 and "value_head.weight" not in taught
    expected = {name: alone.get(name, 0.0) + COEF * taught.get(name, 0.0) for name in alone.keys() | taught.keys()}

    found, stats = gradient(policy, mixed(batch), config.model_copy(update={"ptx": PTXConfig(coef=COEF)}))
    assert_close(found, expected)
    # PPO's own statistics are PPO's alone.
    assert torch.equal(stats.sums, stats_alone.sums) and stats_alone.imitation is None and stats.imitation is not None
    assert int(stats.imitation.steps) == int(examples.mask_BT.sum()) == sum(n - asked for n, asked in DEMONSTRATIONS)
    assert float(stats.imitation.policy_loss / stats.imitation.steps) == pytest.approx(float(loss.detach()), rel=1e-5)


def test_the_sum_is_clipped_once_and_taken_in_one_step() -> None:
    config, policy = settings(PTXConfig(coef=COEF), max_grad_norm=0.3), tiny_policy(moved=True)
    batch = mixed(answers(policy, config))
    expected, _ = gradient(policy, batch, config)
    norm = math.sqrt(sum(float(value.norm() ** 2) for value in expected.values()))
    parameters = dict(policy.named_parameters_to_train())
    optimizer = torch.optim.SGD(parameters.values(), lr=1.0)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    result = update(policy, batch, config=config, optimizer=optimizer, learning_rate=1.0)  # type: ignore[arg-type]
    assert (result.steps, result.skipped) == (1, 0) and result.grad_norm == pytest.approx(norm, rel=1e-4) and norm > 0.6
    moved = {name: before[name] - p.detach() for name, p in parameters.items() if name in expected}
    for name, value in expected.items():
        torch.testing.assert_close(moved[name], value * 0.3 / norm, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("ptx", [None, PTXConfig(coef=0.0)], ids=["absent", "zero"])
def test_without_weight_not_a_bit_differs_and_nobody_is_asked(ptx: PTXConfig | None) -> None:
    def refuse(step: int) -> Batch:
        raise AssertionError("nothing should be imitated")

    found = []
    for config, take in ((settings(n_epochs=3), None), (settings(ptx, n_epochs=3), refuse)):
        policy = tiny_policy(moved=True)
        batch = dataclasses.replace(answers(policy, config), demonstrations=take)
        result = update(policy, batch, config=config, learning_rate=0.01)
        found.append([result.stats.sums, *(p.detach() for _, p in policy.named_parameters_to_train())])  # type: ignore[union-attr]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("tokens", [1, 9, 18, 30])
def test_micro_batches_do_not_change_the_gradient(tokens: int) -> None:
    config, policy = settings(PTXConfig(coef=COEF)), tiny_policy(moved=True)
    batch = mixed(answers(policy, config))
    expected, whole = gradient(policy, batch, config)
    found, split = gradient(policy, batch, config, TokenBudget(tokens))
    assert len(micro_batches(demonstrations(), torch.arange(len(DEMONSTRATIONS)), min(tokens, 18))) > 1
    assert_close(found, expected)
    assert whole.imitation is not None and split.imitation is not None
    assert torch.allclose(split.imitation.sums, whole.imitation.sums, rtol=1e-5)


@pytest.mark.parametrize("poison", [math.nan, 1e9])
def test_padding_of_the_demonstrations_changes_nothing(poison: float) -> None:
    config, policy = settings(PTXConfig(coef=COEF)), tiny_policy(moved=True)
    batch = answers(policy, config)
    expected, stats = gradient(policy, mixed(batch), config)
    for columns in (2, 15):
        found, other = gradient(policy, mixed(batch, padded(demonstrations(), columns, poison=poison)), config, TokenBudget(40))
        assert_close(found, expected)
        assert other.imitation is not None and stats.imitation is not None
        assert torch.allclose(other.imitation.sums, stats.imitation.sums, rtol=1e-5)


def test_running_out_of_memory_in_the_demonstrations_begins_the_minibatch_again() -> None:
    """What PPO and a first micro-batch of demonstrations have left in the gradient must not count twice."""
    config, policy = settings(PTXConfig(coef=COEF)), tiny_policy(moved=True)
    batch = answers(policy, config)
    expected, _ = gradient(policy, mixed(batch), config)
    evaluate, calls, asked = policy.evaluate, [], []

    def scarce(part: Batch, **options: Any) -> Any:
        calls.append(part.objective)
        if part.objective == "imitation" and calls.count("imitation") == 2:
            raise torch.OutOfMemoryError("no room left")
        return evaluate(part, **options)

    def take(step: int) -> Batch:
        asked.append(step)
        return demonstrations()

    policy.evaluate = scarce  # type: ignore[method-assign]
    budget = TokenBudget(18)
    found, _ = gradient(policy, dataclasses.replace(batch, demonstrations=take), config, budget)
    assert budget.tokens == 9 and asked == [0, 0]
    assert_close(found, expected)


def test_a_loss_of_demonstrations_that_is_not_finite_costs_the_step() -> None:
    config, policy = settings(PTXConfig(coef=COEF)), tiny_policy(moved=True)
    batch = answers(policy, config)
    examples = demonstrations()
    used = set(batch.observations["tokens"].flatten().tolist())
    alien = next(token for token in examples.observations["tokens"].flatten().tolist() if token not in used)
    with torch.no_grad():  # as an input alone: the answers do not see it
        policy.lm.get_input_embeddings().weight[alien] = float("nan")
    before = {name: p.detach().clone() for name, p in policy.named_parameters_to_train()}
    result = update(policy, mixed(batch, examples), config=config, learning_rate=0.01)
    assert (result.steps, result.skipped) == (0, 1) and result.stats is None
    assert all(torch.equal(p, before[name]) for name, p in policy.named_parameters_to_train())


def test_while_the_critic_alone_learns_nothing_is_imitated() -> None:
    config = settings(PTXConfig(coef=COEF), critic={"warmup_updates": 2}, vf_coef=1.0)
    policy = tiny_policy(moved=True, stop_gradient=True)
    batch = mixed(answers(policy, config))
    for version, imitates in ((1, False), (2, True)):
        found, stats = gradient(policy, dataclasses.replace(batch, version=version), config)
        assert (stats.imitation is not None) == imitates
        assert any(not name.startswith("value_head") for name in found) == imitates


def test_steps_are_numbered_through_the_epochs() -> None:
    policy, asked = tiny_policy(), []

    def take(step: int) -> Batch:
        asked.append(step)
        return demonstrations()

    config = settings(PTXConfig(), batch_size=2, n_epochs=3)
    result = update(policy, dataclasses.replace(answers(policy, config), demonstrations=take), config=config)
    assert asked == [0, 1, 2, 3, 4, 5]
    assert result.stats is not None and result.stats.imitation is not None
    assert int(result.stats.imitation.steps) == 6 * int(demonstrations().mask_BT.sum())


# --- a run ---


def letters(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [sum(letter in "aeiou" for letter in text) / 2 for text in completions]


def ppo(**changes: Any) -> PPO:
    common: dict[str, Any] = {
        "total_episodes": 32,
        "episodes_per_update": 8,
        "batch_size": 4,
        "n_epochs": 2,
        "learning_rate": 0.01,
        "max_new_tokens": 4,
        "evaluate_every": 2,
        "dtype": "float32",
        "device": "cpu",
        "verbose": 0,
        "seed": 3,
    }
    prompts = [row["prompt"] for row in PAIRS]
    return PPO(model_folder(), TextTask(prompts, letters, held_out=0.3), **(common | changes))


@pytest.mark.usefixtures("in_own_folder")
@pytest.mark.parametrize(
    ("schedule", "coefs"),
    [("constant", [0.8] * 4), ("linear", [0.8, 0.6, 0.4, 0.2]), ("cosine", [0.8, 0.682843, 0.4, 0.117157])],
)
def test_the_weight_moves_over_the_run(schedule: str, coefs: list[float]) -> None:
    model = ppo(ptx_data=PAIRS, ptx={"coef": 0.8, "schedule": schedule, "batch_size": 3}).learn()
    lines = rows(model.run_folder or Path())
    updates = [line for line in lines if "ptx/coef" in line]
    assert [line["ptx/coef"] for line in updates] == pytest.approx(coefs, abs=1e-6)
    assert all(line["ptx/loss"] > 0 for line in updates)
    assert all(line["eval/ptx_perplexity"] > 1 for line in lines if "eval/reward" in line)
    assert model.evaluate()["eval/ptx_perplexity"] == lines[-1]["eval/ptx_perplexity"]


@pytest.mark.usefixtures("in_own_folder")
def test_at_weight_0_demonstrations_are_evaluated_and_nothing_else_changes() -> None:
    plain, watched = ppo(run_name="plain").learn(), ppo(run_name="watched", ptx_data=PAIRS, ptx={"coef": 0.0}).learn()
    assert all(torch.equal(value, weights(watched)[name]) for name, value in weights(plain).items())
    for line, other in zip(rows(Path("runs/plain")), rows(Path("runs/watched")), strict=True):
        name = "eval/ptx_perplexity" if "eval/reward" in line else "ptx/coef"
        assert other == line | {name: other[name]} and (other[name] > 1 or name == "ptx/coef")


@pytest.mark.usefixtures("in_own_folder")
def test_each_epoch_of_the_demonstrations_is_a_pass_whatever_stopped_the_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ppo(ptx_data=PAIRS[:10], ptx={"batch_size": 3, "held_out": 0.0}, target_kl=1e-3, total_episodes=64)
    training = model._session.training
    taken: list[int] = []
    collect = training.rollout.demonstrations.collect  # type: ignore[attr-defined]

    def listed(*, first: int, count: int, **others: Any) -> Batch:
        taken.extend(range(first, first + count))
        return collect(first=first, count=count, **others)

    monkeypatch.setattr(training.rollout.demonstrations, "collect", listed)  # type: ignore[attr-defined]
    model.learn()
    stopped = [line["ppo/stopped_early"] for line in rows(model.run_folder or Path()) if "ppo/stopped_early" in line]
    assert 1.0 in stopped and len(taken) < 3 * 4 * len(stopped)  # else nothing was stopped
    assert taken == list(range(len(taken))) and len(taken) == training.rollout.handed_out  # type: ignore[attr-defined]
    data, seed = training.rollout.demonstrations.data, training.rollout.demonstrations.seed  # type: ignore[attr-defined]
    assert sorted(data.training_index(number, seed) for number in taken[:10]) == list(range(10))


@pytest.mark.usefixtures("in_own_folder")
def test_rows_given_in_python_are_given_again_and_must_be_the_same() -> None:
    task = TextTask([row["prompt"] for row in PAIRS], letters, held_out=0.3)
    whole = weights(ppo(run_name="whole", ptx_data=PAIRS, ptx={"batch_size": 3}).learn())
    ppo(run_name="half", ptx_data=PAIRS, ptx={"batch_size": 3}).learn(16)
    found = refusal(lambda: PPO.load("runs/half", task, verbose=0))
    assert found.startswith("ptx.data is missing") and "ptx_data" in found
    found = refusal(lambda: PPO.load("runs/half", task, verbose=0, ptx_data=PAIRS[::-1]))
    assert found.startswith("ptx.data: not the demonstrations that the run began with")
    resumed = PPO.load("runs/half", task, verbose=0, ptx_data=PAIRS).learn(16)
    # The seeds and the counter go on; only what follows from the run's length (no schedule here) could differ.
    assert all(torch.equal(value, weights(resumed)[name]) for name, value in whole.items())
    ppo(run_name="without").learn(8)
    assert refusal(lambda: PPO.load("runs/without", task, verbose=0, ptx_data=PAIRS)).startswith("ptx_data: this run was begun")


@pytest.mark.usefixtures("in_own_folder")
def test_what_is_cut_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    found = refusal(lambda: ppo(ptx_data=[{"text": "the film " * 60}], ptx={"held_out": 0.0}).learn())
    assert "let ptx.max_tokens cut it" in found
    ppo(ptx_data=[{"text": "the film " * 60}], ptx={"held_out": 0.0, "max_tokens": 8}, verbose=1, total_episodes=8).learn()
    assert "1 of 1 examples are cut to ptx.max_tokens (8)" in capsys.readouterr().out


# --- bad input ---


@pytest.mark.usefixtures("in_own_folder")
@pytest.mark.parametrize(
    ("content", "flags", "said"),
    [
        (None, ["--ptx.coef", "0.5"], "ptx.data is missing: name a JSONL file"),
        (None, ["--ptx.data", "labelled.jsonl"], "labelled.jsonl"),
        ("", [], "labelled.jsonl: no demonstrations there"),
        ('{"prompt": "a"}\n', [], "labelled.jsonl, line 1: has prompt; needs text"),
        ('{"text": "a"}\n', ["--ptx.coef", "-1"], "--ptx.coef: should be greater than or equal to 0"),
        ('{"text": "a"}\n', ["--ptx.coeff", "1"], "did you mean '--ptx.coef'?"),
    ],
)
def test_a_mixed_loss_without_demonstrations_is_refused_before_a_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str | None, flags: list[str], said: str
) -> None:
    def load(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a model is loaded")

    write_inputs(tmp_path)
    if content is not None:
        Path("labelled.jsonl").write_text(content)
        flags = ["--ptx.data", "labelled.jsonl", *flags]
    monkeypatch.setattr("surefoot.build.language.load_policy", load)
    assert said in run_cli("ppo", "config.yaml", *flags).complaint
    assert not Path("runs").exists()


@pytest.mark.usefixtures("in_own_folder")
def test_environments_have_no_demonstrations() -> None:
    found = refusal(lambda: PPO("MlpPolicy", "CartPole-v1", ptx_data=PAIRS, verbose=0))
    assert "ptx: a run with env has no such section" in found


@pytest.mark.usefixtures("in_own_folder")
def test_a_row_of_python_that_is_none_is_named() -> None:
    assert refusal(lambda: ppo(ptx_data=[*PAIRS, {"text": "a"}])).startswith("ptx.data, row 25: has text, but")
    assert refusal(lambda: ppo(ptx_data=[])).startswith("ptx.data: no demonstrations there")
    assert refusal(lambda: ppo(ptx={"coef": 0.5})).startswith("ptx.data is missing")


@pytest.mark.usefixtures("in_own_folder")
def test_a_relative_file_is_relative_to_the_configuration(tmp_path: Path) -> None:
    file = write_inputs(tmp_path / "project", ptx={"data": "labelled.jsonl"})
    (tmp_path / "project" / "labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    ended = run_cli("ppo", file, "--run.name", "r")
    assert ended.code == 0, ended.err
    state = checkpoint.load_checkpoint(checkpoint.newest_checkpoint(tmp_path / "runs" / "r" / "checkpoints") or Path())[1]
    assert state["rollout"]["ptx"]["handed_out"] > 0
    assert loop.Progress(**state["progress"]).updates == 2
