"""A reward model as a user meets it: `RewardModel`, `surefoot reward-model`, resume, its use in PPO, bad input in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from tokenizers import Tokenizer, decoders, models

from surefoot import PPO, SFT, RewardModel, TextTask, load_policy
from surefoot.config import PolicyConfig, make_config
from tests import inputs
from tests.inputs import Outcome, model_folder, refusal, run_cli
from tests.tiny import tiny_lm
from tests.train.small_run import rows, weights, write_rows, write_supervised

GOOD, BAD = ["good", "fine", "the best"], ["bad", "poor", "worst"]
PAIRS: list[dict[str, Any]] = [
    {"prompt": f"film {n}", "chosen": f" is {GOOD[n % 3]}", "rejected": f" is {BAD[n // 2 % 3]}"} for n in range(40)
]
RATINGS = [{"text": f"film {n} is {[*GOOD, *BAD][n % 6]}", "rating": 3.0 - n % 2 / 2 if n % 6 < 3 else -2} for n in range(60)]
CHAT = [{"role": "user", "content": "who"}]
SMALL = {"dtype": "float32", "verbose": 0}
FAST: dict[str, Any] = {"held_out": 0.2, "epochs": 6, "learning_rate": 0.01, "batch_size": 8, **SMALL}
CONFIG: dict[str, Any] = {
    "seed": 5,
    "device": "cpu",
    "run": {"name": "run", "checkpoint_every": 2},
    "policy": {"dtype": "float32", "adapter": {"rank": 2}},
    "reward_model": {
        "data": "pairs.jsonl",
        "held_out": 0.3,
        "epochs": 2,
        "batch_size": 10,
        "learning_rate": 0.01,
        "lr_warmup": 0.3,
        "center": 0.01,
        "micro_batch_tokens": 80,
    },
    "evaluate": {"every": 2, "episodes": 6},
}


pytestmark = pytest.mark.usefixtures("in_own_folder")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model that has learned to prefer the good films."""
    folder = tmp_path_factory.mktemp("reward")
    model = RewardModel(model_folder(), PAIRS, run_folder=str(folder / "runs"), **FAST).learn()
    model.save(folder / "saved")
    return folder / "saved"


def write_project(folder: Path, model: Path, *, data: Any = PAIRS, **sections: Any) -> Path:
    """reward.yaml and its data; the run's folder to be."""
    run = write_supervised(folder, model, CONFIG, command="reward", **sections)
    write_rows(folder / "pairs.jsonl", data)
    return run


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
    assert (
        metrics["eval/pearson"] > 0.9 and metrics["eval/spearman"] > 0.7 and metrics["eval/accuracy"] > 0.9 and good > bad + 1
    )
    assert metrics == pytest.approx(found[1][0], abs=1e-3) and found[0][1] == pytest.approx(found[1][1], abs=1e-2)


@pytest.mark.parametrize("held_out", [0.2, 0.0])
def test_rewards_are_calibrated_on_the_held_out_texts(held_out):
    model = RewardModel(model_folder(), PAIRS, **FAST | {"held_out": held_out, "epochs": 1}).learn()
    assert model.data is not None
    pairs = model.data.held_out or model.data.train
    scores = torch.tensor(
        model.score([one.prompt for one in pairs for _ in one.texts], [t for one in pairs for t in one.texts])
    )
    assert float(scores.mean()) == pytest.approx(0, abs=1e-4) and float(scores.std(correction=0)) == pytest.approx(1, abs=1e-4)
    before = model.score(["film"], [" is good"])
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
    assert refusal(loaded.learn).startswith("there is nothing to train on; give the preferences")
    assert loaded.score([], []) == []


def test_chats_go_through_the_models_own_template():
    data = [{**row, "prompt": CHAT, "chosen": [{"role": "assistant", "content": row["chosen"]}]} for row in PAIRS]
    model = RewardModel(model_folder(chat=True), data, **FAST | {"held_out": 0.0, "epochs": 1}).learn()
    plain = model.score([CHAT], [" is good"])
    assert plain == model.score([CHAT], [[{"role": "assistant", "content": " is good"}]]) != model.score(["who"], [" is good"])
    assert "chat template" in refusal(lambda: RewardModel(model_folder(), data, **FAST | {"held_out": 0.0}).learn())


def test_a_loaded_policy_becomes_a_reward_model():
    policy = load_policy(str(model_folder()), PolicyConfig(dtype="float32"))
    assert RewardModel(policy, PAIRS, **FAST).learn().evaluate()["eval/accuracy"] == 1.0


def test_ppo_is_paid_by_a_reward_model(saved):
    model = RewardModel.load(saved)
    settings: dict[str, Any] = {"total_episodes": 4, "episodes_per_update": 4, "batch_size": 4, "max_new_tokens": 4, **SMALL}
    ppo = PPO(model_folder(), TextTask(["film 1 is", "a band"], model, held_out=0.0), **settings).learn()
    samples = rows(ppo.run_folder or Path(), "samples.jsonl")
    expected = model.score([one["prompt"] for one in samples], [one["completion"] for one in samples])
    assert [one["reward"]["reward"] for one in samples] == pytest.approx(expected, abs=1e-5)


def test_a_config_names_a_reward_models_folder_as_reward_or_metric(saved):
    shutil.copytree(saved, "reward")
    project = inputs.write_project(Path("project"), task={"reward": "../reward", "metric": "../reward"})
    assert (done := run_cli("ppo", project, "--run.folder", "runs", "--device", "cpu")).code == 0, done.err
    samples = rows(Path("runs/ppo-1"), "samples.jsonl")
    expected = RewardModel.load("reward").score([one["prompt"] for one in samples], [one["completion"] for one in samples])
    assert [one["reward"]["reward"] for one in samples] == pytest.approx(expected, abs=1e-5)
    assert yaml.safe_load(Path("runs/ppo-1/config.yaml").read_text())["task"]["reward"] == str(Path("reward").absolute())
    # Naming a folder that holds something else is one line.
    said = run_cli("ppo", project, "--task.reward", str(model_folder())).complaint
    assert said.startswith(f"task.reward: no reward model in {model_folder()}, which would have a surefoot_reward.safetensors")


def test_learning_more_and_going_on_in_another_process():
    settings = FAST | {"lr_schedule": "constant", "lr_warmup": 0.0}
    straight = RewardModel(model_folder(), PAIRS, run_name="a", **settings | {"epochs": 3}).learn()
    first = RewardModel(model_folder(), PAIRS, run_name="b", **settings | {"epochs": 1}).learn()
    assert first.is_finished
    again = RewardModel.load("runs/b", PAIRS, verbose=0)
    assert again.is_finished and again.score(["film"], [" is good"]) == first.score(["film"], [" is good"])
    assert again.learn(2).is_finished
    assert all(torch.equal(value, weights(straight)[name]) for name, value in weights(again).items())  # type: ignore[arg-type]
    assert refusal(lambda: first.learn(1)).endswith("open it with RewardModel.load")
    assert refusal(lambda: RewardModel.load("runs/b")).endswith("RewardModel.load(folder, data)")
    assert refusal(lambda: RewardModel.load("runs/b", PAIRS[1:], verbose=0)).startswith(
        "reward_model.data: not the preferences"
    )


@pytest.mark.parametrize(
    ("sections", "flags", "said"),
    [
        ({"reward_model": {"data": None}}, (), "reward.yaml: no preferences to learn from; name a JSONL file as"),
        ({"reward_model": {"data": "no.jsonl"}}, (), "data: no file no.jsonl; "),
        ({}, ("--reward-model.epochs", "0"), "--reward-model.epochs: should be greater than 0, got 0"),
        ({}, ("--reward-model.centre", "1"), "unknown flag '--reward-model.centre'; did you mean '--reward-model.center'?"),
        ({}, ("--reward-model.rating-range", "[4, -4]"), "--reward-model.rating-range: [4.0, -4.0] is not a range; write the"),
        ({}, ("--kl.coef", "0.1"), "reward.yaml: kl: a run with reward_model has no such section"),
        (
            {},
            ("--sft.data", "x"),
            "reward.yaml: a run has one of task, env, sft, reward_model, and here are sft and reward_model; leave",
        ),
        ({}, ("--policy.model", "./no"), "policy.model: no folder ./no"),
    ],
)
def test_bad_input_is_one_line_before_a_model_is_loaded(base, monkeypatch, sections, flags, said):
    monkeypatch.setattr("surefoot.build.language.load_policy", None)
    write_project(Path(), base, **sections)
    ended: Outcome = run_cli("reward-model", "reward.yaml", *flags)
    assert ended.complaint.startswith(said) and not Path("runs").exists()


ONE_CLASS = [{**row, "rating": 1.0} for row in RATINGS]
ONE_SIDE = [{**row, "chosen": " positive", "rejected": " negative"} for row in PAIRS]


@pytest.mark.parametrize(
    ("data", "flags", "said"),
    [
        ([*PAIRS[:2], {"chosen": "a", "rejected": "a"}], (), "pairs.jsonl, line 3: chosen and rejected are the same text"),
        (ONE_CLASS, (), "pairs.jsonl: all 41 ratings to train on are 1; add texts with other ratings"),
        (
            RATINGS,
            ("--reward-model.rating-range", "[-1, 5]"),
            "pairs.jsonl, line 4: the rating -2 is outside rating_range, -1 to 5",
        ),
        (ONE_SIDE, (), "pairs.jsonl: all 27 pairs to train on have the same chosen and the same rejected text"),
        (PAIRS, ("--reward-model.rating-range", "[-4, 4]"), "reward_model.rating_range is for ratings, and these are pairs"),
        (RATINGS, ("--reward-model.center", "0.1"), "reward_model.center is for pairs, and these are ratings; leave it out"),
        (PAIRS[:1], (), "pairs.jsonl: all 1 pairs to train on"),
        ([], (), "pairs.jsonl: no preferences there"),
    ],
    ids=[
        *("equal sides", "one class", "outside the range", "one side", "a range of pairs", "a centre of ratings"),
        *("one row", "no row"),
    ],
)
def test_preferences_that_say_nothing_are_one_line_before_a_model_is_loaded(base, monkeypatch, data, flags, said):
    monkeypatch.setattr("surefoot.build.language.load_policy", None)
    write_project(Path(), base, data=data)
    assert run_cli("reward-model", "reward.yaml", *flags).complaint.startswith(said) and not Path("runs").exists()


def test_ppo_with_another_tokenizer_than_the_reward_models(saved, tmp_path):
    # Text goes from one to the other: the policy's single characters are not the reward model's merged tokens.
    project = inputs.write_project(tmp_path)
    tokens = ["<eos>", "<pad>", *"zyxwvutsrqponmlkjihgfedcba .,"]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    backend.add_special_tokens(tokens[:2])
    backend.decoder = decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")
    tiny_lm(eos_token_id=0, pad_token_id=1).save_pretrained("other")
    tokenizer.save_pretrained("other")
    flags = ("--policy.model", "other", "--task.reward", saved, "--run.folder", "runs", "--run.name", "x")
    assert run_cli("ppo", project, *flags).code == 0
    samples = [json.loads(line) for line in Path("runs/x/samples.jsonl").read_text().splitlines()]
    scores = RewardModel.load(saved).score([s["prompt"] for s in samples], [s["completion"] for s in samples])
    assert [s["reward"]["reward"] for s in samples] == pytest.approx(scores, abs=1e-4)


def test_a_reward_model_that_cannot_read_the_prompts_is_refused_in_one_line(saved, tmp_path):
    chats = [{"prompt": [{"role": "user", "content": word}]} for word in ("the film", "a band", "one", "two")]
    project = inputs.write_project(tmp_path, prompts=chats)
    flags = ("--policy.model", model_folder(chat=True), "--task.reward", saved, "--run.folder", "runs")
    said = run_cli("ppo", project, *flags).complaint
    assert said == ("reward model: text 1: messages need a chat template, and the model's tokenizer has none; use plain text")
    assert not Path("runs").exists()
    missing = run_cli("ppo", project, "--task.reward", "runs/none").complaint
    assert missing.endswith("got 'runs/none'; nor is it a reward model's folder")


@pytest.mark.parametrize("advantage", ["grpo", "rloo", "dr_grpo"])
def test_a_group_of_one_is_refused_before_a_model_is_loaded(tmp_path, monkeypatch, advantage):
    monkeypatch.setattr("surefoot.build.language.load_policy", None)
    project = inputs.write_project(tmp_path)
    said = run_cli("ppo", project, "--ppo.advantage", advantage).complaint
    assert f"{advantage} compares completions of one prompt; give group.size 2 or more" in said


def test_verbs_and_files_that_do_not_belong_together_are_refused(base):
    run = write_project(Path(), base)
    said = "reward.yaml: has a reward_model section; that is for: surefoot reward-model reward.yaml"
    assert run_cli("ppo", "reward.yaml").complaint == said
    config = make_config(CONFIG, where="test")
    assert refusal(lambda: PPO(str(base), TextTask(["a"], make_score), config=config)).endswith("give it to RewardModel")
    RewardModel(str(base), PAIRS, config=config, **SMALL).learn()
    assert refusal(lambda: SFT.load(run)).startswith("runs/run is a run of RewardModel; go on with RewardModel.load")
    assert "go on with RewardModel.load(" in refusal(lambda: PPO.load(run))
    SFT(str(base), ["a b", "the end"], run_name="sft", held_out=0.0, epochs=1, **SMALL).learn()
    assert refusal(lambda: RewardModel.load("runs/sft")).startswith("runs/sft is a run of SFT; go on with SFT.load(")
    assert refusal(lambda: RewardModel.load(base)).startswith(f"{base} is neither a run folder")


def make_score(prompts, completions, **columns):
    return [0.0 for _ in completions]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: RewardModel(model_folder()), "reward_model.data is missing: name a JSONL file of pairs or ratings"),
        (lambda: RewardModel(7, PAIRS), "policy: expected a model's name or folder, or what load_policy gives, got a int"),  # type: ignore[arg-type]
        (lambda: RewardModel(model_folder(), PAIRS, kl={"coef": 1}), "unknown setting 'kl'; docs/config.md lists them"),
        (lambda: RewardModel(model_folder(), [*PAIRS, RATINGS[0]]), "data, row 41: is a rating, but data, row 1 is a pair"),
        (lambda: RewardModel(model_folder(), PAIRS, **SMALL).learn(0), "total_epochs: expected a whole number above 0, got 0"),
        (
            lambda: RewardModel(model_folder(), PAIRS, held_out=0.0, **SMALL).evaluate(),
            "no held-out preferences to evaluate on",
        ),
        (
            lambda: RewardModel(model_folder(), [*PAIRS, {**PAIRS[0], "chosen": "a" * 200}], held_out=0.0, **SMALL).learn(),
            "data, row 41: has 207 tokens, more than the model's context of 96; shorten it",
        ),
    ],
)
def test_bad_input_from_python_is_one_line(call, said):
    assert refusal(call).startswith(said)


def test_texts_that_cannot_be_scored_are_refused(saved):
    model = RewardModel.load(saved)
    assert refusal(lambda: model.score(["a"], [])) == "score: 1 prompts and 0 completions; one prompt each is needed"
    assert refusal(lambda: model.score(["a", "a"], ["b", "c" * 100])).startswith("reward model: text 2: has 102 tokens, more")
    assert refusal(lambda: RewardModel.load(saved, PAIRS)).startswith(f"{saved} was saved and only scores")
