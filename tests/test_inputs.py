"""Models, prompts, rewards and disks that are not as they should be, tried as a user would: from a file, on the command line.

Each is one line with what, where and how to fix it, before heavy work where it can be known, and loses nothing.
"""

from __future__ import annotations

import functools
import json
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
from safetensors.torch import load_file, save_file

from surefoot.storage.run_folder import RunFolder
from surefoot.train import checkpoint
from tests.inputs import PROMPTS, fill_disk, run_cli, write_project

FULL = "No space left on device"
RUN = ("ppo", "config.yaml", "--run.name", "mine", "--run.folder", "runs")


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A whole project to work in; `write_project` puts other parts in."""
    monkeypatch.chdir(tmp_path)
    write_project(tmp_path)
    return tmp_path


@pytest.fixture
def no_model(monkeypatch) -> None:
    """What is checked without a model must be refused before one is loaded."""
    monkeypatch.setattr("surefoot.build.language.load_policy", None)


class Bomb:
    """A pickle that touches `canary` when it is loaded."""

    def __reduce__(self):
        return Path.touch, (Path("canary"),)


Damage = Callable[[Path], object]
WEIGHTS, SHARDS = "model.safetensors", ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def gone(*names: str) -> Damage:
    return lambda folder: [(folder / name).unlink() for name in names]


def written(name: str, data: bytes | Callable[[bytes], bytes]) -> Damage:
    """`data`, or what it makes of the file's, in place of the file."""
    return lambda folder: (folder / name).write_bytes(data((folder / name).read_bytes()) if callable(data) else data)


def changed(name: str, **changes: object) -> Damage:
    return written(name, lambda data: json.dumps(json.loads(data) | changes).encode())


config = functools.partial(changed, "config.json")


def pickle_only(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))


def sharded(second: str) -> Damage:
    def split(folder: Path) -> None:
        shutil.copy(folder / WEIGHTS, folder.parent / "outside.safetensors")
        tensors = load_file(folder / WEIGHTS)
        first = {name: tensors[name] for name in sorted(tensors)[:9]}
        save_file(first, folder / SHARDS[0], metadata={"format": "pt"})
        (folder / WEIGHTS).unlink()
        weights = {name: SHARDS[0] if name in first else second for name in tensors}
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weights}))

    return split


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
    (written(WEIGHTS, pickle.dumps(Bomb())), f"{WEIGHTS}: half-written"),
    (pickle_only, "pytorch_model.bin is a pickle"),
    (sharded(SHARDS[1]), f"{SHARDS[1]} is missing"),
    (sharded("../outside.safetensors"), "'../outside.safetensors'"),
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


MESSAGES = [[{"role": "user", "content": text}] for text in ("one", "two", "three")]


@pytest.mark.parametrize("task", [{"task": {"chat": True}}, {"prompts": MESSAGES}], ids=["chat", "messages"])
def test_chat_needs_a_chat_template_and_is_refused_in_its_own_words(project, task):
    write_project(project, **task)
    run_cli(*RUN).refused("tokenizer", "chat template")
    for template, said in (("{% for x in %}", "expression"), ("{{ raise_exception('no such role') }}", "no such role")):
        (project / "model" / "chat_template.jinja").write_text(template)
        run_cli(*RUN).refused("chat template", said)


def test_what_is_longer_than_the_context_is_named_with_the_ways_out(project):
    long = "a long prompt " * 10
    write_project(project, prompts=[*PROMPTS, {"prompt": long}])
    run_cli(*RUN).refused(f"{long[:60]!r}", "context of 96 leaves 94", "prompt_tokens", "max_new_tokens")
    run_cli(*RUN, "--generation.max-new-tokens", "96").refused("max_new_tokens (96)", "context of 96 tokens")
    assert run_cli(*RUN, "--task.prompt-tokens", "20", "--rollout.total-episodes", "4").code == 0


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("content", "named"),
    [
        ('"one"\n{"prompt"', "line 2: not JSON"),
        ('{"text": "one"}\n', "line 1: no column 'prompt'; it has text"),
        ("", "no prompts"),
    ],
    ids=["broken", "column", "empty"],
)
def test_a_bad_prompt_file_is_refused_before_the_model_is_loaded(project, content, named):
    (project / "prompts.jsonl").write_text(content)
    run_cli(*RUN).refused("prompts.jsonl", named)
    assert not (project / "runs").exists()


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


FUNCTION = "def reward(prompts, completions, **columns):\n    {}\n"
# What a file of rewards or its function can be, the rest of which tests/rewards/ has, and what is named.
BROKEN = [
    ("def reward(:", "task.reward: ", "SyntaxError"),
    # Scripts that end themselves must not end the run, silently and with code 0.
    ("import sys\nsys.exit(0)", "task.reward: ", "SystemExit: 0"),
    ("reward = 0.5", "task.reward: ", "no function 'reward'"),
    (FUNCTION.format("raise ValueError('no\\nidea')"), "raised ValueError: no idea (", "reward.py, line 2)"),
    (FUNCTION.format("import sys; sys.exit(0)"), "raised SystemExit: 0 (", "reward.py, line 2)"),
    (FUNCTION.format("return [1.0]"), "reward function", "returned 1 "),
    (FUNCTION.format("return [1.0, '1.0']"), "reward function", "returned '1.0' for sample 1 (prompt "),
    ("def reward(texts):\n    return [1.0 for _ in texts]\n", "TypeError", "keywords prompts, completions, answer"),
]


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(("source", "first", "second"), BROKEN)
def test_a_broken_reward_is_refused_before_the_model_is_loaded(project, source, first, second):
    write_project(project, reward=source)
    run_cli(*RUN).refused("reward", first, second)
    assert not (project / "runs").exists()


@pytest.mark.usefixtures("no_model")
def test_a_broken_metric_is_refused_before_the_model_is_loaded(project):
    write_project(project, reward=FUNCTION.format("return [0.0] * len(prompts)") + "def metric(**_):\n    return []\n")
    run_cli(*RUN, "--task.metric", "reward.py:metric").refused("metric function", "returned 0 ", "2 completions")


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


def test_a_reward_gets_columns_beside_their_prompts_may_print_and_does_not_move_the_run(project, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    check = "assert all(n == len(p) for p, n in zip(prompts, columns['answer'], strict=True)), (prompts, columns)"
    body = f"import os\n    os.chdir({str(elsewhere)!r})\n    {check}\n    print('scoring')\n    return [0.0] * len(prompts)"
    write_project(project, reward=FUNCTION.format(body))
    outcome = run_cli(*RUN)
    assert outcome.code == 0 and "scoring" in outcome.out
    assert (project / "runs/mine/model/config.json").exists() and not list(elsewhere.iterdir())


@pytest.mark.parametrize("file", ["config.yaml.tmp", "environment.json.tmp", "mine"])
def test_a_disk_full_at_the_start_is_one_line(project, monkeypatch, file):
    real = Path.mkdir
    full = Mock(side_effect=OSError(28, FULL))
    monkeypatch.setattr(
        Path, "mkdir", lambda self, *given, **named: (full if self.name == file else real)(self, *given, **named)
    )
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


def test_a_task_without_held_out_prompts_trains_without_evaluation_and_leaves_no_module_imported(project):
    # Two projects may both have a reward.py.
    write_project(project, task={"held_out": 0})
    write_project(project / "other", reward="def reward(prompts, completions, **columns):\n    return [7.0] * len(prompts)\n")
    outcome = run_cli(*RUN)
    assert outcome.code == 0 and "held-out" not in outcome.out
    assert not [row for row in RunFolder.open("runs/mine").read("metrics.jsonl") if "eval/reward" in row]
    outcome = run_cli("ppo", "other/config.yaml", "--run.folder", "runs", "--rollout.total-episodes", "4")
    assert "reward +7.000" in outcome.out
    assert "reward" not in sys.modules
