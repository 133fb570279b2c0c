"""Programs as users of Stable-Baselines3 write them, with vector environments, callbacks and loggers like its own."""

import io
from pathlib import Path
from typing import Any

import gymnasium
import numpy
import pytest
import torch
from gymnasium import spaces
from torch import nn

from surefoot import A2C, PPO, BaseCallback, MaskablePPO, RecurrentPPO, evaluate_policy
from tests.inputs import refusal
from tests.train.small_run import rows

pytestmark = pytest.mark.usefixtures("in_own_folder")
QUIET: dict[str, Any] = {"n_steps": 16, "batch_size": 16, "n_epochs": 1, "verbose": 0}


class Levels(gymnasium.Env[Any, Any]):
    """Episodes of 5 steps (every second one is cut); a reset without a seed leads to the next level, one with to level 1."""

    def __init__(self, space: spaces.Space[Any] | None = None):
        self.observation_space, self.action_space = space or spaces.Box(-1, 1, (3,)), spaces.Discrete(3)
        self.level, self.count, self.reached, self.steps, self.pace = 0, 0, [], 0, 1.0
        self.render_mode = "rgb_array"

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.level, self.count = 1 if seed is not None else self.level + 1, 0
        self.reached.append(self.level)
        return self._observation(), {}

    def step(self, action: Any) -> Any:
        self.count, self.steps = self.count + 1, self.steps + 1
        is_over, is_cut = self.count == 5, self.level % 2 == 0
        return self._observation(), self.pace, is_over and not is_cut, is_over and is_cut, {"level": self.level}

    def set_pace(self, pace: float) -> None:
        self.pace = pace

    def action_masks(self) -> Any:
        return numpy.arange(3) != self.count % 3

    def render(self) -> Any:
        return numpy.zeros((4, 4, 3), dtype=numpy.uint8)

    def _observation(self) -> Any:
        self.observation_space.seed(self.count)
        return self.observation_space.sample()


class Plain(Levels):
    action_masks: Any = property()  # hides it


class TheirVecEnv:
    """A vector environment with the methods of Stable-Baselines3's."""

    def __init__(self, *envs: Levels):
        self.envs, self.num_envs, self.seeds = envs, len(envs), []
        self.observation_space, self.action_space = envs[0].observation_space, envs[0].action_space

    def seed(self, seed: int) -> None:
        self.seeds.append(seed)

    def reset(self) -> Any:
        return numpy.stack([env.reset()[0] for env in self.envs])

    def step_wait(self) -> None: ...

    def step(self, actions: Any) -> Any:
        parts = []
        for env, action in zip(self.envs, actions, strict=True):
            observation, reward, ended, cut, info = env.step(action)
            info["TimeLimit.truncated"] = cut and not ended
            if ended or cut:
                info |= {"terminal_observation": observation, "episode": {"r": 5.0, "l": 5}}
                observation = env.reset()[0]
            parts.append((observation, reward, ended or cut, info))
        observations, rewards, dones, infos = zip(*parts, strict=True)
        return numpy.stack(observations), numpy.array(rewards), numpy.array(dones), list(infos)

    def env_method(self, name: str, *arguments: Any) -> list[Any]:
        return [env.get_wrapper_attr(name)(*arguments) for env in self.envs]

    def render(self, mode: str = "") -> Any: ...

    def close(self) -> None: ...


class TheirCallback:
    """A callback with the methods of Stable-Baselines3's, of which it inherits none of ours."""

    def __init__(self, last: int = 10**6):
        self.last, self.calls, self.seen = last, [], {}

    def init_callback(self, model: Any) -> None:
        self.model = model

    def update_locals(self, found: dict[str, Any]) -> None:
        self.seen.update(found)

    def on_training_start(self, found: dict[str, Any], _: Any) -> None:
        self.seen = found

    def on_step(self) -> bool:
        self.model.logger.record("mine/level", self.seen["infos"][0]["level"])
        self.calls.append(self.model.num_timesteps)
        return len(self.calls) < self.last

    def on_rollout_start(self) -> None: ...

    on_rollout_end = on_training_end = on_rollout_start


class TheirLogger:
    def __init__(self):
        self.dumped: list[tuple[int, set[str]]] = []
        self.names: set[str] = set()

    def record(self, name: str, value: Any, exclude: Any = None) -> None:
        self.names.add(name)

    def dump(self, step: int) -> None:
        self.dumped.append((step, self.names))


class Halves(nn.Module):
    """A features extractor like those of Stable-Baselines3: made from a space, images with their channels first."""

    def __init__(self, space: Any, features_dim: int = 2):
        super().__init__()
        self.features_dim, self.linear = features_dim, nn.Linear(int(numpy.prod(space.shape)), features_dim)
        self.shape = space.shape

    def forward(self, values: Any) -> Any:
        assert values.shape[1:] == self.shape and values.dtype == torch.float32 and values.max() <= 1
        return self.linear(values.flatten(1))


def test_an_environment_that_is_given_is_reset_as_plain_gymnasium_unless_there_is_a_seed() -> None:
    plain, seeded = Plain(), Plain()
    model = PPO("MlpPolicy", plain, **QUIET).learn(32)
    PPO("MlpPolicy", seeded, seed=0, **QUIET).learn(32)
    assert plain.reached == [1, 2, 3, 4, 5, 6, 7] and set(seeded.reached) == {1}
    assert "reseed: false" in (model.run_folder / "config.yaml").read_text()


def test_a_callback_that_ends_a_run_leaves_the_environment_where_it_stands(capfd: pytest.CaptureFixture[str]) -> None:
    env, callback = Plain(), TheirCallback(last=16 + 7)
    model = PPO("MlpPolicy", env, **QUIET).learn(64, callback=callback)
    assert (env.steps, len(env.reached), model.num_timesteps) == (23, 5, 23)
    model.learn(16, reset_num_timesteps=False)
    assert (env.steps, len(env.reached)) == (39, 8) and model.num_timesteps == 32
    model.learn(16)
    assert env.reached[-4:] == [9, 10, 11, 12]  # a new episode, but no new beginning
    PPO.load(model.run_folder, Plain(), verbose=0)
    assert "was given without a seed" in capfd.readouterr().err


def test_their_vector_environments_are_trained_in_and_given_back() -> None:
    env = TheirVecEnv(Plain(), Plain())
    model = PPO("MlpPolicy", env, gamma=0.5, gae_lambda=1.0, **QUIET)
    seen: list[Any] = []
    model.learn(64, callback=lambda found, _: seen.append(found))
    assert model.get_env() is env and env.seeds == [] and {e.total for e in model._session.parts[0].finished} == {5.0}
    first, second = (step["infos"][0] for step in (seen[4], seen[9]))
    assert (first["TimeLimit.truncated"], second["TimeLimit.truncated"]) == (False, True)
    assert first["episode"]["r"] == 5.0 and first["terminal_observation"].shape == (3,) and first["level"] == 1
    assert evaluate_policy(model, env, 4, return_episode_rewards=True) == ([5.0] * 4, [5] * 4)
    PPO("MlpPolicy", TheirVecEnv(env.envs[0]), seed=3, **QUIET).learn(16)


PROGRAMS: dict[str, Any] = {
    "names": lambda: [kind("MlpPolicy", Plain(), **QUIET).learn(16) for kind in (PPO, A2C)],
    "A2C": lambda: A2C("MlpPolicy", "CartPole-v1", use_rms_prop=True, device="cpu", verbose=0).learn(1e2, None),
    "LSTM": lambda: RecurrentPPO("MlpLstmPolicy", Plain(), n_steps=16, batch_size=20, verbose=0).learn(16),
    "learn": lambda: PPO("MlpPolicy", Plain(), **QUIET).learn(16.0, log_interval=4, tb_log_name="x"),
    "more": lambda: PPO("MlpPolicy", Plain(), **QUIET).learn(numpy.int64(16)).learn(16, reset_num_timesteps=False),
    "nets": lambda: PPO("MlpPolicy", Plain(), policy_kwargs={"net_arch": [{"pi": (4,)}], "activation_fn": nn.Mish}, **QUIET),
    "optimizer": lambda: PPO("MlpPolicy", Plain(), policy_kwargs={"optimizer_class": torch.optim.RMSprop}, **QUIET).learn(32),
    "extractor": lambda: PPO("MlpPolicy", Plain(), policy_kwargs={"features_extractor_class": Halves}, **QUIET).learn(16),
    "image": lambda: PPO(
        "CnnPolicy", Plain(spaces.Box(0, 255, (6, 5, 3), numpy.uint8)), **QUIET,
        policy_kwargs={"features_extractor_class": Halves, "features_extractor_kwargs": {"features_dim": 3}},
    ).learn(16),
}  # fmt: skip


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_run(program: str) -> None:
    PROGRAMS[program]()


def test_a2c_is_resumed_with_the_state_of_its_own_optimizer() -> None:
    def a2c(name: str) -> A2C:
        return A2C("MlpPolicy", "CartPole-v1", n_envs=2, run_name=name, verbose=0)

    once, _ = a2c("once").learn(40), a2c("half").learn(20)
    assert isinstance(once._session.training.optimizer, torch.optim.RMSprop) and once.config.ppo.batch_size == 10
    half = A2C.load("runs/half", verbose=0).learn(20)
    pairs = zip(once.policy.parameters(), half.policy.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs) and type(half) is A2C


def test_get_env_steps_renders_and_reaches_the_sub_environments() -> None:
    model = PPO("MlpPolicy", Plain(), **QUIET).learn(16)
    env = model.get_env()
    observations, ended = env.reset(), []
    for _ in range(10):
        observations, _, _, infos = env.step(model.predict(observations)[0])
        ended += [info["terminal_observation"].shape for info in infos if "terminal_observation" in info]
    assert ended == [(3,)] * 2 and env.render("human").shape == (4, 4, 3) and observations.shape == (1, 3)
    env.env_method("set_pace", 2.0)
    env.set_attr("count", 3, indices=0)
    assert env.get_attr("pace") == [2.0] and env.get_attr("count", 0) == [3]
    assert evaluate_policy(model, env, 2) == (10.0, 0.0) == evaluate_policy(model.policy, env, 2)


def test_what_callbacks_record_and_read() -> None:
    class Reads(BaseCallback):
        def _on_training_start(self) -> None:
            assert self.locals["total_timesteps"] == 32 and self.training_env.num_envs == 1
            self.logger.record("params", {"a": 1})  # no number

        def _on_step(self) -> bool:
            self.logger.record("mine/calls", self.n_calls)
            assert self.locals["new_obs"].shape == (1, 3) and self.locals["actions"].shape == (1,)
            return True

    model, theirs, logger = PPO("MlpPolicy", Plain(), **QUIET), TheirCallback(), TheirLogger()
    model.set_logger(logger)
    model.learn(32, callback=[Reads(), theirs])
    found = rows(model.run_folder)
    assert [row["mine/calls"] for row in found] == [16, 32] and "params" not in found[0]
    assert {step for step, _ in logger.dumped} == {16, 32} and logger.names >= {"params", "mine/level", "ppo/approx_kl"}
    assert theirs.calls == list(range(1, 33)) and model.logger.name_to_value["timesteps"] == 32
    assert (model.learning_rate, model.n_steps, model.gamma, len(model.ep_info_buffer)) == (3e-4, 16, 0.99, 6)
    assert model.observation_space == spaces.Box(-1, 1, (3,)) and model.action_space.n == 3
    with pytest.raises(AttributeError, match="docs/from-sb3"):
        _ = model.rollout_buffer


COUNTED = spaces.Dict({"a": spaces.Discrete(3, start=2), "b": spaces.Box(0, 255, (2,), numpy.uint8)})
SPACES = [spaces.Box(-numpy.inf, 1, (2, 3)), spaces.MultiBinary(3), spaces.MultiDiscrete([2, 3]), COUNTED]


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_a_model_is_loaded_without_its_environment(space: spaces.Space[Any]) -> None:
    env = Levels(space)
    model = MaskablePPO("MultiInputPolicy", env, **QUIET)
    model.save("saved")
    loaded = MaskablePPO.load("saved.zip", verbose=0)
    asked = {"action_masks": env.action_masks(), "deterministic": True}
    seen = env.observation_space.sample()
    assert model.predict(seen, **asked)[0] == loaded.predict(seen, **asked)[0]
    refusal(lambda: loaded.learn(16), "set_env")
    loaded.set_env(Levels(space))
    refusal(lambda: loaded.set_env("CartPole-v1"), "CartPole-v1")


def test_parameters_and_the_forward_pass() -> None:
    model, other = (PPO("MlpPolicy", Plain(), seed=seed, **QUIET) for seed in (0, 1))
    seen = torch.rand(5, 3)
    actions, values, logprobs = model.policy(seen, deterministic=True)
    assert actions.tolist() == model.predict(seen.numpy(), deterministic=True)[0].tolist()
    assert values.shape == (5, 1) and (logprobs < 0).all()
    other.set_parameters(model.get_parameters())
    assert torch.equal(other.policy(seen)[1], values)
    refusal(lambda: other.set_parameters({"policy": {}}), "set_parameters")


def test_what_is_not_taken_is_one_line() -> None:
    class ActorCriticPolicy:
        """By its name Stable-Baselines3's, but from elsewhere."""

    refusal(lambda: PPO(ActorCriticPolicy, Plain()), "features_extractor_class")
    listed = gymnasium.wrappers.vector.DictInfoToList(gymnasium.vector.SyncVectorEnv([Plain]))
    refusal(lambda: PPO("MlpPolicy", listed, run_folder="x", **QUIET).learn(16), "DictInfoToList")
    masked = Levels()
    masked.action_space = spaces.MultiBinary(3)
    refusal(lambda: PPO("MlpPolicy", masked, **QUIET), "action masks", "MultiBinary")
    model = PPO("MlpPolicy", Plain(), **QUIET)
    refusal(lambda: model.save(io.BytesIO()), "BytesIO")
    refusal(lambda: model.predict(Plain().reset()), "reset()")
    Path("theirs.zip").touch()
    refusal(lambda: PPO.load("theirs.zip"), "theirs.zip", "pickles")
    refusal(lambda: evaluate_policy(PPO("MlpPolicy", Plain(), **QUIET), Plain(), n=3), "'n'")
    with pytest.raises(ImportError, match="stable_baselines3"):
        from surefoot import EvalCallback  # noqa: F401
    assert not Path("runs").exists()
