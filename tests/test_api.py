"""What users of the package write: the public names, their signatures, and the three-line start with everything in it."""

import ast
import inspect
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

import surefoot
from surefoot import DPO, PPO, SFT, RewardModel, TextTask, advantages, collect, load_policy, update
from surefoot.config import AdapterConfig, Config, make_config
from surefoot.train import loop
from tests.inputs import PROMPTS, model_folder, refusal, run_cli
from tests.test_reward_model import PAIRS, RATINGS
from tests.test_sft import PAIRS as EXAMPLES
from tests.test_sft import SENTENCES
from tests.tiny import tiny_policy, tiny_tokenizer
from tests.train.small_run import weights

SMALL = {"total_episodes": 8, "episodes_per_update": 4, "batch_size": 4, "n_epochs": 1, "max_new_tokens": 3, "dtype": "float32"}
pytestmark = pytest.mark.usefixtures("in_own_folder")


def reward(prompts, completions, **columns):
    return [float(len(c)) for c in completions]


def task(**settings: object) -> TextTask:
    return TextTask(PROMPTS, reward, **{"held_out": 0.5, **settings})


def small(policy: object = None, env: TextTask | None = None, **settings: object) -> PPO:
    return PPO(tiny_policy() if policy is None else policy, env or task(), **{"verbose": 0, **SMALL, **settings})


def test_the_public_names_are_complete_documented_and_the_same_to_type_checkers():
    promised = "A2C BaseCallback DPO MaskablePPO PPO PPOObjective RecurrentPPO RewardModel SFT TextTask advantages collect"
    promised += " evaluate_policy load_policy make_env make_optimizer make_policy new_model update"
    errors = {name for name, value in vars(surefoot.errors).items() if isinstance(value, type) and issubclass(value, Exception)}
    assert set(surefoot.__all__) == {*promised.split()} | errors
    for name in surefoot.__all__:
        assert getattr(surefoot, name).__name__ == name and inspect.getdoc(getattr(surefoot, name))
    block = next(node for node in ast.parse(Path(surefoot.__file__).read_text()).body if isinstance(node, ast.If))
    seen = {alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == set(surefoot.__all__)
    with pytest.raises(AttributeError, match="module 'surefoot' has no attribute 'GRPO'"):
        surefoot.GRPO  # noqa: B018
    with pytest.raises(ImportError):
        from surefoot import GRPO  # noqa: F401


def plain_signature(function: Callable[..., object]) -> str:
    """Names, kinds and defaults, without the types."""
    signature = inspect.signature(function)
    parameters = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty))


SIGNATURES = {
    PPO.__init__: "(self, policy, env=None, *, config=None, verbose=1, run=None, ptx_data=None, **settings)",
    PPO.learn: "(self, total=None, /, callback=None, progress_bar=False, *, total_episodes=None, total_timesteps=None,"
    " reset_num_timesteps=True, log_interval=None, tb_log_name=None)",
    PPO.evaluate: "(self, episodes=None)",
    PPO.generate: "(self, prompts, *, seed=0, **sampling)",
    PPO.predict: "(self, observation, state=None, episode_start=None, deterministic=False, *, action_masks=None)",
    PPO.save: "(self, folder)",
    PPO.load: "(folder, env=None, *, verbose=1, **given)",
    PPO.open: "(source, env=None)",
    SFT.generate: "(self, prompts, *, seed=0, **sampling)",
    RewardModel.score: "(self, prompts, completions)",
    TextTask.__init__: (
        "(self, prompts, reward, *, metric=None, held_out=0.1, prompt_column='prompt', prompt_tokens=None, chat=False)"
    ),
    collect: "(policy, env, *, episodes=64, first_episode=0, seed=0, version=0, engine=None, config=None)",
    advantages: "(batch, config=None)",
    update: (
        "(policy, batch, objective=None, *, optimizer=None, learning_rate=None, generator=None, budget=None, check_first=False)"
    ),
    load_policy: "(source, config=None, *, device='cpu', seed=0)",
}
for supervised in (SFT, RewardModel, DPO):
    SIGNATURES[supervised.__init__] = "(self, policy, data=None, *, config=None, verbose=1, run=None, **settings)"
    SIGNATURES[supervised.learn] = "(self, total_epochs=None, callback=None)"
    SIGNATURES |= {supervised.evaluate: "(self, examples=None)", supervised.save: "(self, folder)"}
    SIGNATURES[supervised.load] = "(folder, data=None, *, verbose=1, accept_changes=False)"


def test_public_signatures_change_only_on_purpose():
    assert {function: plain_signature(function) for function in SIGNATURES} == SIGNATURES


def test_ten_lines_train_a_model_with_a_reward_of_ones_own(capsys):
    seen = []

    def more_words(prompts, completions, **columns):
        seen.append((prompts, completions, columns))
        return [1.0 * text.count(" ") for text in completions]

    model = PPO(model_folder(), TextTask(PROMPTS, more_words), learning_rate=1e-3, **SMALL)
    assert model.learn() is model
    one, several = model.generate("the film", seed=4), model.generate(["the film", "two"], seed=4)
    assert isinstance(one, str) and several[0] == one and len(several) == 2 and model.generate([]) == []
    model.save("out")
    opened = transformers.AutoModelForCausalLM.from_pretrained("out")
    tokens = torch.tensor([tiny_tokenizer()("the film")["input_ids"]])
    assert torch.allclose(opened(tokens).logits, model.policy.lm(tokens).logits, atol=1e-4)
    assert model.run_folder == Path("runs/ppo-1") and "update 2/2" in capsys.readouterr().out
    for prompts, completions, columns in seen:
        assert [len(p) for p in prompts] == columns["answer"] and [type(c) for c in completions] == [str] * len(prompts)


def test_settings_and_config_are_the_same_thing():
    config = make_config({"ppo": {"gamma": 0.5}, "kl": {"coef": 0.3}, "run": {"name": "mine"}}, where="test")
    model = PPO(tiny_policy(), config=config, gamma=0.25, adapter={"rank": 2})
    assert (model.config.kl.coef, model.config.ppo.gamma, model.config.run.name) == (0.3, 0.25, "mine")
    assert model.config.policy.adapter == AdapterConfig(rank=2)
    assert PPO(tiny_policy(), adapter=None).config.policy.adapter is None
    assert PPO(tiny_policy()).config == Config()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"learning_rat": 1}, "'learning_rate'"),
        ({"batch_size": 5}, "ppo.batch_size (5)"),
        ({"adapter": {"rnk": 2}}, "'policy.adapter.rank'"),
        ({"run_name": "../up"}, "run.name"),
        ({"n_steps": 5}, "n_steps"),
        ({"model": "another"}, "model"),
    ],
)
def test_a_wrong_setting_is_refused_before_the_model_is_loaded(monkeypatch, settings, named):
    monkeypatch.setattr("surefoot.build.language.load_policy", None)
    refusal(lambda: PPO("smollm2-135m-instruct", task(), **settings), named)


def test_what_is_no_policy_or_no_task_is_refused_and_a_folder_is_text_or_path():
    for policy in (None, 5, torch.nn.Linear(2, 2), ["a", "b"]):
        refusal(lambda policy=policy: PPO(policy, task()), "policy", type(policy).__name__)
    for env in ("CartPole-v1", PROMPTS, reward):
        refusal(lambda env=env: PPO(tiny_policy(), env), "env", "TextTask")
    assert {PPO(kind(model_folder())).policy.lm.config.vocab_size for kind in (str, Path)} == {61}


def test_the_try_of_the_reward_leaves_the_global_generators_alone_and_nothing_is_shown(capfd):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    small(env=TextTask(PROMPTS, lambda prompts, completions, **columns: torch.rand(len(prompts)).tolist()))
    assert torch.equal(torch.rand(3), expected)
    small().learn()
    assert capfd.readouterr() == ("", "")


def test_what_cannot_be_trained_or_evaluated_is_refused_and_leaves_nothing():
    model = small(evaluate_episodes=0)
    for count in (0, -4, 2.5, "100"):
        refusal(lambda count=count: model.learn(count), "total_episodes", repr(count))
        refusal(lambda count=count: model.evaluate(count), "episodes", repr(count))
    refusal(model.evaluate, "evaluate.episodes", "episodes=")
    refusal(small(env=task(held_out=0)).evaluate, "held-out prompts")
    for method in (PPO.learn, PPO.evaluate):
        refusal(lambda method=method: method(PPO(tiny_policy())), "PPO(model, task)")
    assert not Path("runs").exists()
    assert model.evaluate(1)["eval/length"] > 0


@pytest.mark.parametrize(
    ("prompts", "named"),
    [
        ("", "generate"),
        (["one", " "], "prompt 2"),
        (None, "NoneType"),
        ([{"role": "user", "content": "hi"}], "prompt 1"),
        ([[{"role": "user", "content": "hi"}]], "chat template"),
        ("x" * 100, "100 tokens"),
    ],
)
def test_prompts_that_cannot_be_continued_are_refused(prompts, named):
    refusal(lambda: PPO(tiny_policy()).generate(prompts), named)


def test_generating_stops_at_the_strings_the_policy_was_trained_to_stop_at():
    prompts = ["one"] * 20
    free = small(max_new_tokens=20).generate(prompts)
    stopped = small(max_new_tokens=20, stop=["e"]).generate(prompts)
    assert any(text.count("e") > 1 for text in free)
    for before, after in zip(free, stopped, strict=True):
        assert before.startswith(after) and ("e" in before) == ("e" in after)
        assert "e" not in after[:-3]  # the longest token has three letters


def test_generating_goes_through_the_template_of_a_task_that_was_trained_through_it():
    policy = tiny_policy(tokenizer=tiny_tokenizer(chat=True))
    prompt = "one"
    as_chat = small(policy, task(chat=True)).generate(prompt)
    assert as_chat == small(policy).generate([[{"role": "user", "content": prompt}]])[0]
    assert as_chat != small(policy).generate(prompt)


def test_what_is_opened_writes_as_what_was_trained():
    shutil.copytree(model_folder(chat=True), "model")
    kept = {"stop": ["e"], "stop_token_ids": [5], "temperature": 0.3, "dtype": "bfloat16", "max_new_tokens": 3}
    model = PPO("model", task(chat=True), verbose=0, **{**SMALL, **kept}).learn(4)
    tuned = SFT("model", ["one", "two"] * 4, held_out=0.0, epochs=1, verbose=0, **kept).learn()
    answers = [{"messages": [{"role": role, "content": "one"} for role in ("user", "assistant")]}] * 8
    chats = SFT("model", answers, held_out=0.0, epochs=1, verbose=0, **kept).learn()
    model.save("out"), tuned.save("tuned"), chats.save("chats")
    for name, opened in {
        "model": model,
        **{name: PPO.open(name) for name in ("out", "tuned", "chats", model.run_folder, tuned.run_folder)},
        "loaded": SFT.load("tuned", ["one"], verbose=0),
    }.items():
        generation = opened.config.generation
        found = {key: getattr(generation, key) for key in kept if key != "dtype"} | {"dtype": opened.config.policy.dtype}
        assert found == kept, name
        assert generation.chat == (name not in ("tuned", tuned.run_folder, "loaded"))
    opened, chat = PPO.open("out"), [{"role": "user", "content": "one"}]
    assert opened.generate("one") == opened.generate([chat])[0] == run_cli("generate", "out", "one").out[:-1]


SUPERVISED = pytest.mark.parametrize(
    ("kind", "section", "data", "other"),
    [(SFT, "sft", SENTENCES, EXAMPLES[0]), (RewardModel, "reward_model", PAIRS, RATINGS[0])],
    ids=["sft", "reward model"],
)


@SUPERVISED
def test_a_supervised_run_learns_more_and_goes_on_in_another_process(kind, section, data, other):
    settings = {"held_out": 0.0, "batch_size": 8, "lr_schedule": "constant", "lr_warmup": 0.0, "dtype": "float32", "verbose": 0}
    straight = kind(model_folder(), data, epochs=4, run_name="a", **settings).learn()
    first = kind(model_folder(), data, epochs=1, run_name="b", **settings).learn().learn(1)
    again = kind.load("runs/b", data, verbose=0)
    assert first.is_finished and again.is_finished and again.learn(2).is_finished
    assert all(torch.equal(value, weights(straight)[name]) for name, value in weights(again).items())
    refusal(lambda: first.learn(1), "runs/b", f"{kind.__name__}.load")
    refusal(lambda: kind.load("runs/b"), f"{kind.__name__}.load(folder, data)")
    refusal(lambda: kind.load("runs/b", data[1:], verbose=0), f"{section}.data")
    again._session.training.stop.signal_number = int(signal.SIGTERM)
    stopped = str(loop._interrupted(again._session.training))
    assert stopped.endswith(f"continue with: {kind.__name__}.load('runs/b', data).learn()")


@SUPERVISED
def test_what_a_supervised_run_cannot_be_is_one_line(kind, section, data, other):
    refusal(lambda: kind(model_folder()), f"{section}.data")
    refusal(lambda: kind(7, data), "policy")
    refusal(lambda: kind(model_folder(), data, model="another"), "model")
    refusal(lambda: kind(model_folder(), [*data, other]), f"data, row {len(data) + 1}")
    refusal(lambda: kind(model_folder(), data, verbose=0).learn(0), "total_epochs")
    refusal(lambda: kind(model_folder(), data, held_out=0.0, verbose=0).evaluate(), "held-out")
    long = SENTENCES[0] * 20
    rows = [long] if kind is SFT else [{"chosen": long, "rejected": "a"}, {"chosen": "a", "rejected": "b"}]
    refusal(lambda: kind(model_folder(), rows, held_out=0.0, verbose=0).learn(), "row 1", "context")


def test_folders_that_cannot_be_loaded_or_written_are_one_line():
    Path("empty").mkdir()
    shutil.copytree(model_folder(), "plain")
    for name in ("nowhere", "empty", "plain"):
        refusal(lambda name=name: PPO.load(name, task()), name, "config.yaml", "surefoot.yaml")
    PPO(model_folder(), verbose=0).save("out")
    Path("out/surefoot.yaml").write_text("ppo: !!python/object/apply:os.system ['touch canary']")
    refusal(lambda: PPO.load("out", task()), "out/surefoot.yaml, line 1")
    assert not Path("canary").exists()
    Path("file").touch()
    refusal(lambda: PPO(tiny_policy()).save("file/out"), "file/out")
