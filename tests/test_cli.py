"""The command line as a shell sees it: verbs, flags, exit codes, streams, and how soon it answers."""

import errno
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import surefoot
from surefoot import assets
from surefoot.cli import main as cli
from surefoot.config import field_table, load_config
from tests.inputs import Outcome, model_folder, run_cli, write_project

HEAVY = ("torch", "transformers", "peft", "numpy", "safetensors", "rich", "tensorboard")

FIELDS = {f"--{row.key.replace('_', '-')}" for row in field_table()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, Outcome]:
    """A run that the command line has trained to its end, and what it said."""
    folder = tmp_path_factory.mktemp("finished")
    outcome = run_cli("ppo", write_project(folder), "--run.name", "mine", "--run.folder", folder / "runs")
    return folder / "runs" / "mine", outcome


@pytest.fixture
def finished(trained) -> Path:
    return trained[0]


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("statement", "seconds"),
    [
        ("import surefoot", 0.3),
        ("from surefoot.cli.main import main; main(['--help'])", 0.7),
        ("from surefoot.cli.main import main; main(['ppo', '--help'])", 0.7),
    ],
    ids=["import", "--help", "ppo --help"],
)
def test_what_needs_no_torch_imports_none_and_answers_at_once(statement, seconds):
    check = f"import sys, atexit; atexit.register(lambda: print(sorted(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr))"
    taken = []
    for _ in range(3):  # of the processor's time, the best: other programs want it too
        before = os.times()
        result = python("-c", f"{check}\n{statement}")
        after = os.times()
        taken.append(after.children_user + after.children_system - before.children_user - before.children_system)
        assert (result.returncode, result.stderr) == (0, "[]\n")
    assert min(taken) < seconds, taken


@pytest.mark.parametrize(("arguments", "code"), [("ppo no.yaml", 2), ("import-trl -- trl grpo --beta 0", 0)])
def test_settings_are_read_without_importing_torch(arguments, code):
    result = python("-X", "importtime", "-m", "surefoot.cli.main", *arguments.split())
    assert result.returncode == code and "surefoot.config" in result.stderr and "| torch" not in result.stderr


def test_help_lists_every_verb_with_what_it_does_and_flags_that_there_are():
    outcome = run_cli("--help")
    named = re.findall(r"--([a-z_-]+\.[a-z_.-]+)", outcome.out)
    assert named and {name.replace("-", "_") for name in named} <= {row.key for row in field_table()}
    said = " ".join(outcome.out.split())
    assert outcome.code == 0 and outcome.err == ""
    for name, verb in cli.VERBS.items():
        assert f" {name} {verb.summary}" in said
    for code in ("0 done", "2 bad input", "3 stopped", "130 Ctrl-C", "143 SIGTERM"):
        assert code in said
    assert run_cli("--version").out == f"surefoot {surefoot.__version__}\n"


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_explains_itself_and_lists_the_fields_it_takes(verb):
    outcome = run_cli(verb, "--help")
    assert outcome.code == 0 and outcome.out.startswith(f"usage: surefoot {verb} ")
    flags = {word for word in outcome.out.split() if word.startswith("--")}
    takes_fields = verb in ("ppo", "sft", "new-model", "reward-model", "dpo", "rejection-sampling", "demo")
    assert flags >= FIELDS if takes_fields else not flags & FIELDS - {"--seed"}


PPO, GENERATE = ["ppo", "config.yaml"], ["generate", "model", "x"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], ["a verb is needed", *cli.VERBS]),
        (["resum"], ["'resum'", "'resume'"]),
        (["train"], ["'train'", *cli.VERBS]),
        (["ppo"], ["FILE", "surefoot ppo --help"]),
        ([*PPO, "more"], ["more", "surefoot --help"]),
        ([*PPO, "--kl.coef"], ["--kl.coef needs a value"]),
        (["ppo", "--run.name", "--seed", "3", "config.yaml"], ["--run.name needs a value"]),
        ([*PPO, "--run.name="], ["--run.name", "null"]),
        (["ppo", "no.yaml"], ["no.yaml: no such file"]),
        (["ppo", "empty.yaml"], ["empty.yaml", "task.prompts", "env.id"]),
        (["sft", "config.yaml"], ["config.yaml", "sft.data"]),
        (["reward-model", "config.yaml"], ["config.yaml", "reward_model.data"]),
        (["dpo", "config.yaml"], ["config.yaml", "dpo.data"]),
        (["ppo", "sft.yaml"], ["sft.yaml", "sft section", "surefoot sft sft.yaml"]),
        (["ppo", "."], [".: cannot be read"]),
        (["resume", "no", "--seed", "3"], ["no is not a run folder"]),
        (["generate", "model", "  "], ["text is empty"]),
        ([*GENERATE, "--seed", "a"], ["--seed", "'a'"]),
        ([*GENERATE, "--temperature", "-1"], ["temperature", "got -1.0"]),
        (["generate", "./no", "x"], ["policy.model: no folder ./no"]),
        (["fetch", "tweeets"], ["'tweeets'", *assets.ASSETS]),
        (["demo", "--nosuch", "1"], ["'--nosuch'"]),
        (["demo", "--run.name", "../x"], ["--run.name", "'../x'"]),
    ],
    ids=" ".join,
)
def test_a_command_that_cannot_be_is_one_line_and_exit_code_2(project, monkeypatch, arguments, named):
    monkeypatch.setattr("surefoot.build.language.load_policy", None)  # nothing of this may come as far as a model
    (project / "empty.yaml").touch()
    (project / "sft.yaml").write_text("sft: {data: prompts.jsonl}")
    before = sorted(project.rglob("*"))
    run_cli(*arguments).refused(*named)
    assert sorted(project.rglob("*")) == before


def test_fetch_prints_the_path_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(assets, "fetch", lambda name: assets.log_to_stderr("fetching it") or tmp_path / name)
    outcome = run_cli("fetch", "tweets")
    assert (outcome.code, outcome.out, outcome.err) == (0, f"{tmp_path / 'tweets'}\n", "fetching it\n")


@pytest.mark.parametrize("order", [1, -1], ids=["after", "before"])
def test_flags_may_stand_before_and_after_the_file(project, monkeypatch, order):
    seen = []
    monkeypatch.setattr("surefoot.api.ppo.PPO.__init__", lambda self, *_, config, **__: seen.append(config))
    monkeypatch.setattr(cli, "_finish", lambda run: None)
    flags = ["--seed", "3", "--kl.coef=3e-1", "--ppo.gamma", "0.5", "--run.name", "7", "--ppo.gamma", "0.25"]
    run_cli("ppo", *[part for group in (["config.yaml"], flags)[::order] for part in group])
    assert [(c.seed, c.kl.coef, c.ppo.gamma, c.run.name) for c in seen] == [(3, 0.3, 0.25, "7")]


def test_a_run_says_what_it_does_what_it_left_and_what_to_do_next(trained):
    folder, outcome = trained
    assert outcome.code == 0 and outcome.err == ""
    lines = outcome.out.splitlines()
    starts = ("held-out after 0", "update 1/2", "update 2/2", "held-out after 2", "model: ", "run:   ", "next:  ")
    assert len(lines) == len(starts) and all(line.startswith(start) for line, start in zip(lines, starts, strict=True))
    assert lines[-1] == f'next:  surefoot generate {folder} "your text"'
    for part in ("config.yaml", "environment.json", "metrics.jsonl", "samples.jsonl", "tensorboard", "model/config.json"):
        assert (folder / part).exists(), part
    task = load_config(folder / "config.yaml").task
    assert task is not None and Path(task.prompts) == (folder.parent.parent / "prompts.jsonl").resolve()


def test_a_device_this_machine_lacks_is_refused_before_anything_is_fetched(project, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("surefoot.data.assets.fetch", None)
    for flags in (["--task.prompts", "tweets"], ["--policy.model", "smollm2-135m-instruct"]):
        run_cli("ppo", "config.yaml", "--device", "cuda", *flags).refused("device: cuda", "auto or cpu")


def test_generate_continues_a_text_with_any_model(finished, monkeypatch):
    monkeypatch.setattr(assets, "fetch", lambda name: model_folder())
    for name in (finished, finished / "model", model_folder(), "smollm2-135m-instruct"):
        command = ("generate", name, "the film", "--max-new-tokens", "5")
        first = run_cli(*command)
        assert first.code == 0 and first.err == "" and first.out.strip() and run_cli(*command).out == first.out
        assert len({run_cli(*command, "--seed", seed).out for seed in range(4)}) > 1


def test_generate_obeys_its_flags(finished):
    greedy = {run_cli("generate", finished, "the film", "--temperature", "0", "--seed", seed).out for seed in range(3)}
    narrow = {run_cli("generate", finished, "the film", "--top-k", "1", "--seed", seed).out for seed in range(3)}
    assert len(greedy) == 1 and narrow == greedy


def test_generate_sends_a_chat_through_the_template(finished, monkeypatch):
    command = ("generate", model_folder(chat=True), "the film", "--temperature", "0")
    assert run_cli(*command).out != run_cli(*command, "--chat").out
    run_cli("generate", finished, "the film", "--chat").refused("chat template")


def test_generate_needs_a_checkpoint_of_a_run_that_has_just_begun(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "begun", ignore=shutil.ignore_patterns("checkpoints"))
    # What the untrained model writes must not pass for the run's.
    run_cli("generate", tmp_path / "begun", "x").refused(str(tmp_path / "begun"), "no checkpoint yet")


def test_a_bug_is_a_traceback_and_not_a_line(project, monkeypatch):
    monkeypatch.setattr("surefoot.build.language.build_task", lambda config: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_cli("ppo", "config.yaml")


def test_a_message_of_several_lines_is_said_in_one(monkeypatch):
    monkeypatch.setattr(assets, "fetch", lambda name: (_ for _ in ()).throw(surefoot.InputError("one\ntwo\n")))
    assert run_cli("fetch", "tweets").complaint == "one two"


def shell(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A command line in a real shell, `surefoot` being this interpreter's."""
    script = f'surefoot() {{ "{sys.executable}" -m surefoot.cli.main "$@"; }}; {command}'
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(surefoot.__file__).parent.parent)}
    environment.pop("PYTHONUNBUFFERED", None)  # a pipe is noticed to be closed when the buffer is written, at the end
    command = ["bash", "-c", script]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("verb", ["--help", "ppo --help", "--version"])
def test_help_into_a_closed_pipe_is_silent(tmp_path, verb):
    result = shell(f"surefoot {verb} | true; echo ${{PIPESTATUS[0]}}", tmp_path)
    assert (result.stdout, result.stderr) == ("0\n", "")


def test_a_run_goes_on_when_nobody_reads_its_output_any_more(project):
    # `surefoot ppo … | head -1` must cost neither the run nor its model.
    result = shell("surefoot ppo config.yaml --run.name mine --run.folder runs | head -1; echo ${PIPESTATUS[0]}", project)
    lines = result.stdout.splitlines()
    assert len(lines) == 2 and lines[1] == "0" and result.stderr == ""
    for left in ("checkpoints/00000002/manifest.json", "model/config.json"):
        assert (project / "runs/mine" / left).exists()


def test_output_in_another_encoding_loses_a_character_and_not_the_run(project, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    cli.main(["ppo", "config.yaml", "--run.name", "mine", "--run.folder", "runs"])
    terminal.seek(0)
    shown = terminal.read()
    assert "rollout" in shown and " ? score " in shown and shown.splitlines()[-1].startswith("next:")


def test_output_to_a_full_disk_costs_its_words_and_not_the_run(project, monkeypatch):
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sys, "stdout", Full())
    err = io.StringIO()
    monkeypatch.setattr(sys, "stderr", err)
    with pytest.raises(SystemExit) as end:
        cli.main(["ppo", "config.yaml", "--run.name", "mine", "--run.folder", "runs"])
    assert end.value.code == 2 and err.getvalue() == "surefoot: stdout could not be written: No space left on device\n"
    assert (project / "runs/mine/model/config.json").exists()
