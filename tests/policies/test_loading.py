"""Writing a model for others, and refusing folders that are no whole, safe model."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from surefoot.config import AdapterConfig, PolicyConfig
from surefoot.policies.lm.policy import load_policy, resolve_dtype
from surefoot.policies.lm.pretrained import check_model_folder
from tests.inputs import refusal
from tests.tiny import FAMILIES, random_tokens, tiny_lm, tiny_policy, tiny_tokenizer, written_batch

PAIRS = [(random_tokens(4, seed=1), random_tokens(6, seed=2))]
WEIGHTS = "model.safetensors"
FLOAT32 = PolicyConfig(adapter=AdapterConfig(rank=4), dtype="float32")


@pytest.fixture(autouse=True)
def _quiet_progress_bars():
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="module")
def whole_model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    tiny_lm().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole_model, tmp_path) -> Path:
    """A copy of a whole model, to be damaged."""
    return Path(shutil.copytree(whole_model, tmp_path / "model"))


@pytest.fixture
def sharded(whole_model, tmp_path) -> Path:
    folder = Path(shutil.copytree(whole_model, tmp_path / "sharded", ignore=shutil.ignore_patterns(WEIGHTS)))
    tiny_lm().save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def refuse(folder: Path | str, *named: str) -> None:
    refusal(lambda: load_policy(str(folder), FLOAT32), *named)


def test_loading_and_saving_print_nothing(whole_model, tmp_path, capfd) -> None:
    transformers.utils.logging.enable_progress_bar()
    load_policy(str(whole_model), FLOAT32).save(tmp_path)
    assert (*capfd.readouterr(),) == ("", "") and transformers.utils.logging.is_progress_bar_enabled()


@pytest.mark.parametrize("adapter", [True, False], ids=["LoRA", "all weights"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_saved_opens_in_transformers_and_is_the_adapted_model(family, adapter, tmp_path):
    policy = tiny_policy(family, adapter=adapter, moved=True)
    tokens = torch.tensor([random_tokens(12, seed=0)])
    before = policy.lm(tokens).logits
    policy.save(tmp_path)
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.allclose(opened(tokens).logits, before, atol=1e-4)
    assert not torch.allclose(tiny_lm(family).eval()(tokens).logits, before, atol=1e-2)  # it has moved
    assert torch.equal(policy.lm(tokens).logits, before)  # saving changed nothing
    assert not [p for p in tmp_path.iterdir() if p.suffix in {".bin", ".pt", ".pth", ".pkl"}]


def test_a_bfloat16_base_is_saved_with_the_adapter_merged_in_float32(tmp_path):
    # Merged in bfloat16, a small adapter would be rounded away.
    policy = tiny_policy(dtype=torch.bfloat16)
    with torch.no_grad():
        for name, parameter in policy.named_parameters_to_train():
            if "lora_B" in name:
                parameter.add_(1e-5)
    base = {name: p.float() for name, p in tiny_lm().to(torch.bfloat16).named_parameters()}
    policy.save(tmp_path)
    saved = load_file(tmp_path / WEIGHTS)
    assert saved["model.layers.0.self_attn.q_proj.weight"].dtype == torch.float32
    assert sum(not torch.equal(saved[name], base[name]) for name in saved) == 14  # seven linear layers in two blocks


def test_loading_a_saved_folder_whole_or_sharded_gives_the_same_policy(whole_model, sharded):
    made, batch = tiny_policy(), written_batch(PAIRS)
    for loaded in (load_policy(str(folder), FLOAT32) for folder in (whole_model, sharded)):
        assert torch.equal(loaded.evaluate(batch).logprobs_BT, made.evaluate(batch).logprobs_BT)
        assert loaded.tokenizer("the end")["input_ids"] == made.tokenizer("the end")["input_ids"]
        assert (loaded.model_end_tokens, loaded.fingerprint()) == (made.model_end_tokens, made.fingerprint())


def test_bfloat16_stores_only_a_frozen_base_in_bfloat16(whole_model):
    for adapter, stored in ((AdapterConfig(rank=4), {torch.bfloat16}), (None, set())):
        policy = load_policy(str(whole_model), PolicyConfig(adapter=adapter, dtype="bfloat16"))
        assert {p.dtype for p in policy.lm.parameters() if not p.requires_grad} == stored
        assert {p.dtype for _, p in policy.named_parameters_to_train()} == {torch.float32}


def rewritten(folder: Path, change: Callable[[bytes], bytes], name: str = WEIGHTS) -> None:
    (folder / name).write_bytes(change((folder / name).read_bytes()))


def with_header(header: bytes) -> Callable[[Path], None]:
    return lambda folder: rewritten(folder, lambda data: len(header).to_bytes(8, "little") + header)


def overlap(data: bytes) -> bytes:
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    first, second = [name for name in header if name != "__metadata__"][:2]
    header[first]["data_offsets"] = header[second]["data_offsets"]
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def reconfigured(**change: Any) -> Callable[[Path], None]:
    return lambda folder: rewritten(folder, lambda data: json.dumps(json.loads(data) | change).encode(), "config.json")


def reweighted(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        weights = load_file(folder / WEIGHTS)
        change(weights)
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})

    return damage


LOST = "model.layers.1.mlp.up_proj.weight"  # transformers would fill the gap with random numbers and only warn
DAMAGED_HEADERS = [b"[]", b'"x"', b"{}{}", b"\xff\xfe", b'{"a": 1}', b'{"a": {"data_offsets": [0]}}']
DAMAGED_HEADERS += [b'{"a": {"data_offsets": [0, "x"]}}', b"[" * 100_000]
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), f"no {WEIGHTS}"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "no config.json"),
    "no tokenizer": (lambda folder: [file.unlink() for file in folder.glob("tokenizer*")], "model"),
    "more than it says": (lambda folder: rewritten(folder, lambda data: data + b"\0" * 64), WEIGHTS),
    "overlapping tensors": (lambda folder: rewritten(folder, overlap), "model"),
    "missing weights": (reweighted(lambda weights: weights.pop(LOST)), LOST),
    "not numbers": (reweighted(lambda weights: weights["model.norm.weight"].fill_(float("nan"))), "nan"),
    "other shapes": (reconfigured(hidden_size=48), "32"),
    "a width that is not a number": (reconfigured(hidden_size="wide"), "model"),
    "an unknown kind": (reconfigured(model_type="nonesuch"), "model"),
    "not causal": (reconfigured(model_type="t5"), "model"),
}
DAMAGES |= {f"cut to {n}": (lambda f, n=n: rewritten(f, lambda data: data[:n]), WEIGHTS) for n in (0, 5, 8, 200, -1)}
DAMAGES |= {f"header {n}": (with_header(header), WEIGHTS) for n, header in enumerate(DAMAGED_HEADERS)}
DAMAGES |= {  # refused before it is read
    f"huge header {n}": (lambda f, n=n: rewritten(f, lambda data: n.to_bytes(8, "little") + data[8:]), "header")
    for n in (2**63, 10**12, 99_999_999)
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_folder_is_refused_and_what_is_wrong_is_named(folder, case):
    damage, named = DAMAGES[case]
    damage(folder)
    refuse(folder, named)


class _Canary:
    """Unpickling this makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "model.pkl", WEIGHTS, "theirs.py"])
def test_pickled_weights_are_refused_without_being_opened(folder, tmp_path, name):
    canary = tmp_path / "canary"
    if name == "theirs.py":  # nor is code that comes with a model run
        auto_map = {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}
        reconfigured(model_type="their_own", auto_map=auto_map)(folder)
        (folder / name).write_text(f"import pathlib\npathlib.Path({str(canary)!r}).touch()\n")
        refuse(folder, str(folder))
    else:
        (folder / WEIGHTS).unlink()
        (folder / name).write_bytes(pickle.dumps(_Canary(canary)))
        refuse(folder, name, "safetensors")
    assert not canary.exists()


def test_a_missing_or_truncated_shard_and_a_damaged_index_are_named(sharded):
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    rewritten(sharded, lambda data: data[:-1], shard.name)
    for damage in (lambda: None, shard.unlink):
        damage()
        refuse(sharded, shard.name)
    for text in ("{", "[]", "{}", '{"weight_map": []}'):
        (sharded / "model.safetensors.index.json").write_text(text)
        refuse(sharded, "index.json")


def test_a_folder_that_is_not_there_is_named_and_a_hub_id_is_left_to_transformers(tmp_path):
    for nowhere in (str(tmp_path / "nowhere"), "./nowhere"):
        refuse(nowhere, nowhere)
    check_model_folder("someone/some-model")
    check_model_folder("gpt2")


def test_dtype_auto_takes_bfloat16_only_where_the_processor_has_it(monkeypatch):
    assert resolve_dtype("float32", "cpu") == torch.float32
    assert resolve_dtype("bfloat16", "cpu") == torch.bfloat16
    for has_it, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has_it=has_it: has_it)
        # Emulated bfloat16, as on older GPUs, is slower than float32 and does not count.
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True, now=has_it: now or including_emulation
        )
        assert resolve_dtype("auto", "cpu") == resolve_dtype("auto", "cuda") == expected
    assert resolve_dtype("auto", "mps") == torch.float32
