"""Several runs from one file, each with what the ones before it left: `surefoot pipeline FILE`.

Every stage is an ordinary run in a folder of its own. A pipeline that was stopped goes on where it stood, and one that is
finished does nothing: what a stage left is never made twice.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surefoot.api.ppo import PPO, merge
from surefoot.api.reward_model import RewardModel
from surefoot.api.sft import SFT
from surefoot.build.language import (
    build_demonstrations,
    build_policy,
    build_preferences,
    build_reward,
    build_task,
    probe_functions,
)
from surefoot.build.preflight import build_device, model_of_run
from surefoot.build.training import build_rollout
from surefoot.config import (
    Config,
    RewardPart,
    SFTConfig,
    dump_config,
    make_config,
    make_paths_relative_to,
    read_sections,
    set_field,
)
from surefoot.config.pipeline import PipelineConfig, Product, PseudoLabelsConfig, checked, with_products
from surefoot.core.seeds import derived_seed
from surefoot.data import assets
from surefoot.envs.text import TextTask
from surefoot.errors import InputError
from surefoot.policies.lm.pretrained import check_model_folder
from surefoot.rewards.functions import RewardFunction
from surefoot.rewards.mixed import assign_rewards
from surefoot.storage.files import write_durably
from surefoot.storage.run_folder import RunFolder


@dataclass(frozen=True)
class Stage:
    """One run of a pipeline, or with `pseudo_labels` one writing of examples. All its paths are absolute."""

    name: str
    config: Config
    pseudo_labels: PseudoLabelsConfig | None = None

    @property
    def folder(self) -> Path:
        """Its run folder."""
        return Path(self.config.run.folder) / self.name

    @property
    def product(self) -> Path:
        """What later stages call `stage:NAME`: a model's folder, or a JSONL file."""
        return self.folder / ("model" if self.pseudo_labels is None else "pseudo_labels.jsonl")

    @property
    def kind(self) -> Product:
        """What the product is."""
        if self.pseudo_labels is not None:
            return "examples"
        model: Product = "an environment's policy" if self.config.env else "a language model"
        return "a reward model" if self.config.reward_model else model


def load_pipeline(path: Path | str, overrides: Mapping[str, str] | None = None) -> list[Stage]:
    """Read and check a whole pipeline. `overrides` are dotted keys of the file, `stages.ppo.kl.coef`.

    Relative paths in the file are relative to the file; those in overrides to the working directory. Raises InputError with
    one line for a stage that no run could be made of, models, functions or data that are not there or of no use, and a
    `stage:` that is not an earlier one, or leaves another kind of thing.
    """
    data = read_sections(path)
    given = data.get("stages")
    for sections in (data.get("common"), *(given.values() if isinstance(given, dict) else ())):
        make_paths_relative_to(Path(path).parent.absolute(), sections if isinstance(sections, dict) else {})
    make_paths_relative_to(Path(path).parent.absolute(), {"run": data})  # the pipeline's folder
    for key, text in (overrides or {}).items():
        set_field(data, key, text)
    pipeline = checked(PipelineConfig, data, str(path))
    stages: dict[str, Stage] = {}
    for name, sections in pipeline.stages.items():
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or len(name) > 64:
            raise InputError(
                f"{path}: {name[:60]!r} is no name for a stage; take small letters, digits and _"
            )
        stages[name] = _stage(name, sections, pipeline, f"{path}, stage {name}", stages)
    made = {str(stage.product): stage for stage in stages.values()}
    for stage in stages.values():
        try:
            _check_inputs(stage, made)
        except InputError as error:
            raise InputError(f"{path}, stage {stage.name}: {error}") from None
    return list(stages.values())


def run_pipeline(stages: list[Stage], *, verbose: int = 1) -> None:
    """Bring every stage to its end, in order. Raises what a run raises; then the same call goes on from there."""
    for stage in stages:
        _check_begun(stage, stages)
    for number, stage in enumerate(stages, start=1):
        is_finished = stage.product.exists()
        print(
            f"stage {number} of {len(stages)}: {stage.name}{', finished before' if is_finished else ''}",
            flush=True,
        )
        if is_finished:
            continue
        if stage.pseudo_labels is not None:
            _write_pseudo_labels(stage, stage.pseudo_labels)
        else:
            _train(stage, verbose)


def _stage(
    name: str, sections: dict[str, Any], pipeline: PipelineConfig, where: str, earlier: Mapping[str, Stage]
) -> Stage:
    left = {stage.name: (stage.kind, str(stage.product)) for stage in earlier.values()}
    data: dict[str, Any] = {}
    merge(data, with_products(pipeline.common, {}, where))
    merge(data, with_products(sections, left, where))
    data = {key: value for key, value in data.items() if value is not None or key == "pseudo_labels"}
    run = data.setdefault("run", {})
    if isinstance(run, dict):  # what is none is refused below
        if run.keys() & {"name", "folder"}:
            raise InputError(
                f"{where}: run.name and run.folder follow from the pipeline's folder; leave them out"
            )
        run |= {"folder": pipeline.folder, "name": name}
    if "new_model" in data:
        raise InputError(
            f"{where}: new_model is read by surefoot new-model; make the model before, and name its folder"
        )
    kinds = [kind for kind in ("task", "env", "sft", "reward_model") if kind in data]
    if not kinds:
        raise InputError(f"{where}: nothing to learn; it needs a task, env, sft or reward_model section")
    make_paths_relative_to(Path.cwd(), data)  # those that came as flags
    labels = None
    if "pseudo_labels" in data:
        given = data.pop("pseudo_labels")  # null where its lines are all comments
        labels = checked(PseudoLabelsConfig, {} if given is None else given, f"{where}, pseudo_labels")
        if kinds != ["task"]:
            raise InputError(
                f"{where}: pseudo_labels answers the prompts of a task; give it a task section alone"
            )
    config = make_config(data, where=where)
    if labels is not None and labels.episodes % (group := config.group.size):
        raise InputError(
            f"{where}: group.size ({group}) does not divide pseudo_labels.episodes ({labels.episodes})"
        )
    return Stage(name, config, labels)


def _check_inputs(stage: Stage, made: Mapping[str, Stage]) -> None:
    """Raise InputError for models, functions and data that are missing, if no stage will have `made` them, or of no use."""
    config, critic = stage.config, stage.config.policy.critic.model
    build_device(config.device)
    if config.env is None and config.policy.model not in {*made, *assets.ASSETS}:
        check_model_folder(config.policy.model)
    if critic is not None and critic not in {*made, *assets.ASSETS}:
        check_model_folder(model_of_run(critic), key="policy.critic.model")
    for section in (config.sft, config.ptx):
        if section is not None and section.data not in made:
            build_demonstrations(section)
    if config.reward_model is not None and config.reward_model.data not in made:
        build_preferences(config)
    kinds = _check_task(config, made)
    if stage.pseudo_labels is not None:
        _check_join(stage.pseudo_labels.join, kinds, made)


def _check_task(config: Config, made: Mapping[str, Stage]) -> set[str]:
    """The kinds of rows that its answers would be, if its prompts are there. Raises InputError for bad rewards and prompts."""
    task = config.task
    if task is None:
        return set()
    parts = task.reward if isinstance(task.reward, list) else [RewardPart(name=task.reward)]
    metric = [] if task.metric is None else [RewardPart(name=task.metric)]
    functions: list[tuple[str, RewardFunction]] = []
    for key, part in [("reward", part) for part in parts] + [("metric", part) for part in metric]:
        if part.name not in made:
            function = build_reward(part, f"task.{key}", config.device)
            if not Path(part.name).is_dir():
                functions.append((key, function))
    if task.prompts in made:
        return set()
    settings = task.model_dump(include={"held_out", "prompt_column", "prompt_tokens", "chat"})
    read = TextTask(assets.resolve(task.prompts, key="task.prompts"), _nothing, **settings)
    for key, function in functions:
        read.reward, read.metric = (function, None) if key == "reward" else (_nothing, function)
        probe_functions(read)
    return {" and ".join(_example(example.prompt, "", chat=task.chat)) for example in read.train}


def _nothing(completions: Sequence[Any], **_: Any) -> list[float]:
    """The reward of a task whose own is still to be made."""
    return [0.0] * len(completions)


def _check_join(join: str | None, kinds: set[str], made: Mapping[str, Stage]) -> None:
    """Raise InputError if the rows of `join` and answers that are written as rows of these `kinds` are not all of one kind."""
    if len(kinds) > 1:
        raise InputError(
            "task.prompts are strings and messages; task.chat: true makes examples of one kind from both"
        )
    if join is None or join in made:
        return
    if not Path(source := assets.resolve(join, key="pseudo_labels.join")).is_file():
        raise InputError(f"pseudo_labels.join: no file {join}")
    kind = " and ".join(build_demonstrations(SFTConfig(data=source, held_out=0.0)).train[0].contents)
    if kinds and kind not in kinds:
        raise InputError(
            f"pseudo_labels.join has {kind}, and the answers will be {min(kinds)}; a file holds one kind"
        )


def _check_begun(stage: Stage, stages: list[Stage]) -> None:
    """Raise InputError for a stage that was begun with other settings, or from what an earlier one no longer is."""
    labels = stage.pseudo_labels
    begun = stage.folder / ("config.yaml" if labels is None else "pseudo_labels.yaml")
    now = _leaves(
        stage.config.model_dump() | ({} if labels is None else {"pseudo_labels": labels.model_dump()})
    )
    gone = [
        other.name for other in stages if str(other.product) in now.values() and not other.product.exists()
    ]
    if gone and stage.folder.exists():
        raise InputError(
            f"stage {stage.name} was made from what stage {gone[0]} no longer is; remove {stage.folder} too"
        )
    if not begun.is_file():
        if labels is None:
            RunFolder.check_free(stage.config)
        return
    data = read_sections(begun)
    given = {} if labels is None else {"pseudo_labels": data.pop("pseudo_labels", None)}
    then = _leaves(make_config(data, where=str(begun)).model_dump() | given)
    for key in (*now, *then):
        if now.get(key) != then.get(key):
            raise InputError(
                f"stage {stage.name} was begun with {key} {then.get(key)!r:.60}, and now has {now.get(key)!r:.60}; "
                f"name another folder, or remove {stage.folder}"
            )


def _leaves(value: Any, key: str = "") -> dict[str, Any]:
    """Nested data by dotted keys."""
    if not isinstance(value, (dict, list)):
        return {key: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {
        leaf: end
        for name, inner in items
        for leaf, end in _leaves(inner, f"{key}.{name}".lstrip(".")).items()
    }


def _train(stage: Stage, verbose: int) -> None:
    config, is_begun = stage.config, (stage.folder / "config.yaml").is_file()
    model: PPO | SFT | RewardModel
    if config.supervised is not None:
        kind = SFT if config.sft is not None else RewardModel
        model = (
            kind.load(stage.folder, verbose=verbose)
            if is_begun
            else kind(config.policy.model, config=config, verbose=verbose)
        )
    elif is_begun:
        model = PPO.load(stage.folder, verbose=verbose)
    else:
        task = build_task(config) if config.env is None else None
        model = PPO(config.policy.model, task, config=config, verbose=verbose)
    model.learn()
    model.save(stage.product)


def _write_pseudo_labels(stage: Stage, labels: PseudoLabelsConfig) -> None:
    """The policy's best answers as examples, of those that are not empty and ended by themselves: where one was cut off is
    no place to learn to end at. Raises InputError if there is none.
    """
    config = stage.config
    task = build_task(config)
    probe_functions(task)
    policy = build_policy(config)
    policy.drop_reference()
    rollout: Any = build_rollout(config, policy, task)
    numbers, group = range(labels.episodes), config.group.size
    prompts = [task.training_example(number // group, config.seed) for number in numbers]
    seeds = [derived_seed(config.seed, "sampling", number) for number in numbers]
    answers = rollout.play(prompts, seeds, None)
    usable = [
        answer for answer in answers if answer.completion_text.strip() and answer.stop_reason.ended_by_itself
    ]
    if not usable:
        raise InputError(
            f"stage {stage.name}: of {labels.episodes} answers none says something and ended by itself; raise "
            "generation.max_new_tokens, or end them with generation.stop"
        )
    assign_rewards(task.reward, usable)
    best = sorted(usable, key=lambda answer: -answer.reward)[: max(1, round(labels.keep * len(usable)))]
    join = None if labels.join is None else assets.resolve(labels.join, key="pseudo_labels.join")
    given = b"" if join is None else Path(join).read_bytes().rstrip() + b"\n"
    rows = dict.fromkeys(
        json.dumps(_example(a.prompt, a.completion_text, chat=task.chat), ensure_ascii=False) for a in best
    )
    settings = f"{dump_config(config)}pseudo_labels: {json.dumps(labels.model_dump(), ensure_ascii=False)}\n"
    stage.folder.mkdir(parents=True, exist_ok=True)
    write_durably(stage.folder / "pseudo_labels.yaml", settings.encode())
    write_durably(stage.product, given + "".join(row + "\n" for row in rows).encode())
    print(
        f"of {labels.episodes} answers {len(usable)} say something and ended; the best {len(best)} of these, "
        f"{len(rows)} different ones, rewards from {best[-1].reward:.3f} up: {stage.product}"
    )


def _example(prompt: Any, answer: str, *, chat: bool) -> dict[str, Any]:
    """What `sft.data` takes: a string that goes through the chat template becomes a user's message, as it did there."""
    if isinstance(prompt, str) and not chat:
        return {"prompt": prompt, "completion": answer}
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return {"messages": [*turns, {"role": "assistant", "content": answer}]}
