"""Whole runs on environments: exact to the bit however they were interrupted, and what Stable-Baselines3's users write."""

import functools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import SyncVectorEnv
from torch import nn

from surefoot import PPO, evaluate_policy
from surefoot.policies.control.policy import ControlPolicy
from surefoot.train import loop
from tests.envs.counter import Counter
from tests.inputs import refusal
from tests.train.small_run import Killed, rows, same_weights, weights

pytestmark = pytest.mark.usefixtures("in_own_folder")
N_ENVS, N_STEPS, UPDATES = 3, 16, 6
BATCH = N_ENVS * N_STEPS
SMALL: dict[str, Any] = {"n_envs": N_ENVS, "n_steps": N_STEPS, "batch_size": N_STEPS, "n_epochs": 2, "learning_rate": 0.01}
SMALL |= {"seed": 5, "device": "cpu", "verbose": 0, "run_checkpoint_every": 2, "evaluate_episodes": 0}
NORMALIZED = {"normalize_observations": True, "normalize_rewards": True, "env_kwargs": {"max_episode_steps": 13}}
LSTM = {"policy_kwargs": {"lstm_hidden_size": 8}}
RUNS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "plain": ("MlpPolicy", "CartPole-v1", {}),
    "normalized": ("MlpPolicy", "Pendulum-v1", NORMALIZED),
    "lstm": ("MlpLstmPolicy", "CartPole-v1", LSTM),
}
EACH_RUN = pytest.mark.parametrize(("policy", "env", "settings"), RUNS.values(), ids=RUNS)


def small(policy: Any = "MlpPolicy", env: Any = "CartPole-v1", **settings: Any) -> PPO:
    return PPO(policy, env, **{**SMALL, **({} if isinstance(env, str) else {"n_envs": 1}), **settings})


def load(folder: str, env: Any = None, **settings: Any) -> PPO:
    return PPO.load(folder, env, verbose=0, **settings)


def killing(at_step: int) -> Callable[..., bool]:
    left = iter(range(at_step))

    def callback(*_: Any) -> bool:
        if next(left, None) is None:
            raise Killed
        return True

    return callback


# Three steps, each paid the same.
Constant = functools.partial(Counter, 3, "terminated")


ODD = """
import pathlib
from tests.envs.counter import Counter

class Odd(Counter):
    def step(self, action):
        assert self.steps + 1 < int(pathlib.Path("fail_at").read_text()), "the wheel came off"
        return super().step(action)
"""


def test_a_run_that_was_killed_goes_on_bit_for_bit() -> None:
    """With workers, continuous actions and normalization; tests/test_runs.py kills runs of the other kinds."""
    whole, killed = (small("MlpPolicy", "Pendulum-v1", run_name=n, vectorization="async", **NORMALIZED) for n in ("w", "k"))
    whole.learn(UPDATES * BATCH)
    with pytest.raises(Killed):  # in the rollout after update 3, one ahead of the newest checkpoint
        killed.learn(UPDATES * BATCH, callback=killing(3 * N_STEPS + 7))
    resumed = load("runs/k").learn()
    assert resumed.is_finished and same_weights(whole, resumed) and not same_weights(whole, killed)
    assert rows(Path("runs/w")) == rows(Path("runs/k"))
    assert Path("runs/w/samples.jsonl").read_text() == Path("runs/k/samples.jsonl").read_text() != ""


@EACH_RUN
def test_learning_twice_is_learning_once_for_longer(policy: str, env: str, settings: dict[str, Any]) -> None:
    once = small(policy, env, run_name="once", **settings).learn(total_timesteps=4 * BATCH)
    twice = small(policy, env, run_name="twice", **settings).learn(2 * BATCH).learn(total_timesteps=2 * BATCH)
    assert same_weights(once, twice) and rows(Path("runs/once")) == rows(Path("runs/twice"))


def test_in_an_environment_that_cannot_be_saved_new_episodes_begin() -> None:
    def env(n: int = 2) -> Any:
        return SyncVectorEnv([lambda: gymnasium.make("CartPole-v1")] * n)  # it resets itself, from no seed of ours

    first = small(env=env(), run_name="own").learn(2 * BATCH)
    refusal(lambda: load("runs/own"), "PPO.load(folder, env)")
    refusal(lambda: load("runs/own", env(3)), "env", "num_envs 2")
    second = load("runs/own", env())
    assert same_weights(first, second)
    assert second.learn(2 * BATCH).is_finished and not same_weights(first, second)


@pytest.mark.parametrize("policy", ["MlpPolicy", "MlpLstmPolicy"])
@pytest.mark.parametrize("reward", [0.0, 1.0])
def test_equal_rewards_and_minibatches_of_one_step_stay_finite(reward: float, policy: str) -> None:
    steps, normalized = 5 if policy == "MlpPolicy" else 1, {**NORMALIZED, "env_kwargs": {}}
    model = small(policy, Constant(reward), n_steps=steps, batch_size=1, **normalized).learn(10)
    assert all(value.isfinite().all() for value in weights(model).values())
    found = rows(Path("runs/ppo-1"))
    assert len(found) == 10 // steps and all(numpy.isfinite(value) for row in found for value in row.values())
    assert found[-1]["ppo/skipped_steps"] == 0


@EACH_RUN
def test_a_saved_policy_predicts_the_same(policy: str, env: str, settings: dict[str, Any]) -> None:
    model = small(policy, env, **settings).learn(2 * BATCH)
    model.save("saved")
    loaded = load("saved")
    observations = numpy.random.default_rng(0).normal(size=(7, *model.env.observation_spaces["obs"].shape)).astype("f4")
    ours, *others = (each.predict(observations, deterministic=True)[0] for each in (model, loaded, load("runs/ppo-1")))
    assert all(numpy.array_equal(ours, other) for other in others)
    assert loaded.config.ppo == model.config.ppo and loaded.env.reward_stats == model.env.reward_stats
    assert model.env.reward_stats.count == (2 * BATCH if settings is NORMALIZED else 0)
    assert str(loaded.learn(BATCH).run_folder).endswith("ppo-2")  # it can be trained on, as another run


@pytest.mark.parametrize(("env", "shape"), [("CartPole-v1", ()), ("Pendulum-v1", (1,))])
def test_predict_takes_one_observation_or_many(env: str, shape: tuple[int, ...]) -> None:
    model = small(env=env)
    space = model.env.observation_spaces["obs"]
    one, state = model.predict(numpy.zeros(space.shape, dtype="f4"))
    assert numpy.shape(one) == shape and state is None and one in model.env.action_space
    many, _ = model.predict(numpy.zeros((4, *space.shape), dtype="f4"), deterministic=True)
    assert many.shape == (4, *shape) and numpy.array_equal(many, many[:1].repeat(4, 0))
    drawn, _ = model.predict(numpy.zeros((64, *space.shape), dtype="f4"))
    assert len(numpy.unique(drawn)) > 1
    refusal(lambda: model.predict(numpy.zeros(17)), "obs", "[17]")


def test_predict_remembers_by_its_state_and_forgets_at_a_start() -> None:
    model = small("MlpLstmPolicy", "Pendulum-v1", policy_kwargs={"lstm_hidden_size": 8, "ortho_init": False})
    predict = functools.partial(model.predict, numpy.random.default_rng(0).normal(size=(2, 3)).astype("f4"), deterministic=True)
    fresh, state = predict()
    assert [part.shape for part in state] == [(2, 8)] * 4
    later, begun = predict(state)[0], predict(state, numpy.array([True, False]))[0]
    assert not numpy.allclose(fresh, later)
    assert numpy.allclose(begun[0], fresh[0]) and numpy.allclose(begun[1], later[1])
    for wrong in (state[:2], [part[:1] for part in state]):
        refusal(lambda wrong=wrong: predict(wrong), "state")


def test_predict_needs_the_masks_it_was_trained_with() -> None:
    class Masked(Counter):
        def action_masks(self) -> Any:
            return numpy.array([self.count % 2 == 0, self.count % 2 == 1])

    predict, seen = small(env=Masked()).predict, numpy.zeros((3, 1), dtype="f4")
    masks = numpy.array([[True, False], [False, True], [True, True]])
    assert predict(seen, action_masks=masks)[0][:2].tolist() == [0, 1]
    assert predict(seen[0], action_masks=[False, True])[0] == 1
    for wrong in (None, masks[:2], [True]):
        refusal(lambda wrong=wrong: predict(seen, action_masks=wrong), "action_masks [3, 2]")
    refusal(lambda: predict(seen[0], action_masks=[0, 0]), "row 0", "action_mask")


def test_predict_checks_every_part_of_an_observation() -> None:
    class Parts(Counter):
        observation_space = spaces.Dict({"box": spaces.Box(0, 9, ()), "count": spaces.Discrete(3, start=1)})

        def _observation(self) -> Any:
            return {"box": numpy.float32(0), "count": 3 if self.count else 1}

    model, zero, ones = small(env=Parts()).learn(BATCH), numpy.float32(0), numpy.ones(4, dtype=int)
    assert model.predict({"box": zero, "count": 2})[0] in (0, 1)
    assert model.predict({"box": numpy.zeros(4, dtype="f4"), "count": ones})[0].shape == (4,)
    bad = [({"box": numpy.float32(numpy.nan), "count": 2}, "observation box of row 0"), ({"box": zero}, "'count'")]
    bad += [({"box": zero, "count": 4}, "observation count")]
    bad += [({"box": numpy.zeros(4, dtype="f4"), "count": ones[:3]}, "count has shape [3]")]
    for observation, named in bad:
        refusal(lambda observation=observation: model.predict(observation), named)


def test_in_an_environment_that_was_used_in_between_new_episodes_begin() -> None:
    env = Constant(2.0)
    model = small(env=env, n_steps=16).learn(16)  # ends one step into its sixth episode
    for where in (env, model.env):
        assert env.count == 1
        assert evaluate_policy(model, where, 2) == (6.0, 0.0)
        model.learn(16)
    assert {(row["return"], row["steps"]) for row in rows(model.run_folder, "samples.jsonl")} == {(6.0, 3)}  # type: ignore
    env.step(0)  # somebody looks at it
    model.learn(16)
    assert {(episode.total, episode.steps) for episode in model._session.training.rollout.finished} == {(6.0, 3)}  # type: ignore
    refusal(lambda: model.learn(16, callback=lambda *_: bool(evaluate_policy(model, env))), "training environment")


def test_rewards_ends_and_infos_reach_callbacks_by_sub_environment() -> None:
    seen: list[Any] = []
    env = SyncVectorEnv([lambda: gymnasium.wrappers.RecordEpisodeStatistics(Constant(2.0))] * 2)
    small(env=env, n_steps=3).learn(6, callback=lambda found, _: seen.append(found))
    first, _, last = ([*found["infos"], *found["dones"], *found["rewards"]] for found in seen)
    assert first[2:] == [False, False, 2.0, 2.0] and "episode" not in first[0]
    assert last[2:] == [True, True, 2.0, 2.0] and last[1]["episode"]["r"] == 6.0 and last[1]["is_success"]


def test_a_model_of_an_environment_that_gymnasium_made_is_loaded_without_it() -> None:
    small(env=gymnasium.make("CartPole-v1", max_episode_steps=9)).save("saved")
    model = load("saved")
    assert model.config.env is not None and model.config.env.id == "CartPole-v1"
    assert evaluate_policy(model, n_eval_episodes=2, warn=False)[0] <= 9
    assert PPO.open("saved").predict(numpy.zeros(4))[0] in (0, 1)
    small(env=gymnasium.wrappers.FlattenObservation(gymnasium.make("CartPole-v1"))).save("wrapped")
    wrapped = load("wrapped")  # to predict alone
    assert wrapped.predict(numpy.zeros(4))[0] in (0, 1)
    refusal(lambda: wrapped.learn(8), "set_env")
    short = gymnasium.make("CartPole-v1", max_episode_steps=7)  # one that is given takes precedence
    model = load("saved", short)
    assert model.env.env.envs[0].env is short and model.config.env is not None and model.config.env.id is None
    refusal(lambda: load("saved", "Pendulum-v1"), "saved")


def test_the_users_policy_is_trained_and_loaded() -> None:
    class Mine(ControlPolicy):
        """A policy that never sees the first number."""

        def prepare(self, observations: Any, *, learn: bool = False) -> Any:
            return super().prepare({"obs": observations["obs"] * numpy.array([0, 1, 1, 1], dtype="f4")}, learn=learn)

    box, choice = {"obs": spaces.Box(-1, 1, (4,))}, spaces.Discrete(2)
    model = small(Mine(box, choice), "CartPole-v1").learn(2 * BATCH)
    acts = [model.predict(numpy.array([x, 0.1, 0.2, 0.3]), deterministic=True)[0] for x in (-3.0, 3.0)]
    assert isinstance(model.policy, Mine) and acts[0] == acts[1]
    model.save("mine")
    loaded = load("mine", policy=Mine(box, choice, seed=9))
    assert isinstance(loaded.policy, Mine) and same_weights(model, loaded)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_a_run_and_its_workers_is_one_line_and_a_checkpoint(number: int) -> None:
    """As a terminal sends Ctrl-C: to every process of the group."""
    sizes = f"n_steps: {N_STEPS}, total_timesteps: 10_000_000"
    env = f"env: {{id: CartPole-v1, n_envs: 2, vectorization: async, {sizes}}}"
    Path("run.yaml").write_text(f"{{{env}, evaluate: {{episodes: 0}}, ppo: {{batch_size: {N_STEPS}}}}}")
    command = [Path(sys.executable).with_name("surefoot"), "ppo", "run.yaml", "--run.name", "stopped"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True, text=True)
    log, deadline = Path("runs/stopped/metrics.jsonl"), time.monotonic() + 60
    while time.monotonic() < deadline and (not log.exists() or log.read_bytes().count(b"\n") < 5):
        time.sleep(0.01)
    os.killpg(process.pid, number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number, said
    *waits, line = [line for line in said.splitlines() if line]
    assert line.startswith("surefoot: stopped after update "), said
    assert len(waits) < 2 and all("waiting for env CartPole-v1" in one for one in waits), said  # if it came in a step
    assert load("runs/stopped").num_timesteps > 0


def test_the_users_network_keeps_its_weights_and_what_is_frozen_stays() -> None:
    mine = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3).requires_grad_(False), nn.Tanh())
    mine.features_dim = 3  # type: ignore[assignment]
    before = {name: value.clone() for name, value in mine.state_dict().items()}
    model = small(mine, "CartPole-v1")
    assert all(torch.equal(value, mine.state_dict()[name]) for name, value in before.items())
    model.learn(2 * BATCH)
    changed = {name for name, value in before.items() if not torch.equal(value, mine.state_dict()[name])}
    assert changed == {"0.weight", "0.bias"}
    assert load("runs/ppo-1", policy=mine).num_timesteps == 2 * BATCH


@pytest.mark.filterwarnings("ignore:.*ERROR:UserWarning")  # Gymnasium's log of what a worker raised
@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_an_environment_that_fails_in_the_middle_of_a_run_leaves_a_checkpoint(vectorization: str) -> None:
    Path("odd.py").write_text(ODD)
    Path("fail_at").write_text(str(3 * N_STEPS + 5))
    settings = {"env": "odd.py:Odd", "vectorization": vectorization, "n_envs": 2, "run_checkpoint_every": 100}
    refusal(lambda: small(run_name="odd", **settings).learn(UPDATES * 2 * N_STEPS), "env Odd", "the wheel came off")
    Path("fail_at").write_text("1000000")
    resumed = load("runs/odd")
    assert resumed.num_timesteps == 3 * 2 * N_STEPS
    assert same_weights(small(run_name="whole", **settings).learn(UPDATES * 2 * N_STEPS), resumed.learn())


def test_evaluation_is_the_mean_of_whole_episodes() -> None:
    model, envs = small(env=Constant(2.0)), SyncVectorEnv([lambda: Constant(2.0), lambda: Constant(4.0)])
    assert evaluate_policy(model, Constant(2.0), n_eval_episodes=3) == (6.0, 0.0)
    assert evaluate_policy(model, envs, n_eval_episodes=4) == (9.0, 3.0)
    assert evaluate_policy(model, envs, 3, return_episode_rewards=True) == ([6.0, 6.0, 12.0], [3, 3, 3])
    with pytest.raises(AssertionError, match=r"Counter: mean return 6\.00 <= 7\.00"):
        evaluate_policy(model, Constant(2.0), reward_threshold=7)
    refusal(lambda: evaluate_policy(model), "env")
    refusal(lambda: evaluate_policy(model, "CartPole-v1"), "Box(0.0, 100.0, (1,)")
    refusal(lambda: evaluate_policy(small(env="FrozenLake-v1", n_envs=1), "FrozenLake8x8-v1"), "Discrete(16)")


def test_a_learning_rate_may_be_a_function_of_what_is_left() -> None:
    def rate(left: float) -> float:
        return 1e-3 * left

    model = small(learning_rate=rate, run_name="mine")
    model.save("saved")
    with pytest.raises(Killed):
        model.learn(4 * BATCH, callback=killing(2 * N_STEPS + 1))
    refusal(lambda: load("runs/mine").learn(), "ppo.learning_rate")
    load("runs/mine", learning_rate=rate).learn()
    found = [row["ppo/learning_rate"] for row in rows(Path("runs/mine"))]
    assert found == pytest.approx([1e-3, 0.75e-3, 0.5e-3, 0.25e-3])
    number = load("saved", learning_rate=2e-4, n_steps=numpy.int64(8), batch_size=8).learn(24)  # takes its place
    assert rows(number.run_folder)[-1]["ppo/learning_rate"] == 2e-4  # type: ignore[arg-type]


def test_schedules_reach_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, update = [], loop.update

    def watched(policy: Any, batch: Any, objective: Any, **others: Any) -> Any:
        seen.append((objective.ent_coef, objective.clip_range))
        return update(policy, batch, objective, **others)

    monkeypatch.setattr(loop, "update", watched)
    small(ent_coef=0.04, ent_schedule="linear", clip_range=lambda left: 0.4 * left).learn(4 * BATCH)
    assert [value for pair in seen for value in pair] == pytest.approx([0.04, 0.4, 0.03, 0.3, 0.02, 0.2, 0.01, 0.1])


def test_stable_baselines3s_keywords_mean_what_they_mean_there() -> None:
    same_name = {"learning_rate": 1e-3, "batch_size": 16, "n_epochs": 3, "gamma": 0.9, "gae_lambda": 0.8, "clip_range": 0.3}
    same_name |= {"clip_range_vf": None, "normalize_advantage": False, "ent_coef": 0.01, "vf_coef": 0.7}
    same_name |= {"max_grad_norm": 0.9, "target_kl": None}
    rest = {"n_steps": 32, "use_sde": True, "sde_sample_freq": 4, "tensorboard_log": "board", "seed": None}
    rest |= {"verbose": 0, "device": "cpu", "_init_setup_model": True}
    networks = {"activation_fn": nn.ReLU, "net_arch": {"pi": [8, 6], "vf": [4]}, "log_std_init": -2.0}
    model = PPO("MlpPolicy", "Pendulum-v1", **same_name, **rest, policy_kwargs=networks)
    ppo, layers, head = model.config.ppo, model.policy.layers, model.policy.head
    assert {name: getattr(ppo, name) for name in same_name} == same_name and ppo.value_loss == "squared"
    towers = ((layer for layer in tower if isinstance(layer, nn.Linear)) for tower in (layers.policy, layers.value))
    assert [[layer.out_features for layer in tower] for tower in towers] == [[8, 6], [4]]
    assert isinstance(layers.policy[1], nn.ReLU) and type(head).__name__ == "StateDependentHead"
    assert head.sample_freq == 4 and head.log_std.detach().unique().tolist() == [-2.0]
    assert model.config.env.n_steps == 32 and model.config.run.folder == "board"
    assert rows(model.learn(32).run_folder)[0]["timesteps"] == 32  # no evaluation that nobody asked for


def test_the_global_generators_are_started_for_those_who_give_a_seed() -> None:
    def started() -> None:
        random.seed(5)
        numpy.random.seed(5)
        torch.manual_seed(5)

    def drawn() -> list[float]:
        return [random.random(), float(numpy.random.rand()), float(torch.rand(()))]

    def after(**seed: Any) -> list[float]:
        started()
        PPO("MlpPolicy", "CartPole-v1", n_steps=8, batch_size=8, n_epochs=1, verbose=0, **seed).learn(8)
        return drawn()

    started()
    untouched = drawn()
    assert after() == untouched != after(seed=3) == after(seed=3)
    assert len({PPO("MlpPolicy", "CartPole-v1", seed=None, verbose=0).config.seed for _ in range(2)}) == 2


IN_KWARGS = {"optimizer_class": torch.optim.SGD, "activation_fn": nn.Softmax, "use_beta": True}
KEYWORDS = [({"policy_kwargs": {name: value}}, f"policy_kwargs.{name}") for name, value in IN_KWARGS.items()]
KEYWORDS += [({"policy_kwargs": {"net_arch": value}}, "policy.network.net_arch") for value in ({"q": [3]}, [0])]
KEYWORDS += [({"clip_range_vf": lambda left: left}, "clip_range_vf"), ({"stats_window_size": 7}, "stats_window_size")]
KEYWORDS += [({"learning_rat": 1.0}, "'learning_rate'"), ({"total_episodes": 7}, "rollout"), ({"kl": {"coef": 0.1}}, "kl")]


@pytest.mark.parametrize(("settings", "named"), KEYWORDS, ids=lambda value: str(value)[:40])
def test_a_keyword_without_a_counterpart_is_one_line(settings: dict[str, Any], named: str) -> None:
    refusal(lambda: small(**settings), named)
