"""PPO mixed with the likelihood of demonstrations: the gradient of the sum, who is imitated when, resume, and bad input."""

import dataclasses
import math
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from surefoot import PPO, TextTask
from surefoot.config import Config, PTXConfig
from surefoot.data.batches import demonstration_batch, micro_batches
from surefoot.data.rows import index_in_order
from surefoot.policies.lm.policy import CausalLMPolicy
from surefoot.train.ppo_objective import PPOObjective
from surefoot.train.supervised_objectives import SumObjective
from surefoot.train.update import TokenBudget, update
from surefoot.types import Batch
from tests import fakes
from tests.fakes import CPU, assert_close, named_gradient, padded
from tests.inputs import model_folder, refusal
from tests.tiny import random_tokens, tiny_policy, written_batch
from tests.train.small_run import letters, rows, same_weights
from tests.train.test_nll import transformers_gradient

COMPLETIONS = ((3, 5), (2, 1), (4, 3), (3, 7))  # (prompt, completion), tokens
DEMONSTRATIONS = ((9, 3), (4, 2), (6, 1))  # (all, those before what is trained), tokens
COEF = 0.7
PAIRS = [{"prompt": f"{word} {number}", "completion": f" {word}"} for word in ("the", "an", "in") for number in range(8)]


def config_of(**settings: Any) -> Config:
    """One step on a batch of four completions in groups of two."""
    common = {"batch_size": 4, "n_epochs": 1, "learning_rate": 0.01, "kl": {"coef": 0.0}, "group": {"size": 2}}
    return fakes.config_of(**common | settings)


class Demonstrations:
    """Hands the same rows out every time, and remembers which were asked for."""

    inputs: ClassVar = {"ptx.data": "digest"}

    def __init__(self, batch: Batch | None = None):
        rows = [(random_tokens(n, seed=n), [t >= start for t in range(n)]) for n, start in DEMONSTRATIONS]
        self.batch = demonstration_batch(rows, device=CPU) if batch is None else batch
        self.asked: list[int] = []
        self.per_update, self.notice = len(self.batch), ""

    def collect(self, *, first: int, count: int) -> Batch:
        assert count == self.per_update
        self.asked.append(first)
        return self.batch


def mixed(config: Config, demonstrations: Demonstrations | None = None) -> SumObjective:
    with_weight = config.model_copy(update={"ptx": PTXConfig(coef=COEF)})
    return SumObjective(with_weight, demonstrations or Demonstrations())  # type: ignore[arg-type]


def completions(policy: CausalLMPolicy, config: Config) -> Batch:
    """Two completions of each of two prompts, rewarded at random, a little away from what the policy would write now."""
    batch = written_batch([(random_tokens(p, seed=b), random_tokens(a, seed=10 + b)) for b, (p, a) in enumerate(COMPLETIONS)])
    generator = torch.Generator().manual_seed(1)
    shape = batch.mask_BT.shape
    with torch.no_grad():
        view = policy.evaluate(batch)
    batch.logprobs_BT = view.logprobs_BT + 0.1 * torch.randn(shape, generator=generator)
    batch.values_BT = view.values_BT
    batch.rewards_BT = torch.where(batch.ends_BT, torch.randn(shape, generator=generator), 0.0)
    batch.groups_B, batch.baselines_B = torch.tensor([0, 0, 1, 1]), torch.tensor([0.1, 0.1, -0.2, -0.2])
    batch.step_limit = 8
    return PPOObjective(config).prepare(batch)


def numbers(stats: Any) -> list[float]:
    return [float(value) for name, value in vars(stats).items() if not name.startswith("nll")]


# --- the gradient ---
@pytest.mark.parametrize("adapter", [True, False], ids=["adapter", "full"])
@pytest.mark.parametrize("kind", ["gae", "grpo", "reinforce_pp", "remax"])
def test_the_gradient_is_the_sum_of_both(kind: str, adapter: bool) -> None:
    config = config_of(advantage=kind, ent_coef=0.01, loss_aggregation="sequence")
    policy, examples = tiny_policy(adapter=adapter, moved=True), Demonstrations().batch
    batch = completions(policy, config)
    alone, stats_alone = named_gradient(PPOObjective(config), policy, batch)
    likely, loss = transformers_gradient(policy, examples)
    assert float(sum(value.norm() ** 2 for value in likely.values())) > 0.1 and "value_head.weight" not in likely
    expected = {name: alone.get(name, 0.0) + COEF * likely.get(name, 0.0) for name in alone.keys() | likely.keys()}

    found, stats = named_gradient(mixed(config), policy, batch)
    assert_close(found, expected)
    assert numbers(stats) == numbers(stats_alone)
    assert int(stats.nll_tokens) == int(examples.mask_BT.sum()) == sum(n - start for n, start in DEMONSTRATIONS)
    assert float(stats.nll / stats.nll_tokens) == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize(("tokens", "columns"), [(1, 0), (9, 0), (18, 0), (30, 0), (40, 2), (40, 15)])
def test_micro_batches_and_padding_do_not_change_the_gradient(tokens: int, columns: int) -> None:
    config, policy = config_of(), tiny_policy(moved=True)
    batch, wide = completions(policy, config), Demonstrations(padded(Demonstrations().batch, columns, poison=math.nan))
    expected, whole = named_gradient(mixed(config), policy, batch)
    found, split = named_gradient(mixed(config, wide), policy, batch, tokens)
    assert len(micro_batches(Demonstrations().batch, torch.arange(len(DEMONSTRATIONS)), min(tokens, 18))) > 1
    assert_close(found, expected)
    assert (float(split.nll), split.nll_tokens) == (pytest.approx(float(whole.nll), rel=1e-5), whole.nll_tokens)


def test_running_out_of_memory_in_the_demonstrations_begins_the_minibatch_again() -> None:
    """What PPO and a first micro-batch of demonstrations have left in the gradient must not count twice."""
    config, policy = config_of(max_grad_norm=1e9), tiny_policy(moved=True)
    batch, demonstrations = completions(policy, config), Demonstrations()
    expected, _ = named_gradient(mixed(config), policy, batch)
    evaluate, calls = policy.evaluate, []

    def scarce(part: Batch, **options: Any) -> Any:
        calls.append(not len(part.rewards_BT))
        if calls[-1] and sum(calls) == 2:
            raise torch.OutOfMemoryError("no room left")
        return evaluate(part, **options)

    policy.evaluate = scarce  # type: ignore[method-assign]
    objective, budget = mixed(config, demonstrations), TokenBudget(18)
    update(policy, batch, objective, budget=budget)
    assert budget.tokens == 9 and demonstrations.asked == [0, 0] and objective.taken == len(DEMONSTRATIONS)
    assert_close({n: p.grad for n, p in policy.named_parameters_to_train() if p.grad is not None}, expected)


def test_a_loss_of_demonstrations_that_is_not_finite_costs_the_step() -> None:
    config, policy, demonstrations = config_of(), tiny_policy(moved=True), Demonstrations()
    batch = completions(policy, config)
    used = set(batch.observations["tokens"].flatten().tolist())
    alien = next(token for token in demonstrations.batch.observations["tokens"].flatten().tolist() if token not in used)
    with torch.no_grad():  # as an input alone: the completions do not see it
        policy.lm.get_input_embeddings().weight[alien] = float("nan")
    before = {name: p.detach().clone() for name, p in policy.named_parameters_to_train()}
    result = update(policy, batch, mixed(config, demonstrations))
    assert (result.steps, result.skipped) == (0, 1) and result.stats is None
    assert all(torch.equal(p, before[name]) for name, p in policy.named_parameters_to_train())


def test_while_the_critic_alone_learns_no_demonstrations_are_taken() -> None:
    config = config_of(critic={"warmup_updates": 2, "stop_gradient": True}, vf_coef=1.0)
    policy = tiny_policy(moved=True, stop_gradient=True)
    batch = completions(policy, config)
    for version, is_mixed in ((1, False), (2, True)):
        found, stats = named_gradient(mixed(config), policy, dataclasses.replace(batch, version=version))
        assert (stats.nll_tokens > 0) == is_mixed
        assert any(not name.startswith("value_head") for name in found) == is_mixed


# --- a run ---
def ppo(**changes: Any) -> PPO:
    sizes = {"total_episodes": 32, "episodes_per_update": 8, "batch_size": 4, "n_epochs": 2, "max_new_tokens": 4}
    rest = {"learning_rate": 0.01, "evaluate_every": 2, "dtype": "float32", "device": "cpu", "verbose": 0, "seed": 3}
    prompts = [row["prompt"] for row in PAIRS]
    return PPO(model_folder(), TextTask(prompts, letters, held_out=0.3), **(sizes | rest | changes))


@pytest.mark.usefixtures("in_own_folder")
def test_the_weight_moves_over_the_run() -> None:
    model = ppo(ptx_data=PAIRS, ptx={"coef": 0.8, "schedule": "linear", "batch_size": 3}).learn()
    lines = rows(model.run_folder or Path())
    updates = [line for line in lines if "ptx/coef" in line]
    assert [line["ptx/coef"] for line in updates] == pytest.approx([0.8, 0.6, 0.4, 0.2])
    assert all(line["ptx/loss"] > 0 for line in updates)
    assert all(line["eval/ptx_perplexity"] > 1 for line in lines if "eval/reward" in line)
    assert model.evaluate()["eval/ptx_perplexity"] == lines[-1]["eval/ptx_perplexity"]


@pytest.mark.usefixtures("in_own_folder")
def test_at_weight_0_demonstrations_are_evaluated_and_nothing_else_changes() -> None:
    plain, watched = ppo(run_name="plain").learn(), ppo(run_name="watched", ptx_data=PAIRS, ptx={"coef": 0.0}).learn()
    assert same_weights(plain, watched)
    for line, other in zip(rows(Path("runs/plain")), rows(Path("runs/watched")), strict=True):
        name = "eval/ptx_perplexity" if "eval/reward" in line else "ptx/coef"
        assert other == line | {name: other[name]} and (other[name] > 1 or name == "ptx/coef")


@pytest.mark.usefixtures("in_own_folder")
def test_each_epoch_of_the_demonstrations_is_a_pass_whatever_stopped_the_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ppo(ptx_data=PAIRS[:10], ptx={"batch_size": 3, "held_out": 0.0}, target_kl=1e-3, total_episodes=64)
    objective: Any = model._session.training.objective
    taken: list[int] = []
    collect = objective.demonstrations.collect

    def listed(*, first: int, count: int, **others: Any) -> Batch:
        taken.extend(range(first, first + count))
        return collect(first=first, count=count, **others)

    monkeypatch.setattr(objective.demonstrations, "collect", listed)
    model.learn()
    stopped = [line["ppo/stopped_early"] for line in rows(model.run_folder or Path()) if "ppo/stopped_early" in line]
    assert 1.0 in stopped and len(taken) < 3 * 4 * len(stopped)  # else nothing was stopped
    assert taken == list(range(len(taken))) and len(taken) == objective.taken
    passes = objective.demonstrations
    assert sorted(index_in_order(number, len(passes.data.train), passes.seed) for number in taken[:10]) == list(range(10))


@pytest.mark.usefixtures("in_own_folder")
def test_rows_given_in_python_are_given_again_and_must_be_the_same() -> None:
    task = TextTask([row["prompt"] for row in PAIRS], letters, held_out=0.3)
    whole = ppo(run_name="whole", ptx_data=PAIRS, ptx={"batch_size": 3}).learn()
    ppo(run_name="half", ptx_data=PAIRS, ptx={"batch_size": 3}).learn(16)
    refusal(lambda: PPO.load("runs/half", task, verbose=0), "ptx.data", "ptx_data")
    refusal(lambda: PPO.load("runs/half", task, verbose=0, ptx_data=PAIRS[::-1]), "ptx.data")
    resumed = PPO.load("runs/half", task, verbose=0, ptx_data=PAIRS).learn(16)
    # The seeds and the counter go on; only what follows from the run's length (no schedule here) could differ.
    assert same_weights(whole, resumed)
    ppo(run_name="without").learn(8)
    refusal(lambda: PPO.load("runs/without", task, verbose=0, ptx_data=PAIRS), "ptx_data")


@pytest.mark.usefixtures("in_own_folder")
def test_a_row_of_python_that_is_none_is_named() -> None:
    refusal(lambda: ppo(ptx_data=[*PAIRS, {"text": "a"}]), "ptx.data, row 25")
    refusal(lambda: ppo(ptx_data=[]), "ptx.data")
    refusal(lambda: ppo(ptx={"coef": 0.5}), "ptx.data")
    refusal(lambda: PPO("MlpPolicy", "CartPole-v1", ptx_data=PAIRS, verbose=0), "ptx", "env")
