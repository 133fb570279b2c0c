"""What `save` writes computes what was trained, and adapters are where their targets say, or it is said where not."""

import copy
import itertools
from typing import Any

import pytest
import torch
import transformers

from surefoot.config import AdapterConfig, PolicyConfig
from surefoot.policies.lm.policy import CausalLMPolicy, load_policy, wrap_policy
from tests.inputs import refusal
from tests.tiny import FAMILIES, MIXTURES, move, random_tokens, tiny_lm, tiny_policy, tiny_tokenizer

ENDS = {"gpt2": ("wte", "lm_head"), "gpt_neox": ("embed_in", "lm_head")}  # else embed_tokens and lm_head
EXPERTS, ROUTER = ["gate_up_proj", "down_proj"], ["gate"]


def saving_cases() -> list[Any]:
    cases = []
    for family, tied, dtype in itertools.product((*FAMILIES, *MIXTURES), (True, False), ("float32", "bfloat16")):
        first, last = ENDS.get(family, ("embed_tokens", "lm_head"))
        targets: list[Any] = [None] if family == "lstm" else [None, "all-linear", [first], [last], [first, last]]
        if family in MIXTURES:
            targets += [EXPERTS, ["q_proj", *(["router"] if family == "gpt_oss" else [] if family == "phimoe" else ROUTER)]]
        for chosen in targets:
            is_quick = tied and dtype == "float32" and ((family in FAMILIES and chosen != [first, last]) or chosen == EXPERTS)
            marks = () if is_quick else pytest.mark.slow
            name = f"{family} {'tied' if tied else 'untied'} {chosen} {dtype}"
            cases.append(pytest.param(family, tied, chosen, dtype, marks=marks, id=name))
    return cases


def in_float32(policy: CausalLMPolicy) -> Any:
    return copy.deepcopy(policy.lm).float()


@pytest.mark.parametrize(("family", "tied", "targets", "dtype"), saving_cases())
@torch.no_grad()
def test_what_is_saved_opens_in_transformers_and_computes_what_was_trained(family, tied, targets, dtype, tmp_path):
    tiny_lm(family, tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    adapter = None if targets is None else AdapterConfig(rank=4, targets=targets)
    tokens = torch.tensor([random_tokens(12, seed=0)])
    policy = load_policy(str(tmp_path / "base"), PolicyConfig(adapter=adapter, dtype=dtype))
    start = in_float32(policy)(tokens).logits
    move(policy)
    assert {p.dtype for _, p in policy.named_parameters_to_train()} == {torch.float32}
    before = in_float32(policy)(tokens).logits
    # Gemma rounds the factor of its embeddings to what it computes in.
    within = 5e-3 if (dtype, family[:5]) == ("bfloat16", "gemma") else 1e-4
    for out in (tmp_path / "saved", tmp_path / "saved again"):
        policy.save(out)
        opened = transformers.AutoModelForCausalLM.from_pretrained(out)
        assert opened.dtype == torch.float32 and torch.allclose(opened(tokens).logits, before, atol=within)
        policy = load_policy(str(out), PolicyConfig(adapter=adapter, dtype="float32"))
        assert not torch.allclose(policy.lm(tokens).logits, start, atol=1e-2)  # it has moved
    assert not [p for p in out.iterdir() if p.suffix in {".bin", ".pt", ".pth", ".pkl"}]


def test_saving_changes_nothing(tmp_path):
    policy, tokens = tiny_policy("gemma", moved=True), torch.tensor([random_tokens(12, seed=0)])
    before = policy.lm(tokens).logits
    policy.save(tmp_path)
    assert torch.equal(policy.lm(tokens).logits, before)


@pytest.mark.parametrize(
    ("family", "targets", "said"),
    [
        *((family, "all-linear", ()) for family in (*FAMILIES[:-1], "mixtral", "qwen3_moe")),
        ("gpt_oss", "all-linear", ("86%", "mlp.experts.gate_up_proj", "mlp.router")),
        ("phimoe", "all-linear", ("86%", "mlp.experts.down_proj", "mlp.router")),
        ("glm4_moe", "all-linear", ("31%", "mlp.up_proj", "mlp.shared_experts.up_proj")),
        ("qwen2_moe", EXPERTS, ("31%", "mlp.experts.down_proj")),
        ("mixtral", ["w1", "w2", "w3"], ()),  # as they were called before
    ],
)
def test_what_the_targets_leave_alone_is_said(family, targets, said):
    policy = wrap_policy(tiny_lm(family), tiny_tokenizer(), config=PolicyConfig(adapter=AdapterConfig(targets=targets)))
    assert bool(policy.notice) == bool(said) and all(fact in policy.notice for fact in said)


@pytest.mark.parametrize(
    ("family", "targets", "named"),
    [
        ("llama", ["q_proj", "v_porj"], ("v_porj", "v_proj")),
        ("llama", ["q_proj", "input_layernorm"], ("input_layernorm",)),
        ("llama", ["q_proj", "gate"], ("gate", "gate_proj")),
        ("gpt_oss", ["gate"], ("gate",)),
        ("mixtral", ["w1", "w2"], ("w3",)),
        # peft would put these on the experts
        ("qwen3_moe", ["mlp.shared_experts.down_proj"], ("shared_experts",)),
        ("glm4_moe", ["q_proj", "mlp.shared_experts.down_proj"], ("shared_experts",)),
    ],
)
def test_a_target_that_no_adapter_can_be_on_is_named(family, targets, named):
    config = PolicyConfig(adapter=AdapterConfig(targets=targets))
    refusal(lambda: wrap_policy(tiny_lm(family), tiny_tokenizer(), config=config), "policy.adapter.targets", *named)


def test_linear_layers_with_a_forward_of_their_own_are_adapted() -> None:
    sizes = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    falcon = transformers.FalconForCausalLM(transformers.FalconConfig(**sizes, bos_token_id=0, eos_token_id=1))
    policy = wrap_policy(falcon, tiny_tokenizer(), config=PolicyConfig(adapter=AdapterConfig()))
    trained = {name.split(".lora_")[0].rpartition(".")[2] for name, _ in policy.named_parameters_to_train() if "lora_" in name}
    assert trained == {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"} and policy.notice == ""
