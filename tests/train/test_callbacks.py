"""Callbacks and observers of every kind of run: what they see, how they end one, and that they stay their owner's."""

from typing import Any

import numpy
import pytest

from surefoot import PPO, SFT, BaseCallback, RewardModel, TextTask
from surefoot.storage.run_folder import RunFolder
from surefoot.train import loop
from surefoot.train.callbacks import calling
from tests.inputs import model_folder, refusal
from tests.train.small_run import rows

pytestmark = pytest.mark.usefixtures("in_own_folder")
PAIRS = [{"prompt": f"film {n}", "chosen": f" is good {n}", "rejected": f" is bad {n}"} for n in range(12)]
SMALL: dict[str, Any] = {"dtype": "float32", "device": "cpu", "verbose": 0}


def text(**settings: Any) -> PPO:
    task = TextTask(["the film", "a band", "one"], lambda prompts, completions, **_: [float(len(c)) for c in completions])
    sizes = {"total_episodes": 16, "episodes_per_update": 4, "batch_size": 4, "n_epochs": 1, "max_new_tokens": 2}
    return PPO(model_folder(), task, **sizes, **SMALL, **settings)


MODELS = {
    "ppo": (text, 4, 4),  # what makes it, its updates, units of the budget in one
    "sft": (lambda: SFT(model_folder(), ["a film", "one", "two"], held_out=0.0, epochs=4, batch_size=3, **SMALL), 4, 3),
    "reward model": (lambda: RewardModel(model_folder(), PAIRS, held_out=0.0, epochs=4, batch_size=12, **SMALL), 4, 12),
    "environment": (lambda: PPO("MlpPolicy", "CartPole-v1", n_steps=8, batch_size=8, total_timesteps=32, verbose=0), 4, 8),
}


class Recorder(BaseCallback):
    """Records which hook was called with what; `last` is the number of the step after which to end."""

    def __init__(self, last: int | None = None):
        super().__init__()
        self.last, self.hooks, self.counted = last, [], []
        for name in ("training_start", "rollout_start", "rollout_end", "training_end"):
            setattr(self, f"_on_{name}", lambda name=name: self.hooks.append(name))

    def _on_step(self) -> bool:
        assert getattr(self.model, "num_timesteps", self.num_timesteps) == self.num_timesteps
        assert self.training.policy is self.model.policy
        self.counted.append(self.num_timesteps)
        self.hooks.append("step")
        return self.n_calls != self.last


@pytest.mark.parametrize("kind", MODELS)
def test_every_kind_of_run_calls_back(kind):
    make, updates, size = MODELS[kind]
    recorder, seen = Recorder(), []
    model = make().learn(callback=[recorder, lambda found, _: seen.append(found)])
    steps = ["step"] * size
    one = ["rollout_start", *steps, "rollout_end"] if kind == "environment" else ["rollout_start", "rollout_end", "step"]
    assert recorder.hooks == ["training_start", *one * updates, "training_end"]
    each = 1 if kind == "environment" else size
    assert recorder.counted == [each * (n + 1) for n in range(len(recorder.counted))]
    assert recorder.n_calls == len(seen) and seen[-1].keys() >= ({"rewards"} if kind == "environment" else {"metrics"})
    logged = [row for row in RunFolder.open(model.run_folder).read("metrics.jsonl") if "eval/metric" not in row]
    if kind != "environment":
        assert [{"update": n + 1, **found["metrics"]} for n, found in enumerate(seen)] == logged


@pytest.mark.parametrize("kind", MODELS)
def test_a_callback_ends_the_run_which_goes_on_with_the_next_learn(kind):
    make, updates, size = MODELS[kind]
    after = size + 3 if kind == "environment" else 1  # in the second rollout, or with the first update
    model = make().learn(callback=Recorder(last=after))
    assert (model.run_folder / "checkpoints" / "latest").read_text() == "00000001" and not model.is_finished
    assert model.learn().is_finished
    logged = [row["update"] for row in rows(model.run_folder) if "eval/metric" not in row]
    assert logged == list(range(1, updates + 1))


class Observer:
    """What its owner adds to a training."""

    def __init__(self):
        self.logged: list[int] = []
        self.phase = lambda name: None

    def log(self, metrics: dict[str, float], progress: loop.Progress, samples: Any):
        self.logged.append(progress.updates)


@pytest.mark.parametrize("kind", MODELS)
def test_the_observers_of_a_trainings_owner_stay_through_every_learn(kind):
    make, updates, size = MODELS[kind]
    model, observer = make(), Observer()
    training = model._session.training
    training.observers.append(observer)
    model.learn()
    model.learn(size if kind in ("ppo", "environment") else 1)
    assert training.observers == [observer] and set(range(1, updates + 2)) <= set(observer.logged)


def test_callbacks_need_a_training_alone():
    training, recorder = text()._session.training, []
    with calling(lambda found, _: recorder.append(found), training):
        loop.run(training)
    assert len(recorder) == 4 and not training.observers
    refusal(lambda: text().learn(callback=5), "callback", "int")


@pytest.mark.parametrize("ends", [False, numpy.bool_(False), 0])
def test_whatever_is_false_ends_a_run_and_none_goes_on(ends):
    seen: list[Any] = []
    model = MODELS["environment"][0]().learn(callback=[lambda *_: None, lambda *_: seen.append(1) or ends])
    assert len(seen) == 1 and not model.is_finished


def test_the_penalty_moves_even_where_a_callback_raises():
    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    model = text(kl={"target": 0.01, "horizon": 20.0}, learning_rate=0.1)
    with pytest.raises(ZeroDivisionError):
        model.learn(callback=fail)
    model.learn()
    coefs = [row["kl/coef"] for row in rows(model.run_folder) if "kl/coef" in row]
    assert coefs[0] != coefs[1]
