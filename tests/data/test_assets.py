"""Fetching by name with a pretended pip: whatever goes wrong in between, no half asset stays and the next fetch works."""

import errno
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from surefoot.data import assets
from surefoot.envs.text import TextTask
from tests import golden
from tests.inputs import refusal

ARCHIVE = b"what the index serves"
CONTENT = "what is made of it"


class Pip:
    """In place of `subprocess.run`: what pip would leave in its --dest folder."""

    def __init__(self, archives: dict[str, bytes] | None = None, *, stderr: str = "", returncode: int = 0):
        self.archives = {"thing-1.0.tar.gz": ARCHIVE} if archives is None else archives
        self.stderr, self.returncode = stderr, returncode
        self.commands: list[list[str]] = []
        self.requirements = ""

    def __call__(self, command: list[str], **_: object) -> SimpleNamespace:
        self.commands.append(command)
        self.requirements = Path(command[command.index("--requirement") + 1]).read_text()
        for name, data in self.archives.items():
            (Path(command[command.index("--dest") + 1]) / name).write_bytes(data)
        return SimpleNamespace(returncode=self.returncode, stderr=self.stderr)


def build(archive: Path, folder: Path) -> None:
    assert archive.read_bytes() == ARCHIVE
    (folder / "part").mkdir()
    (folder / "part" / "first").write_text(CONTENT)
    (folder / "second").write_text(CONTENT)


THING = assets.Asset("a thing", "thing", "1.0", hashlib.sha256(ARCHIVE).hexdigest(), False, build, "second")
MODEL = replace(THING, description="a model", product="")


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("SUREFOOT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(assets, "ASSETS", {"thing": THING, "some-model": MODEL})
    return tmp_path / "cache"


@pytest.fixture
def pip(monkeypatch) -> Pip:
    pretended = Pip()
    monkeypatch.setattr(assets.subprocess, "run", pretended)
    return pretended


def left_in(cache: Path) -> set[str]:
    return {path.name for path in cache.iterdir()} - {"thing-1.0.lock"}


def assert_next_fetch_works(cache: Path, pip: Pip) -> None:
    assert assets.fetch("thing").read_text() == CONTENT
    assert (cache / "thing-1.0" / "part" / "first").read_text() == CONTENT
    assert left_in(cache) == {"thing-1.0"}


def refused(*names: str) -> None:
    refusal(lambda: assets.fetch("thing"), *names)


def test_an_asset_is_fetched_once_with_a_line_on_stderr_and_its_products_path_is_given(cache, pip, capsys):
    path = assets.fetch("thing")
    assert path == cache / "thing-1.0" / "second" and path.read_text() == CONTENT
    assert capsys.readouterr() == ("", "fetching a thing\n")
    assert assets.fetch("thing") == path and len(pip.commands) == 1 and capsys.readouterr() == ("", "")
    listed = json.loads((cache / "thing-1.0" / "asset.json").read_text())
    assert listed == {"source": "thing==1.0", "files": {"part/first": len(CONTENT), "second": len(CONTENT)}}
    assert assets.fetch("some-model") == cache / "some-model-1.0"
    assert left_in(cache) == {"thing-1.0", "some-model-1.0", "some-model-1.0.lock"}


def test_pip_is_asked_for_one_pinned_file_with_its_hash(cache, pip, monkeypatch):
    refusal(lambda: assets.fetch("thnig"), "thnig", "some-model, thing")
    assert pip.commands == [] and not cache.exists()
    assets.fetch("thing")
    assert pip.requirements.split() == ["thing==1.0", f"--hash=sha256:{THING.sha256}"]
    assert {"--no-deps", "--require-hashes", "--no-binary=thing"} <= set(pip.commands[0])
    monkeypatch.setitem(assets.ASSETS, "thing", replace(THING, version="2.0", is_wheel=True))
    assets.fetch("thing")
    assert "--only-binary=thing" in pip.commands[1]
    monkeypatch.setitem(assets.ASSETS, "thing", replace(THING, version="3.0", needs="no_such_module"))
    refused("no_such_module", "surefoot[demo]")
    assert len(pip.commands) == 2  # found out before the download


PLACES = [({"SUREFOOT_CACHE": "{}/own", "XDG_CACHE_HOME": "{}/xdg"}, "own"), ({"SUREFOOT_CACHE": "~/own"}, "home/own")]
PLACES += [({"XDG_CACHE_HOME": "{}/xdg"}, "xdg/surefoot"), ({"XDG_CACHE_HOME": ""}, "home/.cache/surefoot")]


@pytest.mark.parametrize(("variables", "place"), [*PLACES, ({}, "home/.cache/surefoot")])
@pytest.mark.usefixtures("cache", "pip")
def test_the_cache_is_where_it_is_said_to_be(monkeypatch, tmp_path, variables, place):
    for name in ("SUREFOOT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "{}/home", **variables}.items():
        monkeypatch.setenv(name, value.format(tmp_path))
    assert assets.fetch("thing") == tmp_path / place / "thing-1.0" / "second"


GZ = "thing-1.0.tar.gz"


DOWNLOADS = {
    "ERROR: No matching": Pip({}, returncode=1, stderr="WARNING: x\nERROR: No matching distribution\n"),
    "No module named pip": Pip({}, returncode=1, stderr="python: No module named pip\n"),
    "pip ended with code 2": Pip({}, returncode=2, stderr="what pip never said before"),
    "ERROR: IncompleteRead": Pip({GZ: ARCHIVE[:5]}, returncode=1, stderr="ERROR: IncompleteRead"),
    "pip ended with code 0": Pip({"a": ARCHIVE, "b": ARCHIVE}),
    "thing-1.0.tar.gz has another SHA-256 than thing 1.0": Pip({GZ: ARCHIVE[:-1]}),
}


@pytest.mark.parametrize(("said", "pretended"), [*DOWNLOADS.items(), ("pip ended with code 0", Pip({}))])
def test_a_failed_download_leaves_nothing_and_the_next_one_works(cache, monkeypatch, pip, said, pretended):
    monkeypatch.setattr(assets.subprocess, "run", pretended)
    refused(said)
    assert left_in(cache) == set()
    monkeypatch.setattr(assets.subprocess, "run", pip)
    assert_next_fetch_works(cache, pip)


# Between any two of these steps the work can end: what is called, and with what file or folder.
STEPS: dict[str, tuple[Any, str, str]] = {
    "mkdtemp": (tempfile, "mkdtemp", ""),
    "download": (subprocess, "run", ""),
    "asset.json": (Path, "write_text", "asset.json"),
    "rmtree": (shutil, "rmtree", "thing-1.0"),
    "replace": (os, "replace", ""),
}


def break_at(step: str, monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    """Let `act` happen just before `step` of making an asset, or at the end of its building."""
    if step == "build":
        half = replace(THING, build=lambda archive, folder: (build(archive, folder), act())[0])
        monkeypatch.setitem(assets.ASSETS, "thing", half)
        return
    owner, name, place = STEPS[step]
    real = getattr(owner, name)

    def wrapped(*arguments: Any, **keywords: object) -> object:
        if not place or Path(arguments[0]).name == place:
            act()
        return real(*arguments, **keywords)

    monkeypatch.setattr(owner, name, wrapped)


STOP, FULL = KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")


@pytest.mark.parametrize("step", [*STEPS, "build"])
@pytest.mark.parametrize("error", [STOP, FULL], ids=["Ctrl-C", "full"])
def test_an_interrupted_fetch_leaves_no_half_asset(cache, pip, step, error):
    with pytest.MonkeyPatch.context() as patches:
        break_at(step, patches, Mock(side_effect=error))
        with pytest.raises(KeyboardInterrupt) if error is STOP else golden.refused("thing-1.0", "No space left"):
            assets.fetch("thing")
    assert left_in(cache) == set()
    assert_next_fetch_works(cache, pip)


def fetch_in_child(step: str, act: Callable[[], None]) -> int:
    """Fetch in a process of its own, with `act` just before `step`; its number."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of threads that do not come along: nothing there needs them
        if child := os.fork():
            return child
    try:
        with pytest.MonkeyPatch.context() as patches:
            break_at(step, patches, act)
            os._exit(assets.fetch("thing").read_text() != CONTENT)
    finally:
        os._exit(2)


@pytest.mark.parametrize("step", ["download", "build", "replace"])
def test_a_killed_fetch_leaves_no_half_asset_and_its_remains_are_cleared(cache, pip, step):
    killed = fetch_in_child(step, lambda: os.kill(os.getpid(), signal.SIGKILL))
    assert os.waitstatus_to_exitcode(os.waitpid(killed, 0)[1]) == -signal.SIGKILL
    assert "thing-1.0" not in left_in(cache) and left_in(cache)  # what was aside is still there
    assert_next_fetch_works(cache, pip)


def test_of_two_processes_one_makes_the_asset_and_both_get_it(cache, pip, tmp_path):
    def dawdle() -> None:
        with (tmp_path / "builds").open("a") as log:
            log.write("one\n")
        time.sleep(0.3)

    children = [fetch_in_child("build", dawdle) for _ in range(2)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert (tmp_path / "builds").read_text() == "one\n" and left_in(cache) == {"thing-1.0"}


DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing": lambda folder: (folder / "part" / "first").unlink(),
    "truncated": lambda folder: (folder / "second").write_text(CONTENT[:-1]),
    "folder": lambda folder: ((folder / "second").unlink(), (folder / "second").mkdir()),
    "no list": lambda folder: (folder / "asset.json").unlink(),
}
for text in ("", "[]", '{"files": []}', '{"files": null}', "{}"):
    DAMAGES[text] = lambda folder, text=text: (folder / "asset.json").write_text(text)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_made_again(cache, pip, damage):
    assets.fetch("thing")
    DAMAGES[damage](cache / "thing-1.0")
    assert_next_fetch_works(cache, pip)
    assert len(pip.commands) == 2


def test_a_cache_that_cannot_be_used_is_named_with_the_way_out(cache, pip, monkeypatch, tmp_path):
    (cache / "thing-1.0.lock").mkdir(parents=True)  # works for root too, whom permissions don't stop
    refused(str(cache), "SUREFOOT_CACHE")
    (cache / "thing-1.0.lock").rmdir()
    assets.fetch("thing")
    (cache / "thing-1.0.lock").unlink()
    (cache / "thing-1.0.lock").mkdir()
    assert assets.fetch("thing").read_text() == CONTENT  # a whole one is used all the same
    (tmp_path / "file").touch()
    monkeypatch.setenv("SUREFOOT_CACHE", str(tmp_path / "file" / "cache"))
    refused(str(tmp_path / "file"), "SUREFOOT_CACHE")


def test_a_name_becomes_a_path_and_a_path_stays_one(cache, pip, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, key, names in (
        ("thing", "policy.model", ("thing", "some-model")),
        ("some-model", "task.prompts", ("some-model", "thing")),
        ("thnig", "task.prompts", ("no file thnig", "thing")),
    ):
        refusal(lambda name=name, key=key: assets.resolve(name, key=key), key, *names)
    assert pip.commands == []
    assert assets.resolve("thing", key="task.prompts") == str(cache / "thing-1.0" / "second")
    assert assets.resolve("some-model") == str(cache / "some-model-1.0")
    assert assets.resolve("org/some-model") == "org/some-model"  # perhaps on the hub
    (tmp_path / "thing").touch()
    assert assets.resolve("thing", key="task.prompts") == "thing"  # a local file wins


def test_the_real_assets_are_pinned():
    for name, asset in assets.ASSETS.items():
        assert re.fullmatch(r"[0-9a-f]{64}", asset.sha256) and re.fullmatch(r"[\d.]+", asset.version), name
        assert re.fullmatch(r"[a-z0-9-]+", name) and asset.description and asset.package


def packed(name: str, data: bytes) -> bytes:
    buffer, member = io.BytesIO(), tarfile.TarInfo(name)
    member.size = len(data)
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


TABLES = [("movie-reviews", "movieReviewSnippets"), ("product-reviews", "amazonReviewSnippets"), ("tweets", "tweets")]


@pytest.mark.parametrize(("name", "table"), TABLES)
def test_rated_texts_become_prompts_with_their_rating(cache, pip, monkeypatch, name, table):
    lines = "1\t3.2\tA café.\tReally\n2\t-1.5\t \n3\t-0.5\tNo.".encode("latin-1")
    inner = packed(f"hutto_ICWSM_2014/{table}_GroundTruth.txt", lines)  # an archive in an archive, as vaderSentiment has it
    archive = packed("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz", inner)
    monkeypatch.undo()
    monkeypatch.setenv("SUREFOOT_CACHE", str(cache))
    monkeypatch.setattr(assets.subprocess, "run", Pip({"v.tar.gz": archive}))
    monkeypatch.setitem(assets.ASSETS, name, replace(assets.ASSETS[name], sha256=hashlib.sha256(archive).hexdigest()))
    task = TextTask(assets.fetch(name), lambda prompts, completions, **_: [0.0], held_out=0)
    assert [(e.prompt, e.columns) for e in task.train] == [("A café.\tReally", {"rating": 3.2}), ("No.", {"rating": -0.5})]
