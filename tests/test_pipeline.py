"""`surefoot pipeline`: stages that take what earlier ones left, resume, rejection sampling, and bad input in one line."""

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
from surefoot.types import StopReason, Trajectory
from tests.inputs import model_folder, run_cli
from tests.tiny import tiny_tokenizer
from tests.train.small_run import rows
from tests.train.warm import Strike, Warm

WEIGHTS, REJECTION = "model.safetensors", "surefoot.api.rejection"
PAIRS = [{"prompt": f"{word} {number}", "completion": f" {word * 2}"} for word in ("the", "an", "in") for number in range(4)]
RATINGS = [{"text": f"{word} film {number}", "rating": number % 3} for word in ("good", "bad") for number in range(6)]
PROMPTS = [{"prompt": f"{word} {number}"} for word in ("the", "our", "in") for number in range(4)]
CHATS = [{"messages": [{"role": "user", "content": "the"}, {"role": "assistant", "content": " end"}]}]
MIXED = [{"prompt": prompt} for prompt in ("the", "our", "in", [{"role": "user", "content": "the"}])]
TASK = {"prompts": "prompts.jsonl", "reward": "stage:judge", "held_out": 0.3}
SHORT = {"max_new_tokens": 3, "stop": ["e", "o", "a", "i"]}
STAGES: dict[str, Any] = {
    "taught": {"sft": {"data": "pairs.jsonl", "epochs": 1, "batch_size": 4, "held_out": 0.3}},
    "judge": {"reward_model": {"data": "ratings.jsonl", "epochs": 1, "batch_size": 4, "held_out": 0.3}},
    "tuned": {
        "policy": {"model": "stage:taught"},
        "task": TASK,
        "generation": {"max_new_tokens": 3},
        "ppo": {"batch_size": 4, "n_epochs": 1},
        "rollout": {"total_episodes": 8, "episodes_per_update": 4},
    },
    "answers": {
        "policy": {"model": "stage:tuned"},
        "task": TASK,
        "generation": SHORT,
        "rejection_sampling": {"episodes": 36, "keep": 0.5, "join": "pairs.jsonl"},
    },
    "again": {"sft": {"data": "stage:answers", "epochs": 1, "batch_size": 4, "held_out": 0.3}},
}


BROKEN = "def takes_nothing():\n    return []\n\ndef says_nothing(**columns):\n    return []\n"
BROKEN += "\ndef length(prompts, **columns):\n    return [float(len(prompt)) for prompt in prompts]\n"


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


def test_every_stage_leaves_what_the_next_one_takes_and_a_finished_pipeline_does_nothing(whole: Path):
    runs = whole / "runs"
    assert sorted(path.name for path in runs.iterdir()) == ["again", "answers", "judge", "taught", "tuned"]
    tuned = yaml.safe_load((runs / "tuned" / "config.yaml").read_text())
    assert tuned["policy"]["model"] == str(runs / "taught" / "model")
    assert tuned["task"]["reward"] == str(runs / "judge" / "model")
    assert (runs / "again" / "model" / WEIGHTS).is_file()
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*") if path.is_file() and path.name != ".lock"}
    config, text = runs / "tuned" / "config.yaml", (runs / "tuned" / "config.yaml").read_text()
    config.write_text("# A remark.\n" + yaml.safe_dump(yaml.safe_load(text), sort_keys=True))  # the same settings
    outcome = run_cli("pipeline", whole / "pipeline.yaml")
    config.write_text(text)
    assert outcome.code == 0 and outcome.out.count("finished before") == len(STAGES), outcome.err
    assert {path: path.stat().st_mtime_ns for path in before if path != config}.items() <= before.items()


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


@pytest.mark.parametrize(("place", "nth"), [("surefoot.train.update:take_step", 4), (f"{REJECTION}:write_durably", 2)])
def test_a_killed_pipeline_goes_on_to_the_same_weights(tmp_path: Path, whole: Path, warm: Warm, place: str, nth: int):
    file = write(tmp_path, STAGES)
    strike = Strike(place, nth=nth, signals=[int(signal.SIGKILL)])
    assert warm.run(tmp_path, "pipeline", file, strikes=[strike]).code == -signal.SIGKILL
    ended = warm.run(tmp_path, "pipeline", file)
    assert ended.code == 0, ended.stderr
    for stage in ("taught", "tuned", "again"):
        mine, other = tmp_path / "runs" / stage, whole / "runs" / stage
        assert rows(mine) == rows(other)
        assert (mine / "model" / WEIGHTS).read_bytes() == (other / "model" / WEIGHTS).read_bytes()
    mine, other = (folder / "runs" / "answers" / "completions.jsonl" for folder in (tmp_path, whole))
    assert mine.read_bytes() == other.read_bytes()


def test_paths_in_the_file_are_its_own_and_those_in_flags_the_working_directorys(tmp_path: Path, warm: Warm, monkeypatch):
    here, there = tmp_path / "a", tmp_path / "a" / "b"
    there.mkdir(parents=True)
    write(there, {"taught": STAGES["taught"]})
    strike = Strike("surefoot.api.supervised:SFT.save", signals=[int(signal.SIGKILL)])
    assert warm.run(here, "pipeline", "b/pipeline.yaml", strikes=[strike]).code == -signal.SIGKILL
    checkpoint = next((there / "runs" / "taught" / "checkpoints").glob("*/*.safetensors"))
    before = checkpoint.stat().st_mtime_ns
    refused = warm.run(there, "pipeline", "../b/pipeline.yaml", "--stages.taught.sft.learning-rate", "0.5")
    assert "sft.learning_rate" in refused.stderr and refused.code == 2
    ended = warm.run(there, "pipeline", "../b/pipeline.yaml")
    assert ended.code == 0, ended.stderr
    assert (there / "runs" / "taught" / "model" / WEIGHTS).is_file()
    assert checkpoint.stat().st_mtime_ns == before  # it went on from there
    assert not [path for path in tmp_path.rglob("runs") if path != there / "runs"]
    (there / "pairs.jsonl").rename(here / "mine.jsonl")
    monkeypatch.chdir(here)
    flags = {"stages.taught.sft.data": "./mine.jsonl", "folder": "here", "common.seed": "9"}
    (stage,) = load_pipeline("b/pipeline.yaml", flags)
    assert stage.config.sft is not None and stage.config.seed == 9
    assert stage.config.sft.data == str(here / "mine.jsonl") and stage.config.policy.model == str(there / "model")
    assert stage.product == here / "here" / "taught" / "model"


def changed(name: str, **sections: Any) -> dict[str, Any]:
    """`STAGES` with other sections in one stage; None takes one out."""
    stage = {key: value for key, value in (STAGES[name] | sections).items() if value is not None}
    return STAGES | {name: stage}


def tuned(**settings: Any) -> dict[str, Any]:
    """`STAGES` with other settings of the task of PPO."""
    return changed("tuned", task=TASK | settings)


JUDGED = {"name": "stage:judge"}
GROUPS: dict[str, Any] = {"group": {"size": 8}, "rollout": {"episodes_per_update": 64}, "ppo": {"batch_size": 8}}
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "a name that is a path": ({"../x": STAGES["taught"]}, "'../x'"),
    "a later stage": ({"first": STAGES["tuned"]}, "stage:taught"),
    "nothing to learn": ({"empty": {"seed": 1}}, "stage empty"),
    "a misspelt key": (changed("taught", sft={"data": "pairs.jsonl", "epoch": 1}), "stage taught: unknown key 'sft.epoch'"),
    "no rows to join": (changed("answers", rejection_sampling={"join": "none.jsonl"}), "answers: rejection_sampling.join"),
    "rejection without a task": (changed("answers", task=None, sft=STAGES["taught"]["sft"]), "answers: rejection_sampling"),
    "rejection that is no section": (changed("answers", rejection_sampling=5), "rejection_sampling"),
    "a run that is no section": (changed("taught", run=5), "stage taught: run"),
    "a new model": (changed("taught", new_model={}), "new_model"),
    "a share of a group": (changed("answers", **GROUPS), "rejection_sampling.episodes (36)"),
    "no such part": (tuned(reward=[JUDGED, {"name": "math:sinus"}]), "stage tuned: task.reward, sinus"),
    "a reward that takes nothing": (tuned(reward=[JUDGED, {"name": "broken.py:takes_nothing"}]), "takes_nothing"),
    "a metric that says nothing": (tuned(metric="broken.py:says_nothing"), "stage tuned: the metric"),
    "no reward model": (tuned(reward="model"), "stage tuned: task.reward"),
    "no such model": (changed("taught", policy={"model": "./none"}), "stage taught: policy.model"),
    "a reward model as policy": (changed("tuned", policy={"model": "stage:judge"}), "policy.model"),
    "a language model as reward": (tuned(reward=[{"name": "stage:taught"}]), "task.reward.name"),
    "a model as examples": (changed("again", sft={"data": "stage:tuned"}), "stage again: sft.data"),
    "chats for strings": (changed("answers", rejection_sampling={"join": "chats.jsonl"}), "sampling.join has messages"),
    "pairs for a chat": (changed("answers", task=TASK | {"chat": True}), "join has prompt and completion"),
    "prompts of both kinds": (changed("answers", task=TASK | {"prompts": "mixed.jsonl", "held_out": 0.0}), "task.prompts"),
    "a name of its own": (changed("taught", run={"name": "x"}), "run.name"),
}


@pytest.mark.parametrize(("stages", "named"), BAD.values(), ids=BAD)
def test_bad_pipelines_are_refused_in_one_line_before_any_stage(tmp_path: Path, stages: dict[str, Any], named: str):
    run_cli("pipeline", write(tmp_path, stages)).refused(named)
    assert not (tmp_path / "runs").exists()


def test_a_stage_that_was_begun_with_other_settings_is_refused(whole: Path):
    file = whole / "pipeline.yaml"
    run_cli("pipeline", file, "--stages.tuned.kl.coef", "0.3").refused("stage tuned", "kl.coef 0.05", "0.3")
    flags = ("--stages.answers.rejection-sampling.keep", "0.25")
    run_cli("pipeline", file, *flags).refused("stage answers", "rejection_sampling.keep 0.5", "0.25")


def test_a_stage_made_from_one_that_was_removed_is_refused(whole: Path, tmp_path: Path):
    file = whole / "pipeline.yaml"
    aside = tmp_path / "taught"
    shutil.move(whole / "runs" / "taught", aside)
    outcome = run_cli("pipeline", str(file))
    shutil.move(aside, whole / "runs" / "taught")
    outcome.refused("stage tuned", "stage taught")
    shutil.move(whole / "runs" / "again", aside)  # nothing stands on it
    outcome = run_cli("pipeline", str(file))
    assert outcome.code == 0 and outcome.out.count("finished before") == len(STAGES) - 1


def test_an_empty_section_has_its_defaults_and_a_part_that_is_a_stage_is_called_by_its_name(tmp_path: Path):
    parts = [{"name": "stage:judge"}, {"name": "stage:judge2", "weight": 0.5}, {"name": "stage:judge", "label": "other"}]
    stages = STAGES | {"judge2": STAGES["judge"], "more": tuned(reward=parts)["tuned"]}
    stages["answers"] = STAGES["answers"] | {"rejection_sampling": None, "ppo": {"batch_size": 7}}  # it updates nothing
    loaded = {stage.name: stage.config for stage in load_pipeline(write(tmp_path, stages))}
    assert loaded["answers"].rejection_sampling == RejectionSamplingConfig()
    settings = loaded["more"].task
    assert settings is not None and not isinstance(settings.reward, str)
    assert [part.called for part in settings.reward] == ["judge", "judge2", "other"]


def test_answers_of_a_chat_are_learned_behind_the_tokens_they_were_written_behind(tmp_path: Path):
    shutil.copytree(model_folder(chat=True), tmp_path / "model")
    tokenizer, tools = tiny_tokenizer(chat=True), [{"type": "function", "function": {"name": "add"}}]
    tokenizer.chat_template = "{{ tools[0]['function']['name'] if tools }}" + tokenizer.chat_template
    tokenizer.save_pretrained(tmp_path / "model")
    asked = [{"prompt": word, "tools": tools} for word in ("a", "in", "the")]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    section = {"prompts": "asked.jsonl", "reward": "broken.py:length", "chat": True}
    labels = {"episodes": 12, "keep": 1.0, "join": "chats.jsonl"}
    file = write(tmp_path, {"answers": {"task": section, "generation": SHORT, "rejection_sampling": labels}})
    assert (outcome := run_cli("pipeline", file)).code == 0, outcome.err
    given, *examples = [json.loads(line) for line in (tmp_path / "runs/answers/completions.jsonl").open()]
    assert given["messages"] == CHATS[0]["messages"] and examples
    for example in examples:
        user, assistant = example["messages"]
        assert (user["role"], assistant["role"], example["tools"]) == ("user", "assistant", tools)
        prompt = encode_prompt(tokenizer, user["content"], chat=True, tools=tools)
        whole = tokenizer.apply_chat_template([user, assistant], tools=tools, tokenize=True, return_dict=True)["input_ids"]
        assert tuple(whole[: len(prompt)]) == prompt


def test_answers_that_were_all_cut_off_are_no_examples(tmp_path: Path):
    stage = {"task": {"prompts": "prompts.jsonl", "reward": "broken.py:length"}, "generation": {"max_new_tokens": 1}}
    file = write(tmp_path, {"answers": stage | {"rejection_sampling": {"episodes": 2}}})
    run_cli("pipeline", file).refused("of 2 completions", "generation.max_new_tokens")
    (tmp_path / "runs" / "answers" / "config.yaml").unlink()
    run_cli("pipeline", file).refused("answers", "config.yaml")


def test_the_pages_pipeline_is_one_and_its_table_is_whole(tmp_path: Path):
    page = (Path(__file__).parent.parent / "docs" / "pipeline.md").read_text(encoding="utf-8")
    example = yaml.safe_load(page.split("```yaml")[1].split("```")[0])
    write(tmp_path, example["stages"])
    (tmp_path / "pairs.jsonl").rename(tmp_path / "examples.jsonl")
    (tmp_path / "prompts.jsonl").rename(tmp_path / "unlabeled.jsonl")
    assert [stage.name for stage in load_pipeline(tmp_path / "pipeline.yaml")] == ["sft", "judge", "ppo", "best", "again"]
    fields = [*PipelineConfig.model_fields, *(f"rejection_sampling.{name}" for name in RejectionSamplingConfig.model_fields)]
    assert all(f"| `{name}` |" in page for name in fields)


@pytest.mark.parametrize("name", ["pipeline.yaml", "pipeline_labels.yaml"])
def test_the_recipes_pipelines_are_whole(tmp_path: Path, name: str):
    recipe = Path(__file__).parent.parent / "recipes" / "semi_supervised"
    films = [f"the film {n}" for n in range(20)]
    examples = [{"prompt": film, "completion": " is good"} for film in films]
    rows = {"examples": examples, "answers": examples, "openings": PROMPTS, "questions": PROMPTS}
    rows["ratings"] = [{"text": film, "rating": n % 3} for n, film in enumerate(films)]
    rows["answer_pairs"] = [{"prompt": f, "chosen": f" {n % 2}", "rejected": f" {1 - n % 2}"} for n, f in enumerate(films)]
    (tmp_path / "data").mkdir()
    for file, lines in rows.items():
        (tmp_path / "data" / f"{file}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shutil.copy(recipe / name, tmp_path)
    assert [stage.name for stage in load_pipeline(tmp_path / name)] == ["sft", "judge", "ppo", "best", "again"]
