"""Separate critics: what their values are, what reaches their weights, what is kept of them."""

import copy
import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from surefoot import PPO, SFT, RewardModel, TextTask, load_policy
from surefoot.config import AdapterConfig, CriticConfig, PolicyConfig
from surefoot.policies.lm.policy import CausalLMPolicy
from surefoot.rollout.logprobs import fill_logprobs
from surefoot.storage.safetensors import read_tensors
from surefoot.train.ppo_objective import PPOObjective
from surefoot.train.update import make_optimizer
from tests.fakes import assert_close, config_of, train
from tests.inputs import model_folder, refusal
from tests.policies.test_lm import PAIRS, refused_lm
from tests.policies.test_training import assert_first_ratio_is_1, rollout
from tests.tiny import FAMILIES, LSTM, tiny_lm, tiny_policy, tiny_tokenizer, written_batch
from tests.train.small_run import rows

ADAPTER, SEPARATE = CriticConfig(kind="adapter"), CriticConfig(kind="separate")
KINDS = pytest.mark.parametrize("critic", [ADAPTER, SEPARATE], ids=["adapter", "separate"])
# What is trained beside it: only a separate critic can go with either.
BESIDE = [(ADAPTER, True), (SEPARATE, True), (SEPARATE, False)]
SETTINGS = pytest.mark.parametrize(("critic", "adapter"), BESIDE, ids=["adapter", "separate", "separate, all weights"])
RUN: dict[str, Any] = {"dtype": "float32", "verbose": 0, "total_episodes": 8, "episodes_per_update": 8, "batch_size": 4}
RUN |= {"max_new_tokens": 4, "learning_rate": 0.01, "run_checkpoint_every": 1}

pytestmark = pytest.mark.usefixtures("in_own_folder")


@pytest.fixture(scope="module")
def reward_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model with a calibration that is not 0 and 1."""
    folder = tmp_path_factory.mktemp("reward")
    pairs = [{"prompt": f"film {n}", "chosen": " is good", "rejected": f" is bad {n}"} for n in range(20)]
    settings = {"dtype": "float32", "verbose": 0, "epochs": 2, "learning_rate": 0.01, "batch_size": 8, "held_out": 0.3}
    model = RewardModel(model_folder(), pairs, run_folder=str(folder / "runs"), run_name="run", **settings)
    model.learn().save(folder / "saved")
    return folder / "saved"


def loaded(critic: CriticConfig, **settings: Any) -> CausalLMPolicy:
    return load_policy(str(model_folder()), PolicyConfig(critic=critic, dtype="float32", **settings))


def other_model(folder: str, *, lm: Any = None, tokenizer: Any = None, **overrides: Any) -> str:
    (lm or tiny_lm(seed=3, **overrides)).save_pretrained(folder)
    (tokenizer or tiny_tokenizer()).save_pretrained(folder)
    return folder


def critics_own(name: str) -> bool:
    return name.startswith(("critic.", "value_head."))


def trained(policy: CausalLMPolicy, *, critic: bool | None = None) -> dict[str, Tensor]:
    """Copies of what is trained, or of the critic's part of it alone, or of the rest."""
    named = policy.named_parameters_to_train()
    return {name: p.detach().clone() for name, p in named if critic is None or critics_own(name) == critic}


@torch.no_grad()
def plain_values(policy: CausalLMPolicy, family: str) -> Tensor:
    """Values of every completion token from a plain transformers model that has the critic's weights, row by row."""
    assert policy.critic is not None
    trained = {name: p.detach() for name, p in policy.critic.parameters().items()}
    lm, scale = tiny_lm(family).eval(), 32 / 4
    if policy.critic.adapter is None:
        lm.base_model.load_state_dict(trained, strict=False)
    else:
        weights = dict(lm.base_model.named_parameters())
        for name, a in trained.items():
            if ".lora_A." in name:
                b, weight = trained[name.replace(".lora_A.", ".lora_B.")], weights[name.split(".lora_A.")[0] + ".weight"]
                weight += (scale * b @ a).T if weight.shape != (b @ a).shape or family == "gpt2" else scale * b @ a
    rows = [torch.tensor([[*prompt, *answer[:t]]]) for prompt, answer in PAIRS for t in range(len(answer))]
    found = [lm(input_ids=row, use_cache=False, output_hidden_states=True).hidden_states[-1][0, -1] for row in rows]
    return torch.cat([policy.value_head(hidden) for hidden in found])


def reached(policy: CausalLMPolicy, loss: Tensor) -> set[str]:
    """Names of the parameters that the loss moves."""
    named = dict(policy.named_parameters_to_train())
    found = torch.autograd.grad(loss, [*named.values()], allow_unused=True, retain_graph=True)
    return {name for name, gradient in zip(named, found, strict=True) if gradient is not None and gradient.any()}


CRITICS = [(family, critic) for family in FAMILIES for critic in (ADAPTER, SEPARATE) if family != LSTM or critic is SEPARATE]


@pytest.mark.parametrize(("family", "critic"), CRITICS, ids=lambda one: getattr(one, "kind", one))
def test_values_are_those_of_the_critics_own_model(family, critic):
    policy, batch = tiny_policy(family, critic=critic, moved=True), written_batch(PAIRS)
    with torch.no_grad():
        found, alone = policy.evaluate(batch).values_BT, policy.compute_values(batch)
    assert torch.allclose(found[batch.mask_BT], plain_values(policy, family), atol=2e-4)
    assert torch.equal(found, alone) and (found[~batch.mask_BT] == 0).all()


@KINDS
def test_the_critic_reads_neither_demonstrations_nor_what_no_values_are_learned_of(monkeypatch, critic):
    policy, batch = tiny_policy(critic=critic, moved=True), written_batch(PAIRS)
    expected = policy.evaluate(batch)
    monkeypatch.setattr(policy, "_critics_hidden", lambda batch: pytest.fail("the critic read them"))
    found = policy.evaluate(dataclasses.replace(batch, values_BT=torch.empty(0)))
    assert torch.equal(found.logprobs_BT, expected.logprobs_BT) and torch.equal(found.entropies_BT, expected.entropies_BT)
    assert (found.values_BT == 0).all() and (expected.values_BT[batch.mask_BT] != 0).all()
    fill_logprobs(policy, batch, token_budget=10**6, exact_logprobs=policy.exact_logprobs)
    assert (batch.values_BT == 0).all() and batch.reference_logprobs_BT is not None


@SETTINGS
def test_the_value_loss_reaches_the_critic_alone_and_the_policy_loss_the_policy_alone(critic, adapter):
    policy, batch = tiny_policy(critic=critic, adapter=adapter, moved=True), written_batch(PAIRS)
    policy.reference_logprobs(batch)  # switches adapters off and on again
    own, others = (trained(policy, critic=critic).keys() for critic in (True, False))
    view = policy.evaluate(batch, entropy_gradient=True)
    policy.compute_values(batch)  # a switch between forward and backward loses nothing
    policy.reference_logprobs(batch)
    assert reached(policy, view.values_BT.square().sum()) == own and len(own) > 10
    for found in (view.logprobs_BT, view.entropies_BT):
        assert reached(policy, found.sum()) == others and len(others) > 10
    assert {p.dtype for p in trained(policy).values()} == {torch.float32}


@SETTINGS
def test_policy_and_reference_are_what_they_are_without_the_critic(critic, adapter):
    plain, policy = tiny_policy(adapter=adapter), tiny_policy(critic=critic, adapter=adapter)
    batch = written_batch(PAIRS)
    own = dict(plain.named_parameters_to_train())
    with torch.no_grad():
        for name, parameter in policy.named_parameters_to_train():
            assert critics_own(name) or torch.equal(parameter, own[name]), name
            parameter.add_(0.05)
            if not critics_own(name):
                own[name].add_(0.05)
        assert torch.equal(policy.reference_logprobs(batch), plain.reference_logprobs(batch))
        policy.compute_values(batch)
        assert torch.equal(policy.evaluate(batch).logprobs_BT, plain.evaluate(batch).logprobs_BT)
    assert policy.fingerprint() == plain.fingerprint()
    for each, folder in ((policy, Path("with")), (plain, Path("without"))):
        each.save_model(folder)
    assert_close(*(read_tensors(Path(folder) / "model.safetensors") for folder in ("with", "without")), 0.0)


@pytest.mark.parametrize("targets", [["embed_tokens"], ["embed_tokens", "q_proj"], ["lm_head"]])
def test_the_critics_adapter_is_its_own_wherever_it_is(targets):
    adapter = AdapterConfig(rank=4, targets=targets)
    if targets == ["lm_head"]:
        refusal(lambda: loaded(ADAPTER, adapter=adapter), "policy.critic.kind", "output layer")
        return
    policy = loaded(ADAPTER, adapter=adapter)
    named = [name for name, _ in policy.named_parameters_to_train()]
    assert sum(critics_own(name) for name in named) == 2 + sum("critic" in name for name in named) == len(named) // 2 + 1


def test_the_critics_adapter_starts_at_0_from_its_seed_alone():
    named, again = (trained(tiny_policy(critic=ADAPTER)) for _ in range(2))
    for name, parameter in named.items():
        assert torch.equal(parameter, again[name])
        if name.startswith("critic."):
            own = named["model." + name.removeprefix("critic.").replace(".critic.", ".default.")]
            assert parameter.shape == own.shape and torch.equal(parameter, own) == (".lora_B." in name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@SETTINGS
def test_a_rollouts_values_are_the_critics_and_the_first_ratio_is_1(critic, adapter, dtype):
    policy, exact = tiny_policy(critic=critic, adapter=adapter, dtype=dtype, moved=True), dtype == torch.float32
    batch = rollout(policy, episodes=32)
    assert (batch.behavior_logprobs_BT is None) == exact  # what the sampler gave is kept
    with torch.no_grad():
        expected = policy.compute_values(batch)
    assert expected.abs().max() > 0.1
    assert torch.allclose(batch.values_BT, expected, atol=1e-4 if exact else 0.05)
    assert_first_ratio_is_1(policy, batch, exact=exact)


def test_a_critic_may_start_as_another_model():
    sizes = {"hidden_size": 16, "num_hidden_layers": 3}
    policy = loaded(CriticConfig(kind="separate", model=other_model("smaller", **sizes)))
    assert policy.critic is not None and policy.value_head.weight.shape == (1, 16)
    assert_close(policy.critic.body.state_dict(), tiny_lm(seed=3, **sizes).base_model.state_dict(), 0.0)


@pytest.mark.parametrize("adapter", [AdapterConfig(rank=2), None], ids=["LoRA", "all weights"])
def test_a_reward_model_is_a_critic_whose_value_at_the_end_token_is_the_calibrated_reward(reward_folder, adapter):
    policy = loaded(CriticConfig(kind="separate", model=str(reward_folder)), adapter=adapter)
    judge = RewardModel.load(reward_folder)
    assert judge.policy.shift != 0 and judge.policy.scale != 1
    texts, tokenizer = ["film 3 is good", "film 8 is bad", "the end"], tiny_tokenizer()
    encoded = [(*tokenizer(text)["input_ids"], tokenizer.eos_token_id) for text in texts]
    batch = written_batch((tokens, (7,)) for tokens in encoded)  # the value before 7 is read at the end token
    with torch.no_grad():
        values = policy.evaluate(batch).values_BT[batch.mask_BT]
    assert values.tolist() == pytest.approx(judge.score(["", "", ""], texts), abs=1e-5) and values.std() > 0.05
    # Its run folder names it too.
    run = reward_folder.parent / "runs" / "run"
    shutil.copytree(reward_folder, run / "model", dirs_exist_ok=True)
    model = PPO(model_folder(), verbose=0, critic=CriticConfig(kind="separate", model=str(run)))
    assert torch.equal(model.policy.value_head.weight, policy.value_head.weight)


def vowels(prompts: list[str], completions: list[str]) -> list[float]:
    return [float(sum(letter in "aeiou" for letter in text)) for text in completions]


def task() -> TextTask:
    return TextTask([f"film {n}" for n in range(12)], vowels, held_out=0.3)


@KINDS
def test_save_and_load_keep_the_critic(critic):
    model = PPO(model_folder(), task(), critic=critic, **RUN).learn()
    model.save("out")
    again = PPO.load("out", task(), verbose=0)
    before, after = (trained(each.policy, critic=True) for each in (model, again))
    assert_close(after, before, 0.0)
    assert len(read_tensors(Path("out/surefoot_critic.safetensors"))) == len(before)
    assert model.policy.value_head.weight.abs().max() > 0
    assert PPO.open("out").policy.critic is None  # to write with, it needs none
    again.learn(8)
    # As a critic of another kind it is refused.
    other, text = "adapter" if critic.kind == "separate" else "separate", Path("out/surefoot.yaml").read_text()
    Path("out/surefoot.yaml").write_text(text.replace(f"kind: {critic.kind}", f"kind: {other}"))
    refusal(lambda: PPO.load("out", task()), "out/surefoot_critic.safetensors does not fit", "policy.critic: trunk.")


@pytest.mark.parametrize("advantage", ["grpo", "reinforce_pp"])
def test_without_values_no_critic_is_built(advantage):
    settings = RUN | {"advantage": advantage, "group": {"size": 2}}
    model = PPO(model_folder(), task(), critic=SEPARATE, **settings).learn()
    assert model.policy.critic is None
    assert PPO.load(model.run_folder, task(), verbose=0).is_finished
    policy = loaded(SEPARATE)
    pairs = [{"chosen": "good", "rejected": "bad"}, {"chosen": "fine", "rejected": "poor"}]
    for unfit in (
        lambda: PPO(copy.deepcopy(policy), task(), **settings).learn(),
        lambda: SFT(copy.deepcopy(policy), ["a b", "the end"], held_out=0.0, verbose=0).learn(),
        lambda: RewardModel(policy, pairs, held_out=0.0, verbose=0),
    ):
        refusal(unfit, "policy: it has a separate critic", "critic.kind: shared")


def test_while_the_critic_warms_up_the_policy_and_the_kl_coefficient_stay():
    """A policy that stands still has KL 0, which a controller would take for a coefficient too high."""
    settings = RUN | {"total_episodes": 24, "kl": {"coef": 0.1, "target": 1e-6, "horizon": 80.0}, "run_name": "run"}
    model = PPO(model_folder(), task(), critic={"kind": "adapter", "warmup_updates": 2}, **settings)
    before = trained(model.policy)
    model.learn(16)
    assert {critics_own(name) for name, p in trained(model.policy).items() if not torch.equal(p, before[name])} == {True}
    model.learn(8)
    # Updates 1 and 2 warm up; 3 is the first to be counted, too late for its own coefficient.
    assert [row["kl/coef"] for row in rows(Path("runs/run")) if "kl/coef" in row] == [0.1, 0.1, 0.1]


@pytest.mark.parametrize("asked", [ADAPTER, SEPARATE, CriticConfig(stop_gradient=True)], ids=["adapter", "separate", "stopped"])
def test_a_loaded_policy_without_the_critic_that_is_asked_for_is_refused(asked):
    policy = loaded(CriticConfig())
    refusal(lambda: PPO(policy, task(), critic=asked, **RUN).learn(), "policy.critic", "load_policy")
    if asked.stop_gradient:
        pairs = [{"chosen": f"good {n}", "rejected": "bad"} for n in range(4)]
        settings = {"held_out": 0.0, "verbose": 0, "critic": {"stop_gradient": True}}
        refusal(lambda: RewardModel(policy, pairs, **settings), "policy.critic", "load_policy")
    PPO(loaded(asked), task(), critic=asked, **RUN).learn()


def with_another_token() -> str:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["film"])
    return other_model("other", tokenizer=tokenizer)


def damaged(folder: str) -> str:
    Path(folder, "surefoot_reward.safetensors").write_bytes(b"")
    return folder


CASES: dict[str, tuple[Callable[[], str], list[str]]] = {
    "no folder": (lambda: "./none", ["model: no folder ./none"]),
    "no model": (lambda: ".", ["model .", "config.json"]),
    "other tokenizer": (with_another_token, ["model other", "'film' is 57"]),
    "fewer embeddings": (lambda: other_model("other", vocab_size=58), ["model other", "58", "61"]),
    "a damaged reward model": (lambda: damaged(other_model("other")), ["other/surefoot_reward.safetensors"]),
    "it looks ahead": (lambda: other_model("bert", lm=refused_lm("looks ahead")), ["model bert", "looks ahead"]),
}


@pytest.mark.parametrize("case", CASES)
def test_a_critic_that_does_not_fit_is_refused_in_one_line(case):
    make, named = CASES[case]
    critic = CriticConfig(kind="separate", model=make())
    refusal(lambda: loaded(critic), *named)
    refusal(lambda: PPO(model_folder(), task(), critic=critic, **RUN), *named)
    assert not Path("runs").exists()


def test_a_critic_has_a_learning_rate_which_the_schedule_moves_too():
    policy = tiny_policy(critic=SEPARATE)
    before = trained(policy)
    config = config_of(learning_rate=0.01, n_epochs=1, batch_size=100, max_grad_norm=1e9)
    optimizer = make_optimizer(policy, PPOObjective(config), critic_learning_rate=0.001)
    train(policy, rollout(policy), config, optimizer=optimizer, learning_rate=0.005)  # half of its highest
    moved = {name: float((p - before[name]).abs().max()) for name, p in trained(policy).items()}
    largest = {own: max(size for name, size in moved.items() if critics_own(name) == own) for own in (True, False)}
    # Adam's first step is its learning rate, but for ε, whatever the gradient.
    assert largest == {True: pytest.approx(0.0005, rel=0.02), False: pytest.approx(0.005, rel=0.02)}
