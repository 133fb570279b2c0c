"""Models, prompts, rewards and disks that are not as they should be, tried as a user would: from a file, on the command line.

Each is one line with what, where and how to fix it, before heavy work where it can be known, and loses nothing.
"""

import functools
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
import yaml

from surefoot.storage.run_folder import RunFolder
from surefoot.train import checkpoint
from tests.inputs import PROMPTS, fill_disk, run_cli, write_project
from tests.test_reward_model import PAIRS as PREFERENCES
from tests.test_reward_model import RATINGS
from tests.test_sft import PAIRS

FULL = "No space left on device"
RUN = ("ppo", "config.yaml", "--run.name", "mine", "--run.folder", "runs")


@pytest.fixture
def no_model(monkeypatch) -> None:
    """What is checked without a model must be refused before one is loaded."""
    monkeypatch.setattr("surefoot.build.language.load_policy", None)


Damage = Callable[[Path], object]
WEIGHTS = "model.safetensors"


def gone(*names: str) -> Damage:
    return lambda folder: [(folder / name).unlink() for name in names]


def written(name: str, data: bytes | Callable[[bytes], bytes]) -> Damage:
    """`data`, or what it makes of the file's, in place of the file."""
    return lambda folder: (folder / name).write_bytes(data((folder / name).read_bytes()) if callable(data) else data)


def changed(name: str, **changes: object) -> Damage:
    return written(name, lambda data: json.dumps(json.loads(data) | changes).encode())


config = functools.partial(changed, "config.json")


def remote_code(folder: Path) -> None:
    config(model_type="mine", auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"})(folder)
    (folder / "code.py").write_text("from pathlib import Path\nPath('canary').touch()\n")


# What is wrong with a model folder, and what is named. The first part is found before anything is loaded.
SEEN_FROM_OUTSIDE = [
    (gone("config.json"), "no config.json"),
    (gone(WEIGHTS), f"no {WEIGHTS}"),
    (written(WEIGHTS, lambda data: data[: len(data) // 2]), f"{WEIGHTS}: half-written"),
    (written(WEIGHTS, b""), f"{WEIGHTS}: half-written"),
    (written(WEIGHTS, lambda data: (2**62).to_bytes(8, "little") + data[8:]), f"{WEIGHTS}: half-written"),
]
SEEN_BY_LOADING = [
    (remote_code, "configuration"),
    (gone("tokenizer.json", "tokenizer_config.json"), "tokenizer"),
    (written("tokenizer.json", b"{"), "tokenizer"),
    (written("tokenizer.json", b'{"model": {"type": "x"}}'), "tokenizer"),
    *((written("config.json", data), "configuration") for data in (b"{", b"[]", b"{}")),
    (config(model_type="t5"), "causal language model"),
    (config(hidden_size="wide"), "configuration"),
    (config(num_hidden_layers=3, layer_types=None), "9 weights of the model are not in the folder"),
    (config(intermediate_size=64), "is [32, 48], and config.json says [32, 64]"),
]


@pytest.mark.parametrize(("damage", "named"), [*SEEN_FROM_OUTSIDE, *SEEN_BY_LOADING])
def test_a_broken_model_folder_is_refused_and_leaves_no_run(project, monkeypatch, damage, named):
    damage(project / "model")
    if (damage, named) in SEEN_FROM_OUTSIDE:
        monkeypatch.setattr("surefoot.build.language.load_policy", None)
        run_cli("generate", "model", "x").refused("model", named)
    run_cli(*RUN).refused("model", named)
    assert not (project / "canary").exists() and not (project / "runs").exists()


def test_what_is_longer_than_the_context_is_named_with_the_ways_out(project):
    long = "a long prompt " * 10
    write_project(project, prompts=[*PROMPTS, {"prompt": long}])
    run_cli(*RUN).refused(f"{long[:60]!r}", "context of 96 leaves 94", "prompt_tokens", "max_new_tokens")
    run_cli(*RUN, "--generation.max-new-tokens", "96").refused("max_new_tokens (96)", "context of 96 tokens")
    assert run_cli(*RUN, "--task.prompt-tokens", "20", "--rollout.total-episodes", "4").code == 0


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("flag", "value", "named"),
    [
        ("--task.prompts", "no.jsonl", ["task.prompts", "no.jsonl", "movie-reviews"]),
        ("--task.prompts", "smollm2-135m-instruct", ["task.prompts", "smollm2-135m-instruct", "movie-reviews"]),
        ("--task.prompts", "model", ["model: cannot be read: Is a directory"]),
        ("--task.reward", "reward", ["task.reward", "file.py:function", "'reward'"]),
        ("--task.reward", "no.such:reward", ["task.reward: no.such", "ModuleNotFoundError: No module named 'no'"]),
        ("--task.metric", "no.py:other", ["task.metric: no file no.py"]),
        ("--policy.model", "movie-reviews", ["policy.model: movie-reviews", "smollm2-135m-instruct"]),
    ],
)
def test_a_name_that_leads_nowhere_is_refused_before_the_model_is_loaded(project, flag, value, named):
    run_cli(*RUN, flag, value).refused(*named)


BIASED = [{**row, "chosen": " positive", "rejected": " negative"} for row in PREFERENCES]
# Command, rows of pairs.jsonl, flags, and what is named.
EXAMPLES = [
    ("sft", PAIRS, "--sft.data null", "sft.data"),
    ("sft", PAIRS, "--sft.data no.jsonl", "no.jsonl"),
    ("sft", PAIRS, "--sft.lr-schedule function", "--sft.lr-schedule"),
    ("sft", PAIRS, "--sft.columns '{promt: q}'", "--sft.columns"),
    ("sft", PAIRS, "--sft.columns '{prompt: q}'", "pairs.jsonl, line 1"),
    ("sft", PAIRS, "--policy.model ./no", "policy.model"),
    ("reward-model", PREFERENCES, "--reward-model.data null", "reward_model.data"),
    ("reward-model", PREFERENCES, "--reward-model.data no.jsonl", "no.jsonl"),
    ("reward-model", PREFERENCES, "--reward-model.rating-range [4,-4]", "--reward-model.rating-range"),
    ("reward-model", PREFERENCES, "--reward-model.rating-range [-4,4]", "reward_model.rating_range"),
    ("reward-model", PREFERENCES, "--policy.model ./no", "policy.model"),
    ("reward-model", RATINGS, "--reward-model.rating-range [-1,5]", "pairs.jsonl, line 4"),
    ("reward-model", RATINGS, "--reward-model.center 0.1", "reward_model.center"),
    ("reward-model", [{**row, "rating": 1.0} for row in RATINGS], "", "41 ratings"),
    ("reward-model", BIASED, "", "27 pairs"),
    ("ppo", [], "--task.prompts pairs.jsonl", "pairs.jsonl: no prompts"),
    ("ppo", [{"text": "one"}], "--task.prompts pairs.jsonl", "line 1: no column 'prompt'; it has text"),
    ("ppo", PAIRS, "--ptx.coef 0.5", "ptx.data"),
    ("ppo", PAIRS, "--ptx.data no.jsonl", "no.jsonl"),
    ("ppo", [], "--ptx.data pairs.jsonl", "pairs.jsonl"),
    ("ppo", [{"prompt": "a"}], "--ptx.data pairs.jsonl", "pairs.jsonl, line 1"),
    ("ppo", PAIRS, "--ptx.data pairs.jsonl --ptx.coef -1", "--ptx.coef"),
    ("ppo", PAIRS, "--ptx.data pairs.jsonl --ptx.coeff 1", "'--ptx.coef'"),
]


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(("verb", "rows", "flags", "named"), EXAMPLES)
def test_examples_that_cannot_be_learned_from_are_refused_before_the_model_is_loaded(project, verb, rows, flags, named):
    if verb != "ppo":
        section = {verb.replace("-", "_"): {"data": "pairs.jsonl", "held_out": 0.3}}
        Path("config.yaml").write_text(yaml.safe_dump({"policy": {"model": "model"}, **section}))
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_cli(verb, "config.yaml", *shlex.split(flags)).refused(named)
    assert not (project / "runs").exists()


FUNCTION = "def reward(prompts, completions, **columns):\n    {}\n"
# What a file of rewards or its function can be, the rest of which tests/rewards/ has, and what is named.
BROKEN = [
    ("def reward(:", "task.reward: ", "SyntaxError"),
    # Scripts that end themselves must not end the run, silently and with code 0.
    ("import sys\nsys.exit(0)", "task.reward: ", "SystemExit: 0"),
    (FUNCTION.format("raise ValueError('no\\nidea')"), "raised ValueError: no idea (", "reward.py, line 2)"),
    (FUNCTION.format("return [1.0]"), "reward function", "returned 1 "),
    ("def reward(texts):\n    return [1.0 for _ in texts]\n", "TypeError", "keywords prompts, completions, answer"),
]


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(("source", "first", "second"), BROKEN)
def test_a_broken_reward_is_refused_before_the_model_is_loaded(project, source, first, second):
    write_project(project, reward=source)
    run_cli(*RUN).refused("reward", first, second)
    assert not (project / "runs").exists()


# The try at the start and the evaluation before the first update are calls 1 and 2, the updates' rollouts 3 and 4.
AT_CALL = """
import itertools
calls = itertools.count(1)

def reward(prompts, completions, **columns):
    scores = [float(len(c)) for c in completions]
    if next(calls) == {call}:
        {what}
    return scores
"""
MID_RUN = [("raise SystemExit", "raised SystemExit"), ("scores[2] = float('nan')", "returned nan for sample 2 (prompt ")]


@pytest.mark.parametrize(("what", "named"), [*MID_RUN, ("scores.pop()", "returned 3 ")])
def test_a_reward_that_breaks_in_the_middle_of_a_run_loses_nothing(project, what, named):
    # checkpoint_every is far away: what is saved is saved because of the error.
    write_project(project, reward=AT_CALL.format(call=4, what=what), run={"checkpoint_every": 100})
    outcome = run_cli(*RUN)
    assert "update 1/2" in outcome.out and "update 2/2" not in outcome.out
    outcome.refused("reward function", named, "surefoot resume runs/mine")
    assert newest(project) == "00000001"
    (project / "reward.py").write_text(AT_CALL.format(call=0, what="pass"))
    run_cli("resume", "runs/mine").refused("task.reward", "--accept-changes")  # its file has changed
    resumed = run_cli("resume", "runs/mine", "--accept-changes")
    assert resumed.code == 0 and "update 2/2" in resumed.out and "update 1/2" not in resumed.out


@pytest.mark.parametrize("file", ["config.yaml.tmp", "environment.json.tmp", "mine"])
def test_a_disk_full_at_the_start_is_one_line(project, monkeypatch, file):
    real, full = Path.mkdir, Mock(side_effect=OSError(28, FULL))
    monkeypatch.setattr(Path, "mkdir", lambda self, *a, **named: (full if self.name == file else real)(self, *a, **named))
    fill_disk(monkeypatch, file)
    run_cli(*RUN).refused("runs/mine", FULL)


def newest(project: Path) -> str:
    saved = checkpoint.newest_checkpoint(project / "runs/mine/checkpoints")
    return "" if saved is None else saved.name


@pytest.mark.parametrize(
    ("file", "writes_before"),
    [("metrics.jsonl", 2), ("samples.jsonl", 2), ("metrics.jsonl", 1), ("samples.jsonl", 0), ("events.out", 0)],
)
def test_a_disk_full_in_the_middle_of_a_run_is_one_line_and_leaves_the_checkpoints(project, monkeypatch, file, writes_before):
    with monkeypatch.context() as patches:
        fill_disk(patches, file, after=writes_before)
        place = "runs/mine/tensorboard" if file == "events.out" else f"runs/mine/{file}"
        run_cli(*RUN).refused(place, FULL)
    if writes_before == 2:  # the evaluation's and the first update's line are there; so is the first update's checkpoint
        assert newest(project) == "00000001"
    resumed = run_cli("resume", "runs/mine")  # there is space again
    assert resumed.code == 0, resumed
    rows = RunFolder.open("runs/mine").read("metrics.jsonl")
    assert [row["update"] for row in rows if "eval/reward" not in row] == [1, 2]
    assert [row["update"] for row in rows if "eval/reward" in row] == [0, 2]


def test_a_disk_full_while_a_checkpoint_or_the_model_is_written_leaves_a_run_that_can_go_on(project, monkeypatch):
    with monkeypatch.context() as patches:
        fill_disk(patches, "manifest.json.tmp", after=1)
        run_cli(*RUN).refused("runs/mine/checkpoints/00000002", FULL)
    assert newest(project) == "00000001"
    with monkeypatch.context() as patches:
        patches.setattr("surefoot.policies.lm.policy.save_file", Mock(side_effect=OSError(28, FULL)))
        run_cli("resume", "runs/mine").refused("runs/mine/model", FULL)
    assert not (project / "runs/mine/model").exists()
    assert run_cli("resume", "runs/mine").code == 0 and (project / "runs/mine/model/config.json").exists()


def test_a_task_without_held_out_prompts_trains_without_evaluation(project):
    write_project(project, task={"held_out": 0})
    outcome = run_cli(*RUN)
    assert outcome.code == 0 and "held-out" not in outcome.out
    assert not [row for row in RunFolder.open("runs/mine").read("metrics.jsonl") if "eval/reward" in row]
