"""The gradient written out by hand is the one autograd finds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from gymnasium import spaces

from surefoot.config import NetworkConfig
from surefoot.core.losses import LossSettings, LossStats, ppo_loss
from surefoot.policies import closed_form
from surefoot.policies.control import ControlPolicy
from surefoot.types import Batch

ROWS = 40
ACTIONS = {
    "one choice": spaces.Discrete(5),
    "gaussian": spaces.Box(-2.0, 2.0, (3,)),
    "state-dependent": spaces.Box(-2.0, 2.0, (3,)),
}


def policy_for(action: str) -> ControlPolicy:
    layers: dict[str, list[int]] = {"pi": [16, 8], "vf": [12]}
    use_sde = action == "state-dependent"
    config = NetworkConfig(net_arch=layers, ortho_init=False, log_std_init=-0.3, use_sde=use_sde)  # type: ignore[arg-type]
    return ControlPolicy({"obs": spaces.Box(-1.0, 1.0, (2, 3))}, ACTIONS[action], config=config, seed=1)


def played(policy: ControlPolicy, action: str) -> Batch:
    """Rows whose old policy is a little apart, so that some are clipped on either side."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    discrete = action == "one choice"
    actions = torch.randint(0, 5, (ROWS, 1), generator=generator) if discrete else normal(ROWS, 1, 3)
    zeros = torch.zeros(ROWS, 1)
    batch = Batch(
        observations={"obs": normal(ROWS, 1, 2, 3)},
        actions_BT=actions,
        mask_BT=torch.ones(ROWS, 1, dtype=torch.bool),
        logprobs_BT=zeros,
        values_BT=zeros,
        rewards_BT=zeros,
        ends_BT=zeros.bool(),
        bootstrap_BT=zeros,
        advantages_BT=normal(ROWS, 1),
        returns_BT=normal(ROWS, 1),
    )
    with torch.no_grad():
        view = policy.evaluate(batch)
    return replace(batch, logprobs_BT=view.logprobs_BT + 0.3 * normal(ROWS, 1), values_BT=view.values_BT + normal(ROWS, 1))


def by_autograd(policy: ControlPolicy, batch: Batch, settings: LossSettings) -> LossStats:
    view = policy.evaluate(batch, entropy_gradient=True)
    assert batch.advantages_BT is not None and batch.returns_BT is not None
    loss, stats = ppo_loss(
        (view.logprobs_BT, view.values_BT, view.entropies_BT),
        (batch.logprobs_BT, batch.values_BT),
        advantages_BT=batch.advantages_BT,
        returns_BT=batch.returns_BT,
        mask_BT=batch.mask_BT,
        denominator=ROWS,
        settings=settings,
    )
    loss.backward()
    return stats


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize(
    "settings",
    [LossSettings(), LossSettings(clip_range=0.1, clip_range_vf=0.5, vf_coef=1.0, ent_coef=0.3)],
    ids=["plain", "value clip and entropy"],
)
def test_closed_form_and_autograd_find_the_same_gradient(action: str, settings: LossSettings) -> None:
    policy = policy_for(action)
    batch = played(policy, action)
    expected_stats = by_autograd(policy, batch, settings)
    expected = {name: p.grad.clone() for name, p in policy.named_parameters_to_train() if p.grad is not None}
    for _, parameter in policy.named_parameters_to_train():
        parameter.grad = None
    assert policy.accumulate is not None and batch.advantages_BT is not None
    stats = policy.accumulate(batch, batch.advantages_BT, denominator=ROWS, settings=settings)
    torch.testing.assert_close(stats.sums, expected_stats.sums, rtol=1e-5, atol=1e-5)
    assert 0 < float(stats.clipped) < ROWS  # both branches were there
    found = {name: p.grad for name, p in policy.named_parameters_to_train() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_two_calls_add_up() -> None:
    policy = policy_for("gaussian")
    batch = played(policy, "gaussian")
    assert policy.accumulate is not None and batch.advantages_BT is not None
    for _ in range(2):
        policy.accumulate(batch, batch.advantages_BT, denominator=ROWS, settings=LossSettings())
    twice = {name: p.grad.clone() for name, p in policy.named_parameters_to_train() if p.grad is not None}
    by_autograd_policy = policy_for("gaussian")
    by_autograd(by_autograd_policy, batch, LossSettings())
    for name, parameter in by_autograd_policy.named_parameters_to_train():
        assert parameter.grad is not None
        torch.testing.assert_close(twice[name], 2 * parameter.grad, rtol=1e-4, atol=1e-6)


def test_what_is_not_written_out_goes_through_autograd() -> None:
    space, action = {"obs": spaces.Box(-1.0, 1.0, (3,))}, spaces.Discrete(2)
    assert closed_form.supports(ControlPolicy(space, action))
    others = [
        ControlPolicy(space, action, kind="MlpLstmPolicy"),
        ControlPolicy(space, action, config=NetworkConfig(activation="relu")),
        ControlPolicy(space, action, config=NetworkConfig(share=True)),
        ControlPolicy(space, action, dtype=torch.bfloat16),
        ControlPolicy({"obs": spaces.Discrete(3)}, action),
        ControlPolicy(space, spaces.MultiDiscrete([2, 2])),
        ControlPolicy({**space, "action_mask": spaces.MultiBinary(2)}, action),
    ]
    assert [policy.accumulate for policy in others] == [None] * len(others)
