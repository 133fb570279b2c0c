"""A policy in the hands of the update: the start is exact, and every mode of arithmetic learns."""

import copy

import pytest
import torch

import surefoot
from surefoot import collect
from surefoot.config import GenerationConfig
from surefoot.envs.text import TextTask
from surefoot.policies.lm.policy import CausalLMPolicy
from surefoot.train.ppo_objective import advantages
from surefoot.types import Batch
from tests.fakes import config_of, train
from tests.tiny import FAMILIES, tiny_policy

PROMPTS = ["the", "a band in the sun.", "1, 2, 3", "who?", "an inner thing and another", "no"]
# The token budgets differ on purpose: old and new log-probs come from batches of other shapes.
PPO = config_of(batch_size=4, n_epochs=1, learning_rate=1e-6, micro_batch_tokens=90, kl={"coef": 0.1})
EXACT, ROUGH = torch.float32, torch.bfloat16


def reward(prompts, completions, **columns):
    return [float(len(set(text))) for text in completions]


def rollout(policy: CausalLMPolicy, *, episodes: int = 12, temperature: float = 1.0) -> Batch:
    task = TextTask(PROMPTS, reward, held_out=0.0)
    generation = GenerationConfig(max_new_tokens=10, slots=5, temperature=temperature)
    config = config_of(micro_batch_tokens=64).model_copy(update={"generation": generation})
    return advantages(collect(policy, task, episodes=episodes, config=config, seed=3), PPO)


def assert_first_ratio_is_1(policy: CausalLMPolicy, batch: Batch, *, exact: bool = True) -> None:
    stats = train(policy, batch, PPO).first
    assert float(stats.ratio / stats.num_tokens) == pytest.approx(1, abs=1e-6 if exact else 1e-3)
    assert float(stats.ratio_max) == pytest.approx(1, abs=1e-4 if exact else 0.05)
    assert float(stats.approx_kl / stats.num_tokens) < (1e-10 if exact else 1e-5) and int(stats.clipped) == 0


@pytest.mark.parametrize(("family", "temperature"), [*((family, 1.0) for family in FAMILIES), ("llama", 0.6)])
def test_before_the_first_step_the_ratio_is_1_and_there_is_no_kl_to_the_reference(family, temperature):
    batch = rollout(tiny_policy(family), temperature=temperature)
    assert (batch.logprobs_BT - batch.reference_logprobs_BT).abs().max() < 1e-4
    policy = tiny_policy(family, moved=True)
    batch = rollout(policy, temperature=temperature)
    assert (batch.logprobs_BT - batch.reference_logprobs_BT).abs().max() > 0.01
    assert_first_ratio_is_1(policy, batch)


@pytest.mark.parametrize("adapter", [True, False], ids=["LoRA", "all weights"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_in_bfloat16_scoring_again_makes_the_first_ratio_1(family, adapter):
    policy = tiny_policy(family, adapter=adapter, moved=True, dtype=ROUGH)
    assert not policy.exact_logprobs
    batch = rollout(policy, episodes=32)
    assert batch.behavior_logprobs_BT is not None
    assert (batch.behavior_logprobs_BT - batch.logprobs_BT)[batch.mask_BT].abs().mean() < 0.05  # the sampler's own
    assert_first_ratio_is_1(policy, batch, exact=False)


@pytest.mark.parametrize("dtype", [EXACT, ROUGH], ids=str)
@pytest.mark.parametrize("adapter", [True, False])
def test_one_step_at_learning_rate_1e_6_changes_every_parameter_it_should(adapter, dtype):
    # Weights held in bfloat16 would round such a step away.
    policy = tiny_policy(adapter=adapter, dtype=dtype, moved=True)
    before = {name: p.detach().clone() for name, p in policy.named_parameters_to_train()}
    frozen = policy.fingerprint()
    result = train(policy, rollout(policy), config_of(PPO, batch_size=12))
    assert (result.steps, result.skipped) == (1, 0) and policy.fingerprint() == frozen
    moved = {name: float((p.detach() - before[name]).abs().max()) for name, p in policy.named_parameters_to_train()}
    assert min(moved.values()) > 0 and max(moved.values()) == pytest.approx(1e-6, rel=0.3)  # Adam's first step


@pytest.mark.parametrize("dtype", [EXACT, ROUGH], ids=str)
def test_the_reference_of_full_fine_tuning_does_not_move(dtype):
    policy = tiny_policy(adapter=False, dtype=dtype)
    batch = rollout(policy)
    before = policy.reference_logprobs(batch)
    weights = copy.deepcopy(policy.lm.state_dict())
    for _ in range(3):
        train(policy, batch, config_of(PPO, learning_rate=1e-3))
    assert not any(torch.equal(value, weights[name]) for name, value in policy.lm.state_dict().items())
    assert torch.equal(policy.reference_logprobs(batch), before)
    assert (policy.evaluate(batch).logprobs_BT - before)[batch.mask_BT].abs().max() > 0.1


def test_a_policy_that_was_handed_in_is_changed_by_training_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    policy, task = tiny_policy(), TextTask(PROMPTS, reward, held_out=0.0)
    before = {name: value for name, value in vars(policy).items() if not isinstance(value, torch.nn.Module)}
    settings = {"total_episodes": 8, "episodes_per_update": 8, "batch_size": 8, "max_new_tokens": 4}
    model = surefoot.PPO(policy, task, temperature=0.7, verbose=0, run_name="ppo", **settings)
    assert model.learn().policy is policy
    surefoot.SFT(policy, [{"prompt": "the", "completion": " end"}] * 4, verbose=0, run_name="sft").learn()
    assert {name: vars(policy)[name] for name in before} == before
