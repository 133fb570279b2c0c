"""Direct preference optimization as a user meets it: `DPO`, `surefoot dpo`, its reference, resume, bad input in one line."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from surefoot import DPO, PPO, TextTask
from surefoot.config import DPOConfig
from surefoot.core.preference import dpo_loss
from surefoot.data.batches import texts_of
from surefoot.data.preferences import PreferenceDataset
from surefoot.rollout.pairs import PairRollout
from surefoot.train.supervised_objectives import DPOObjective
from tests.fakes import assert_close, named_gradient
from tests.inputs import model_folder, refusal, run_cli
from tests.test_reward_model import CHAT, PAIRS, RATINGS
from tests.tiny import FAMILIES, plain_scores, tiny_policy
from tests.train.small_run import rows, weights, write_rows, write_supervised

SMALL: dict[str, Any] = {"dtype": "float32", "verbose": 0}
FAST: dict[str, Any] = {"held_out": 0.2, "epochs": 6, "learning_rate": 0.01, "batch_size": 8, **SMALL}
CONFIG = {"policy": {"dtype": "float32"}, "dpo": {"data": "pairs.jsonl"}}

pytestmark = pytest.mark.usefixtures("in_own_folder")


def rollout(policy: Any, data: Any = PAIRS[:10], **settings: Any) -> PairRollout:
    return PairRollout(policy, PreferenceDataset(data, held_out=0.0), DPOConfig(**settings), seed=0)


@pytest.mark.parametrize("adapter", [{"rank": 4}, None], ids=["adapter", "full"])
def test_a_preference_is_learned_in_seconds_and_goes_on_to_ppo(adapter: Any, capsys: pytest.CaptureFixture[str]) -> None:
    rate = 0.01 if adapter else 0.003
    model = DPO(model_folder(), PAIRS, **FAST | {"verbose": 1, "adapter": adapter, "learning_rate": rate})
    assert model.learn() is model and model.run_folder == Path("runs/dpo-1")
    logged = rows(Path("runs/dpo-1"))
    first, last = ([row for row in logged if "dpo/loss" in row][n] for n in (0, -1))
    # Before the first step the policy is its reference: no margin, the loss of a coin.
    assert first["dpo/loss"] == pytest.approx(0.6931472) and first["rewards/chosen"] == pytest.approx(0.0, abs=1e-5)
    assert last["dpo/loss"] < 0.2 and last["rewards/margins"] == last["rewards/chosen"] - last["rewards/rejected"] > 1
    assert last["rewards/accuracies"] == 1.0 and last["dpo/epoch"] > 5 and last["logps/chosen"] < 0
    before, *_, after = [row for row in logged if "eval/accuracy" in row]
    # Of equal log-probs rounding may decide.
    assert abs(before["eval/accuracy"] - 0.5) < 0.3 and before["eval/margin"] == pytest.approx(0.0, abs=1e-5)
    assert after["eval/accuracy"] == 1.0 and after["eval/margin"] > 1
    assert model.evaluate() == {name: value for name, value in after.items() if name != "update"}
    assert "accuracy 1.000" in capsys.readouterr().out and Path("runs/dpo-1/checkpoints/best").exists()
    assert rows(Path("runs/dpo-1"), "samples.jsonl")[-1].keys() >= {"prompt", "chosen", "rejected", "scores"}
    model.save("out")
    assert transformers.AutoModelForCausalLM.from_pretrained("out").config.model_type == "llama"
    task = TextTask(["film 1", "film 2"], lambda prompts, completions: [0.0] * len(prompts), held_out=0.0)
    ppo = PPO("out", task, total_episodes=4, episodes_per_update=4, batch_size=4, **SMALL).learn()
    assert rows(ppo.run_folder or Path())[0]["kl/reference"] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_are_of_whole_completions_and_the_reference_is_the_start(family: str) -> None:
    policy = tiny_policy(family)
    start = rollout(policy).collect(first=0, count=4)
    for side, tokens in enumerate(texts_of(start).observations["tokens"][:2]):
        begin, end = (int(start.observations[name][0, side]) for name in ("starts", "lengths"))
        with torch.no_grad():
            expected = plain_scores(policy, tokens[:begin].tolist(), tokens[begin:end].tolist())["logprobs"].sum()
        assert start.reference_B2 is not None and float(start.reference_B2[0, side]) == pytest.approx(float(expected), abs=1e-3)
    with torch.no_grad():
        for _, parameter in policy.named_parameters_to_train():
            parameter.add_(0.02)
    moved = rollout(policy).collect(first=0, count=4)
    assert moved.reference_B2 is not None and torch.equal(moved.reference_B2, start.reference_B2)


@pytest.mark.parametrize("tokens", [1, 30, 90])
def test_micro_batches_and_the_reference_of_other_rows_change_no_gradient(tokens: int) -> None:
    policy = tiny_policy(moved=True)
    batch = rollout(policy).collect(first=0, count=7)
    objective = DPOObjective(functools.partial(dpo_loss, beta=0.5, label_smoothing=0.1))
    expected, whole = named_gradient(objective, policy, batch)
    found, split = named_gradient(
        objective, policy, rollout(policy, micro_batch_tokens=tokens).collect(first=0, count=7), tokens
    )
    assert_close(found, expected)
    assert split.mean == pytest.approx(whole.mean, rel=1e-5) and not any("value_head" in name for name in found)


def test_the_reference_is_computed_once() -> None:
    policy = tiny_policy()
    asked, real = [], policy.reference_logprobs
    policy.reference_logprobs = lambda batch: asked.append(len(batch)) or real(batch)  # type: ignore[method-assign]
    pairs = rollout(policy)
    for first in range(0, 40, 4):
        pairs.collect(first=first, count=4)
    assert sum(asked) == 2 * 10


def test_prompts_may_be_chats_or_none_and_their_tokens_are_not_trained() -> None:
    chats = [{**row, "prompt": CHAT, "chosen": [{"role": "assistant", "content": row["chosen"]}]} for row in PAIRS]
    for data, prompt_tokens in ((chats, {5, 6, 7}), ([{k: v for k, v in row.items() if k != "prompt"} for row in PAIRS], {1})):
        model = DPO(model_folder(chat=True), data, **FAST | {"held_out": 0.0, "epochs": 1}).learn()
        batch = model._session.parts[0].collect(first=0, count=8)
        assert set(batch.observations["starts"].unique().tolist()) <= prompt_tokens
    refusal(lambda: DPO(model_folder(), chats, **FAST | {"held_out": 0.0}).learn(), "chat template")


def test_learning_more_and_going_on_in_another_process() -> None:
    settings = FAST | {"lr_schedule": "constant", "lr_warmup": 0.0}
    straight = DPO(model_folder(), PAIRS, run_name="a", **settings | {"epochs": 3}).learn()
    DPO(model_folder(), PAIRS, run_name="b", **settings | {"epochs": 1}).learn()
    again = DPO.load("runs/b", PAIRS, verbose=0)
    assert again.is_finished and again.learn(2).is_finished
    assert all(torch.equal(value, weights(straight)[name]) for name, value in weights(again).items())  # type: ignore[arg-type]
    refusal(lambda: DPO.load("runs/b"), "DPO.load(folder, data)")
    refusal(lambda: DPO.load("runs/b", PAIRS[1:], verbose=0), "dpo.data")


ONE_SIDE = [{**row, "chosen": " positive", "rejected": " negative"} for row in PAIRS]


@pytest.mark.parametrize(
    ("data", "flags", "named"),
    [
        (PAIRS, ("--dpo.data", "null"), "dpo.data"),
        (PAIRS, ("--dpo.beta", "0"), "--dpo.beta"),
        (PAIRS, ("--dpo.label-smoothing", "0.5"), "--dpo.label-smoothing"),
        (PAIRS, ("--policy.critic.kind", "separate"), "policy.critic"),
        (RATINGS, (), "dpo.data"),
        (ONE_SIDE, (), "pairs"),
        ([{**PAIRS[0], "chosen": PAIRS[0]["rejected"]}], (), "pairs.jsonl, line 1"),
    ],
)
def test_bad_input_is_one_line_before_a_model_is_loaded(
    base: Path, monkeypatch: pytest.MonkeyPatch, data: Any, flags: tuple[str, ...], named: str
) -> None:
    monkeypatch.setattr("surefoot.build.language.load_policy", None)
    write_supervised(Path(), base, CONFIG, command="dpo")
    write_rows(Path("pairs.jsonl"), data)
    run_cli("dpo", "dpo.yaml", *flags).refused(named)
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("data", "call", "named"),
    [
        (None, lambda make: make(), "dpo.data"),
        (PAIRS, lambda make: make(held_out=0.0).evaluate(), "held-out preferences"),
        ([*PAIRS, {**PAIRS[0], "chosen": "a" * 200}], lambda make: make().learn(), "row 41: has 207"),
    ],
)
def test_bad_input_from_python_is_one_line(data: Any, call: Any, named: str) -> None:
    refusal(lambda: call(functools.partial(DPO, model_folder(), data, **SMALL)), named)
