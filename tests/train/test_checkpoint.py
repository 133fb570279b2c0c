"""Checkpoints: bit for bit, whole after any kill, and never more trusted than their manifest."""

import contextlib
import json
import os
import pickle
import random
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy
import pytest
import torch

from surefoot.storage.files import sha256
from surefoot.storage.run_folder import RunFolder
from surefoot.train import checkpoint
from surefoot.train.checkpoint import load_checkpoint, newest_checkpoint, point, pointed_checkpoint, save_checkpoint
from tests.fakes import BigramPolicy
from tests.golden import check, refused
from tests.inputs import refusal
from tests.train import killing
from tests.train.warm import ENVIRONMENT, ROOT

FILES = ("manifest.json", "optimizer.safetensors", "policy.safetensors", "state.json")


def two_checkpoints(folder: Path) -> Path:
    """Checkpoints 1 and 2 in `folder`; the path of 2."""
    killing.save(folder, 1)
    return killing.save(folder, 2)


def forge(path: Path, **contents: bytes):
    """Replace files of a checkpoint (`policy`, `optimizer`, `state`) and make its manifest agree."""
    manifest = json.loads((path / "manifest.json").read_text())
    for stem, data in contents.items():
        file = path / (f"{stem}.json" if stem == "state" else f"{stem}.safetensors")
        file.write_bytes(data)
        manifest["files"][file.name] = {"size": len(data), "sha256": sha256(file)}
    (path / "manifest.json").write_text(json.dumps(manifest))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_tensors_of_every_kind_and_state_come_back_bit_for_bit(tmp_path):
    tensors = {
        "odd floats": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45, 3.4e38]),
        "half": torch.randn(3, 5).bfloat16(),
        "scalar": torch.tensor(7.0),
        "empty": torch.zeros(0, 4),
        "integers": torch.tensor([-(2**63), 2**63 - 1]),
        "transposed": torch.randn(4, 3).T,
        "part of another": torch.randn(10)[2:5],
    }
    state = {"tiny": 5e-324, "third": 1 / 3, "large": 2**62 + 1, "none": None, "text": "naïve \ud800", "list": [1, [2.5]]}
    path = save_checkpoint(tmp_path, 1, tensors={"policy": tensors, "optimizer": {}}, state=state, keep=2)
    loaded, loaded_state = load_checkpoint(path)
    assert loaded_state == state
    assert loaded.keys() == {"policy", "optimizer"} and loaded["optimizer"] == {} and loaded["policy"].keys() == tensors.keys()
    for name, tensor in tensors.items():
        copy = loaded["policy"][name]
        assert copy.dtype == tensor.dtype and copy.shape == tensor.shape, name
        assert copy.reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8)), name


def test_a_loaded_checkpoint_is_what_the_manifest_lists_and_does_not_change_with_its_file(tmp_path):
    # safetensors maps files into memory: what is kept must not vanish when the checkpoint is removed or overwritten.
    path = killing.save(tmp_path, 3, size=10_000)
    (path / "extra.safetensors").write_bytes(b"not one")
    tensors, _ = load_checkpoint(path)
    (path / "policy.safetensors").write_bytes(b"\xff" * (path / "policy.safetensors").stat().st_size)
    assert tensors.keys() == {"policy", "optimizer"} and (tensors["policy"]["weight"] == 3).all()


def test_everything_is_on_disk_before_the_checkpoint_gets_its_name(tmp_path, monkeypatch):
    synced: set[int] = set()
    renamed: list[str] = []
    sync, replace = os.fsync, os.replace

    def watched_replace(source: Path, target: Path):
        if Path(source).is_dir():
            assert {path.stat().st_ino for path in (source, *source.iterdir())} <= synced
        if renamed and renamed[-1] == "00000001":
            assert tmp_path.stat().st_ino in synced  # the new name, before the pointer names it
        renamed.append(Path(target).name)
        synced.discard(tmp_path.stat().st_ino)
        replace(source, target)

    monkeypatch.setattr(os, "fsync", lambda fd: (synced.add(os.fstat(fd).st_ino), sync(fd)))
    monkeypatch.setattr(os, "replace", watched_replace)
    killing.save(tmp_path, 1)
    assert renamed == ["manifest.json", "00000001", "latest"]


@pytest.mark.parametrize("keep", [2, 3])
def test_the_newest_and_the_best_stay(tmp_path, keep: int):
    for number in range(1, 8):
        killing.save(tmp_path, number, keep=keep)
        if number == 2:
            point(tmp_path, "best", "00000002")
    newest = [f"{number:08d}" for number in range(8 - keep, 8)]
    assert names(tmp_path) == ["00000002", *newest, "best", "latest"]
    assert (tmp_path / "latest").read_text() == "00000007"
    assert killing.number_in(pointed_checkpoint(tmp_path, "best")) == 2
    killing.save(tmp_path, 9)
    (tmp_path / "00000009" / "state.json").unlink()
    killing.save(tmp_path, 8, keep=keep)  # what is damaged, of an abandoned future, takes no place
    assert {"00000007", "00000008"} <= set(names(tmp_path))


def seen_by(what: str, folder: Path) -> dict[str, int]:
    command = [sys.executable, "-m", "tests.train.killing", what, str(folder)]
    ended = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


def test_a_kill_at_any_file_system_call_leaves_a_whole_checkpoint(tmp_path):
    kills = seen_by("every-call", tmp_path)
    assert kills.keys() == {prepare.__name__ for prepare in killing.BEFORE}
    assert min(kills.values()) > 15, kills


def test_a_kill_at_any_moment_of_a_loop_of_saves_leaves_the_last_one_saved(tmp_path):
    tmp_path /= "checkpoints"
    seen = seen_by("random", tmp_path)
    # Kills that only ever fell between two saves would show nothing.
    assert seen["kills"] == 40 and seen["half done"] >= 4 and seen["saves"] >= 40, seen


DAMAGES: dict[str, Callable[[bytes], bytes] | None] = {
    "cut": lambda data: data[:-1],
    "halved": lambda data: data[: len(data) // 2],
    "flipped": lambda data: data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 0x80]) + data[len(data) // 2 + 1 :],
    "longer": lambda data: data + b"x",
    "gone": None,
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_named_and_the_older_checkpoint_used(tmp_path, capsys, name: str, damage: str):
    file = two_checkpoints(tmp_path) / name
    if (change := DAMAGES[damage]) is None:
        file.unlink()
    else:
        file.write_bytes(change(file.read_bytes()))
    with refused(name):
        load_checkpoint(file.parent)
    assert killing.number_in(newest_checkpoint(tmp_path)) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(file) in said and "00000001" in said


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "policy.safetensors", "../best"])
def test_a_pipe_is_never_read(tmp_path, name: str):
    path = two_checkpoints(tmp_path)
    (path / name).unlink(missing_ok=True)
    os.mkfifo(path / name)
    assert killing.number_in(newest_checkpoint(tmp_path)) == (2 if name == "../best" else 1)
    assert pointed_checkpoint(tmp_path, "best") is None


def test_all_damaged_is_an_error_that_names_a_file_and_none_at_all_is_not(tmp_path):
    two_checkpoints(tmp_path)
    for number in (1, 2):
        (tmp_path / f"0000000{number}" / "policy.safetensors").write_bytes(b"")
    with refused("00000002/policy.safetensors"):
        newest_checkpoint(tmp_path)
    assert newest_checkpoint(tmp_path / "nowhere") is None
    (tmp_path / "empty" / "00000003.tmp").mkdir(parents=True)
    (tmp_path / "empty" / "latest").write_text("00000003")
    assert newest_checkpoint(tmp_path / "empty") is None and pointed_checkpoint(tmp_path / "empty", "latest") is None


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file can grow past `size` bytes. Python ignores SIGXFSZ, so that writing fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# Bytes that suffice for nothing, for the pointers alone, for state and manifest but not the tensors, the other way.
@pytest.mark.parametrize(("limit", "size", "note"), [(0, 9, ""), (8, 9, ""), (900, 500, ""), (900, 9, "long" * 300)])
def test_a_full_disk_is_one_clear_line_and_the_older_checkpoint_stands(tmp_path, limit: int, size: int, note: str):
    two_checkpoints(tmp_path)
    point(tmp_path, "best", "00000001")
    before = names(tmp_path)
    with refused("00000003", "older"), largest_file(limit):
        killing.save(tmp_path, 3, size=size, note=note)
    with refused("best", "00000002"), largest_file(0):
        point(tmp_path, "best", "00000002")
    assert names(tmp_path) == before and (tmp_path / "best").read_text() == "00000001"
    assert killing.number_in(newest_checkpoint(tmp_path)) == 2 and (tmp_path / "latest").read_text() == "00000002"
    killing.save(tmp_path, 3, size=size, note=note)
    assert killing.number_in(newest_checkpoint(tmp_path)) == 3


def test_a_read_only_folder_is_one_clear_line():
    root = os.geteuid() == 0
    with tempfile.TemporaryDirectory() as name:  # not tmp_path: only its owner gets that far
        folder = Path(name)
        folder.chmod(0o755)
        two_checkpoints(folder)
        folder.chmod(0o555)
        if root:  # whom no permission stops
            os.seteuid(65534)
        try:
            said = [refusal(lambda: killing.save(folder, 3)), refusal(RunFolder(folder).hold)]
        finally:
            if root:
                os.seteuid(0)
        folder.chmod(0o755)
        assert "00000003" in said[0] and all(check(line, "Permission denied") for line in said)
        assert killing.number_in(newest_checkpoint(folder)) == 2


def test_a_second_writer_is_refused_until_the_first_has_gone_or_was_killed(tmp_path):
    first, second = RunFolder(tmp_path), RunFolder(tmp_path)
    first.hold()
    first.hold()
    first.is_at_work = True
    with refused("in use by this very process"):
        second.hold()
    first.release()
    second.hold()
    first.hold()  # from one that is not at work
    assert not second.is_held
    first.release()
    program = "import os, sys; from pathlib import Path; from surefoot.storage.run_folder import RunFolder; r = RunFolder("
    program += "Path(sys.argv[1])); r.hold(); print(flush=True); os.kill(os.getpid(), 9 * (sys.stdin.read() == 'die'))"
    command, pipe = [sys.executable, "-c", program, str(tmp_path)], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with refused("in use by another run"):
            first.hold()
        holder.communicate("die")
    assert holder.returncode == -9
    first.hold()
    # A forked process that outlives its parent, as an environment's worker may, keeps nothing.
    first.release()
    program = program.rpartition("print(")[0] + "print(os.fork() or '', flush=True); time.sleep(20 * (not parent))"
    program = program.replace("r.hold();", "r.hold(); parent = os.getpid();").replace("not parent", "os.getpid() != parent")
    command = [sys.executable, "-c", program.replace("import os, sys;", "import os, sys, time;"), str(tmp_path)]
    child = int(subprocess.run(command, stdout=pipe, stderr=pipe, text=True, check=True).stdout.split()[0])
    first.hold()
    os.kill(child, 9)


@pytest.mark.parametrize("name", ["..", "../00000001", "/00000001", "", "00000001/", "00000001\n", "00000001\0", "\udcff", "x"])
def test_a_pointer_names_nothing_outside_its_folder(tmp_path, name: str):
    killing.save(tmp_path / "checkpoints", 1)
    killing.save(tmp_path, 1)
    for pointer in ("latest", "best"):
        target = f"{tmp_path}{name}" if name.startswith("/") else name
        (tmp_path / "checkpoints" / pointer).write_bytes(target.encode(errors="surrogateescape"))
        assert pointed_checkpoint(tmp_path / "checkpoints", pointer) is None
    killing.save(tmp_path / "checkpoints", 2)  # reads `best` to spare it
    assert names(tmp_path / "checkpoints")[:2] == ["00000001", "00000002"]


def test_a_link_is_no_checkpoint_and_none_of_its_files(tmp_path):
    elsewhere = killing.save(tmp_path / "elsewhere", 8)
    path = two_checkpoints(tmp_path / "checkpoints")
    (tmp_path / "checkpoints" / "00000008").symlink_to(elsewhere)
    assert newest_checkpoint(tmp_path / "checkpoints") == path
    (path / "policy.safetensors").rename(tmp_path / "moved")
    (path / "policy.safetensors").symlink_to(tmp_path / "moved")
    with refused("policy.safetensors"):
        load_checkpoint(path)


def header(text: str, claims: int | None = None, data: bytes = b"") -> bytes:
    return (len(text) if claims is None else claims).to_bytes(8, "little") + text.encode() + data


def tensors_of(*entries: str, data: bytes = b"1234") -> bytes:
    """A safetensors file of `name, shape, offsets, dtype`."""
    parts = [entry.split() for entry in entries]
    listed = [f'"{n}":{{"dtype":"{d}","shape":[{shape}],"data_offsets":[{offsets}]}}' for n, shape, offsets, d in parts]
    return header("{" + ",".join(listed) + "}", data=data)


# File of a checkpoint -> what it is forged to be.
FORGED = {
    "policy.safetensors": [
        *(b"", header("nonsense"), header(" " * 150_000_000)),
        *(header("{}", claims=claims) for claims in (2**62, 50_000_000)),  # larger than memory, or the file
        tensors_of("a 9 0,36 F32"),  # the data is shorter
        tensors_of("a 1 0,4 F32", "b 1 2,6 F32", data=b"123456"),  # they overlap
        *(tensors_of(entry) for entry in ("a 1 0,4 F33", "a 2 0,4 F32", "a -1 0,4 F32")),
    ],
    "manifest.json": [
        *(b"", b"[]", b"null", b"3", b"[" * 100_000, b'{"format": 1}', b'{"format": 1, "files": []}'),
        *(b'{"format": 1, "files": {%s}}' % listed for listed in (b"", b'"state.json": 3')),
        *(b'{"format": 1, "files": {"state.json": {"size": %s, "sha256": ""}}}' % size for size in (b'"x"', b"1e999")),
        b'{"format": 2, "files": {"state.json": {"size": 1, "sha256": ""}}}',
    ],
}


@pytest.mark.parametrize(("name", "data"), [(n, data) for n in FORGED for data in FORGED[n]], ids=lambda v: repr(v)[:50])
def test_a_forged_file_is_refused_by_name(tmp_path, name, data):
    path = two_checkpoints(tmp_path)
    if name == "manifest.json":
        (path / name).write_bytes(data)
    else:
        forge(path, policy=data)
    with refused(name):
        load_checkpoint(path)


@pytest.mark.parametrize("listed", ["..", "../00000001/state.json", "/etc/hostname", "sub/state.json", "", ".", "a\0b"])
def test_a_manifest_lists_plain_names_only(tmp_path, listed):
    path = two_checkpoints(tmp_path)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][listed] = manifest["files"]["state.json"]
    (path / "manifest.json").write_text(json.dumps(manifest))
    with refused(str(path)):
        load_checkpoint(path)


class Canary:
    """Unpickled, it leaves a file."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return os.mkdir, (str(self.file),)


def poison(canary: Path) -> bytes:
    """A pickle that is known to bite."""
    data = pickle.dumps(Canary(canary))
    pickle.loads(data)
    canary.rmdir()
    return data


@pytest.mark.parametrize("name", ["policy", "optimizer", "state"])
def test_a_pickle_with_a_safe_name_is_refused_unopened(tmp_path, name):
    path = two_checkpoints(tmp_path / "checkpoints")
    forge(path, **{name: poison(tmp_path / "canary")})
    with refused(name):
        load_checkpoint(path)
    assert not (tmp_path / "canary").exists()


def adam(policy: BigramPolicy) -> torch.optim.Adam:
    return torch.optim.Adam([parameter for _, parameter in policy.named_parameters_to_train()], lr=0.1, fused=True)


def step(policy: BigramPolicy, optimizer: torch.optim.Adam):
    optimizer.zero_grad()
    (policy.logits_VV.square().sum() + policy.values_V.cos().sum()).backward()
    optimizer.step()


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])  # of a weight in memory: convolutions have channels last
def test_a_restored_optimizer_goes_on_as_if_it_had_never_stopped(tmp_path, order: tuple[int, int]):
    policy, resumed = BigramPolicy(seed=1), BigramPolicy(seed=2)
    for each in (policy, resumed):
        each.logits_VV.data = each.logits_VV.data.permute(order).contiguous().permute(order)
    optimizer = adam(policy)
    assert checkpoint.optimizer_tensors(policy, optimizer) == {}
    for _ in range(3):
        step(policy, optimizer)
    tensors = {"policy": checkpoint.policy_tensors(policy), "optimizer": checkpoint.optimizer_tensors(policy, optimizer)}
    path = save_checkpoint(tmp_path, 3, tensors=tensors, state={}, keep=2)
    resumed_optimizer = adam(resumed)
    step(resumed, resumed_optimizer)  # whatever it was before must be gone
    loaded, _ = load_checkpoint(path)
    checkpoint.restore_policy(resumed, loaded["policy"])
    checkpoint.restore_optimizer(resumed, resumed_optimizer, loaded["optimizer"])
    for _ in range(2):
        step(policy, optimizer)
        step(resumed, resumed_optimizer)
    assert torch.equal(policy.logits_VV, resumed.logits_VV) and torch.equal(policy.values_V, resumed.values_V)
    assert int(resumed_optimizer.state[resumed.values_V]["step"]) == 5
    checkpoint.restore_optimizer(resumed, resumed_optimizer, {})  # as saved before its first step
    assert not resumed_optimizer.state


SQUARE, ONE, NINE, DOUBLE = torch.zeros(7, 7), torch.ones(1), torch.zeros(9), torch.zeros(7).double()
UNFIT = {
    "weights": [{"logits": None, "other": SQUARE}, {"logits": None}, {"other": ONE}, {"values": NINE}, {"values": DOUBLE}],
    "optimizer": [
        *({"logits/exp_avg": None}, {"logits/step": None}, {"logits/more": SQUARE}, {"other/step": ONE[0]}),
        *({"nonsense": ONE}, {"values/exp_avg": NINE}, {"values/exp_avg_sq": DOUBLE}),
    ],
}


@pytest.mark.parametrize(("of", "change"), [(of, change) for of in UNFIT for change in UNFIT[of]], ids=str)
def test_what_does_not_fit_is_refused_and_nothing_is_copied(of, change):
    policy = BigramPolicy(seed=1)
    optimizer = adam(policy)
    step(policy, optimizer)
    saved = checkpoint.policy_tensors(policy) if of == "weights" else checkpoint.optimizer_tensors(policy, optimizer)
    tensors = {name: value for name, value in {**saved, **change}.items() if value is not None}
    other, untouched = BigramPolicy(seed=2), BigramPolicy(seed=2)
    with refused("does not fit this policy"):
        if of == "weights":
            checkpoint.restore_policy(other, tensors)
        else:
            checkpoint.restore_optimizer(policy, optimizer, tensors)
    assert torch.equal(other.logits_VV, untouched.logits_VV) and torch.equal(other.values_V, untouched.values_V)


def draws() -> list[float]:
    """An odd number from each: Python and NumPy make normal numbers in pairs and keep the second."""
    python = [random.random(), random.gauss(0, 1), random.getrandbits(70)]
    legacy = [*numpy.random.standard_normal(3).tolist(), float(numpy.random.rand())]
    return [*python, *legacy, *torch.randn(3).tolist(), *torch.rand(17).tolist()]


def test_generators_are_put_back_exactly_through_json_and_start_by_their_seed():
    checkpoint.seed_generators(2**63 - 1)
    first = draws()
    states = json.loads(json.dumps(checkpoint.generator_states()))
    expected = draws() + draws()
    checkpoint.seed_generators(7)
    assert not set(draws()) & set(first)
    checkpoint.restore_generators(states)
    assert draws() + draws() == expected
    checkpoint.seed_generators(2**63 - 1)
    assert draws() == first
