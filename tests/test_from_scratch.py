"""A language model from nothing: tokenizer, folder, `surefoot new-model`, and the whole way through SFT to PPO."""

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

from surefoot import PPO, SFT, TextTask, load_policy, new_model
from surefoot.config import PolicyConfig
from surefoot.policies.lm.from_scratch import END, learn_tokenizer
from tests.inputs import refusal, run_cli, write_project
from tests.train.small_run import rows, write_rows
from tests.train.warm import cold

TEXTS = [f"the {noun} is {word}." for noun in ("cat", "dog", "hen", "cow") for word in ("red", "big", "old", "shy")]
ROWS = [{"text": text} for text in TEXTS]
CHATS = [{"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}]} for text in TEXTS]
WHOLE = {"adapter": None, "dtype": "float32", "verbose": 0}
TINY = {"vocab": 300, "width": 32, "layers": 1}
KINDS = ("transformer", "lstm")
pytestmark = pytest.mark.usefixtures("in_own_folder")


def random_text(chance: random.Random) -> str:
    """Any Unicode but lone surrogates, which are no text; blanks and ASCII more often than they would come by chance."""
    alphabets = [(0, 0x80), (0, 0x300), (0x20, 0x21), (0x0E00, 0xD800), (0xE000, 0x110000)]
    return "".join(chr(chance.randrange(*chance.choice(alphabets))) for _ in range(chance.randrange(30)))


@pytest.mark.parametrize("vocab", [257, 300], ids=["bytes", "BPE"])
def test_any_text_comes_back_from_its_tokens(vocab):
    new_model("new", TEXTS, vocab=vocab, held_out=0.0, width=32, layers=1)
    tokenizer = transformers.AutoTokenizer.from_pretrained("new")
    chance = random.Random(0)
    texts = [random_text(chance) for _ in range(300)]
    texts += ["", "  two  blanks ", " it 's , n't .", "\r\n\t\0", "e\u0301 \u00e9", "\ufeff\u202e", f"a {END} b", TEXTS[0]]
    for text in texts:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    if vocab == 257:  # all but one are bytes
        for text in ("the cat", "é", "日本", "\U0001f600"):
            assert len(tokenizer(text)["input_ids"]) == len(text.encode())
        assert (len(tokenizer), tokenizer.eos_token_id) == (257, 0)


def test_merges_are_of_what_stands_often_and_end_with_the_text():
    tokenizer = learn_tokenizer(["aab"] * 9 + ["xay"], 259)
    # Of pairs, (a, a) and (a, b) stand nine times each; the earlier one is merged, then what it makes with b.
    assert tokenizer.convert_ids_to_tokens(tokenizer("aab")["input_ids"]) == ["aab"]
    assert len(tokenizer("xay")["input_ids"]) == 3
    assert len(learn_tokenizer(["ab"], 5000)) == 258  # there is nothing else to merge


def test_the_seed_alone_decides_the_weights_in_any_interpreter():
    write_rows(Path("texts.jsonl"), ROWS)
    config = {"seed": 3, "policy": {"model": "cold", "adapter": None}, "sft": {"data": "texts.jsonl"}, "new_model": TINY}
    Path("new.yaml").write_text(yaml.safe_dump(config))
    ended = cold(Path.cwd(), "new-model", "new.yaml")
    assert ended.code == 0, ended.stderr
    global_state = torch.get_rng_state()
    new_model("same", "texts.jsonl", seed=3, **TINY)
    new_model("other", "texts.jsonl", seed=4, **TINY)
    assert torch.equal(torch.get_rng_state(), global_state)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert Path("same", name).read_bytes() == Path("cold", name).read_bytes()
    assert Path("same", "model.safetensors").read_bytes() != Path("other", "model.safetensors").read_bytes()


def test_the_tokenizer_sees_nothing_of_what_is_held_out():
    model = SFT(new_model("new", TEXTS, held_out=0.4, **TINY), TEXTS, held_out=0.4, **WHOLE)
    trained = [example.contents["text"] for example in model.data.train]
    assert 0 < len(trained) < len(TEXTS)
    new_model("alone", trained, held_out=0.0, **TINY)
    assert Path("new/tokenizer.json").read_bytes() == Path("alone/tokenizer.json").read_bytes()
    new_model("all", TEXTS, held_out=0.0, **TINY)
    assert Path("new/tokenizer.json").read_bytes() != Path("all/tokenizer.json").read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_the_sizes_are_those_that_were_asked_for(kind):
    new_model("new", TEXTS, kind=kind, vocab=300, width=64, layers=3, held_out=0.0)
    lm = load_policy("new", PolicyConfig(adapter=None)).lm
    config, vocabulary = lm.config, lm.get_output_embeddings().weight.shape[0]
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (64, 3, vocabulary)
    assert vocabulary == len(transformers.AutoTokenizer.from_pretrained("new")) <= 300
    body = sum(p.numel() for p in lm.base_model.parameters()) - 64 * vocabulary
    # LSTM: 4 gates of W, U and two biases. Llama: 4 attention and 3 MLP matrices, two norms a layer, one at the end.
    assert body == (3 * 4 * (2 * 64 * 64 + 2 * 64) if kind == "lstm" else 3 * (4 * 64**2 + 3 * 64 * 160 + 2 * 64) + 64)


def test_chats_bring_roles_and_a_template_and_pairs_give_both_their_texts():
    new_model("new", CHATS, held_out=0.0, **TINY)
    model = SFT("new", CHATS, held_out=0.0, epochs=20, learning_rate=0.01, **WHOLE).learn()
    assert model.generate([CHATS[0]["messages"][:1]], temperature=0) == ["yes"]
    assert len(model.policy.tokenizer("<|user|>")["input_ids"]) == 1
    new_model("pairs", [{"prompt": "qqqq", "completion": "zzzz"}] * 5, held_out=0.0, **TINY)
    tokenizer = transformers.AutoTokenizer.from_pretrained("pairs")
    assert [len(tokenizer(text)["input_ids"]) for text in ("qqqq", "zzzz", "jjjj")] == [1, 1, 4]


@pytest.mark.parametrize("kind", KINDS)
def test_from_nothing_through_sft_to_ppo(kind):
    """The language has 16 sentences that are equally likely, so that "the" leaves log 16 nats to be guessed. PPO is paid for
    one of its four words in a place that chance decides.
    """
    data = TEXTS * 4
    new_model("new", data, kind=kind, held_out=0.0, **TINY)
    sft = SFT("new", data, held_out=0.0, epochs=60, batch_size=16, learning_rate=0.02, **WHOLE).learn()
    metrics = rows(sft.run_folder or Path())
    tokens = metrics[-1]["length/mean"]
    assert metrics[0]["sft/nll"] * tokens > 12  # nats a sentence: from log of the vocabulary a token
    assert metrics[-1]["sft/nll"] * tokens == pytest.approx(2.77, abs=0.35)
    sft.save("tuned")

    def is_old(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        return [float("old" in text) for text in completions]

    task = TextTask(["the"], is_old, held_out=0.0)
    ppo = PPO(
        "tuned", task, total_episodes=640, episodes_per_update=32, batch_size=16, n_epochs=2, max_new_tokens=12,
        learning_rate=0.003, kl={"coef": 0.02}, evaluate_every=None, **WHOLE,
    ).learn()  # fmt: skip
    rewards = [row["reward/mean"] for row in rows(ppo.run_folder or Path())]
    kl = [row["kl/reference"] for row in rows(ppo.run_folder or Path())]
    assert rewards[0] < 0.6 and sum(rewards[-3:]) / 3 > 0.9, rewards
    # To the fine-tuned model, frozen: always the one of four words is log 4 away, 1.39 nats.
    assert abs(kl[0]) < 1e-3 and sum(kl[-3:]) / 3 == pytest.approx(1.39, abs=0.3)
    assert sum(text.endswith("is old.") for text in ppo.generate(["the"] * 10, max_new_tokens=12)) >= 7


@pytest.mark.parametrize("kind", KINDS)
def test_the_command_line_goes_the_whole_way(kind):
    write_rows(Path("texts.jsonl"), ({"said": text, "text": "no"} for text in TEXTS))
    section = {"data": "texts.jsonl", "columns": {"text": "said"}, "epochs": 1}
    config = {"policy": {"model": "new", "adapter": None}, "new_model": TINY, "sft": section}
    Path("sft.yaml").write_text(yaml.safe_dump(config))
    made = run_cli("new-model", "sft.yaml", "--new-model.kind", kind)
    assert (made.code, made.out) == (0, "model: new\nnext:  surefoot sft sft.yaml\n")
    assert made.err.startswith(f"new: {kind} of ") and made.err.endswith(" examples\n")
    assert {p.name for p in Path("new").iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert run_cli("sft", "sft.yaml", "--run.name", "tuned").code == 0
    flags = ("--policy.model", "runs/tuned/model", "--policy.adapter", "null", "--run.folder", "runs")
    assert (trained := run_cli("ppo", write_project(Path("project")), *flags)).code == 0, trained.err
    assert run_cli("generate", "runs/ppo-1", "the", "--max-new-tokens", 3).code == 0


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (("--new-model.vocab", "256"), ("--new-model", "vocab is 256")),
        (("--new-model.vocab", "1000000000"), ("2.6e+11 weights",)),
        (("--new-model.width", "48"), ("width is 48",)),
        (("--policy.model", "full"), ("policy.model", "full exists")),
        (("--policy.model", "sft.yaml"), ("policy.model", "sft.yaml is a file")),
        (("--policy.model", "sft.yaml/new"), ("sft.yaml/new could not be written",)),
        (("--policy.model", "smollm2-135m-instruct"), ("sft.yaml", "policy.model")),
        (("--policy.adapter.rank", "4"), ("sft.yaml", "adapter")),
        (("--sft.data", "empty.jsonl"), ("empty.jsonl", "no demonstrations there")),
        (("--sft.data", "null"), ("sft.yaml", "sft.data")),
    ],
    ids=" ".join,
)
def test_bad_input_is_one_line(flags, names):
    Path("full").mkdir()
    Path("full/precious").touch()
    write_rows(Path("texts.jsonl"), ROWS)
    Path("empty.jsonl").touch()
    Path("sft.yaml").write_text(yaml.safe_dump({"policy": {"model": "new", "adapter": None}, "sft": {"data": "texts.jsonl"}}))
    run_cli("new-model", "sft.yaml", *flags).refused(*names)
    assert not Path("new").exists() and [p.name for p in Path("full").iterdir()] == ["precious"]
    assert not list(Path().rglob("new.*"))


def test_the_folder_is_beside_the_file_and_sft_finds_it_there():
    Path("of_mine").mkdir()
    write_rows(Path("of_mine/texts.jsonl"), ROWS)
    config = {"policy": {"model": "base", "adapter": None}, "new_model": TINY, "sft": {"data": "texts.jsonl", "epochs": 1}}
    Path("of_mine/sft.yaml").write_text(yaml.safe_dump(config))
    run_cli("sft", "of_mine/sft.yaml").refused("of_mine/base", "surefoot new-model of_mine/sft.yaml")
    assert run_cli("new-model", "of_mine/sft.yaml").out.startswith("model: of_mine/base\n")
    assert not Path("base").exists()
    assert run_cli("sft", "of_mine/sft.yaml", "--run.name", "tuned").code == 0
    # Another model, named for one run, keeps its name.
    shutil.move("of_mine/base", "elsewhere")
    assert run_cli("sft", "of_mine/sft.yaml", "--policy.model", "elsewhere").code == 0
    del config["new_model"]  # beside a file without the section too
    Path("of_mine/sft.yaml").write_text(yaml.safe_dump(config))
    assert run_cli("new-model", "of_mine/sft.yaml", "--new-model.vocab", 300).out.startswith("model: of_mine/base\n")


def test_bad_input_in_python_is_one_line():
    for texts, settings, names in (
        (TEXTS, {"kind": "rnn"}, ("new_model.kind", "'rnn'")),
        (TEXTS, {"hidden": 3}, ("new_model.hidden",)),
        ([], {}, ("no demonstrations there",)),
        (CHATS, {"vocab": 259}, ("chats need 260",)),
    ):
        refusal(lambda texts=texts, settings=settings: new_model("new", texts, **settings), *names)
    assert not Path("new").exists()
    for folder in ("new", "usual"):  # an empty folder may become the model
        Path(folder).mkdir()
    new_model("new", TEXTS, kind="lstm", **TINY)
    assert Path("new").stat().st_mode == Path("usual").stat().st_mode
    refusal(lambda: SFT("new", TEXTS, verbose=0), "LstmForCausalLM", "policy.adapter: null")
