"""Writing a model for others, and refusing folders that are no whole, safe model."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from surefoot.config import AdapterConfig, PolicyConfig
from surefoot.policies.lm.policy import load_policy, resolve_dtype
from surefoot.policies.lm.pretrained import check_model_folder
from tests.inputs import model_folder, refusal
from tests.test_inputs import WEIGHTS, Bomb, Damage, config, written
from tests.tiny import FAMILIES, random_tokens, tiny_lm, tiny_policy, written_batch

PAIRS = [(random_tokens(4, seed=1), random_tokens(6, seed=2))]
FLOAT32 = PolicyConfig(adapter=AdapterConfig(rank=4), dtype="float32")


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of a whole model, to be damaged."""
    return Path(shutil.copytree(model_folder(), tmp_path / "model"))


@pytest.fixture
def sharded(folder) -> Path:
    (folder / WEIGHTS).unlink()
    tiny_lm().save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def refuse(folder: Path | str, *named: str) -> None:
    refusal(lambda: load_policy(str(folder), FLOAT32), *named)


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


def test_loading_a_saved_folder_whole_or_sharded_prints_nothing_and_gives_the_same_policy(sharded, tmp_path, capfd):
    made, batch = tiny_policy(), written_batch(PAIRS)
    transformers.utils.logging.enable_progress_bar()
    policies = [load_policy(str(folder), FLOAT32) for folder in (model_folder(), sharded)]
    policies[0].save(tmp_path)
    assert (*capfd.readouterr(),) == ("", "") and transformers.utils.logging.is_progress_bar_enabled()
    for loaded in policies:
        assert torch.equal(loaded.evaluate(batch).logprobs_BT, made.evaluate(batch).logprobs_BT)
        assert loaded.tokenizer("the end")["input_ids"] == made.tokenizer("the end")["input_ids"]
        assert (loaded.model_end_tokens, loaded.fingerprint()) == (made.model_end_tokens, made.fingerprint())


def test_bfloat16_stores_only_a_frozen_base_in_bfloat16():
    for adapter, stored in ((AdapterConfig(rank=4), {torch.bfloat16}), (None, set())):
        policy = load_policy(str(model_folder()), PolicyConfig(adapter=adapter, dtype="bfloat16"))
        assert {p.dtype for p in policy.lm.parameters() if not p.requires_grad} == stored
        assert {p.dtype for _, p in policy.named_parameters_to_train()} == {torch.float32}


def without_numbers(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    weights["model.norm.weight"].fill_(float("nan"))
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


DAMAGES: dict[str, tuple[Damage, str]] = {  # more of them: tests/test_inputs.py
    "less than it says": (written(WEIGHTS, lambda data: data[:-1]), f"{WEIGHTS}: half-written"),
    "more than it says": (written(WEIGHTS, lambda data: data + b"\0" * 64), f"{WEIGHTS}: half-written"),
    "not numbers": (without_numbers, "nan"),
    "an unknown kind": (config(model_type="nonesuch"), "configuration"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_folder_is_refused_and_what_is_wrong_is_named(folder, case):
    damage, named = DAMAGES[case]
    damage(folder)
    refuse(folder, named)


@pytest.mark.usefixtures("in_own_folder")
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "model.pkl", WEIGHTS])
def test_pickled_weights_are_refused_without_being_opened(folder, name):
    (folder / WEIGHTS).unlink()
    (folder / name).write_bytes(pickle.dumps(Bomb()))
    refuse(folder, name, "safetensors")
    assert not Path("canary").exists()


def test_a_missing_or_truncated_shard_and_a_damaged_index_are_named(sharded):
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    written(shard.name, lambda data: data[:-1])(sharded)
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
