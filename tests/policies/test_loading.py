"""Writing a model for others, and refusing folders that are no whole, safe model."""

import functools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from surefoot import PPO, SFT, RewardModel, TextTask
from surefoot.config import AdapterConfig, PolicyConfig
from surefoot.policies.lm.policy import load_policy, resolve_dtype
from surefoot.policies.lm.pretrained import check_model_folder
from tests.inputs import model_folder, refusal
from tests.test_inputs import WEIGHTS, Damage, changed, config, written
from tests.tiny import CONTEXT, END, random_tokens, tiny_lm, tiny_policy, tiny_tokenizer, written_batch
from tests.train.test_checkpoint import poison

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


def reweighted(change: Callable[[torch.Tensor], torch.Tensor], folder: Path, name: str = "model.norm.weight") -> None:
    weights = load_file(folder / WEIGHTS)
    weights[name] = change(weights[name])
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


CHARSMAP = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
DAMAGES: dict[str, tuple[Damage, str]] = {  # more of them: tests/test_inputs.py
    "less than it says": (written(WEIGHTS, lambda data: data[:-1]), f"{WEIGHTS}: half-written"),
    "more than it says": (written(WEIGHTS, lambda data: data + b"\0" * 64), f"{WEIGHTS}: half-written"),
    "not numbers": (functools.partial(reweighted, lambda weight: weight * float("nan")), "model.norm.weight has numbers"),
    "an infinite embedding": (
        functools.partial(reweighted, lambda rows: rows / (torch.arange(61)[:, None] != 60), name="model.embed_tokens.weight"),
        "model.embed_tokens.weight has numbers",
    ),
    "an unknown kind": (config(model_type="nonesuch"), "configuration"),
    "20,000 layers": (config(num_hidden_layers=20_000), "20000"),
    "nested layers": (config(text_config={"num_hidden_layers": 10**6}), "1000000"),
    "an adapter beside it": (lambda folder: (folder / "adapter_config.json").write_text("{}"), "merge_and_unload"),
    "an adapter alone": (lambda f: (f / "config.json").rename(f / "adapter_config.json"), "merge_and_unload"),
    "a pipe": (lambda folder: os.mkfifo(folder / "chat_template.jinja"), "chat_template.jinja"),
    "a device": (lambda folder: (folder / "added_tokens.json").symlink_to("/dev/zero"), "added_tokens.json"),
    "whole numbers": (functools.partial(reweighted, lambda weight: weight.to(torch.int8)), "I8"),
    "a length that is none": (changed("tokenizer_config.json", model_max_length="long"), "tokenizer"),
    "a charsmap that is none": (changed("tokenizer.json", normalizer=CHARSMAP), "charsmap"),  # Rust panics
    "an end that is none": (changed("generation_config.json", eos_token_id="x"), "'x'"),
    "an end beyond the rows": (changed("generation_config.json", eos_token_id=[1, 61]), "61"),
    **{
        f"quantized, {method}": (config(quantization_config={"quant_method": method, "bits": 4}), str(method))
        for method in ("gptq", "awq", "bitsandbytes", "compressed-tensors", "unheard of", None)
    },
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_folder_is_refused_and_what_is_wrong_is_named(folder, case):
    damage, named = DAMAGES[case]
    damage(folder)
    refuse(folder, named)


QUANTIZED = {"quantization_config": {"quant_method": "fp8"}}


@pytest.mark.parametrize("change", [{"output_attentions": True}, {"return_dict": False}, QUANTIZED])
def test_settings_that_loading_can_undo_are_undone(folder, change, tmp_path):
    config(**change)(folder)
    load_policy(str(folder), FLOAT32).save_model(tmp_path / "saved")
    assert not change.items() <= json.loads((tmp_path / "saved" / "config.json").read_text()).items()
    assert load_policy(str(tmp_path / "saved"), FLOAT32).fingerprint() == tiny_policy().fingerprint()


def adding_tokens(folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": [f"<x{i}>" for i in range(9)]})
    tokenizer.save_pretrained(folder)


def beginning_with(token: int) -> Damage:
    """A tokenizer that begins each text with a token of which only its id is said."""
    special = {"<s>": {"id": "<s>", "ids": [token], "tokens": ["<s>"]}}
    single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    processor = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": special}
    return changed("tokenizer.json", post_processor=processor)


# Rust's tokenizers panic: Oniguruma gives up.
PANIC = {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (adding_tokens, ("<x8>", "65", "61")),
        (beginning_with(5000), ("5000", "61")),
        (changed("tokenizer.json", pre_tokenizer=PANIC), ("Onig",)),
    ],
    ids=["added tokens", "a BOS", "a panic"],
)
def test_what_a_tokenizer_makes_of_a_text_and_the_model_cannot_read_is_one_line_through_every_door(
    folder, tmp_path, monkeypatch, damage, named
):
    monkeypatch.chdir(tmp_path)
    damage(folder)
    texts, quiet = ["the <x8>" + "x" * 40] * 4, {"verbose": 0, "held_out": 0.0, "dtype": "float32", "epochs": 1}
    pairs = [{"prompt": "a", "chosen": "<x8>" + "x" * 40, "rejected": text} for text in "cdef"]
    task = TextTask(texts, lambda completions, **_: [0.0] * len(completions), held_out=0.0)
    small = {"verbose": 0, "total_episodes": 4, "episodes_per_update": 4, "batch_size": 4, "max_new_tokens": 2}
    doors: list[Callable[[], Any]] = [
        lambda: PPO(str(folder), task, **small).learn(),
        lambda: PPO(str(folder), task, critic={"kind": "separate"}, **small).learn(),
        lambda: SFT(str(folder), texts, **quiet).learn(),
        lambda: RewardModel(str(folder), pairs, **quiet).learn(),
        lambda: PPO.open(folder).generate(texts),
    ]
    for door in doors:
        refusal(door, str(folder), *named)
    if damage is not adding_tokens:
        return
    assert isinstance(PPO.open(folder).generate("the"), str)
    refusal(lambda: PPO(tiny_policy(), task, verbose=0, stop_token_ids=[57, 10**12]).generate("the"), "stop_token_ids", "57")


def test_a_tokenizer_that_cannot_read_a_text_is_one_line(folder):
    changed("tokenizer_config.json", tokenizer_class="BertTokenizer")(folder)  # whose words have no unknown one here
    refusal(lambda: PPO.open(folder).generate("the cat"), "tokenizer", "'the cat'", "[UNK]")


_TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
_TEXT |= {"head_dim": 8, "vocab_size": 61, "pad_token_id": 0, "eos_token_id": END, "max_position_embeddings": CONTEXT}
_SEEN = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
_SEEN |= {"image_size": 8, "patch_size": 4}
_IMAGES = {"mm_tokens_per_image": 4, "image_token_index": 50, "boi_token_index": 51, "eoi_token_index": 52}
_ROPE = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 24}
_ROPE |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
UNUSUAL: dict[str, tuple[str, dict[str, Any], int]] = {
    "nested": ("Gemma3", {"text_config": _TEXT, "vision_config": _SEEN, "eos_token_id": END, **_IMAGES}, CONTEXT),
    "MPT": ("Mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": CONTEXT, "vocab_size": 61}, CONTEXT),
    # To where its factors change.
    "longrope": ("Phi3", {**_TEXT, "rope_parameters": _ROPE, "original_max_position_embeddings": 24}, 24),
}


@pytest.mark.parametrize("case", UNUSUAL)
def test_the_context_is_the_models_own_however_its_config_has_it(case, tmp_path):
    name, settings, length = UNUSUAL[case]
    kind = "ForConditionalGeneration" if case == "nested" else "ForCausalLM"
    getattr(transformers, name + kind)(getattr(transformers, name + "Config")(**settings)).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    policy = load_policy(str(tmp_path), PolicyConfig(adapter=None, dtype="float32"))
    assert policy.context_length == length
    assert [fact in policy.notice for fact in ("longrope", "24", str(CONTEXT))] == [case == "longrope"] * 3
    task = TextTask(["the cat " * 20], lambda completions, **_: [0.0] * len(completions), held_out=0.0)
    refusal(lambda: PPO(policy, task, verbose=0, adapter=None).generate("the cat " * 20), str(length))


@pytest.mark.usefixtures("in_own_folder")
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "model.pkl", WEIGHTS])
def test_pickled_weights_are_refused_without_being_opened(folder, name):
    (folder / WEIGHTS).unlink()
    (folder / name).write_bytes(poison(Path("canary").absolute()))
    refuse(folder, name, "safetensors")
    assert not Path("canary").exists()


def test_a_missing_or_truncated_shard_and_a_damaged_index_are_named(sharded):
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    written(shard.name, lambda data: data[:-1])(sharded)
    for damage in (lambda: None, shard.unlink):
        damage()
        refuse(sharded, shard.name)
    outside = '{"metadata": {}, "weight_map": {"lm_head.weight": "../outside.safetensors"}}'
    for text in ("{", "[]", "{}", '{"weight_map": []}', "[" * 100_000, outside):
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
        emulated = lambda including_emulation=True, has_it=has_it: has_it or including_emulation  # noqa: E731
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", emulated)
        assert resolve_dtype("auto", "cpu") == resolve_dtype("auto", "cuda") == expected
    assert resolve_dtype("auto", "mps") == torch.float32
