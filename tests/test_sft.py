"""Supervised fine-tuning as a user meets it: `SFT`, its evaluation, the road to PPO."""

from pathlib import Path

import pytest
import transformers

from surefoot import DPO, PPO, SFT, RewardModel, TextTask
from surefoot.config import make_config
from tests.inputs import model_folder, refusal
from tests.train.small_run import rows

SENTENCES = ["the film was good", "a band in the end", "her two dogs"]
PAIRS = [{"prompt": f"{word} {number}", "completion": f" {word * 2}"} for word in ("the", "an", "in") for number in range(8)]
SMALL = {"dtype": "float32", "verbose": 0}
pytestmark = pytest.mark.usefixtures("in_own_folder")


def reward(prompts, completions, **columns):
    return [float(len(c)) for c in completions]


def test_three_sentences_are_learnt_by_heart_and_go_on_to_ppo(capsys):
    model = SFT(model_folder(), SENTENCES, held_out=0.0, epochs=80, learning_rate=0.02, dtype="float32")
    assert model.learn() is model
    last = rows(model.run_folder or Path())[-1]
    assert last["sft/nll"] < 0.05 and last["sft/epoch"] == 80 and last["examples"] == 240 and last["sft/skipped_steps"] == 0
    assert model.run_folder == Path("runs/sft-1") and "update 80/80" in capsys.readouterr().out
    assert model.generate(["the f", "a b", "h"], temperature=0) == ["ilm was good", "and in the end", "er two dogs"]
    model.save("out")
    assert transformers.AutoModelForCausalLM.from_pretrained("out").config.model_type == "llama"

    # What PPO starts from, and holds its policy to, is the model as it was taught.
    task = TextTask(["the f", "a b"], reward, held_out=0.0)
    ppo = PPO("out", task, total_episodes=4, episodes_per_update=4, batch_size=4, **SMALL)
    assert ppo.generate("a b", temperature=0) == "and in the end"
    first = rows(ppo.learn().run_folder or Path())[0]
    assert first["kl/reference"] == pytest.approx(0, abs=1e-4) and first["length/end_rate"] > 0.5
    # Its settings lie beside it too, but for those of its kind of run.
    assert PPO.load("out", TextTask(["a"], reward, held_out=0.0), verbose=0).config == PPO("out", **SMALL).config


def test_held_out_likelihood_chooses_the_best_checkpoint():
    model = SFT(model_folder(), PAIRS, held_out=0.3, epochs=4, learning_rate=0.01, evaluate_every=2, seed=2, **SMALL).learn()
    evaluations = [row for row in rows(model.run_folder or Path()) if "eval/nll" in row]
    assert [row["update"] for row in evaluations][:2] == [0, 2] and evaluations[-1]["eval/nll"] < evaluations[0]["eval/nll"]
    best = max(evaluations, key=lambda row: row["eval/metric"])
    assert (Path("runs/sft-1/checkpoints/best")).read_text() == f"{best['update']:08d}"
    found = model.evaluate()
    assert found["eval/nll"] == pytest.approx(evaluations[-1]["eval/nll"]) and model.evaluate(1) != found
    samples = rows(Path("runs/sft-1"), "samples.jsonl")
    assert len(samples) == len(evaluations) * len(model.data.held_out)
    assert samples[0].keys() == {"update", "split", "prompt", "completion", "nll"}


def test_the_temperature_of_writing_is_not_one_of_the_loss():
    def loss(temperature: float) -> float:
        settings = {"held_out": 0.0, "epochs": 1, "temperature": temperature, **SMALL}
        return rows(SFT(model_folder(), SENTENCES, **settings).learn().run_folder or Path())[0]["sft/nll"]

    assert loss(0.5) == loss(1.0)


def test_runs_and_settings_of_another_kind_are_refused(base):
    task, settings = TextTask(["a", "b"], reward), {"total_episodes": 4, "episodes_per_update": 4, "batch_size": 4}
    pairs = [{"chosen": "a" * n, "rejected": "b" * n} for n in range(1, 5)]
    PPO(str(base), task, run_name="PPO", **settings, **SMALL).learn()
    SFT(str(base), SENTENCES, run_name="SFT", held_out=0.0, epochs=1, **SMALL).learn()
    RewardModel(str(base), pairs, run_name="RewardModel", held_out=0.0, epochs=1, **SMALL).learn()
    DPO(str(base), pairs, run_name="DPO", held_out=0.0, epochs=1, **SMALL).learn()
    for opener in (PPO, SFT, RewardModel, DPO):
        for other in {"PPO", "SFT", "RewardModel", "DPO"} - {opener.__name__}:
            refusal(lambda opener=opener, other=other: opener.load(f"runs/{other}"), f"{other}.load")
        refusal(lambda opener=opener: opener.load(base), str(base))
    for section, kind in (({"sft": {}}, "SFT"), ({"reward_model": {}}, "RewardModel"), ({"dpo": {}}, "DPO")):
        config = make_config({"policy": {"model": str(base)}, **section}, where="test")
        refusal(lambda config=config: PPO(str(base), task, config=config), kind)
