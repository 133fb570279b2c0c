"""Run folders: names, logs, full disks; what is resumed, loaded and saved, and what is refused."""

import functools
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from surefoot import PPO
from surefoot.config import make_config
from surefoot.rewards import mixed
from surefoot.rewards.functions import compute_several
from surefoot.storage.files import whole_folder, writing
from surefoot.storage.run_folder import RunFolder
from surefoot.storage.safetensors import read_tensors
from tests.golden import refused
from tests.inputs import run_cli
from tests.tiny import written_batch
from tests.train.small_run import Killed, python_ppo, python_task, rows, same_weights, weights, write_project
from tests.train.test_checkpoint import forge, header, largest_file, poison
from tests.train.warm import Ended

BATCH = written_batch([((5, 9, 30), (8, 44, 2)), ((7,), (12, 13, 14, 15))])
# Two updates, the weights untouched by anything that knows how long the run is.
SHORT: dict[str, dict[str, Any]] = {
    "ppo": {"lr_schedule": "constant", "lr_warmup": 0.0},
    "rollout": {"total_episodes": 12},
    "evaluate": {"every": 1},
}


def contents(folder: Path) -> dict[Path, tuple[bytes, int]]:
    """Every file's bytes and time of change."""
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def in_folder(folder: Path, **run: Any) -> Any:
    return make_config({"run": {"folder": str(folder), **run}}, where="test")


def test_a_taken_name_ends_with_2_before_anything_is_loaded(tmp_path, base, monkeypatch):
    run = write_project(tmp_path, base)
    run.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("surefoot.build.language.load_policy", None)
    run_cli("ppo", "ppo.yaml").refused("runs/run exists")
    assert not list(run.iterdir())
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with refused("link exists"):
        RunFolder.create(in_folder(tmp_path, name="link"))


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for name in ("run", None):
        with refused("run.folder", "file"):
            RunFolder.create(in_folder(tmp_path / "file", name=name))


def test_runs_without_a_name_are_numbered_each_its_own(tmp_path, monkeypatch):
    made = [RunFolder.create(in_folder(tmp_path)) for _ in range(3)]
    shutil.rmtree(tmp_path / "ppo-2")
    made.append(RunFolder.create(in_folder(tmp_path)))
    assert [run.path.name for run in made] == ["ppo-1", "ppo-2", "ppo-3", "ppo-4"]
    # Another run takes the number between looking and making.
    answers = iter(["ppo-3", "ppo-4", "ppo-5"])
    monkeypatch.setattr(RunFolder, "free_name", lambda config, prefix: next(answers))
    assert RunFolder.create(in_folder(tmp_path)).path.name == "ppo-5"


def test_logs_are_cut_to_the_checkpoint_and_to_nothing_without_one(tmp_path, monkeypatch):
    run = RunFolder(tmp_path)
    assert run.log_sizes() == {"metrics.jsonl": 0, "samples.jsonl": 0}
    run.append("metrics.jsonl", [{"update": 1}])
    run.append("samples.jsonl", [{"text": "naïve"}, {"text": "日本"}])
    synced: set[int] = set()
    with monkeypatch.context() as patches:  # they are on disk before a checkpoint counts on them
        patches.setattr(os, "fsync", lambda descriptor: synced.add(os.fstat(descriptor).st_ino))
        sizes = run.log_sizes()
    assert synced == {(tmp_path / log).stat().st_ino for log in sizes} and min(sizes.values()) > 0
    run.append("metrics.jsonl", [{"update": 2, "ppo/ratio_max": math.inf, "nested": [{"a": math.nan}]}])
    assert run.read("metrics.jsonl")[-1] == {"update": 2, "ppo/ratio_max": None, "nested": [{"a": None}]}  # JSON has no inf
    run.append("samples.jsonl", [{"text": "日本"}])
    whole = (tmp_path / "samples.jsonl").read_bytes()
    (tmp_path / "samples.jsonl").write_bytes(whole[:-5])  # in the middle of 本
    assert run.read("samples.jsonl") == [{"text": "naïve"}, {"text": "日本"}]
    run.cut_logs(sizes)
    run.append("samples.jsonl", [{"text": "after"}])
    assert run.read("metrics.jsonl") == [{"update": 1}]
    assert [row["text"] for row in run.read("samples.jsonl")] == ["naïve", "日本", "after"]
    run.cut_logs({})
    assert run.read("metrics.jsonl") == []


@pytest.mark.parametrize("text", ["\ud800 alone", "line\nbreak", "separators \u2028\u2029\x85\x0b", "\0", "😀"])
def test_whatever_a_model_writes_comes_back_from_the_log(tmp_path, text):
    run = RunFolder(tmp_path)
    run.append("samples.jsonl", [{"completion": text}, {"completion": "next"}])
    assert [row["completion"] for row in run.read("samples.jsonl")] == [text, "next"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, base, warm) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    run = write_project(folder, base)
    assert warm.run(folder, "ppo", "ppo.yaml").code == 0
    return run


def test_resuming_a_finished_run_or_one_in_use_changes_nothing(finished, warm):
    before = contents(finished)
    ended = warm.run(finished.parent.parent, "resume", "runs/run")
    how = "next:  surefoot resume runs/run --rollout.total-episodes N, for a longer run\n"
    assert ended == Ended(0, f"runs/run is finished; its model is runs/run/model\n{how}", "")
    holder = RunFolder(finished)
    holder.hold()
    ended = warm.run(finished.parent.parent, "resume", "runs/run")
    holder.release()
    assert ended.code == 2 and "in use by another run" in ended.stderr and contents(finished) == before
    environment = json.loads((finished / "environment.json").read_text())
    assert torch.__version__.startswith(environment["packages"]["torch"].split("+")[0])
    assert yaml.safe_load((finished / "config.yaml").read_text())["kl"]["target"] == 0.05


def test_resuming_what_is_no_run_ends_with_2(tmp_path, base, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    for name in ("empty", "damaged"):
        Path(name).mkdir()
    Path("damaged/config.yaml").write_text("ppo: {n_epoch")
    for name in ("nowhere", "file", "empty", "damaged"):
        run_cli("resume", name).refused(name)
    assert not list(Path("empty").iterdir())
    model = python_ppo(base, tmp_path, **SHORT).learn()
    run_cli("resume", model.run_folder).refused("with its task: PPO.load(folder, task)")


UNUSUAL: list[tuple[str, tuple[str, ...], Any]] = [
    ("state", ("progress", "best_update"), "4"),
    ("state", ("rollout", "reward_stats"), {"mean": 0.0}),
    ("state", ("total",), 2.5),
    ("manifest", ("files", "optimizer.safetensors"), None),  # it must not be resumed without
]


@pytest.mark.parametrize("case", UNUSUAL, ids=str)
def test_a_checkpoint_of_other_kinds_of_values_is_one_line_whatever_its_checksum(finished, tmp_path, warm, case):
    file, at, value = case
    shutil.copytree(finished.parent.parent, tmp_path, dirs_exist_ok=True)
    for path in (tmp_path / "runs" / "run" / "checkpoints").glob("0*"):
        contents = json.loads((path / f"{file}.json").read_text())
        place = functools.reduce(dict.__getitem__, at[:-1], contents)
        if value is None:
            del place[at[-1]]
            (path / "manifest.json").write_text(json.dumps(contents))
        else:
            place[at[-1]] = value
            forge(path, state=json.dumps(contents).encode())
    ended = warm.run(tmp_path, "resume", "runs/run")
    assert ended.code == 2 and at[-1].split(".")[0] in ended.stderr and ended.stderr.count("\n") == 1, ended


@pytest.mark.parametrize("name", ["model.safetensors", "surefoot_critic.safetensors", "surefoot.yaml"])
def test_a_model_that_is_no_longer_whole_is_written_again(finished, tmp_path, warm, name: str):
    shutil.copytree(finished.parent.parent, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "runs" / "run" / "model" / name
    if name == "model.safetensors":
        file.write_bytes(file.read_bytes()[:100])
    else:
        file.unlink()
    ended = warm.run(tmp_path, "resume", "runs/run")
    assert ended.code == 0 and ended.stdout.startswith("model: "), ended
    assert file.read_bytes() == (finished / "model" / name).read_bytes()


def test_what_happens_to_a_folder_or_a_log_under_its_run_is_said(tmp_path, capsys):
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    run.hold()
    log = run.path / "metrics.jsonl"

    def replace_log() -> None:
        log.rename(run.path / "other")
        log.write_text("{}\n")

    for change, said in ((log.unlink, "gone"), (lambda: os.truncate(log, 3), "has 3 bytes"), (replace_log, "has 3 bytes")):
        run.append(log.name, [{"update": 1}])
        assert capsys.readouterr().err == ""
        change()
        run.append(log.name, [{"update": 2}])
        assert said in capsys.readouterr().err
    run.cut_logs({log.name: 1_000})
    assert "are gone" in capsys.readouterr().err
    log.unlink()
    os.mkfifo(log)
    with refused("metrics.jsonl", "no regular file"):
        run.append(log.name, [{"update": 3}])
    run.path.rename(tmp_path / "moved")
    with refused("was moved"):
        run.append(log.name, [{"update": 3}])
    run.path.mkdir()
    with refused("was moved"):
        run.check_there()
    assert not list(run.path.iterdir())


def test_what_killed_writers_left_beside_a_folder_goes_and_what_living_ones_write_stays(tmp_path):
    (tmp_path / "out.dead.unfinished").mkdir()
    (tmp_path / "out.others").mkdir()
    with whole_folder(tmp_path / "out") as mine, whole_folder(tmp_path / "out") as other:
        assert mine.exists() and other.exists() and not (tmp_path / "out.dead.unfinished").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.others"]
    with refused("out", "No space left"), writing(tmp_path / "out"):
        raise Exception("No space left on device (os error 28)")  # as Rust's tokenizers do


@pytest.mark.parametrize("at", [3, 5, 8])
def test_a_loaded_run_goes_on_bit_for_bit(tmp_path, base, monkeypatch, at: int):
    calls = 0

    def deadly(*given: Any) -> dict[str, list[float]]:
        nonlocal calls
        calls += 1
        if calls == at:
            raise Killed
        return compute_several(*given)

    whole = python_ppo(base, tmp_path / "whole").learn()
    with monkeypatch.context() as patches:
        patches.setattr(mixed, "compute_several", deadly)
        model = python_ppo(base, tmp_path)
        with pytest.raises(Killed):
            model.learn()
    assert model.run_folder is not None and whole.run_folder is not None
    loaded = PPO.load(model.run_folder, python_task(), verbose=0)
    torch.manual_seed(at)  # what happens between loading and learning is no business of the run's
    loaded.learn()
    assert same_weights(loaded, whole)
    for log in ("metrics.jsonl", "samples.jsonl"):
        assert rows(model.run_folder, log) == rows(whole.run_folder, log)


def test_of_two_models_of_one_run_only_one_goes_on(tmp_path, base):
    first = python_ppo(base, tmp_path, **SHORT).learn()
    assert first.is_finished and first.run_folder is not None
    before = contents(first.run_folder)
    for model in (first, PPO.load(first.run_folder, python_task(), verbose=0)):
        with pytest.warns(UserWarning, match=r"to its end; learn\(total_episodes=N\) trains it further"):
            model.learn()
    assert contents(first.run_folder) == before  # a finished run is left as it is
    second, third = (PPO.load(first.run_folder, python_task(), verbose=0) for _ in range(2))  # a cell that is run twice

    def again(*_: Any) -> None:
        with refused("in use by this very process"):
            PPO.load(first.run_folder, python_task(), verbose=0)

    third.learn(6, callback=again)
    for model in (first, second):
        with refused("00000003", "PPO.load"):
            model.learn(6)


def test_the_saved_model_gives_the_same_logits_and_values_and_trains_in_a_run_of_its_own(tmp_path, base, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for adapter, tolerance in (({"rank": 2}, 1e-5), (None, 0.0)):  # merging the adapter rounds
        model = python_ppo(base, tmp_path, name=f"adapter-{adapter is not None}", policy={"adapter": adapter}, **SHORT).learn()
        model.save("out")
        loaded = PPO.load("out", verbose=0)
        with torch.no_grad():
            ours, theirs = model.policy.evaluate(BATCH), loaded.policy.evaluate(BATCH)
        torch.testing.assert_close(ours.logprobs_BT, theirs.logprobs_BT, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(ours.values_BT, theirs.values_BT, rtol=tolerance, atol=tolerance)
        assert ours.values_BT.abs().max() > 0.01
        assert loaded.config.ppo == model.config.ppo and loaded.config.seed == model.config.seed
    assert PPO.load("out", python_task(), verbose=0).learn(6).run_folder == Path("runs/ppo-1")


def test_a_saved_folder_is_whole_or_absent(tmp_path, base, monkeypatch):
    model = python_ppo(base, tmp_path)
    with refused("out"), largest_file(20_000):
        model.save(tmp_path / "out")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("out")]
    model.save(tmp_path / "out")
    model.save(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("out")] == ["out"]


def test_a_critic_that_is_none_is_refused(tmp_path, base):
    python_ppo(base, tmp_path).save(tmp_path / "out")
    file = tmp_path / "out" / "surefoot_critic.safetensors"
    other_names = header('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', data=b"1234")
    for bad in (poison(tmp_path / "canary"), file.read_bytes()[:-4], other_names, None):
        file.unlink()
        if bad is not None:
            file.write_bytes(bad)
        with refused("surefoot_critic.safetensors"):
            PPO.load(tmp_path / "out", verbose=0)
    assert not (tmp_path / "canary").exists()


def test_generation_takes_the_best_checkpoint_and_survives_a_wild_pointer(finished, tmp_path):
    shutil.copytree(finished.parent.parent, tmp_path, dirs_exist_ok=True)
    run = tmp_path / "runs" / "run"

    def assert_opens(name: str) -> None:
        saved = read_tensors(run / "checkpoints" / name / "policy.safetensors")
        assert all(tensor.equal(saved[key]) for key, tensor in weights(PPO.open(run)).items())

    assert_opens("00000004")
    (run / "checkpoints" / "best").write_text("../../../../00000004")
    assert_opens("00000006")
