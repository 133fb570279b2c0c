"""A reward model as a user meets it: `RewardModel`, what it learns and is saved as, its use in PPO."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

from surefoot import RewardModel, load_policy, new_model
from surefoot.config import PolicyConfig
from tests import inputs
from tests.inputs import model_folder, refusal, run_cli
from tests.train.small_run import rows

GOOD, BAD = ["good", "fine", "the best"], ["bad", "poor", "worst"]
PAIRS: list[dict[str, Any]] = [
    {"prompt": f"film {n}", "chosen": f" is {GOOD[n % 3]}", "rejected": f" is {BAD[n // 2 % 3]}"} for n in range(40)
]
RATINGS = [{"text": f"film {n} is {[*GOOD, *BAD][n % 6]}", "rating": 3.0 - n % 2 / 2 if n % 6 < 3 else -2} for n in range(60)]
CHAT = [{"role": "user", "content": "who"}]
SMALL = {"dtype": "float32", "verbose": 0}
FAST: dict[str, Any] = {"held_out": 0.2, "epochs": 6, "learning_rate": 0.01, "batch_size": 8, **SMALL}
pytestmark = pytest.mark.usefixtures("in_own_folder")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model that has learned to prefer the good films."""
    folder = tmp_path_factory.mktemp("reward")
    model = RewardModel(model_folder(), PAIRS, run_folder=str(folder / "runs"), **FAST).learn()
    model.save(folder / "saved")
    return folder / "saved"


def test_a_preference_is_learned_in_seconds(capsys):
    model = RewardModel(model_folder(), PAIRS, **FAST | {"verbose": 1})
    assert model.learn() is model and model.run_folder == Path("runs/reward-model-1")
    logged = rows(Path("runs/reward-model-1"))
    evaluations = [row for row in logged if "eval/accuracy" in row]
    assert evaluations[0]["eval/accuracy"] < 0.9 and evaluations[-1]["eval/accuracy"] == 1.0
    assert logged[-2]["reward_model/loss"] < 0.1 and logged[-2]["reward_model/skipped_steps"] == 0
    assert model.evaluate() == {name: value for name, value in evaluations[-1].items() if name != "update"}
    assert "accuracy 1.000" in capsys.readouterr().out
    good, bad = model.score(["film 99", "film 99"], [" is the best", " is worst"])
    assert good > bad + 1
    samples = rows(Path("runs/reward-model-1"), "samples.jsonl")
    assert samples[-1].keys() == {"update", "split", "prompt", "chosen", "rejected", "margin", "scores"}
    assert samples[-1]["scores"][0] > samples[-1]["scores"][1]
    assert (Path("runs/reward-model-1/checkpoints/best")).exists()


@pytest.mark.parametrize("adapter", [{"rank": 4}, None], ids=["adapter", "full"])
def test_ratings_are_learned_whatever_their_scale(adapter):
    found = []
    for scale in (1.0, 100.0):
        data = [{**row, "rating": row["rating"] * scale + 7} for row in RATINGS]
        settings = FAST | {"learning_rate": 0.01 if adapter else 0.005, "epochs": 10, "adapter": adapter}
        model = RewardModel(model_folder(), data, rating_range=[-400, 400], **settings).learn()
        found.append((model.evaluate(), model.score(["", ""], ["film 3 is good", "film 8 is bad"])))
    metrics, (good, bad) = found[0]
    least = {"eval/pearson": 0.9, "eval/spearman": 0.7, "eval/accuracy": 0.9}
    assert all(metrics[name] > value for name, value in least.items()) and good > bad + 1
    assert metrics == pytest.approx(found[1][0], abs=1e-3) and found[0][1] == pytest.approx(found[1][1], abs=1e-2)


def test_rewards_are_calibrated_on_the_held_out_texts():
    model = RewardModel(model_folder(), PAIRS, **FAST | {"epochs": 1}).learn()
    assert model.data is not None
    pairs = model.data.held_out
    scores = torch.tensor(model.score([p.prompt for p in pairs for _ in p.texts], [t for p in pairs for t in p.texts]))
    assert float(scores.mean()) == pytest.approx(0, abs=1e-4) and float(scores.std(correction=0)) == pytest.approx(1, abs=1e-4)
    before = model.score(["film"], [" is good"])
    assert RewardModel.load(model.run_folder, PAIRS, verbose=0).score(["film"], [" is good"]) == before
    assert model.learn(1).score(["film"], [" is good"]) != before  # calibrated again for the weights as they are now


@pytest.mark.parametrize("adapter", [{"rank": 4}, None], ids=["adapter", "full"])
def test_what_is_saved_scores_as_what_was_trained(adapter):
    model = RewardModel(model_folder(), PAIRS, **FAST | {"epochs": 2, "adapter": adapter}).learn()
    model.save("out")
    texts = ["film 3", "a", ""], [" is good", "b", "film 9 is worst"]
    loaded = RewardModel.load("out")
    assert loaded.score(*texts) == pytest.approx(model.score(*texts), abs=1e-4)
    assert loaded(prompts=texts[0], completions=texts[1], answer=[1, 2, 3]) == loaded.score(*texts)
    # Alone or among others, longer ones too: padding does not matter.
    assert [loaded.score([p], [c])[0] for p, c in zip(*texts, strict=True)] == pytest.approx(loaded.score(*texts), abs=1e-4)
    # Where prompt ends and completion begins does not matter: what is scored is the text.
    assert loaded.score(["film"], [" 3 is good"]) == loaded.score(["film 3"], [" is good"])
    assert transformers.AutoModelForCausalLM.from_pretrained("out").config.model_type == "llama"
    for unable in (loaded.learn, loaded.evaluate):
        refusal(unable, "RewardModel.load(run_folder)")
    assert loaded.score([], []) == []


def test_chats_go_through_the_models_own_template():
    data = [{**row, "prompt": CHAT, "chosen": [{"role": "assistant", "content": row["chosen"]}]} for row in PAIRS]
    model = RewardModel(model_folder(chat=True), data, **FAST | {"held_out": 0.0, "epochs": 1}).learn()
    plain = model.score([CHAT], [" is good"])
    assert plain == model.score([CHAT], [[{"role": "assistant", "content": " is good"}]]) != model.score(["who"], [" is good"])
    refusal(lambda: RewardModel(model_folder(), data, **FAST | {"held_out": 0.0}).learn(), "chat template")


def test_a_loaded_policy_becomes_a_reward_model():
    policy = load_policy(str(model_folder()), PolicyConfig(dtype="float32"))
    assert RewardModel(policy, PAIRS, **FAST).learn().evaluate()["eval/accuracy"] == 1.0


def paid(run: Path, reward: Path) -> bool:
    """Whether the run's completions were paid what the reward model says of them."""
    samples = rows(run, "samples.jsonl")
    expected = RewardModel.load(reward).score([one["prompt"] for one in samples], [one["completion"] for one in samples])
    return [one["reward"]["reward"] for one in samples] == pytest.approx(expected, abs=1e-4)


def test_a_config_names_a_reward_models_folder_as_reward_or_metric(saved):
    shutil.copytree(saved, "reward")
    # Text goes from one to the other: the policy's bytes are not the reward model's merged tokens.
    new_model("other", [row["prompt"] for row in inputs.PROMPTS], vocab=257, width=32, layers=1)
    project = inputs.write_project(Path("project"), task={"reward": "../reward", "metric": "../reward"})
    flags = ("--policy.model", "other", "--run.folder", "runs", "--device", "cpu")
    assert (done := run_cli("ppo", project, *flags)).code == 0, done.err
    assert paid(Path("runs/ppo-1"), Path("reward"))
    assert yaml.safe_load(Path("runs/ppo-1/config.yaml").read_text())["task"]["reward"] == str(Path("reward").absolute())
    # Naming a folder that holds something else is one line.
    run_cli("ppo", project, "--task.reward", model_folder()).refused("task.reward", str(model_folder()))


def test_a_reward_model_that_cannot_read_the_prompts_is_refused_in_one_line(saved, tmp_path):
    chats = [{"prompt": [{"role": "user", "content": word}]} for word in ("the film", "a band", "one", "two")]
    project = inputs.write_project(tmp_path, prompts=chats)
    flags = ("--policy.model", model_folder(chat=True), "--task.reward", saved, "--run.folder", "runs")
    run_cli("ppo", project, *flags).refused("reward model: text 1", "chat template")
    assert not Path("runs").exists()
    run_cli("ppo", project, "--task.reward", "runs/none").refused("task.reward", "'runs/none'")


def test_texts_that_cannot_be_scored_are_refused(saved):
    model = RewardModel.load(saved)
    refusal(lambda: model.score(["a"], []), "1 prompts and 0 completions")
    refusal(lambda: model.score(["a", "a"], ["b", "c" * 100]), "text 2", "102 tokens")
    refusal(lambda: RewardModel.load(saved, PAIRS), str(saved))
