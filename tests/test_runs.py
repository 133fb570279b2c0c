"""Every kind of run: killed or interrupted anywhere and resumed it is the run that was not; other data is refused."""

import contextlib
import dataclasses
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from surefoot.build.inputs import code_inputs
from surefoot.config import SUPERVISED, make_config
from tests import golden, test_pipeline
from tests.test_reward_model import PAIRS as PREFERENCES
from tests.test_reward_model import RATINGS
from tests.test_sft import PAIRS
from tests.train.small_run import assert_equal, outcome, write_project, write_rows, write_supervised
from tests.train.warm import Strike, Warm, cold, wait_for

TERM, KILL = int(signal.SIGTERM), int(signal.SIGKILL)
LOOP, CHECKPOINT = "surefoot.train.loop", "surefoot.train.checkpoint"
SMALL = {"seed": 5, "device": "cpu", "run": {"name": "run", "checkpoint_every": 2}, "evaluate": {"every": 2, "episodes": 4}}
ADAPTED = {**SMALL, "policy": {"dtype": "float32", "adapter": {"rank": 2}}}
STEPS = {"learning_rate": 0.01, "lr_warmup": 0.3, "held_out": 0.3, "epochs": 2}
PTX = {
    "ptx": {"data": "data.jsonl", "coef": 0.4, "schedule": "linear", "batch_size": 5},
    "ppo": {"advantage": "dr_grpo", "batch_size": 2, "target_kl": 0.2},
    "group": {"size": 2, "skip_zero_variance": True},
    "kl": {"target": None},
}


def env(name: str, policy: str, **settings: Any) -> Callable[[Path, Path], Path]:
    """Six updates in an environment."""
    sizes = {"id": name, "n_envs": 2, "n_steps": 32, "total_timesteps": 384}
    ppo = {"n_epochs": 2, "batch_size": 32, "lr_schedule": "linear", "learning_rate": 0.003}
    network = {"network": {"lstm_hidden_size": 8}} if "Lstm" in policy else {}
    config = {**SMALL, "env": sizes | settings, "policy": network, "ppo": ppo}
    return lambda folder, base: write_supervised(folder, Path(policy), config, command="ppo")


@dataclasses.dataclass
class Kind:
    """How a run of a kind is set up, and the places of its own to strike at."""

    verb: str
    write: Callable[[Path, Path], Path]  # (folder, base model): the run's folder to be
    product: str = "surefoot.policies.lm.policy:CausalLMPolicy.save"
    strikes: dict[str, Strike] = dataclasses.field(default_factory=dict)
    data: Sequence[Any] = ()  # of data.jsonl, which must not change under the run
    again: tuple[str, str] = ("resume", "runs/run")

    def project(self, folder: Path, base: Path) -> Path:
        """Write all that a run needs; its folder to be."""
        run = self.write(folder, base)
        if self.data:
            write_rows(folder / "data.jsonl", self.data)
        return run

    @property
    def start(self) -> tuple[str, str]:
        """The command line of a new run."""
        return self.verb, "pipeline.yaml" if self.verb == "pipeline" else "ppo.yaml"


def text(**sections: Any) -> Callable[[Path, Path], Path]:
    return lambda folder, base: write_project(folder, base, **sections)


def supervised(section: str, **settings: Any) -> Callable[[Path, Path], Path]:
    config = {**ADAPTED, section: {"data": "data.jsonl", **STEPS, **settings}}
    return lambda folder, base: write_supervised(folder, base, config, command="ppo")


STEP = {"in an update": Strike("surefoot.train.update:take_step", 5, after=True)}
OF_TEXT = {
    **STEP,
    "in a rollout": Strike("surefoot.generation.engine:TokenEngine.poll", 30),
    "in a reward": Strike("random:gauss", 47),
    "tensors of a checkpoint": Strike(f"{CHECKPOINT}:save_file", 4, after=True),
    "before its pointer": Strike(f"{CHECKPOINT}:point", 2),
}
SCORER = "surefoot.policies.lm.reward_model:RewardModelPolicy.save"
OF_PAIRS = supervised("reward_model", batch_size=10, center=0.01, micro_batch_tokens=80)
OF_RATINGS = supervised("reward_model", batch_size=10, rating_range=[-4, 4])
CONTROL = "surefoot.policies.control.policy:ControlPolicy.save"
ENVIRONMENTS = {
    "in a rollout": Strike("surefoot.policies.control.policy:ControlPolicy.act", 100),
    "before its pointer": Strike(f"{CHECKPOINT}:point", 2),
}
REJECTION: dict[str, Any] = {
    "task": {"prompts": "data.jsonl"},
    "rejection_sampling": {"episodes": 22, "keep": 0.5},
    "generation": {"max_new_tokens": 5, "stop": ["e", "o", "a", "i"]},
}
KINDS = {
    "ppo": Kind("ppo", text(), strikes=OF_TEXT),
    "ptx": Kind("ppo", text(**PTX), strikes=STEP, data=PAIRS),
    "sft": Kind("sft", supervised("sft", batch_size=5, micro_batch_tokens=40), strikes=STEP, data=PAIRS),
    "reward model of pairs": Kind("reward-model", OF_PAIRS, SCORER, STEP, PREFERENCES),
    "reward model of ratings": Kind("reward-model", OF_RATINGS, SCORER, STEP, RATINGS),
    "dpo": Kind("dpo", supervised("dpo", batch_size=10, beta=0.3, micro_batch_tokens=80), strikes=STEP, data=PREFERENCES),
    "rejection sampling": Kind("rejection-sampling", text(**REJECTION), data=[{"prompt": row["prompt"]} for row in PAIRS]),
    "cartpole": Kind("ppo", env("CartPole-v1", "MlpPolicy", normalize_rewards=True), CONTROL, ENVIRONMENTS),
    "lstm": Kind("ppo", env("CartPole-v1", "MlpLstmPolicy", normalize_observations=True), CONTROL, ENVIRONMENTS),
    "self-play": Kind("ppo", env("classic/tictactoe-v3", "MlpPolicy", self_play={}), CONTROL),
}
SEQUENCES = {"policy": {"critic": {"kind": "separate", "learning_rate": 0.003}}, "ppo": {"loss_aggregation": "sequence"}}
GRPO = {"ppo": {"advantage": "grpo", "batch_size": 2}, "group": {"size": 2}, "kl": {"target": None}}


def pipeline(folder: Path, base: Path) -> Path:
    """A pipeline's stages; the run folder of the last."""
    return test_pipeline.write(folder, test_pipeline.STAGES).parent / "runs" / "again"


# Only killed at random: what else there is to them is that of a kind above.
KILLED = KINDS | {
    "separate critic, sequences": Kind("ppo", text(**SEQUENCES)),
    "adapter critic": Kind("ppo", text(policy={"critic": {"kind": "adapter"}})),
    "grpo": Kind("ppo", text(**GRPO)),
    "images": Kind("ppo", env("tests.envs.counter:Pictures", "CnnPolicy")),
    "workers": Kind("ppo", env("Pendulum-v1", "MlpPolicy", vectorization="async", normalize_observations=True)),
    "pipeline": Kind("pipeline", pipeline, again=("pipeline", "pipeline.yaml")),
}
KILLS = int(os.environ.get("SUREFOOT_KILLS", "3"))  # of each kind


def strikes(name: str) -> dict[str, Strike]:
    """Where a run of this kind is struck."""
    if name == "rejection sampling":
        rejection = "surefoot.api.rejection"
        return {
            "before anything": Strike(f"{rejection}:RejectionSampling._restore", 1),
            "in the first batch": Strike("random:gauss", 3),
            "in a batch": Strike("surefoot.generation.engine:TokenEngine.poll", 12),
            "logged, not saved": Strike(f"{rejection}:write_durably", 2),
            "saved": Strike(f"{rejection}:write_durably", 2, after=True),
            "all sampled": Strike(f"{rejection}:RejectionSampling.save", 1),
        }
    return {
        "before anything": Strike(f"{LOOP}:run", 1),
        "first rollout": Strike(f"{LOOP}:collect", 1, after=True),
        "first checkpoint": Strike(f"{CHECKPOINT}:_put_in_place", 1),
        "checkpoint without its pointer": Strike(f"{CHECKPOINT}:_put_in_place", 2, after=True),
        "logs ahead of the checkpoint": Strike(f"{LOOP}:_finish", 3),
        "evaluation": Strike(f"{LOOP}:evaluate", 2, after=True),
        **{place: Strike(f"{CHECKPOINT}:{what}", 1, since=(f"{LOOP}:collect", 6)) for place, what in AT_THE_END.items()},
        **KINDS[name].strikes,
        "product half written": Strike(KINDS[name].product, 1, after=True),
    }


def logged(name: str) -> Strike:
    """Once something of the run is saved."""
    return strikes(name)["in a batch" if name == "rejection sampling" else "logs ahead of the checkpoint"]


# What happens there is the loop's doing, whatever it trains: of two kinds always, of the others among the slow tests.
AT_THE_END = {"last one without its pointer": "point", "last one beside old ones": "_remove_old"}
OF_THE_LOOP = ("before anything", "first rollout", "first checkpoint", "checkpoint without its pointer", *AT_THE_END)
CASES = [
    pytest.param(name, place, marks=[pytest.mark.slow] * (place in OF_THE_LOOP and name not in ("ppo", "cartpole")))
    for name in KINDS
    for place in strikes(name)
]
ENDED: dict[str, tuple[dict[str, dict[str, Any]], float]] = {}


@pytest.fixture
def whole(kind: str, base: Path, warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], float]:
    """What a run of the kind leaves that nobody disturbed, by run folder, and the seconds it took."""
    if kind not in ENDED:
        folder = tmp_path_factory.mktemp("uninterrupted")
        KILLED[kind].project(folder, base)
        warm.start(folder, *KILLED[kind].start)
        started, ended = time.monotonic(), warm.wait()
        assert ended.code == 0, ended.stderr
        assert kind == "pipeline" or ("\nrun:   " in ended.stdout and "\nnext:  surefoot " in ended.stdout)
        seconds = time.monotonic() - started
        ENDED[kind] = {run.name: outcome(run) for run in (folder / "runs").iterdir()}, seconds
    return ENDED[kind]


@pytest.fixture
def expected(whole: tuple[dict[str, Any], float]) -> dict[str, Any]:
    """What the run of the kind leaves."""
    return whole[0]["run"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_runs_under_test_exercise_what_they_should(kind: str, expected: dict[str, Any]) -> None:
    if kind == "rejection sampling":
        assert len(expected["metrics"]) == 4 and len(expected["examples"].splitlines()) > 2
        return
    progress, log = expected["state"]["progress"], expected["metrics"]
    assert progress["updates"] >= 6 and progress["bad_steps"] == 0 and len({str(row) for row in log}) == len(log)
    rates = [value for row in log for name, value in row.items() if name.endswith("/learning_rate")]
    assert max(rates) > rates[-1] and any(len(row) > 2 and "eval/metric" in row for row in log)
    if kind == "ptx":
        taken = json.dumps(expected["state"]).count('"taken": 0')
        assert not taken and 1.0 in [row.get("ppo/stopped_early") for row in log]


@pytest.mark.parametrize(("kind", "place"), CASES)
def test_a_killed_and_resumed_run_is_the_run_that_was_not(
    tmp_path: Path, base: Path, warm: Warm, *, kind: str, place: str, expected: dict[str, Any]
) -> None:
    run = KINDS[kind].project(tmp_path, base)
    strike = dataclasses.replace(strikes(kind)[place], signals=[KILL])
    assert warm.run(tmp_path, KINDS[kind].verb, "ppo.yaml", strikes=[strike]).code == -KILL
    ended = warm.run(tmp_path, "resume", "runs/run")
    assert ended.code == 0, ended.stderr
    assert_equal(run, expected)
    assert not [path for end in ("tmp", "old", "unfinished") for path in run.rglob(f"*.{end}")]


@pytest.mark.parametrize("kind", KINDS)
def test_a_signal_saves_stops_and_says_how_to_go_on(
    tmp_path: Path, base: Path, warm: Warm, kind: str, expected: dict[str, Any]
) -> None:
    run = KINDS[kind].project(tmp_path, base)
    strike = dataclasses.replace(logged(kind), signals=[TERM])
    ended = warm.run(tmp_path, KINDS[kind].verb, "ppo.yaml", strikes=[strike])
    assert ended.code == 128 + TERM and ended.stderr.count("\n") == 1, ended
    how = ended.stderr.partition("saved; continue with: surefoot ")[2].split()
    assert how == ["resume", "runs/run"] and not (run / "model").exists() and not (run / "completions.jsonl").exists()
    ended = warm.run(tmp_path, *how)
    assert ended.code == 0, ended.stderr
    assert_equal(run, expected, but=("checkpoints",))
    again = warm.run(tmp_path, *how)
    assert again.code == 0 and again.stdout.startswith("runs/run is finished; its ")


LONGER = {
    "ppo": ("rollout.total_episodes", 48),
    "sft": ("sft.epochs", 3),
    "dpo": ("dpo.epochs", 3),
    "cartpole": ("env.total_timesteps", 512),
}


@pytest.mark.parametrize("kind", LONGER)
def test_a_finished_run_goes_on_longer_and_at_another_rate_and_a_kill_there_changes_nothing(
    tmp_path: Path, base: Path, warm: Warm, kind: str, expected: dict[str, Any]
) -> None:
    key, total = LONGER[kind]
    rate = f"{kind if kind in SUPERVISED else 'ppo'}.learning_rate"
    run = KINDS[kind].project(tmp_path, base)
    assert warm.run(tmp_path, KINDS[kind].verb, "ppo.yaml").code == 0
    assert f"--{key.replace('_', '-')} N, for a longer run" in warm.run(tmp_path, "resume", "runs/run").stdout
    before = (run / "config.yaml").read_bytes()
    short = warm.run(tmp_path, "resume", "runs/run", f"--{key}", "1")
    golden.check(short.stderr.strip().rpartition("runs/run: ")[2], "ask for more")
    assert (run / "config.yaml").read_bytes() == before and not (run / "history.jsonl").exists()
    shutil.copytree(run, tmp_path / "runs" / "killed")
    flags = (f"--{key}={total}", f"--{rate}", "0.004")
    ended = warm.run(tmp_path, "resume", "runs/run", *flags)
    assert ended.code == 0, ended.stderr
    longer = outcome(run)
    assert longer["state"]["progress"]["collected"] >= longer["state"]["total"] > expected["state"]["total"]
    assert len(longer["metrics"]) > len(expected["metrics"]) and longer["model"] != expected["model"]
    written = json.loads((run / "history.jsonl").read_text().splitlines()[-1])
    assert written["to"] == {key: total, rate: 0.004} and written["from"][rate] != 0.004
    strike = Strike("surefoot.train.update:take_step", 2, after=True, signals=[KILL])
    assert warm.run(tmp_path, "resume", "runs/killed", *flags, strikes=[strike]).code == -KILL
    ended = warm.run(tmp_path, "resume", "runs/killed")
    assert ended.code == 0, ended.stderr
    assert_equal(tmp_path / "runs" / "killed", longer)
    refused = warm.run(tmp_path, "resume", "runs/run", "--seed", "3")
    assert refused.code == 2
    golden.check(refused.stderr.strip().partition("surefoot: ")[2], "--seed", key)


def halve(file: Path) -> None:
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[: len(lines) // 2]))


def edit(file: Path) -> None:
    file.write_text(file.read_text() + "# mended\n")


def retrain(file: Path) -> None:
    tensors = load_file(file)
    save_file(tensors | {name: tensor + 1e-3 for name, tensor in tensors.items()}, file, metadata={"format": "pt"})


@pytest.mark.slow
@pytest.mark.parametrize("nth", range(KILLS))
@pytest.mark.parametrize("kind", KILLED)
def test_a_kill_at_a_random_moment_changes_nothing(
    tmp_path: Path, base: Path, warm: Warm, *, kind: str, nth: int, whole: tuple[dict[str, Any], float]
) -> None:
    """SIGKILL and SIGTERM in turn; SUREFOOT_KILLS is how many of each kind."""
    (expected, seconds), chance, number = whole, random.Random(f"{kind} {nth}"), (KILL, TERM)[nth % 2]
    ended = None
    while ended is None or ended.code == 0:  # it was faster
        shutil.rmtree(tmp_path / "runs", ignore_errors=True)
        run = KILLED[kind].project(tmp_path, base)
        process = warm.start(tmp_path, *KILLED[kind].start)
        wait_for(tmp_path / "stderr.txt")
        time.sleep(chance.uniform(0, seconds))
        seconds *= 0.8  # or it may for ever be faster
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)
        asked, ended = time.monotonic(), warm.wait()
    assert ended.code in (-number, 128 + number) and time.monotonic() - asked < 5, ended
    is_begun = (run / "config.yaml").exists()
    again = KILLED[kind].again if is_begun else KILLED[kind].start
    assert ended.code < 0 or not is_begun or ended.stderr.endswith(f"saved; continue with: surefoot {' '.join(again)}\n")
    ended = (warm.run if nth else cold)(tmp_path, *again)
    assert ended.code == 0, ended.stderr
    for name, left in expected.items():
        assert_equal(tmp_path / "runs" / name, left, but=("checkpoints",) if number == TERM else ())
    assert not [path for end in ("tmp", "old", "unfinished") for path in (tmp_path / "runs").rglob(f"*.{end}")]


LEVELS = int(os.environ.get("SUREFOOT_LEVELS", "8"))  # to which a disk is filled, for each kind
DISK = 1 << 24  # bytes
MOUNT = f'mount -t tmpfs -o size={DISK} none "$0" && exec "$@"'


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ppo", "sft", "reward model of pairs", "cartpole"])
def test_a_disk_that_fills_is_one_line_and_with_room_again_the_run_goes_on(
    tmp_path: Path, base: Path, *, kind: str, expected: dict[str, Any]
) -> None:
    disk = tmp_path / "runs"
    disk.mkdir()
    inside = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c", MOUNT, str(disk))
    if subprocess.run([*inside, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no disk can be mounted here")
    it = KILLED[kind]
    it.project(tmp_path, base)
    with Warm(*inside) as warm:
        there = warm.seen(disk)  # the whole disk
        assert warm.run(tmp_path, *it.start).code == 0
        step = sum(path.stat().st_blocks for path in there.rglob("*")) * 512 // LEVELS  # bytes
        for nth in itertools.count():
            shutil.rmtree(there / "run", ignore_errors=True)
            with contextlib.suppress(OSError):  # it is full
                (there / "other").write_bytes(bytes(DISK))
            os.truncate(there / "other", max(0, (there / "other").stat().st_size - nth * step))
            ended = warm.run(tmp_path, *it.start)
            (there / "other").unlink()
            if ended.code == 0:
                break
            assert ended.code == 2 and ended.stderr.count("\n") == 1 and "No space left on device" in ended.stderr, ended
            is_begun = (there / "run" / "config.yaml").exists()
            again = warm.run(tmp_path, *(it.again if is_begun else it.start))
            assert again.code == 0, (nth, ended, again)
            assert_equal(there / "run", expected)
            assert sorted(path.name for path in there.iterdir()) == ["run"], (nth, ended)
        assert nth >= LEVELS


# Kind of run, file, what is done to it, and the keys that are named.
CHANGES = [
    *((name, "data.jsonl", halve, ".prompts:" if "rejection" in name else ".data:") for name in KINDS if KINDS[name].data),
    ("ppo", "prompts.jsonl", halve, "task.prompts: "),
    ("ppo", "reward.py", edit, "task.metric, task.reward: "),
    ("ppo", "base/model.safetensors", retrain, "policy.model: "),
]


@pytest.mark.parametrize(("kind", "file", "change", "named"), CHANGES)
def test_inputs_that_changed_under_a_run_are_named_and_refused_until_accepted(
    tmp_path: Path, base: Path, warm: Warm, *, kind: str, file: str, change: Callable[[Path], None], named: str
) -> None:
    shutil.copytree(base, tmp_path / "base")
    run = KINDS[kind].project(tmp_path, tmp_path / "base")
    strike = dataclasses.replace(logged(kind), signals=[KILL])
    assert warm.run(tmp_path, KINDS[kind].verb, "ppo.yaml", strikes=[strike]).code == -KILL
    change(tmp_path / file)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    ended = warm.run(tmp_path, "resume", "runs/run")
    assert ended.code == 2 and ended.stderr.startswith("surefoot: runs/run: "), ended
    golden.check(ended.stderr.rstrip("\n").rpartition("runs/run: ")[2], named, "--accept-changes")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    ended = warm.run(tmp_path, "resume", "runs/run", "--accept-changes")
    assert ended.code == 0, ended.stderr


def test_code_and_reward_models_that_a_configuration_names_are_inputs(tmp_path: Path) -> None:
    for name in ("reward.py", "helper.py", "further.py", "other.py", "scorer/model.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "reward.py").write_text("import json, helper\n")
    (tmp_path / "helper.py").write_text("def f():\n    from further import number\n")
    code, model = f"{tmp_path / 'reward.py'}:make", str(tmp_path / "scorer")
    task = {"prompts": "p", "reward": [{"name": code}, {"name": model}], "metric": "tests.tiny:tiny_lm"}
    configs = [make_config(sections, where="") for sections in ({"task": task}, {"env": {"id": code}})]
    before = code_inputs(configs[0]) | code_inputs(configs[1])
    assert before.keys() == {"task.reward make", "task.reward scorer", "task.metric", "env.id"}
    for file, changed in (
        ("reward.py", {"task.reward make", "env.id"}),
        ("further.py", {"task.reward make", "env.id"}),
        ("other.py", set()),
        ("scorer/model.safetensors", {"task.reward scorer"}),
    ):
        edit(tmp_path / file)
        now = code_inputs(configs[0]) | code_inputs(configs[1])
        assert {key for key in now if now[key] != before[key]} == changed
        before = now


@pytest.mark.parametrize("kind", ["ppo", pytest.param("sft", marks=pytest.mark.slow), "cartpole"])
def test_a_fresh_interpreter_elsewhere_resumes_to_the_same_bits(
    tmp_path: Path, base: Path, kind: str, expected: dict[str, Any]
) -> None:
    # Another hash seed and other addresses than the interpreter that was killed; and another working directory.
    run = KINDS[kind].project(tmp_path, base)
    strike = dataclasses.replace(strikes(kind)["logs ahead of the checkpoint"], signals=[KILL])
    assert cold(tmp_path, KINDS[kind].verb, "ppo.yaml", strikes=[strike]).code == -KILL
    (tmp_path / "elsewhere").mkdir()
    assert cold(tmp_path / "elsewhere", "resume", "../runs/run").code == 0
    assert_equal(run, expected)
