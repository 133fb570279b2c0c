"""The gradient written out by hand is the one autograd finds."""

from dataclasses import replace

import pytest
import torch
from gymnasium import spaces

from surefoot.config import NetworkConfig
from surefoot.core.losses import LossSettings, PPOStats, ppo_loss
from surefoot.policies.control import fast_mlp
from surefoot.policies.control.policy import ControlPolicy
from surefoot.train.checkpoint import optimizer_tensors, policy_tensors
from surefoot.train.ppo_objective import PPOObjective
from surefoot.train.update import make_optimizer, update
from surefoot.types import Batch
from tests.fakes import config_of

ROWS = 40
ACTIONS = {
    "one choice": spaces.Discrete(5),
    "masked choice": spaces.Discrete(5),
    "gaussian": spaces.Box(-2.0, 2.0, (3,)),
    "state-dependent": spaces.Box(-2.0, 2.0, (3,)),
}


def policy_for(action: str) -> ControlPolicy:
    layers: dict[str, list[int]] = {"pi": [16, 8], "vf": [12]}
    use_sde = action == "state-dependent"
    config = NetworkConfig(net_arch=layers, ortho_init=False, log_std_init=-0.3, use_sde=use_sde)  # type: ignore[arg-type]
    observed: dict[str, spaces.Space] = {"obs": spaces.Box(-1.0, 1.0, (2, 3))}
    if action == "masked choice":
        observed |= {"last": spaces.Discrete(3), "action_mask": spaces.MultiBinary(5)}
    return ControlPolicy(observed, ACTIONS[action], config=config, seed=1)


def played(policy: ControlPolicy, action: str) -> Batch:
    """Rows whose old policy is a little apart, so that some are clipped on either side."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    discrete = action.endswith("choice")
    actions = torch.randint(0, 5, (ROWS, 1), generator=generator) if discrete else normal(ROWS, 1, 3)
    observations = {"obs": normal(ROWS, 1, 2, 3)}
    if action == "masked choice":
        legal = torch.rand(ROWS, 1, 5, generator=generator) < 0.5
        last = torch.randint(0, 3, (ROWS, 1), generator=generator)
        observations |= {"last": last, "action_mask": legal.scatter(-1, actions[..., None], True)}
    mask = torch.rand(ROWS, 1, generator=generator) < 0.9
    batch = Batch(observations, mask, actions, values_BT=mask, advantages_BT=normal(ROWS, 1), returns_BT=normal(ROWS, 1))
    with torch.no_grad():
        view = policy.evaluate(batch)
    return replace(batch, logprobs_BT=view.logprobs_BT + 0.3 * normal(ROWS, 1), values_BT=view.values_BT + normal(ROWS, 1))


def by_autograd(policy: ControlPolicy, batch: Batch, settings: LossSettings) -> PPOStats:
    view = policy.evaluate(batch, entropy_gradient=True)
    new, old = (view.logprobs_BT, view.values_BT, view.entropies_BT), (batch.logprobs_BT, batch.values_BT)
    of_batch = {name: getattr(batch, name) for name in ("advantages_BT", "returns_BT", "mask_BT")}
    loss, stats = ppo_loss(new, old, **of_batch, scale=1 / int(batch.mask_BT.sum()), settings=settings)
    loss.backward()
    return stats


def written_out(
    policy: ControlPolicy, batch: Batch, settings: LossSettings, *, calls: int = 1, token_budget: int = 1_000
) -> tuple[PPOStats, dict[str, torch.Tensor]]:
    """Sums, and the gradient by parameter."""
    fast = fast_mlp.accelerator(policy)
    assert fast is not None
    with fast.lent(make_optimizer(policy)) as optimizer:
        for _ in range(calls):
            stats = fast.gradient(batch, settings, False, token_budget)
        parameters = dict(policy.named_parameters_to_train())
        parts = optimizer.param_groups[0]["params"][0].grad.split([p.numel() for p in parameters.values()])
        return stats, {name: part.reshape(p.shape) for (name, p), part in zip(parameters.items(), parts, strict=True)}


LOSSES = {
    "plain": LossSettings(),
    "value clip and entropy": LossSettings(clip_range=0.1, clip_range_vf=0.5, vf_coef=1.0, ent_coef=0.3),
    "asymmetric and dual clip": LossSettings(clip_range=0.1, clip_range_high=0.3, dual_clip=1.2),
}


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("loss", LOSSES)
def test_written_out_and_autograd_find_the_same_gradient(action: str, loss: str) -> None:
    policy, settings = policy_for(action), LOSSES[loss]
    batch = played(policy, action)
    expected_stats = by_autograd(policy, batch, settings)
    expected = {name: p.grad.clone() for name, p in policy.named_parameters_to_train() if p.grad is not None}
    for calls, token_budget in ((1, 1_000), (1, 7), (2, 1_000)):  # in micro-batches, and added up
        stats, found = written_out(policy, batch, settings, calls=calls, token_budget=token_budget)
        for name, value in vars(expected_stats).items():
            assert float(getattr(stats, name)) == pytest.approx(float(value), rel=1e-5, abs=1e-5), name
        assert 0 < float(stats.clipped) < float(stats.num_tokens) < ROWS  # both branches were there
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert gradient.abs().max() > 0, name
            torch.testing.assert_close(found[name], calls * gradient, rtol=1e-4, atol=2e-6)


def test_updates_on_one_vector_are_updates_on_the_parameters() -> None:
    """Weights and Adam's moments after three updates, whitening and clipping included: those of autograd and torch's Adam."""
    config = config_of(batch_size=16, n_epochs=2, max_grad_norm=0.2, ent_coef=0.01)
    policies, trained = [policy_for("one choice"), policy_for("one choice")], []
    batch = played(policies[0], "one choice")
    for policy, accelerator in zip(policies, (fast_mlp.accelerator(policies[0]), None), strict=True):
        objective, optimizer = PPOObjective(config, accelerator=accelerator), make_optimizer(policy)
        for number in range(3):
            shuffle = torch.Generator().manual_seed(number)
            result = update(policy, batch, objective, optimizer=optimizer, generator=shuffle)
            assert result.steps == 6 and result.grad_norm > 0.2
        trained.append(policy_tensors(policy) | optimizer_tensors(policy, optimizer))
    assert len(trained[0]) == 4 * 10
    torch.testing.assert_close(*trained, rtol=1e-4, atol=1e-6)  # by name


def test_what_is_not_written_out_goes_through_autograd() -> None:
    space, action = {"obs": spaces.Box(-1.0, 1.0, (3,))}, spaces.Discrete(2)
    mask = {"action_mask": spaces.MultiBinary(2)}
    assert all(fast_mlp.supports(ControlPolicy(s, action)) for s in (space, space | mask, {"obs": spaces.Discrete(3)}))
    frozen = ControlPolicy(space, action)
    frozen.value_head.requires_grad_(False)
    others = [
        ControlPolicy(space, action, kind="MlpLstmPolicy"),
        ControlPolicy(space, action, config=NetworkConfig(activation="relu")),
        ControlPolicy(space, action, config=NetworkConfig(share=True)),
        ControlPolicy(space, action, dtype=torch.bfloat16),
        ControlPolicy({"obs": spaces.Box(0, 255, (36, 36, 3), "uint8")}, action, kind="CnnPolicy"),
        ControlPolicy(space, spaces.MultiDiscrete([2, 2])),
        frozen,
        type("Own", (ControlPolicy,), {})(space, action),  # which may compute anything
    ]
    for policy in others:
        assert fast_mlp.accelerator(policy) is None
