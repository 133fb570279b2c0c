"""A causal LM as policy, critic and reference."""

from dataclasses import replace

import pytest
import torch
import transformers

from surefoot.config import AdapterConfig, PolicyConfig
from surefoot.policies.lm.policy import wrap_policy
from surefoot.types import Batch
from tests import tiny
from tests.fakes import padded
from tests.golden import refused
from tests.tiny import FAMILIES, LSTM, move, plain_scores, random_tokens, tiny_lm, tiny_policy, tiny_tokenizer, written_batch

# Prompts and completions of several lengths; longer than the sliding windows.
PAIRS = [(random_tokens(p, seed=p), random_tokens(a, seed=40 + a)) for p, a in ((3, 5), (1, 1), (9, 4), (2, 12))]
KINDS = ("logprobs", "values", "entropies")
ADAPTER = pytest.mark.parametrize("adapter", [True, False], ids=["LoRA", "all weights"])


def brute_force(policy, prompt, answer, *, temperature: float = 1.0) -> dict[str, torch.Tensor]:
    """Scores of each token from a forward pass over nothing but what stood before it."""
    before = [(*prompt, *answer[:t]) for t in range(len(answer))]
    steps = [plain_scores(policy, row, [token], temperature=temperature) for row, token in zip(before, answer, strict=True)]
    return {kind: torch.cat([step[kind] for step in steps]) for kind in KINDS}


def assert_scores_match(view, batch: Batch, expected, *, tolerance: float = 1e-4) -> None:
    for kind in KINDS:
        found = getattr(view, f"{kind}_BT")
        assert torch.allclose(found[batch.mask_BT], torch.cat([row[kind] for row in expected]), atol=tolerance), kind
        assert (found[~batch.mask_BT] == 0).all(), kind


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_of_a_token_depend_on_what_stood_before_it_and_on_nothing_else(family):
    policy = tiny_policy(family, moved=True)
    batch = written_batch(PAIRS)
    with torch.no_grad():
        assert_scores_match(policy.evaluate(batch), batch, [brute_force(policy, *pair) for pair in PAIRS])


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_and_neighbours_change_nothing(family):
    policy, singles = tiny_policy(family, moved=True), [written_batch([pair]) for pair in PAIRS]
    with torch.no_grad():
        alone = [(policy.evaluate(single), policy.reference_logprobs(single)) for single in singles]
    for columns in (0, 1, 7):
        batch = padded(written_batch(PAIRS), columns, poison=float("nan"))
        tokens = batch.observations["tokens"]
        tokens[torch.arange(tokens.shape[1]) >= batch.observations["lengths"][:, None]] = 60
        with torch.no_grad():
            view, reference = policy.evaluate(batch), policy.reference_logprobs(batch)
        for row, (single, (own, own_reference)) in enumerate(zip(singles, alone, strict=True)):
            pairs = [(getattr(view, f"{kind}_BT"), getattr(own, f"{kind}_BT")) for kind in KINDS]
            for found, expected in [*pairs, (reference, own_reference)]:
                assert torch.allclose(found[row][batch.mask_BT[row]], expected[single.mask_BT], atol=1e-4)


@ADAPTER
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "phi"])
def test_temperature_divides_the_logits_of_policy_and_reference(family, adapter):
    policy = tiny_policy(family, adapter=adapter)
    batch = replace(written_batch(PAIRS), temperature=0.6)
    # With all weights trained, the two take different paths through the head and may differ by rounding.
    kl = policy.evaluate(batch).logprobs_BT - policy.reference_logprobs(batch)
    assert kl.abs().max() <= (0 if adapter else 1e-5)
    move(policy)
    with torch.no_grad():
        assert_scores_match(policy.evaluate(batch), batch, [brute_force(policy, *pair, temperature=0.6) for pair in PAIRS])
    base = tiny_lm(family).eval()
    reference = torch.cat([plain_scores(policy, *pair, lm=base, temperature=0.6)["logprobs"] for pair in PAIRS])
    assert torch.allclose(policy.reference_logprobs(batch)[batch.mask_BT], reference, atol=1e-4)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != LSTM])
def test_a_fresh_adapter_has_no_kl_to_the_reference(family):
    policy = tiny_policy(family)
    batch = written_batch(PAIRS)
    before = policy.evaluate(batch).logprobs_BT
    assert torch.equal(before, policy.reference_logprobs(batch))
    assert (before[batch.mask_BT] < 0).all()
    move(policy)
    after = policy.evaluate(batch).logprobs_BT
    assert (after - policy.reference_logprobs(batch))[batch.mask_BT].abs().mean() > 0.01
    assert torch.equal(policy.reference_logprobs(batch), before)
    assert torch.equal(policy.evaluate(batch).logprobs_BT, after)  # the adapter is on again after the reference


DROPOUT = {"llama": ["attention_dropout"], "gpt2": ["resid_pdrop", "embd_pdrop", "attn_pdrop"]}
DROPOUT |= {"gpt_neox": ["hidden_dropout", "attention_dropout"], "phi": ["resid_pdrop", "embd_pdrop", "attention_dropout"]}


@ADAPTER
@pytest.mark.parametrize("family", DROPOUT)
def test_dropout_of_the_model_is_off(family, adapter):
    lm, tokens = tiny_lm(family, **dict.fromkeys(DROPOUT[family], 0.1)), torch.tensor([PAIRS[3][0] + PAIRS[3][1]])
    with torch.no_grad():
        assert lm.training and not torch.equal(lm(tokens).logits, lm(tokens).logits)  # it is there
    policy, batch = tiny_policy(lm=lm, adapter=adapter, moved=True), written_batch(PAIRS)
    first, second = policy.evaluate(batch), policy.evaluate(batch)
    assert all(torch.equal(getattr(first, f"{kind}_BT"), getattr(second, f"{kind}_BT")) for kind in KINDS)
    assert torch.equal(policy.reference_logprobs(batch), policy.reference_logprobs(batch))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_value_head_is_float32_and_zero_at_the_start(dtype):
    policy, batch = tiny_policy(dtype=dtype), written_batch(PAIRS)
    assert (policy.evaluate(batch).values_BT == 0).all()
    move(policy)
    values = policy.evaluate(batch).values_BT
    assert {values.dtype, policy.value_head.weight.dtype} == {torch.float32}
    assert len(set(values[values != 0].tolist())) == int(batch.mask_BT.sum())


@ADAPTER
@pytest.mark.parametrize("stop_gradient", [True, False])
def test_stop_gradient_keeps_the_value_loss_out_of_the_trunk(adapter, stop_gradient):
    policy = tiny_policy(adapter=adapter, stop_gradient=stop_gradient, moved=True)
    policy.evaluate(written_batch(PAIRS)).values_BT.square().sum().backward()
    trunk = [p.grad for name, p in policy.named_parameters_to_train() if not name.startswith("value_head")]
    reached = any(gradient is not None and gradient.abs().max() > 0 for gradient in trunk)
    assert reached != stop_gradient
    assert policy.value_head.weight.grad.abs().max() > 0
    # The policy's own gradient reaches the trunk in either case.
    policy.evaluate(written_batch(PAIRS)).logprobs_BT.sum().backward()
    assert all(p.grad is not None for name, p in policy.named_parameters_to_train() if name.startswith("model."))


@pytest.mark.parametrize("family", FAMILIES)
@ADAPTER
def test_bfloat16_stays_close_to_float32_and_trains_in_it(family, adapter):
    batch, seen = written_batch(PAIRS), []
    for dtype in (torch.float32, torch.bfloat16):
        policy = tiny_policy(family, adapter=adapter, dtype=dtype)  # in bfloat16 too no sound model is refused
        names, parameters = zip(*policy.named_parameters_to_train(), strict=True)
        assert {p.dtype for p in parameters} == {torch.float32} and len(set(names)) == len(names)
        is_lora = adapter and family != LSTM
        assert all("lora" in name or name.startswith("value_head") for name in names) == is_lora
        seen.append(policy.evaluate(batch).logprobs_BT.detach())
    assert seen[1].dtype == torch.float32 and 0 < (seen[1] - seen[0]).abs().mean() < 0.1


def test_end_tokens_are_the_tokenizers_and_the_generation_configs_and_the_context_is_the_configs(tmp_path):
    for named, expected in (([7, 9], {1, 7, 9}), (None, {1})):
        lm = tiny_lm()
        lm.generation_config.eos_token_id = named
        assert tiny_policy(lm=lm).model_end_tokens == expected
    tokenizer = tiny_tokenizer(chat=True)  # whose answers end with what no configuration names
    tokenizer.chat_template = tokenizer.chat_template.replace("<eos>", "<user>")
    policy, ends = tiny_policy(tokenizer=tokenizer), [tiny.END, tiny.USER]
    assert policy.model_end_tokens == {*ends} and policy.lm.generation_config.eos_token_id == ends
    policy.save_model(tmp_path)
    assert transformers.GenerationConfig.from_pretrained(tmp_path).eos_token_id == ends
    assert [tiny_policy(family).context_length for family in ("llama", "gpt2", "gpt_neox")] == [96] * 3


@ADAPTER
def test_the_fingerprint_knows_the_base_and_not_what_is_trained(adapter):
    policy = tiny_policy(adapter=adapter)
    before = policy.fingerprint()
    assert before == tiny_policy(adapter=adapter).fingerprint()
    move(policy)
    with torch.autograd.graph.saved_tensors_hooks(pytest.fail, pytest.fail):  # no graph is built
        assert policy.fingerprint() == before
    lm = tiny_lm()
    with torch.no_grad():
        lm.model.layers[1].mlp.up_proj.weight[3, 4] += 1e-6
    assert tiny_policy(lm=lm, adapter=adapter).fingerprint() != before


REFUSED = {
    "logits scaled up after the head": ("CohereConfig", {**tiny.DECODER, "logit_scale": 0.5}),
    "logits scaled down": ("GraniteConfig", {**tiny.DECODER, "logits_scaling": 8.0}),
    "a recurrent state": ("MambaConfig", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
    "convolutions": ("Lfm2Config", {**tiny.DECODER, "num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]}),
    "looks ahead": ("BertConfig", {**tiny.DECODER, "is_decoder": False}),
}


def refused_lm(case: str):
    name, settings = REFUSED[case]
    ids = {"bos_token_id": None, "eos_token_id": tiny.END, "pad_token_id": tiny.PAD}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = getattr(transformers, name)(vocab_size=tiny.VOCABULARY, initializer_range=tiny.WIDE, **ids, **settings)
        return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("case", REFUSED)
def test_a_model_that_would_be_trained_wrongly_is_refused(case):
    lm = refused_lm(case)
    for dtype in (torch.float32, torch.bfloat16):
        with refused(type(lm).__name__):
            tiny_policy(lm=lm, adapter=False, dtype=dtype)


def test_adapters_that_cannot_be_are_refused_with_what_to_write():
    unknown = AdapterConfig(targets=["nonesuch"])
    for lm, adapter, said in ((tiny_lm(), unknown, "policy.adapter.targets"), (tiny_lm(LSTM), AdapterConfig(), "Lstm")):
        with refused(said):
            wrap_policy(lm, tiny_tokenizer(), config=PolicyConfig(adapter=adapter))


def test_the_adapters_start_depends_on_its_seed_alone():
    def start(seed: int) -> torch.Tensor:
        policy = wrap_policy(tiny_lm(), tiny_tokenizer(), seed=seed)
        return torch.cat([p.flatten() for _, p in policy.named_parameters_to_train()])

    torch.manual_seed(1)
    first, state = start(5), torch.random.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(start(5), first)
    assert not torch.equal(start(6), first)
    torch.manual_seed(1)
    assert torch.equal(torch.random.get_rng_state(), state)  # nothing was drawn from the global generator


def lstm_states(lm, tokens: tuple[int, ...]) -> torch.Tensor:
    with torch.no_grad():
        return lm.model(torch.tensor([tokens])).last_hidden_state[0]


def test_the_equations_are_the_lstms():
    """i, f, g, o = W x + U h + b; c = σ(f) c + σ(i) tanh(g); h = σ(o) tanh(c), layer on layer, from zeros."""
    lm, tokens = tiny_lm(LSTM).eval(), PAIRS[0][1]
    weights, found = lm.model.lstm.state_dict(), lstm_states(lm, tokens)
    states = [(torch.zeros(32), torch.zeros(32)) for _ in range(2)]
    for t, token in enumerate(tokens):
        x = lm.model.embed_tokens.weight[token]
        for layer, (h, c) in enumerate(states):
            w, u, b, d = (weights[f"{name}_l{layer}"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
            i, f, g, o = (w @ x + u @ h + b + d).chunk(4)
            now = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            x = torch.sigmoid(o) * torch.tanh(now)
            states[layer] = (x, now)
        assert torch.allclose(found[t], x, atol=1e-5)


def test_bfloat16_leaves_an_lstms_state_in_float32():
    exact, rough = (tiny_policy(LSTM, dtype=dtype, moved=True) for dtype in (torch.float32, torch.bfloat16))
    assert not exact.lm.training and exact.lm.model.lstm.training and exact.lm.model.lstm.dropout == 0  # cuDNN asks for it
    with rough._autocast():
        assert torch.equal(lstm_states(rough.lm, PAIRS[0][1]), lstm_states(exact.lm, PAIRS[0][1]))
