"""Losses and gradients as huggingface/trl 1.12.0 computes them: what GRPOTrainer._compute_loss and DPOTrainer._compute_loss
gave for the same tensors (torch 2.13.0, CPU, float32; dropout, KL and entropy off), written down."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surefoot.core.preference import dpo_loss
from surefoot.train import ppo_objective
from surefoot.train.objective import UpdateResult
from surefoot.train.ppo_objective import PPOObjective
from surefoot.train.supervised_objectives import DPOObjective
from surefoot.types import Batch, Evaluation
from tests.fakes import CPU, config_of, named_gradient

GSPO = {"loss_aggregation": "sequence", "importance_sampling_level": "sequence"}
WIDE = {"importance_sampling_level": "sequence", "clip_range": 0.1, "clip_range_high": 0.15}
MASKED = {"mask_truncated": True}
# TRL's loss_type, importance_sampling_level, epsilons, delta -> ours; drift of the log-probs; masked row; its loss, gradient.
LITERALS: dict[str, tuple[dict[str, Any], float, int | None, float, list[list[float]]]] = {
    "grpo, sequence, 3e-4, 4e-4": (
        {**GSPO, "clip_range": 3e-4, "clip_range_high": 4e-4},
        *(-0.001, None, -0.00024994215),
        [[0, 0, 0, 0], [0, 0, 0, 0], [0.111111112, 0.111111112, 0.111111112, 0]],
    ),
    "grpo, sequence, 0.1, 0.15": (
        GSPO | WIDE,
        *(0.2, None, 0.15161679685),
        [[-0.1075885] * 4, [0.124318734, 0.124318734, 0, 0], [0.111111112, 0.111111112, 0.111111112, 0]],
    ),
    "dapo, sequence, 0.1, 0.15": (
        WIDE,
        *(-0.2, None, -0.33333328366),
        [[0, 0, 0, 0], [0, 0, 0, 0], [0.111111112, 0.111111112, 0.111111112, 0]],
    ),
    "dr_grpo, sequence, 0.1, 0.15": (
        {**WIDE, "loss_aggregation": "constant"},
        *(0.2, None, -0.02801763825),
        [[-0.0537942499] * 4, [0.0310796835, 0.0310796835, 0, 0], [0.0416666679, 0.0416666679, 0.0416666679, 0]],
    ),
    "grpo, sequence, 0.1, 0.15, 1.3": (
        {**GSPO, **WIDE, "dual_clip": 1.3},
        *(0.4, None, 0.17959089577),
        [[-0.0926022753] * 4, [0, 0, 0, 0], [0.111111112, 0.111111112, 0.111111112, 0]],
    ),
    "cispo, token, 0.2, 1.28": (
        {"policy_loss": "cispo", "clip_range_high": 0.28},
        *(0.2, None, 0.25571376085),
        [
            [-0.0914686024, -0.213333324, -0.166666672, -0.111720003],
            [0.0711111128, 0.0678557083, 0, 0],
            [0.142222226, 0.111111112, 0.0744800046, 0],
        ],
    ),
    "cispo, sequence, 0.2, 1.1": (
        {"policy_loss": "cispo", "clip_range_high": 0.1, "importance_sampling_level": "sequence"},
        *(0.4, None, 0.31464973092),
        [[-0.123469695] * 4, [0.0611111112, 0.0611111112, 0, 0], [0.111111112, 0.111111112, 0.111111112, 0]],
    ),
    "dapo, token, masked": (
        MASKED,
        *(0.2, 1, -0.26241043210),
        [[-0.117602497, 0, -0.214285731, -0.143640012], [0, 0, 0, 0], [0.213117823, 0.142857149, 0, 0]],
    ),
    "grpo, token, masked": (
        {**MASKED, "loss_aggregation": "sequence"},
        *(0.2, 1, -0.06163315102),
        [[-0.0686014518, 0, -0.125, -0.0837900043], [0, 0, 0, 0], [0.165758312, 0.111111112, 0, 0]],
    ),
    "dr_grpo, token, masked": (
        {**MASKED, "loss_aggregation": "constant"},
        *(0.2, 1, -0.07653637230),
        [[-0.0343007259, 0, -0.0625, -0.0418950021], [0, 0, 0, 0], [0.0621593669, 0.0416666679, 0, 0]],
    ),
    "grpo, sequence, masked": (
        GSPO | MASKED,
        *(0.2, 2, -0.18171654641),
        [[-0.1075885] * 4, [0.124318734, 0.124318734, 0, 0], [0, 0, 0, 0]],
    ),
}


class Given:
    """A policy whose log-probs are given, or, of pairs, the logits that they follow from."""

    def __init__(self, numbers: Tensor):
        self.numbers = nn.Parameter(numbers)

    def named_parameters_to_train(self) -> list[tuple[str, nn.Parameter]]:
        return [("numbers", self.numbers)]

    def evaluate(self, batch: Batch, *, entropy_gradient: bool = False) -> Evaluation:
        if "row" in batch.observations:
            logprobs_BT = self.numbers[batch.observations["row"]][:, : batch.mask_BT.shape[1]]
        else:
            scores_BTV = torch.log_softmax(self.numbers[:, :-1], -1)
            chosen_BT = scores_BTV.gather(-1, batch.actions_BT[:, 1:, None]).squeeze(-1)
            logprobs_BT = nn.functional.pad(chosen_BT, (1, 0), value=torch.nan)  # nothing predicts the first
        return Evaluation(logprobs_BT, torch.zeros_like(logprobs_BT), torch.zeros_like(logprobs_BT))


@pytest.mark.parametrize("name", LITERALS)
@pytest.mark.parametrize("tokens", [1000, 4])
def test_loss_and_gradient_of_completions_are_trls(name: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, drift, truncated, loss, gradient = LITERALS[name]
    numbers = torch.arange(12).view(3, 4)
    old = -(1 + (numbers * 7 % 5)) / 4.0
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]).bool()
    advantages = torch.where(mask, torch.tensor([1.5, -0.5, -1.0])[:, None], 0.0)
    batch = Batch({"row": torch.arange(3)}, mask, logprobs_BT=old, values_BT=torch.zeros(3, 4), advantages_BT=advantages)
    batch.truncated_B, batch.step_limit = torch.tensor([row == truncated for row in range(3)]), 8
    objective, losses = PPOObjective(config_of(advantage="grpo", **settings)), []
    real = ppo_objective.ppo_loss
    monkeypatch.setattr(ppo_objective, "ppo_loss", lambda *a, **k: losses.append((found := real(*a, **k))[0].detach()) or found)
    policy = Given(old + drift * ((numbers * 5 % 7) - 3))
    found, _ = named_gradient(objective, policy, objective.select(batch, 3), tokens)
    assert float(sum(losses)) == pytest.approx(loss, abs=3e-7)
    torch.testing.assert_close(found["numbers"], torch.tensor(gradient), rtol=0, atol=1e-8)


DPO_GRADIENTS = {  # by the logits of the second position, a text in each row
    0.1: [
        *(0.00234280806, 0.00636841264, -0.00871121883, 0.0062986915, -0.00927398354, 0.00297529087),
        *(0.0102142561, -0.00274703605, -0.00746721914, -0.00237641134, -0.00645975582, 0.00883616507),
    ],
    0.5: [
        *(0.0135246068, 0.0367636904, -0.0502882898, 0.037952356, -0.0558797792, 0.0179274213),
        *(0.0589650497, -0.0158581417, -0.0431069024, -0.0143189123, -0.0389228389, 0.0532417372),
    ],
}


@pytest.mark.parametrize(("beta", "loss", "rewards"), [(0.1, 0.74274564, (-0.04654615, 0.05025328)), (0.5, 0.96480626, None)])
def test_loss_gradient_and_metrics_of_pairs_are_trls(beta: float, loss: float, rewards: tuple[float, float] | None) -> None:
    sides = torch.tensor([0, 2, 1, 3])  # TRL has the chosen texts first, a batch here the two of a pair
    tokens = torch.tensor([[0, 1, 2, 0], [0, 2, 1, 0], [0, 1, 0, 2], [0, 2, 2, 0]])[sides].view(2, 2, 4).transpose(1, 2)
    starts, lengths = (torch.tensor(places)[sides].view(2, 2) for places in ([2, 1, 2, 1], [4, 3, 4, 4]))
    observations = {"tokens": tokens, "starts": starts, "lengths": lengths}
    batch = Batch(observations, torch.ones(2, 4, dtype=torch.bool))
    batch.reference_B2 = torch.tensor([-2.0, -2.5, -1.75, -3.25])[sides].view(2, 2)
    objective, policy = (
        DPOObjective(functools.partial(dpo_loss, beta=beta)),
        Given((((torch.arange(48) * 37 % 11) - 5) / 4.0).view(4, 4, 3)[sides]),
    )
    found, stats = named_gradient(objective, policy, batch.to(CPU))
    assert stats.mean == pytest.approx(loss, abs=1e-7)
    torch.testing.assert_close(found["numbers"][sides][:, 1].flatten(), torch.tensor(DPO_GRADIENTS[beta]), rtol=0, atol=1e-8)
    metrics = objective.metrics(batch, UpdateResult(stats))
    expected = {"logps/chosen": -2.71546149, "logps/rejected": -1.99746716, "rewards/accuracies": 0.0}
    if rewards is not None:
        expected |= {"rewards/chosen": rewards[0], "rewards/rejected": rewards[1], "rewards/margins": rewards[0] - rewards[1]}
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, abs=1e-6)


def test_label_smoothing_is_that_of_trls_aot_which_of_one_pair_is_it() -> None:
    logits = (((torch.arange(48) * 37 % 11) - 5) / 4.0).view(4, 4, 3)
    logprobs = torch.log_softmax(logits, -1)
    pair = torch.stack([logprobs[0, 1, 2] + logprobs[0, 2, 0], logprobs[2, 1, 0] + logprobs[2, 2, 2]])[None]
    loss, _ = dpo_loss(pair, torch.tensor([[-2.0, -1.75]]), beta=0.5, label_smoothing=0.1)
    assert float(loss) == pytest.approx(0.87759948, abs=1e-7)
