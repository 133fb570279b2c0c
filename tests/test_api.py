"""What users of the package write: the public names, their signatures, and the three-line start with everything in it."""

from __future__ import annotations

import ast
import inspect
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

import surefoot
from surefoot import PPO, SFT, RewardModel, TextTask, advantages, collect, load_policy, update
from surefoot.config import AdapterConfig, Config, PolicyConfig, make_config
from surefoot.train.ppo_objective import PPOObjective
from tests.fakes import config_of
from tests.inputs import PROMPTS, Rows, model_folder, refusal
from tests.tiny import tiny_policy, tiny_tokenizer

SMALL = {"total_episodes": 8, "episodes_per_update": 4, "batch_size": 4, "n_epochs": 1, "max_new_tokens": 3, "dtype": "float32"}


pytestmark = pytest.mark.usefixtures("in_own_folder")


def reward(prompts, completions, **columns):
    return [float(len(c)) for c in completions]


def task(**settings: object) -> TextTask:
    return TextTask(PROMPTS, reward, **{"held_out": 0.5, **settings})


def small(policy: object = None, env: TextTask | None = None, **settings: object) -> PPO:
    return PPO(tiny_policy() if policy is None else policy, env or task(), **{"verbose": 0, **SMALL, **settings})


def test_the_public_names_are_sorted_and_complete():
    by_kind = sorted(surefoot.__all__, key=lambda name: (not name.isupper(), not name[0].isupper(), name))
    assert surefoot.__all__ == by_kind and len(set(by_kind)) == len(by_kind)
    promised = {
        "BaseCallback",
        "PPO",
        "PPOObjective",
        "RewardModel",
        "SFT",
        "TextTask",
        "advantages",
        "collect",
        "evaluate_policy",
        "load_policy",
        "make_env",
        "make_optimizer",
        "make_policy",
        "new_model",
        "update",
    }
    errors = {name for name, value in vars(surefoot.errors).items() if isinstance(value, type) and issubclass(value, Exception)}
    assert set(surefoot.__all__) == promised | errors


def test_every_public_name_imports_and_type_checkers_see_the_same_ones():
    for name in surefoot.__all__:
        assert getattr(surefoot, name).__name__ == name and inspect.getdoc(getattr(surefoot, name))
    tree = ast.parse(Path(surefoot.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == set(surefoot.__all__)


def test_a_name_that_does_not_exist_is_an_attribute_error():
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
    PPO.learn: "(self, total=None, /, callback=None, progress_bar=False, *, total_episodes=None, total_timesteps=None)",
    PPO.evaluate: "(self, episodes=None)",
    PPO.generate: "(self, prompts, *, seed=0, **sampling)",
    PPO.predict: "(self, observation, state=None, episode_start=None, deterministic=False, *, action_masks=None)",
    PPO.save: "(self, folder)",
    PPO.load: "(folder, env=None, *, verbose=1, **given)",
    PPO.open: "(source, env=None)",
    SFT.__init__: "(self, policy, data=None, *, config=None, verbose=1, run=None, **settings)",
    SFT.learn: "(self, total_epochs=None, callback=None)",
    SFT.evaluate: "(self, examples=None)",
    SFT.generate: "(self, prompts, *, seed=0, **sampling)",
    SFT.save: "(self, folder)",
    SFT.load: "(folder, data=None, *, verbose=1)",
    RewardModel.__init__: "(self, policy, data=None, *, config=None, verbose=1, run=None, **settings)",
    RewardModel.learn: "(self, total_epochs=None, callback=None)",
    RewardModel.evaluate: "(self, examples=None)",
    RewardModel.score: "(self, prompts, completions)",
    RewardModel.save: "(self, folder)",
    RewardModel.load: "(folder, data=None, *, verbose=1)",
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


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda function: function.__qualname__)
def test_public_signatures_change_only_on_purpose(function):
    assert plain_signature(function) == SIGNATURES[function]


def test_ten_lines_train_a_model_with_a_reward_of_ones_own(capsys):
    seen = []

    def more_words(prompts, completions, **columns):
        seen.append((prompts, completions, columns))
        return [1.0 * text.count(" ") for text in completions]

    model = PPO(model_folder(), TextTask(PROMPTS, more_words), learning_rate=1e-3, **SMALL)
    assert model.learn() is model
    assert isinstance(model.generate("the film"), str)
    model.save("out")
    opened = transformers.AutoModelForCausalLM.from_pretrained("out")
    tokens = torch.tensor([tiny_tokenizer()("the film")["input_ids"]])
    assert torch.allclose(opened(tokens).logits, model.policy.lm(tokens).logits, atol=1e-4)
    assert model.run_folder == Path("runs/ppo-1") and "update 2/2" in capsys.readouterr().out
    for prompts, completions, columns in seen:
        assert len(prompts) == len(completions) == len(columns["answer"])
        assert [len(p) for p in prompts] == columns["answer"] and all(isinstance(c, str) for c in completions)


def test_a_reward_may_name_its_columns():
    def exact(prompts, completions, answer):
        return [float(len(c) == n) for c, n in zip(completions, answer, strict=True)]

    assert small(env=TextTask(Rows(PROMPTS), exact)).learn().run_folder is not None


def test_chat_messages_reach_the_reward_as_messages():
    chats = [[{"role": "user", "content": text}] for text in ("one", "two", "three", "four", "five")]
    seen = []

    def on_messages(prompts, completions, **columns):
        seen.extend(zip(prompts, completions, strict=True))
        return [float(len(c[0]["content"])) for c in completions]

    model = small(tiny_policy(tokenizer=tiny_tokenizer(chat=True)), TextTask(chats, on_messages, held_out=0)).learn(4)
    assert all(prompt in chats and [m["role"] for m in completion] == ["assistant"] for prompt, completion in seen)
    assert len(model.generate([chats[0], "plain text"])) == 2


def test_plain_prompts_can_be_sent_as_chat():
    policy = tiny_policy(tokenizer=tiny_tokenizer(chat=True))
    batch = collect(policy, TextTask(["one"], reward, held_out=0, chat=True), episodes=1)
    chat = policy.tokenizer.apply_chat_template(
        [{"role": "user", "content": "one"}], add_generation_prompt=True, return_dict=True
    )
    assert batch.trajectories[0].prompt_tokens == tuple(chat["input_ids"])
    assert batch.trajectories[0].prompt == "one" and isinstance(batch.trajectories[0].completion_text, str)


def test_nothing_is_shown_when_nothing_is_asked_for(capfd):
    small().learn()
    assert capfd.readouterr() == ("", "")


def test_the_loops_parts_are_a_loop_of_ones_own():
    policy, ppo = tiny_policy(), config_of(batch_size=4, n_epochs=1)
    optimizer = torch.optim.Adam([p for _, p in policy.named_parameters_to_train()])
    before = [p.detach().clone() for _, p in policy.named_parameters_to_train()]
    batch = collect(policy, task(held_out=0), episodes=4)
    advantages(batch, ppo)
    result = update(policy, batch, PPOObjective(ppo), optimizer=optimizer)
    assert result.steps == 1
    assert any(not torch.equal(a, p) for a, (_, p) in zip(before, policy.named_parameters_to_train(), strict=True))


def test_settings_and_config_are_the_same_thing():
    config = make_config({"ppo": {"gamma": 0.5}, "kl": {"coef": 0.3}, "run": {"name": "mine"}}, where="test")
    model = PPO(tiny_policy(), config=config, gamma=0.25, adapter={"rank": 2})
    assert (model.config.kl.coef, model.config.ppo.gamma, model.config.run.name) == (0.3, 0.25, "mine")
    assert model.config.policy.adapter == AdapterConfig(rank=2)
    assert PPO(tiny_policy(), adapter=None).config.policy.adapter is None
    assert PPO(tiny_policy()).config == Config()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"learning_rat": 1}, "unknown setting 'learning_rat'; did you mean 'learning_rate'?"),
        ({"chat": True}, "unknown setting 'chat'; it is TextTask's"),
        ({"learning_rate": "fast"}, "PPO(...): ppo.learning_rate: should be a number, got 'fast'"),
        ({"batch_size": 5}, "PPO(...): ppo.batch_size (5) does not divide rollout.episodes_per_update (64); try 4"),
        ({"temperature": 0}, "PPO(...): generation.temperature 0 is greedy and cannot be trained on"),
        ({"adapter": {"rnk": 2}}, "PPO(...): unknown key 'policy.adapter.rnk'; did you mean 'policy.adapter.rank'?"),
        ({"run_name": "../up"}, "PPO(...): run.name: '../up' is not a plain folder name"),
    ],
)
def test_a_wrong_setting_is_refused_before_the_model_is_loaded(monkeypatch, settings, said):
    monkeypatch.setattr("surefoot.build.language.load_policy", None)
    assert refusal(lambda: PPO("smollm2-135m-instruct", task(), **settings)).startswith(said)


@pytest.mark.parametrize("policy", [None, 5, torch.nn.Linear(2, 2), ["a", "b"]], ids=lambda policy: type(policy).__name__)
def test_something_that_is_no_policy_is_refused(policy):
    said = refusal(lambda: PPO(policy, task()))
    assert said == f"policy: expected a model's name or folder, or what load_policy gives, got a {type(policy).__name__}"


@pytest.mark.parametrize("env", ["CartPole-v1", PROMPTS, reward])
def test_something_that_is_no_task_is_refused(env):
    assert refusal(lambda: PPO(tiny_policy(), env)).startswith("env: expected a TextTask(prompts, reward), got ")


@pytest.mark.parametrize("policy", [str, Path])
def test_a_folder_can_be_given_as_text_or_path(policy):
    assert PPO(policy(model_folder())).policy.lm.config.vocab_size == 61


def test_the_try_of_the_reward_leaves_the_global_generators_alone():
    def draws(prompts, completions, **columns):
        return torch.rand(len(prompts)).tolist()

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    small(env=TextTask(PROMPTS, draws))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("count", [0, -4, 2.5, "100"])
def test_a_senseless_number_of_episodes_is_refused(count):
    model = small()
    assert refusal(lambda: model.learn(count)) == f"total_episodes: expected a whole number above 0, got {count!r}"
    assert refusal(lambda: model.evaluate(count)) == f"episodes: expected a whole number above 0, got {count!r}"
    assert not Path("runs").exists()


def test_training_without_a_task_is_refused():
    model = PPO(tiny_policy())
    assert "there is nothing to train on" in refusal(model.learn)
    assert "there is nothing to train on" in refusal(model.evaluate)
    assert not Path("runs").exists()


def test_evaluation_of_no_episodes_is_refused():
    model = small(evaluate_episodes=0)
    assert refusal(model.evaluate) == "evaluate.episodes is 0; say how many: evaluate(episodes=64)"
    assert model.evaluate(1)["eval/length"] > 0


def test_evaluation_without_held_out_prompts_is_refused_and_leaves_nothing():
    model = small(env=task(held_out=0))
    assert "no held-out prompts to evaluate on" in refusal(model.evaluate)
    assert not Path("runs").exists()


def test_evaluation_measures_what_was_held_out():
    judged = []

    def metric(prompts, completions, **columns):
        judged.append(prompts)
        return [0.5] * len(prompts)

    model = small(env=TextTask(["one", "two"], reward, metric=metric, held_out=["her", "him"]))
    measured = model.evaluate()
    assert measured["eval/metric"] == 0.5 and judged[-1] == ["her", "him"]
    assert model.evaluate() == measured and set(model.evaluate(1)) == set(measured)


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        ("", "generate: the prompt is empty"),
        (["one", " "], "generate, prompt 2: the prompt is empty"),
        (5, "prompts: expected a string or a list of prompts, got int"),
        (None, "prompts: expected a string or a list of prompts, got NoneType"),
        (["one", 5], "generate, prompt 2: a prompt must be a string or a list of {role, content} messages, got int"),
        ([{"role": "user", "content": "hi"}], "generate, prompt 1: a prompt must be a string or a list of"),
        ([[{"role": "user"}]], "generate, prompt 1: a prompt must be a string or a list of"),
        ([[{"role": "user", "content": "hi"}]], "messages need a chat template"),
        ("x" * 100, "has 100 tokens; the model's context of 96 leaves 72 beside 24 new ones"),
        ("half \ud83d", "generate: half a surrogate pair"),
    ],
)
def test_prompts_that_cannot_be_continued_are_refused(prompts, said):
    assert said in refusal(lambda: PPO(tiny_policy()).generate(prompts))


def test_sampling_settings_are_checked():
    model = PPO(tiny_policy())
    assert "unknown sampling setting 'top_q'" in refusal(lambda: model.generate("one", top_q=3))
    assert "max_new_tokens: should be greater than 0" in refusal(lambda: model.generate("one", max_new_tokens=0))
    assert "top_p: should be less than or equal to 1" in refusal(lambda: model.generate("one", top_p=3.0))


def test_one_prompt_gives_a_string_and_several_a_list():
    model = PPO(tiny_policy())
    assert isinstance(model.generate("one"), str)
    assert [type(text) for text in model.generate(["one", "two"])] == [str, str] and model.generate([]) == []
    assert model.generate(["one"], seed=4)[0] == model.generate("one", seed=4)


def weights(model: PPO) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.policy.named_parameters_to_train()}


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


def test_a_saved_model_is_loaded_with_its_critic_and_settings():
    model = PPO(model_folder(), task(), verbose=0, kl={"coef": 0.3}, run_name="mine", **SMALL).learn()
    model.save("out")
    loaded = PPO.load("out", task(), verbose=0)
    assert loaded.config.kl.coef == 0.3 and loaded.config.run.name is None  # what it trains is another run
    assert torch.equal(loaded.policy.value_head.weight, model.policy.value_head.weight)
    assert loaded.policy.value_head.weight.abs().sum() > 0
    assert loaded.learn(4).run_folder != model.run_folder


def test_relative_names_in_a_run_folder_are_found_from_anywhere(monkeypatch, tmp_path):
    shutil.copytree(model_folder(), "model")
    PPO("model", task(), verbose=0, run_name="mine", **SMALL).learn(4)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert PPO.load("../runs/mine", task(), verbose=0).learn(4).run_folder is not None
    assert isinstance(PPO.open("../runs/mine").generate("one"), str)


@pytest.mark.parametrize("name", ["nowhere", "empty", "plain"])
def test_a_folder_that_surefoot_did_not_write_is_refused(name):
    Path("empty").mkdir()
    shutil.copytree(model_folder(), "plain")
    assert refusal(lambda: PPO.load(name, task())).startswith(f"{name} is neither a run folder (config.yaml) nor a model that")


def test_settings_of_a_saved_model_that_are_damaged_are_refused():
    PPO(model_folder(), verbose=0).save("out")
    Path("out/surefoot.yaml").write_text("ppo: !!python/object/apply:os.system ['touch canary']")
    assert refusal(lambda: PPO.load("out", task())).startswith("out/surefoot.yaml, line 1: not valid, safe YAML")
    assert not Path("canary").exists()


def test_a_place_that_cannot_be_written_is_one_line():
    Path("file").touch()
    assert refusal(lambda: PPO(tiny_policy()).save("file/out")).startswith("file/out could not be written: ")


def test_load_policy_gives_what_ppo_takes():
    policy = load_policy(str(model_folder()), PolicyConfig(adapter=AdapterConfig(rank=2), dtype="float32"))
    model = small(policy).learn(4)
    assert model.policy is policy and os.path.isdir(model.run_folder or "")
