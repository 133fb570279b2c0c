"""Environments with a script: what is trained on, what a cut-off episode is worth, and what a broken one says."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import gymnasium
import numpy
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

from surefoot import PPO, advantages
from surefoot.config import EnvConfig, NetworkConfig, PPOConfig
from surefoot.envs.gym import Vector, action_range_notice
from surefoot.envs.make import make_vector, wrap_vector
from surefoot.envs.observations import Checks
from surefoot.policies.control.policy import ControlPolicy
from surefoot.rollout.gym import GymRollout, run_episodes
from surefoot.types import Batch
from tests.envs.counter import Counter
from tests.fakes import config_of
from tests.inputs import refusal

pytestmark = pytest.mark.usefixtures("in_own_folder")
MODES = list(AutoresetMode)
EACH_MODE = pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
# Sub-environments by the length of their episodes and how those end.
ENVS = [(3, "truncated"), (3, "terminated"), (2, "truncated"), (3, "both")]
ONE_BOX = spaces.Box(0.0, 1.0, (1,))
WITH_MASK = spaces.Dict({"obs": ONE_BOX, "action_mask": spaces.MultiBinary(3)})


def counters(kind: Any, mode: AutoresetMode, envs: Any = ENVS) -> Vector:
    return wrap_vector(kind([lambda e=e: Counter(*e) for e in envs], autoreset_mode=mode), seed=0)


def made(kind: Any, length: int = 9, end: str = "truncated", n_envs: int = 2) -> Vector:
    return make_vector(kind, n_envs=n_envs, kwargs={"length": length, "end": end}, seed=0)


def linear_critic(env: Vector, *, slope: float = 0.0, at_zero: float = 0.0, model: str = "MlpPolicy") -> ControlPolicy:
    """V(s) = at_zero + slope · s."""
    config = NetworkConfig(net_arch={"pi": [4], "vf": []}, lstm_hidden_size=4)
    policy = ControlPolicy(env.observation_spaces, env.action_space, config=config, kind=model)
    torch.nn.init.constant_(policy.value_head.weight, slope)
    torch.nn.init.constant_(policy.value_head.bias, at_zero)
    return policy


def rollout_of(policy: ControlPolicy, env: Vector, n_steps: int, **settings: Any) -> GymRollout:
    ppo = PPOConfig(batch_size=n_steps, gamma=0.9)
    return GymRollout(policy, env, settings=EnvConfig(n_steps=n_steps, **settings), ppo=ppo, seed=0)


def collect(rollout: GymRollout, version: int = 0) -> Batch:
    return rollout.collect(first=0, count=rollout.per_update, version=version)


def stepped(env: Any, n_steps: int = 12) -> Batch:
    """A rollout of a fresh policy."""
    vector = wrap_vector(env, seed=0)
    return collect(rollout_of(ControlPolicy(vector.observation_spaces, vector.action_space), vector, n_steps))


def script(env: tuple[int, str], mode: AutoresetMode, n_steps: int, rollouts: int) -> list[list[tuple[float, ...]]]:
    """What one sub-environment is to be trained on, rollout by rollout: (state, reward, whether cut here, bootstrap)."""
    length, end = env
    found: list[list[tuple[float, ...]]] = []
    state = 0
    for _ in range(rollouts):
        rows: list[tuple[float, ...]] = []
        for _ in range(n_steps):
            if state == length:  # NEXT_STEP's step that only resets
                state = 0
                continue
            over = state + 1 == length
            rows.append((state, state + 1, over, 10 + 100 * length if over and end == "truncated" else 0))
            state = 0 if over and mode != AutoresetMode.NEXT_STEP else state + 1
        if rows and not rows[-1][2]:
            rows[-1] = (*rows[-1][:2], True, 10 + 100 * state)
        found.append(rows)
    return found


@pytest.mark.parametrize(("kind", "n_steps"), [*((SyncVectorEnv, n) for n in (1, 2, 3, 4, 7, 8)), (AsyncVectorEnv, 7)])
@EACH_MODE
def test_only_what_happened_is_trained_on_in_every_autoreset_mode(mode: AutoresetMode, kind: Any, n_steps: int) -> None:
    env = counters(kind, mode)
    rollout = rollout_of(linear_critic(env, slope=100.0, at_zero=10.0), env, n_steps)
    expected = [script(env, mode, n_steps, rollouts=3) for env in ENVS]
    trained = 0
    for number in range(3):
        batch = collect(rollout, number)
        bootstrap_BT = torch.where(batch.ends_BT, batch.bootstrap_BT, 0)
        columns = (batch.observations["obs"][..., 0], batch.rewards_BT, batch.ends_BT, bootstrap_BT)
        for b, mask_T in enumerate(batch.mask_BT):
            rows = zip(*(column[b, mask_T].tolist() for column in columns), strict=True)
            assert [*map(list, rows)] == [[*map(float, row)] for row in expected[b][number]], (b, number)
        steps = batch.flatten()
        assert len(steps) == int(batch.mask_BT.sum()) and bool(steps.mask_BT.all())
        assert steps.observations["obs"].max() < 3  # a state that ends an episode is never acted on
        assert torch.equal(steps.values_BT[:, 0], 10 + 100 * steps.observations["obs"][:, 0, 0])
        trained += len(steps)
    assert trained == sum(env.env.get_attr("steps"))
    env.close()


@pytest.mark.parametrize("model", ["MlpPolicy", "MlpLstmPolicy"])
@EACH_MODE
def test_a_time_limit_does_not_change_what_a_state_is_worth(mode: AutoresetMode, model: str) -> None:
    """Reward 1 for ever, cut every 8 steps: V = 1 / (1 - γ) is GAE's fixed point, at every step."""
    env = counters(SyncVectorEnv, mode, [(8, "truncated"), (5, "truncated")])
    rollout = rollout_of(linear_critic(env, at_zero=10.0, model=model), env, 19)
    for number in range(3):
        batch = collect(rollout, number)
        batch.rewards_BT = batch.mask_BT.float()
        advantages(batch, config_of(gamma=0.9))
        assert batch.returns_BT is not None and batch.advantages_BT is not None
        assert torch.allclose(batch.returns_BT[batch.mask_BT], torch.tensor(10.0), atol=1e-5)
        assert batch.advantages_BT.abs().max() < 1e-5


@EACH_MODE
def test_episodes_are_reported_as_they_were_played(mode: AutoresetMode) -> None:
    env = counters(SyncVectorEnv, mode)
    rollout = rollout_of(linear_critic(env), env, 5)
    found = [episode for number in range(4) for episode in collect(rollout, number).trajectories]
    kinds = {(episode.total, episode.steps, episode.truncated) for episode in found}
    assert kinds == {(6.0, 3, True), (6.0, 3, False), (3.0, 2, True)}
    played = run_episodes(rollout.policy, counters(SyncVectorEnv, mode), 6)
    # Two for each of the first two and one for each of the others, although the third's are over first.
    assert [episode.steps for episode in played] == [3, 3, 3, 3, 2, 3]


def test_rewards_are_scaled_by_the_std_of_the_discounted_return() -> None:
    env = counters(SyncVectorEnv, AutoresetMode.NEXT_STEP, [(3, "terminated")])
    rollout = rollout_of(linear_critic(env), env, 6, normalize_rewards=True)
    batch = collect(rollout)
    # Rewards 1 2 3 (reset) 1 2; discounted by 0.9: 1, 2.9, 5.61, then again 1, 2.9. The reset is no return.
    returns = [1.0, 2.9, 5.61, 1.0, 2.9]
    stds = [float(numpy.std(returns[:n])) or 1.0 for n in range(1, 6)]
    expected = [min(reward / std, 10.0) for reward, std in zip([1.0, 2.0, 3.0, 1.0, 2.0], stds, strict=True)]
    assert batch.rewards_BT[batch.mask_BT].tolist() == pytest.approx(expected, rel=1e-5)
    assert rollout.finished[0].total == 6.0


class Odd(Counter):
    """A counter that does one thing it should not, at its second step."""

    def __init__(self, fault: str = ""):
        super().__init__(5, "terminated")
        self.fault = fault

    def step(self, action: int) -> Any:
        observation, reward, *rest = super().step(action)
        fault = self.fault if self.steps == 2 else ""
        if fault == "raises":
            raise RuntimeError("the wheel\ncame off")
        if fault == "exits":
            sys.exit()
        if fault == "huge":
            reward = 1e39
        return observation + (numpy.nan if fault == "observation" else 0), numpy.inf if fault == "reward" else reward, *rest


class Masked(Counter):
    """Three actions, of which the second is legal; and a state after which none is, at the end or before it."""

    observation_space = WITH_MASK
    action_space = spaces.Discrete(3)

    def __init__(self, length: int, none_at: Any):
        super().__init__(length, "terminated")
        self.none_at = none_at

    def step(self, action: int) -> Any:
        assert self._observation()["action_mask"][action], "illegal"
        return super().step(action)

    def _observation(self) -> Any:
        mask = numpy.array([0, 1, 0], dtype=numpy.int8) * (self.count != self.none_at)
        return {"obs": numpy.zeros(1, dtype=numpy.float32), "action_mask": mask}


class ByMethod(Counter):
    """Its legal actions are what sb3-contrib's `action_masks` says: 0 at first, 1 from then on."""

    def action_masks(self) -> Any:
        return numpy.array([self.count == 0, self.count != 0])

    def step(self, action: int) -> Any:
        assert self.action_masks()[action], "illegal"
        return super().step(action)


class TwoChoices(Counter):
    """A mask over 2 + 3 actions; in the second choice nothing but the last is ever legal, or nothing at all."""

    observation_space = spaces.Dict({"obs": ONE_BOX, "action_mask": spaces.MultiBinary(5)})
    action_space = spaces.MultiDiscrete([2, 3])

    def step(self, action: Any) -> Any:
        assert action[1] == 2, "illegal"
        return super().step(action[0])

    def _observation(self) -> Any:
        stuck = self.end == "stuck" and self.count == 1
        mask = numpy.array([1, 1, 0, 0, not stuck], dtype=numpy.int8)
        return {"obs": numpy.zeros(1, dtype=numpy.float32), "action_mask": mask}


def network(**attributes: Any) -> Any:
    made = torch.nn.Identity()
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


def odd_spaces(observation: Any = ONE_BOX, action: Any = Counter.action_space) -> Any:
    env = Counter(3, "terminated")
    env.observation_space, env.action_space = observation, action
    return env


def ppo(env: Any, policy: Any = "MlpPolicy", **settings: Any) -> PPO:
    return PPO(policy, env, **{"verbose": 0, "device": "cpu", "n_steps": 8, "batch_size": 8, "n_epochs": 1, **settings})


BROKEN = "kind, nothing = lambda: int, lambda: None\ndef make(): raise RuntimeError('the engine is missing')\n"
SPACES: list[tuple[Any, str]] = [
    (odd_spaces(spaces.Tuple((ONE_BOX, ONE_BOX))), "observation space Tuple"),
    (odd_spaces(spaces.Dict(a=spaces.Dict(b=spaces.Text(5)))), "observation space Text"),
    (odd_spaces(action=spaces.Box(0, 1, (2, 2))), "action space Box(0.0, 1.0, (2, 2), float32)"),
    (odd_spaces(action=spaces.Tuple((ONE_BOX,))), "action space Tuple("),
    (odd_spaces(WITH_MASK, ONE_BOX), "Box"),
    (odd_spaces(WITH_MASK), "shape [3]; Discrete(2) has 2"),
    (odd_spaces(action=spaces.Discrete(10**9)), "action space Discrete has 1,000,000,000"),
    (odd_spaces(action=spaces.MultiDiscrete([10**9, 3])), "action space MultiDiscrete has 1,000,000,003"),
    (odd_spaces(spaces.Dict(a=spaces.MultiBinary(10**9))), "observation space Dict has 1,000,000,000"),
    ("CartPol-v1", "'CartPole-v1'"),
    (5, "int"),
    (None, "env"),
    ("highway-fast-v0", "highway_env:highway-fast-v0 (pip install 'surefoot[driving]')"),
    ("ALE/Pong-v5", "ale_py:ALE/Pong-v5 (pip install 'surefoot[atari]')"),
    ("broken.py:make", "the engine is missing"),
    ("broken.py:nothing", "gymnasium.Env to be made, got NoneType"),
    ("broken.py:kind", "gymnasium.Env to be made, got type"),
]
SETTINGS: list[tuple[Any, Any, dict[str, Any], str]] = [
    ("CartPole-v1", "MlpPolcy", {}, "MlpPolicy"),
    ("CartPole-v1", "CnnPolicy", {}, "policy.model"),
    ("CartPole-v1", "MlpPolicy", {"n_envs": 2, "env_kwargs": {"wheels": 3}}, "wheels"),
    (Counter(), "MlpPolicy", {"n_envs": 4}, "n_envs"),
    (Counter(), network(features_dim=7), {}, "[2, 1] for 2 observations; not [2, 7]"),
    (Counter(), network(act=None), {}, "lacks acting, "),
    (Counter(), network(), {}, "your network needs a features_dim"),
]


@pytest.mark.parametrize(
    ("env", "policy", "settings", "named"), [*((env, "MlpPolicy", {}, named) for env, named in SPACES), *SETTINGS]
)
def test_what_cannot_be_trained_on_is_one_line(env: Any, policy: Any, settings: dict[str, Any], named: str) -> None:
    Path("broken.py").write_text(BROKEN)
    refusal(lambda: ppo(env, policy, **settings), named)


FAULTS = [("raises", "env Odd failed: RuntimeError: the wheel came off"), ("killed", "env Odd failed")]
FAULTS += [("exits", "env Odd failed"), ("huge", "the reward of sub-environment 0 is 1e+39")]
FAULTS += [(what, f"the {named} of sub-environment 0") for what, named in (("observation", "observation obs"), ("reward",) * 2)]


@pytest.mark.filterwarnings("ignore:.*ERROR:UserWarning")  # Gymnasium's log of what a worker raised
@pytest.mark.parametrize("vectorization", ["sync", "async"])
@pytest.mark.parametrize(("fault", "named"), FAULTS)
def test_an_environment_that_fails_is_one_line_and_leaves_no_worker(vectorization: str, fault: str, named: str) -> None:
    env = make_vector(Odd, n_envs=2, vectorization=vectorization, kwargs={"fault": fault}, seed=0)
    workers = list(env.env.processes) if vectorization == "async" else []
    rollout = rollout_of(linear_critic(env), env, 8)
    if fault == "killed":
        collect(rollout)
        if not workers:
            return
        os.kill(workers[1].pid, signal.SIGKILL)
    refusal(lambda: collect(rollout, 1), named)
    if fault in ("observation", "reward", "huge"):
        env.close()
    for worker in workers:
        worker.join(5)
        assert not worker.is_alive()


@EACH_MODE
def test_no_legal_action_is_an_error_before_the_end_and_none_at_it(mode: AutoresetMode) -> None:
    def steps(none_at: int) -> Batch:
        return stepped(SyncVectorEnv([lambda: Masked(3, none_at)], autoreset_mode=mode), 8)

    refusal(lambda: steps(1), "sub-environment 0", "action_mask")
    batch = steps(3)  # when all is over there is nothing to do, and nobody asks for it
    assert set(batch.actions_BT[batch.mask_BT].tolist()) == {1}
    assert batch.logprobs_BT[batch.mask_BT].abs().max() < 1e-6


def test_masks_by_method_are_asked_for_as_sb3_contrib_does() -> None:
    vectors = [kind([lambda: ByMethod(3, "truncated")], autoreset_mode=MODES[2]) for kind in (SyncVectorEnv, AsyncVectorEnv)]
    for env in (wrap_vector(ByMethod(3, "truncated"), seed=0), made(ByMethod, 3), *vectors):
        batch = stepped(env)
        assert torch.equal(batch.actions_BT, (batch.observations["obs"][..., 0] != 0).long())
        env.close()


def test_masks_of_several_choices_leave_an_action_in_each() -> None:
    first, second = (set(actions.flatten().tolist()) for actions in stepped(made(TwoChoices, 4)).actions_BT.unbind(-1))
    assert (first, second) == ({0, 1}, {2})
    refusal(lambda: stepped(made(TwoChoices, 4, "stuck")), "sub-environment 0", "action_mask")


@pytest.mark.parametrize("kind", [ByMethod, TwoChoices, Masked])
def test_masked_episodes_are_repeated_by_legal_actions(kind: Any) -> None:
    """Histories of unlike length: while the shorter one waits for its replay it must do nothing illegal."""
    kwargs: Any = {"length": 7, "none_at": -1} if kind is Masked else {"length": 7, "end": "terminated"}
    env, again = (make_vector(kind, n_envs=3, kwargs=kwargs, seed=1) for _ in range(2))
    stepped(env, 3)
    env.actions[1] = env.actions[1][:1]  # as if its episode had begun two steps later
    assert again.restore(env.state()) is not None and [one.unwrapped.count for one in again.env.envs] == [3, 1, 3]


def test_an_episode_too_long_to_be_repeated_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("surefoot.envs.gym.LONGEST_REPLAY", 5)
    env = made(Counter)
    env.reset()
    for step in range(1, 13):
        env.step(numpy.zeros(2, dtype=numpy.int64))
        kept, into_episode = env.state()["actions"], step % 9
        assert kept is None if into_episode > 5 else [len(history) for history in kept] == [into_episode] * 2
        assert len(env.actions[0]) <= 6


def test_values_beyond_their_bounds_are_said_once_and_used(capsys: pytest.CaptureFixture[str]) -> None:
    class Beyond(Counter):
        observation_space = spaces.Box(0.0, 2.0, (1,))

    assert stepped(Beyond(5, "truncated")).observations["obs"].max() == 4
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["surefoot: env Beyond: the observation obs lies up to 1 outside its space; used as it is"]


class Gives(Counter):
    """Its steps give `odd` as the observation, or in the place that `at` names."""

    def __init__(self, space: Any, odd: Any, at: str = "observation"):
        super().__init__(3, "terminated")
        self.observation_space, self.odd, self.at = space, odd, at

    def reset(self, **settings: Any) -> Any:
        super().reset(**settings)
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> Any:
        _, *rest = super().step(action)
        places = dict(zip(("observation", "reward", "terminated", "truncated", "info"), (None, *rest), strict=True))
        return tuple((places | {"observation": self.observation_space.sample(), self.at: self.odd}).values())


PAIR, BYTES = spaces.Box(-1, 1, (2,)), spaces.Box(0, 255, (2,), numpy.uint8)
# A space, what stands in the place of an observation of it or of another part of a step, and what is named.
ODD = [
    *((PAIR, odd, "observation", "shape") for odd in (numpy.zeros(1), 0.5, numpy.zeros((2, 1)))),
    *((BYTES, odd, "observation", "does not hold them") for odd in map(numpy.array, ([300, 1], [0.2, 0.9], [-1, 1]))),
    (spaces.Discrete(3), 1.5, "observation", "does not hold them"),
    (spaces.Discrete(3), 3, "observation", "outside its space Discrete(3)"),
    (spaces.MultiDiscrete([3, 3]), numpy.array([0, 3]), "observation", "outside its space MultiDiscrete"),
    (spaces.MultiBinary(2), numpy.array([0, 2]), "observation", "outside its space MultiBinary"),
    (spaces.Dict(a=PAIR, b=BYTES), {"a": numpy.zeros(2)}, "observation", "['a', 'b']"),
    *((PAIR, numpy.ones(1), at, "array([1.])") for at in ("reward", "terminated", "truncated")),
]


@pytest.mark.filterwarnings("ignore:.*ERROR:UserWarning")  # Gymnasium's log of what a worker raised
@pytest.mark.parametrize("vectorization", ["sync", "async"])
@pytest.mark.parametrize(("space", "odd", "at", "named"), ODD)
def test_workers_and_this_process_refuse_the_same_steps(vectorization: str, space: Any, odd: Any, at: str, named: str) -> None:
    kwargs = {"space": space, "odd": odd, "at": at}
    env = make_vector(Gives, n_envs=2, vectorization=vectorization, kwargs=kwargs, seed=0)
    env.reset()
    refusal(lambda: env.step(numpy.zeros(2, dtype=numpy.int64)), "env", at, named)


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_workers_and_this_process_take_the_same_observations(vectorization: str) -> None:
    taken = [(PAIR, numpy.zeros(2)), (PAIR, [0, 1]), (BYTES, numpy.array([255, 0])), (spaces.Discrete(3), 2)]
    taken += [(spaces.Box(0, 1, (2,), bool), numpy.array([1, 0])), (spaces.Dict(obs=PAIR), {"obs": numpy.ones(2), "b": 3})]
    for space, odd, at in (*((*one, "observation") for one in taken), (PAIR, numpy.array(2.0), "reward")):
        kwargs = {"space": space, "odd": odd, "at": at}
        env = make_vector(Gives, n_envs=1, vectorization=vectorization, kwargs=kwargs, seed=0)
        env.reset()
        step = env.step(numpy.zeros(1, dtype=numpy.int64))
        expected = odd["obs"] if isinstance(odd, dict) else odd
        found = step.rewards if at == "reward" else step.observations["obs"]
        assert found[0].tolist() == numpy.asarray(expected).tolist() and "b" not in step.observations
        env.close()


@pytest.mark.slow
def test_workers_that_end_at_once_are_told_from_a_script_that_each_imports() -> None:
    """As by spawn and forkserver, in a script that is not guarded; one that is may name a file's function."""
    Path("made.py").write_text("import gymnasium\ndef make():\n    return gymnasium.make('CartPole-v1')\n")
    begin = "import multiprocessing\nfrom surefoot import PPO\nmultiprocessing.set_start_method('forkserver')\n"
    learn = "PPO('MlpPolicy', 'made.py:make', n_envs=2, vectorization='async', n_steps=8, batch_size=8).learn(32)"
    for guard, said in (("", "if __name__ =="), ("\nif __name__ == '__main__':\n", "update 2/2")):
        lines = [line if not guard else f"    {line}" for line in (begin + learn).splitlines()]
        Path("script.py").write_text(guard + "\n".join(lines))
        ended = subprocess.run([sys.executable, "script.py"], capture_output=True, text=True, check=False)
        assert said in (ended.stdout + ended.stderr).strip().splitlines()[-1], ended


def test_an_image_of_unknown_scale_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    space = spaces.Box(-numpy.inf, numpy.inf, (4, 4, 3), numpy.float32)
    checks = Checks({"obs": space}, Counter.action_space, "Camera")
    for brightness in (1.0, 200.0, 201.0):
        checks({"obs": numpy.full((1, 4, 4, 3), brightness, numpy.float32)})
    assert capsys.readouterr().err.splitlines() == [
        "surefoot: env Camera: the observation obs goes up to 200; scale it to about [0, 1], or give its space bounds, "
        "by which it is divided"
    ]


@pytest.mark.parametrize(("low", "high"), [(5, 6), (0, 0.001), (1, 20), (0, 1e6), (0, 10), (-10, 10)])
def test_a_range_that_first_actions_hardly_meet_is_said_with_the_remedy(low: float, high: float) -> None:
    box = spaces.Box(numpy.array([-1, low], numpy.float32), numpy.array([1, high], numpy.float32))
    notice = action_range_notice(box, 1.0)
    assert notice.startswith(f"env: action 1 goes from {low:g} to {high:g}: ") and "RescaleAction(env, -1, 1)" in notice


MOST = float(numpy.finfo(numpy.float32).max)
MET = [(-1, 1), (0, 1), (-2, 2), (-0.4, 0.4), (-3, 3), (0, 0), (0, numpy.inf), (-numpy.inf, numpy.inf), (-MOST, MOST)]


@pytest.mark.parametrize(("low", "high"), MET)
def test_a_range_that_first_actions_meet_needs_no_word(low: float, high: float) -> None:
    assert action_range_notice(spaces.Box(low, high, (2,)), 1.0) == action_range_notice(spaces.Discrete(2), 1.0) == ""
    assert action_range_notice(spaces.Box(-10, 10, (2,)), 4.0) == ""  # it begins with a larger std


def test_layers_of_ones_own_that_change_in_training_are_named() -> None:
    layers: Any = torch.nn.Sequential(torch.nn.Linear(1, 3), torch.nn.BatchNorm1d(3), torch.nn.Dropout(0.5))
    layers.features_dim = 3
    model = ppo(Counter(3, "terminated"), layers)
    assert "BatchNorm1d and Dropout" in model._session.parts[0].notice


@pytest.mark.parametrize(("as_dict", "last"), [(False, numpy.nan), (True, numpy.nan), (True, 1e300)])
def test_a_final_observation_that_is_not_finite_in_float32_is_an_error(as_dict: bool, last: float) -> None:
    def shown(value: float) -> Any:
        values = numpy.full((1, 1), value, dtype="f8")
        return {"a": {"b": values}} if as_dict else values

    class Ends(gymnasium.vector.VectorEnv):
        metadata: ClassVar[dict[str, Any]] = {"autoreset_mode": AutoresetMode.SAME_STEP}
        num_envs, single_action_space = 1, spaces.Discrete(2)
        single_observation_space: Any = spaces.Dict(a=spaces.Dict(b=ONE_BOX)) if as_dict else ONE_BOX

        def reset(self, *, seed: Any = None, options: Any = None) -> Any:
            return shown(0.0), {}

        def step(self, actions: Any) -> Any:
            no = numpy.zeros(1, dtype=bool)
            return shown(0.0), numpy.zeros(1), no, ~no, {"final_obs": shown(last) if as_dict else [shown(last)[0]]}

    refusal(lambda: stepped(Ends(), 3), "sub-environment 0", "not finite")


def test_counts_that_do_not_start_at_0_are_counts_all_the_same() -> None:
    class Started(Counter):
        observation_space = spaces.Discrete(4, start=1)
        action_space = spaces.Discrete(2, start=5)

        def step(self, action: int) -> Any:
            assert action in self.action_space
            return super().step(action)

        def _observation(self) -> Any:
            return self.count + 1

    batch = stepped(Started(3, "truncated"))
    values = {int(state): float(value) for state, value in zip(batch.observations["obs"][0], batch.values_BT[0], strict=True)}
    assert len(values) == len(set(values.values())) == 3


def test_observations_in_a_buffer_that_is_written_again_are_kept() -> None:
    env = wrap_vector(SyncVectorEnv([lambda: Counter(3, "truncated")], copy=False, autoreset_mode=MODES[-1]), seed=0)
    batch = collect(rollout_of(linear_critic(env, slope=100.0, at_zero=10.0), env, 5))
    assert batch.observations["obs"][0, :, 0].tolist() == [0, 1, 2, 0, 1]
    assert batch.bootstrap_BT[0, [2, 4]].tolist() == [310, 210]


def test_continuous_actions_are_clipped_to_the_space_on_their_way_and_trained_on_as_drawn() -> None:
    class Narrow(Counter):
        action_space = spaces.Box(-0.01, 0.01, (2,))

        def step(self, action: Any) -> Any:
            assert action in self.action_space and action.dtype == numpy.float32
            return super().step(0)

    assert stepped(Narrow(3, "truncated")).actions_BT.abs().max() > 0.01


def test_an_environment_may_change_the_action_it_is_given() -> None:
    class Greedy(Counter):
        action_space = spaces.MultiDiscrete([2, 3])

        def step(self, action: Any) -> Any:
            action *= 5
            return super().step(0)

    env = made(Greedy)
    batch = stepped(env, 5)
    assert set(batch.actions_BT.flatten().tolist()) == {0, 1, 2}
    assert numpy.array_equal(numpy.stack(env.actions[1]), batch.actions_BT[1].numpy())


def test_a_rollout_of_one_step_that_only_reset_changes_nothing() -> None:
    env = counters(SyncVectorEnv, AutoresetMode.NEXT_STEP, [(1, "terminated")])
    assert ppo(env.env, n_steps=1, batch_size=2, evaluate_episodes=0).learn(4).num_timesteps == 4


def test_an_evaluation_that_never_ends_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("surefoot.rollout.gym.LONGEST_EPISODE", 50)
    env = made(Counter, 10**9)
    refusal(lambda: run_episodes(linear_critic(env), env, 1), "50 steps", "max_episode_steps", "evaluate.episodes")


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_episodes_under_way_are_repeated_from_their_seeds(kind: str) -> None:
    env, again = (make_vector("CartPole-v1", n_envs=3, vectorization=kind, kwargs={}, seed=4) for _ in range(2))
    actions = numpy.random.default_rng(0).integers(0, 2, (60, 3))
    env.reset()
    for row in actions[:47]:
        observations = env.step(row).observations
    assert len({len(history) for history in env.actions}) > 1 and env.episodes.min() > 1
    restored = again.restore(env.state())
    assert restored is not None and numpy.array_equal(restored["obs"], observations["obs"])
    for row in actions[47:]:
        assert numpy.array_equal(env.step(row).observations["obs"], again.step(row).observations["obs"])
    env.close()
    again.close()


def test_workers_end_with_a_run_that_was_killed():
    program = "import os, signal; from surefoot import make_env; v = make_env('CartPole-v1', n_envs=2, vectorization='async')"
    program += "; print(*(p.pid for p in v.env.processes), flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    ended = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=False)
    workers, give_up = ended.stdout.split(), time.monotonic() + 10
    while any(os.path.exists(f"/proc/{pid}") and "State:\tZ" not in Path(f"/proc/{pid}/status").read_text() for pid in workers):
        assert time.monotonic() < give_up, workers
        time.sleep(0.1)
    assert len(workers) == 2
