"""`surefoot pipeline`: stages that take what earlier ones left, resume, rejection sampling, and bad input in one line."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from surefoot import collect
from surefoot.api.pipeline import load_pipeline
from surefoot.build.language import build_policy, build_task
from surefoot.config import RejectionSamplingConfig
from surefoot.config.pipeline import PipelineConfig
from surefoot.data.render import encode_prompt
from surefoot.errors import InputError
from surefoot.types import StopReason, Trajectory
from tests.inputs import model_folder, run_cli
from tests.tiny import tiny_tokenizer
from tests.train.small_run import rows
from tests.train.warm import Strike, Warm

WEIGHTS = "model.safetensors"
PAIRS = [{"prompt": f"{word} {number}", "completion": f" {word * 2}"} for word in ("the", "an", "in") for number in range(4)]
RATINGS = [{"text": f"{word} film {number}", "rating": number % 3} for word in ("good", "bad") for number in range(6)]
PROMPTS = [{"prompt": f"{word} {number}"} for word in ("the", "our", "in") for number in range(4)]
CHATS = [{"messages": [{"role": "user", "content": "the"}, {"role": "assistant", "content": " end"}]}]
MIXED = [{"prompt": prompt} for prompt in ("the", "our", "in", [{"role": "user", "content": "the"}])]
STAGES: dict[str, Any] = {
    "taught": {"sft": {"data": "pairs.jsonl", "epochs": 1, "batch_size": 4, "held_out": 0.3}},
    "judge": {"reward_model": {"data": "ratings.jsonl", "epochs": 1, "batch_size": 4, "held_out": 0.3}},
    "tuned": {
        "policy": {"model": "stage:taught"},
        "task": {"prompts": "prompts.jsonl", "reward": "stage:judge", "held_out": 0.3},
        "generation": {"max_new_tokens": 3},
        "ppo": {"batch_size": 4, "n_epochs": 1},
        "rollout": {"total_episodes": 8, "episodes_per_update": 4},
    },
    "answers": {
        "policy": {"model": "stage:tuned"},
        "task": {"prompts": "prompts.jsonl", "reward": "stage:judge", "held_out": 0.3},
        "generation": {"max_new_tokens": 3, "stop": ["e", "o", "a", "i"]},
        "rejection_sampling": {"episodes": 36, "keep": 0.5, "join": "pairs.jsonl"},
    },
    "again": {"sft": {"data": "stage:answers", "epochs": 1, "batch_size": 4, "held_out": 0.3}},
}


LABELS = (" positive", " negative")
BROKEN = "def takes_nothing():\n    return []\n\ndef says_nothing(**columns):\n    return []\n"


def write(folder: Path, stages: dict[str, Any]) -> Path:
    """Data, model and `pipeline.yaml` in `folder`; the YAML's path."""
    for name, data in (("pairs", PAIRS), ("ratings", RATINGS), ("prompts", PROMPTS), ("chats", CHATS), ("mixed", MIXED)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    if not (folder / "model").exists():
        shutil.copytree(model_folder(), folder / "model")
    (folder / "broken.py").write_text(BROKEN)
    policy = {"model": "model", "adapter": {"rank": 2}, "dtype": "float32"}
    common = {"seed": 5, "device": "cpu", "policy": policy, "evaluate": {"every": 1, "episodes": 2}}
    pipeline = {"folder": "runs", "common": common, "stages": stages}
    (folder / "pipeline.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(pipeline)), sort_keys=False))
    return folder / "pipeline.yaml"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline that ran to its end without a stop."""
    folder = tmp_path_factory.mktemp("whole")
    outcome = run_cli("pipeline", str(write(folder, STAGES)))
    assert outcome.code == 0, outcome.err
    return folder


def test_every_stage_leaves_what_the_next_one_takes(whole: Path):
    runs = whole / "runs"
    assert sorted(path.name for path in runs.iterdir()) == ["again", "answers", "judge", "taught", "tuned"]
    tuned = yaml.safe_load((runs / "tuned" / "config.yaml").read_text())
    assert tuned["policy"]["model"] == str(runs / "taught" / "model")
    assert tuned["task"]["reward"] == str(runs / "judge" / "model")
    assert (runs / "again" / "model" / "model.safetensors").is_file()


def test_sampled_examples_are_the_given_rows_and_then_the_best_answers(whole: Path):
    lines = (whole / "runs" / "answers" / "completions.jsonl").read_text().splitlines()
    examples = [json.loads(line) for line in lines]
    assert examples[: len(PAIRS)] == PAIRS
    config = load_pipeline(whole / "pipeline.yaml")[3].config
    task = build_task(config)
    batch = collect(build_policy(config), task, episodes=36, seed=5, config=config)
    written = sorted((t for t in batch.trajectories if isinstance(t, Trajectory)), key=lambda t: -t.reward)
    whole_ones = [t for t in written if t.completion_text.strip() and t.stop_reason is not StopReason.LENGTH]
    assert {t.completion_text for t in written} > {t.completion_text for t in whole_ones}  # or there was nothing to leave out
    half = round(len(whole_ones) / 2)
    assert 2 <= half < 18 < len(written)
    best = dict.fromkeys((t.prompt, t.completion_text) for t in whole_ones[:half])  # the same one once
    assert [(row["prompt"], row["completion"]) for row in examples[len(PAIRS) :]] == list(best)


def test_a_finished_pipeline_does_nothing(whole: Path):
    before = {path: path.stat().st_mtime_ns for path in (whole / "runs").rglob("*") if path.is_file() and path.name != ".lock"}
    outcome = run_cli("pipeline", str(whole / "pipeline.yaml"))
    assert outcome.code == 0
    assert outcome.out.count("finished before") == len(STAGES)
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize(
    "strike",
    [
        Strike("surefoot.train.update:take_step", nth=4, signals=[int(signal.SIGKILL)]),
        Strike("surefoot.api.rejection:write_durably", nth=2, signals=[int(signal.SIGKILL)]),
        Strike("surefoot.api.reward_model:RewardModel.save", signals=[int(signal.SIGKILL)]),
    ],
    ids=["in a stage", "writing completions", "between training and saving"],
)
def test_a_killed_pipeline_goes_on_to_the_same_weights(tmp_path: Path, whole: Path, strike: Strike):
    file = write(tmp_path, STAGES)
    with Warm() as warm:
        assert warm.run(tmp_path, "pipeline", file, strikes=[strike]).code == -signal.SIGKILL
        ended = warm.run(tmp_path, "pipeline", file)
    assert ended.code == 0, ended.stderr
    for stage in ("taught", "tuned", "again"):
        mine, other = tmp_path / "runs" / stage, whole / "runs" / stage
        assert rows(mine) == rows(other)
        assert (mine / "model" / WEIGHTS).read_bytes() == (other / "model" / WEIGHTS).read_bytes()
    labels = ("runs", "answers", "completions.jsonl")
    assert tmp_path.joinpath(*labels).read_bytes() == whole.joinpath(*labels).read_bytes()


def test_a_relative_path_means_the_same_from_another_folder(tmp_path: Path):
    here, there = tmp_path / "a", tmp_path / "a" / "b"
    there.mkdir(parents=True)
    write(there, {"taught": STAGES["taught"]})
    strike = Strike("surefoot.api.sft:SFT.save", signals=[int(signal.SIGKILL)])
    with Warm() as warm:
        assert warm.run(here, "pipeline", "b/pipeline.yaml", strikes=[strike]).code == -signal.SIGKILL
        checkpoint = next((there / "runs" / "taught" / "checkpoints").glob("*/*.safetensors"))
        before = checkpoint.stat().st_mtime_ns
        refused = warm.run(there, "pipeline", "../b/pipeline.yaml", "--stages.taught.sft.learning-rate", "0.5")
        assert "stage taught was begun with sft.learning_rate" in refused.stderr
        ended = warm.run(there, "pipeline", "../b/pipeline.yaml")
    assert ended.code == 0, ended.stderr
    assert (there / "runs" / "taught" / "model" / WEIGHTS).is_file()
    assert checkpoint.stat().st_mtime_ns == before  # it went on from there
    assert not [path for path in tmp_path.rglob("runs") if path != there / "runs"]


def test_paths_in_flags_are_relative_to_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = write(tmp_path, {"taught": STAGES["taught"]})
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "pairs.jsonl").rename(tmp_path / "elsewhere" / "mine.jsonl")
    monkeypatch.chdir(tmp_path / "elsewhere")
    (stage,) = load_pipeline("../pipeline.yaml", {"stages.taught.sft.data": "./mine.jsonl", "folder": "here"})
    assert stage.config.sft is not None
    assert stage.config.sft.data == str(tmp_path / "elsewhere" / "mine.jsonl")
    assert stage.product == tmp_path / "elsewhere" / "here" / "taught" / "model"
    assert stage.config.policy.model == str(tmp_path / "model") and file.parent == tmp_path


def test_flags_reach_a_stage_and_the_common_part(tmp_path: Path):
    stages = load_pipeline(write(tmp_path, STAGES), {"common.seed": "9", "stages.tuned.rollout.total_episodes": "4"})
    assert {stage.config.seed for stage in stages} == {9}
    assert stages[2].config.rollout.total_episodes == 4


def changed(name: str, **sections: Any) -> dict[str, Any]:
    """`STAGES` with other sections in one stage; None takes one out."""
    stage = {key: value for key, value in (STAGES[name] | sections).items() if value is not None}
    return STAGES | {name: stage}


def task(**settings: Any) -> dict[str, Any]:
    """The task of `STAGES` with other settings."""
    return STAGES["tuned"]["task"] | settings


TWO_KINDS = changed("answers", task=None, sft=STAGES["taught"]["sft"])
BAD = {
    "no stages": ({}, "stages"),
    "a name that is a path": ({"../x": STAGES["taught"]}, "not a valid name of a stage"),
    "a later stage": ({"first": changed("tuned")["tuned"]}, "stage:taught is no earlier stage; no stage stands before it"),
    "nothing to learn": ({"empty": {"seed": 1}}, "stage empty: no task (task.prompts and task.reward)"),
    "a misspelt key": (changed("taught", sft={"data": "pairs.jsonl", "epoch": 1}), "stage taught: unknown key 'sft.epoch'"),
    "no such file": (changed("judge", reward_model={"data": "none.jsonl"}), "none.jsonl"),
    "no prompts": (changed("tuned", task=STAGES["tuned"]["task"] | {"prompts": "none.jsonl"}), "task.prompts: no file"),
    "no examples to join": (
        changed("answers", rejection_sampling={"join": "none.jsonl"}),
        "stage answers: rejection_sampling.join: no file",
    ),
    "a share of nothing": (changed("answers", rejection_sampling={"keep": 0.0}), "stage answers: rejection_sampling.keep"),
    "rejection sampling without a task": (TWO_KINDS, "stage answers: rejection_sampling: a run with sft has no such section"),
    "rejection sampling that is no section": (
        changed("answers", rejection_sampling=5),
        "rejection_sampling: should be a section",
    ),
    "a run that is no section": (changed("taught", run=5), "stage taught: run: should be a section"),
    "a new model": (changed("taught", new_model={}), "new_model is read by surefoot new-model"),
    "a share of a group": (
        changed("answers", group={"size": 8}, rollout={"episodes_per_update": 64}, ppo={"batch_size": 8}),
        "stage answers: group.size (8) does not divide rejection_sampling.episodes (36)",
    ),
    "no such function": (
        changed("tuned", task=task(metric="none.py:metric")),
        "stage tuned: task.metric: no file",
    ),
    "no such part": (
        changed("tuned", task=task(reward=[{"name": "stage:judge"}, {"name": "math:sinus"}])),
        "stage tuned: task.reward, sinus: math has no function 'sinus'",
    ),
    "a reward that takes nothing": (
        changed("tuned", task=task(reward=[{"name": "stage:judge"}, {"name": "broken.py:takes_nothing"}])),
        "stage tuned: the reward takes_nothing function raised TypeError",
    ),
    "a metric that says nothing": (
        changed("tuned", task=task(metric="broken.py:says_nothing")),
        "stage tuned: the metric function returned 0 rewards",
    ),
    "no reward model": (changed("tuned", task=task(reward="model")), "stage tuned: task.reward: no reward model in"),
    "no such column": (changed("tuned", task=task(prompt_column="text")), "line 1: no column 'text'; it has prompt"),
    "no such model": (changed("taught", policy={"model": "./none"}), "stage taught: policy.model: no folder"),
    "a reward model as policy": (
        changed("tuned", policy={"model": "stage:judge"}),
        "stage tuned: policy.model takes a language model, and stage judge leaves a reward model",
    ),
    "a language model as reward": (
        changed("tuned", task=task(reward=[{"name": "stage:taught"}])),
        "stage tuned: task.reward.name takes a reward model, and stage taught leaves a language model",
    ),
    "a model as examples": (
        changed("again", sft={"data": "stage:tuned"}),
        "stage again: sft.data takes examples, and stage tuned leaves a language model",
    ),
    "a stage as a name": (changed("again", device="stage:tuned"), "device takes nothing of a stage's"),
    "chats to join for strings": (
        changed("answers", rejection_sampling={"episodes": 12, "join": "chats.jsonl"}),
        "rejection_sampling.join has messages, and the completions will be prompt and completion",
    ),
    "pairs to join for a chat": (
        changed("answers", task=task(chat=True)),
        "rejection_sampling.join has prompt and completion, and the completions will be messages",
    ),
    "ratings to join": (
        changed("answers", rejection_sampling={"episodes": 12, "join": "ratings.jsonl"}),
        "rejection_sampling.join has text, and",
    ),
    "prompts of both kinds": (
        changed("answers", task=task(prompts="mixed.jsonl", held_out=0.0)),
        "task.prompts are strings and messages",
    ),
    "a name of its own": (changed("taught", run={"name": "x"}), "run.name and run.folder follow from the pipeline's folder"),
}


@pytest.mark.parametrize(("stages", "words"), BAD.values(), ids=BAD)
def test_bad_pipelines_are_refused_in_one_line_before_any_stage(tmp_path: Path, stages: dict[str, Any], words: str):
    assert words in run_cli("pipeline", write(tmp_path, stages)).complaint
    assert not (tmp_path / "runs").exists()


def test_a_stage_that_was_begun_with_other_settings_is_refused(whole: Path):
    outcome = run_cli("pipeline", str(whole / "pipeline.yaml"), "--stages.tuned.kl.coef", "0.3")
    assert "stage tuned was begun with kl.coef 0.05, and now has 0.3; name another folder" in outcome.complaint
    outcome = run_cli("pipeline", str(whole / "pipeline.yaml"), "--stages.answers.rejection-sampling.keep", "0.25")
    assert "stage answers was begun with rejection_sampling.keep 0.5, and now has 0.25; name another" in outcome.complaint


def test_settings_are_compared_as_settings_and_not_as_text(whole: Path):
    config = whole / "runs" / "tuned" / "config.yaml"
    text = config.read_text()
    config.write_text("# A remark.\n" + yaml.safe_dump(yaml.safe_load(text), sort_keys=True))
    outcome = run_cli("pipeline", str(whole / "pipeline.yaml"))
    config.write_text(text)
    assert outcome.code == 0, outcome.err


def test_a_stage_made_from_one_that_was_removed_is_refused(whole: Path, tmp_path: Path):
    file = whole / "pipeline.yaml"
    aside = tmp_path / "taught"
    shutil.move(whole / "runs" / "taught", aside)
    outcome = run_cli("pipeline", str(file))
    shutil.move(aside, whole / "runs" / "taught")
    assert "stage tuned was made from what stage taught no longer is; remove" in outcome.complaint
    shutil.move(whole / "runs" / "again", aside)  # nothing stands on it
    outcome = run_cli("pipeline", str(file))
    assert outcome.code == 0 and outcome.out.count("finished before") == len(STAGES) - 1


def test_a_folder_that_is_no_whole_run_is_to_be_removed(tmp_path: Path):
    file = write(tmp_path, {"taught": STAGES["taught"]})
    (tmp_path / "runs" / "taught").mkdir(parents=True)
    assert "taught exists, but has no config.yaml and is an incomplete run; remove it" in run_cli("pipeline", file).complaint


def test_an_empty_section_of_rejection_sampling_has_its_defaults(tmp_path: Path):
    stages = load_pipeline(write(tmp_path, STAGES | {"answers": STAGES["answers"] | {"rejection_sampling": None}}))
    assert stages[3].config.rejection_sampling == RejectionSamplingConfig()


def test_a_part_that_is_a_stage_is_called_by_its_name(tmp_path: Path):
    parts = [{"name": "stage:judge"}, {"name": "stage:judge2", "weight": 0.5}, {"name": "stage:judge", "label": "other"}]
    judges = dict.fromkeys(("judge", "judge2"), STAGES["judge"])
    stages = load_pipeline(
        write(tmp_path, {**judges, "tuned": changed("tuned", task=task(reward=parts), policy=None)["tuned"]})
    )
    settings = stages[2].config.task
    assert settings is not None and not isinstance(settings.reward, str)
    assert [part.called for part in settings.reward] == ["judge", "judge2", "other"]


REWARD = "def reward(prompts, completions, **columns):\n    return [float(len(prompt)) for prompt in prompts]\n"


def test_answers_of_a_chat_are_learned_behind_the_tokens_they_were_written_behind(tmp_path: Path):
    (tmp_path / "reward.py").write_text(REWARD)
    shutil.copytree(model_folder(chat=True), tmp_path / "model")
    section = {"prompts": "prompts.jsonl", "reward": "reward.py:reward", "chat": True}
    labels = {"episodes": 12, "keep": 1.0, "join": "chats.jsonl"}
    generation = {"max_new_tokens": 3, "stop": ["e", "o", "a", "i"]}
    file = write(tmp_path, {"answers": {"task": section, "generation": generation, "rejection_sampling": labels}})
    outcome = run_cli("pipeline", file)
    assert outcome.code == 0, outcome.err
    given, *examples = [json.loads(line)["messages"] for line in (tmp_path / "runs/answers/completions.jsonl").open()]
    assert given == CHATS[0]["messages"] and examples
    tokenizer = tiny_tokenizer(chat=True)
    for user, assistant in examples:
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        asked = encode_prompt(tokenizer, [user])
        assert asked == encode_prompt(tokenizer, user["content"], chat=True)
        whole = tokenizer.apply_chat_template([user, assistant], tokenize=True, return_dict=True)["input_ids"]
        assert tuple(whole[: len(asked)]) == asked


def test_answers_that_were_all_cut_off_are_no_examples(tmp_path: Path):
    policy = {"policy": {"model": "model"}}
    task = {"task": {"prompts": "prompts.jsonl", "reward": "reward.py:reward"}, "generation": {"max_new_tokens": 1}}
    (tmp_path / "reward.py").write_text(REWARD)
    file = write(tmp_path, {"answers": policy | task | {"rejection_sampling": {"episodes": 2}}})
    outcome = run_cli("pipeline", str(file))
    assert "of 2 completions none is usable" in outcome.err
    assert outcome.code == 2


def test_the_whole_is_checked_without_a_file(tmp_path: Path):
    with pytest.raises(InputError, match=r"no such file"):
        load_pipeline(tmp_path / "none.yaml")


def test_the_pages_pipeline_is_one_and_its_table_is_whole(tmp_path: Path):
    page = (Path(__file__).parent.parent / "docs" / "pipeline.md").read_text(encoding="utf-8")
    example = yaml.safe_load(page.split("```yaml")[1].split("```")[0])
    write(tmp_path, example["stages"])
    (tmp_path / "pairs.jsonl").rename(tmp_path / "examples.jsonl")
    (tmp_path / "prompts.jsonl").rename(tmp_path / "unlabeled.jsonl")
    stages = load_pipeline(tmp_path / "pipeline.yaml")
    assert [stage.name for stage in stages] == ["sft", "judge", "ppo", "best", "again"]
    fields = [*PipelineConfig.model_fields, *(f"rejection_sampling.{name}" for name in RejectionSamplingConfig.model_fields)]
    assert all(f"| `{name}` |" in page for name in fields)


@pytest.mark.parametrize("name", ["pipeline.yaml", "pipeline_labels.yaml"])
def test_the_recipes_pipelines_are_whole(tmp_path: Path, name: str):
    recipe = Path(__file__).parent.parent / "recipes" / "semi_supervised"
    rows = {
        "examples": [{"prompt": f"the film {n}", "completion": " is good"} for n in range(20)],
        "ratings": [{"text": f"the film {n}", "rating": n % 3} for n in range(20)],
        "openings": PROMPTS,
        "answers": [{"prompt": f"the film {n}", "completion": " positive"} for n in range(20)],
        "answer_pairs": [
            {"prompt": f"the film {n}", "chosen": LABELS[n % 2], "rejected": LABELS[1 - n % 2]} for n in range(20)
        ],
        "questions": PROMPTS,
    }
    (tmp_path / "data").mkdir()
    for file, lines in rows.items():
        (tmp_path / "data" / f"{file}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shutil.copy(recipe / name, tmp_path)
    assert [stage.name for stage in load_pipeline(tmp_path / name)] == ["sft", "judge", "ppo", "best", "again"]
