"""Several runs from one file, each with what the ones before it left: `surefoot pipeline FILE`.

Every stage is an ordinary run in a folder of its own. A pipeline that was stopped goes on where it stood, and one that is
finished does nothing: what a stage left is never made twice.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surefoot import assets, build
from surefoot.config import (
    Config,
    absolute_paths,
    config_from,
    dump_config,
    make_paths_relative_to,
    read_sections,
    set_field,
)
from surefoot.config.pipeline import PipelineConfig, PseudoLabelsConfig, checked
from surefoot.errors import InputError
from surefoot.ppo import PPO, merge
from surefoot.reward_model import RewardModel
from surefoot.run import write_durably
from surefoot.sft import SFT
from surefoot.types import Trajectory

REFERENCE = "stage:"


@dataclass(frozen=True)
class Stage:
    """One run of a pipeline, or with `pseudo_labels` one writing of examples."""

    name: str
    folder: Path
    config: Config
    pseudo_labels: PseudoLabelsConfig | None = None

    @property
    def product(self) -> Path:
        """What later stages call `stage:NAME`: a model's folder, or a JSONL file."""
        return self.folder / ("model" if self.pseudo_labels is None else "pseudo_labels.jsonl")


def load_pipeline(path: Path | str, overrides: Mapping[str, str] | None = None) -> list[Stage]:
    """Read and check a whole pipeline. `overrides` are dotted keys of the file, `stages.ppo.ppo.kl_coef`.

    Raises InputError with one line for a stage that no run could be made of, data that is not there or cannot be learned
    from, and a `stage:` that is not an earlier one.
    """
    path = Path(path)
    data = read_sections(path)
    for key, text in (overrides or {}).items():
        set_field(data, key, text)
    pipeline = checked(PipelineConfig, data, str(path))
    stages: dict[str, Stage] = {}
    for name, sections in pipeline.stages.items():
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or len(name) > 100:
            raise InputError(f"{path}: {name[:60]!r} is no name for a stage; take small letters, digits and _")
        stages[name] = _stage(name, sections, pipeline, path, stages)
    for stage in stages.values():
        _check_data(stage, f"{path}, stage {stage.name}", [earlier.product for earlier in stages.values()])
    return list(stages.values())


def run_pipeline(stages: list[Stage], *, verbose: int = 1) -> None:
    """Bring every stage to its end, in order. Raises what a run raises; then the same call goes on from there."""
    for stage in stages:
        _check_unchanged(stage)
    for number, stage in enumerate(stages, start=1):
        is_finished = stage.product.exists()
        print(f"stage {number} of {len(stages)}: {stage.name}{', finished before' if is_finished else ''}", flush=True)
        if is_finished:
            continue
        if stage.pseudo_labels is not None:
            _write_pseudo_labels(stage, stage.pseudo_labels)
        else:
            _train(stage, verbose)


def _stage(name: str, sections: dict[str, Any], pipeline: PipelineConfig, path: Path, earlier: Mapping[str, Stage]) -> Stage:
    where = f"{path}, stage {name}"
    data: dict[str, Any] = {}
    merge(data, _copy(pipeline.common, {}, where))
    merge(data, _copy(sections, earlier, where))
    labels = data.pop("pseudo_labels", None)
    top = {"folder": pipeline.folder}
    make_paths_relative_to(path.parent, {"run": top})
    folder = Path(top["folder"]) / name
    if isinstance(data.get("run"), dict) and data["run"].keys() & {"name", "folder"}:
        raise InputError(f"{where}: run.name and run.folder follow from the pipeline's folder; leave them out")
    merge(data, {"run": {"folder": top["folder"], "name": name}})
    kinds = [kind for kind in ("task", "env", "sft", "reward_model") if data.get(kind) is not None]
    if not kinds:
        raise InputError(f"{where}: nothing to learn; it needs a task, env, sft or reward_model section")
    pseudo_labels = None
    if labels is not None:
        if kinds != ["task"]:
            raise InputError(f"{where}: pseudo_labels answers the prompts of a task; give it a task section alone")
        make_paths_relative_to(path.parent, {"pseudo_labels": labels})
        pseudo_labels = checked(PseudoLabelsConfig, labels, f"{where}, pseudo_labels")
    return Stage(name, folder, config_from(data, path, where=where), pseudo_labels)


def _copy(value: Any, earlier: Mapping[str, Stage], where: str) -> Any:
    """Nested data anew, `stage:NAME` replaced by the path of what that stage leaves."""
    if isinstance(value, dict):
        return {key: _copy(inner, earlier, where) for key, inner in value.items()}
    if isinstance(value, list):
        return [_copy(inner, earlier, where) for inner in value]
    if not (isinstance(value, str) and value.startswith(REFERENCE)):
        return value
    name = value.removeprefix(REFERENCE)
    if name not in earlier:
        known = f"before it are {', '.join(earlier)}" if earlier else "no stage stands before it"
        raise InputError(f"{where}: {value} is no earlier stage; {known}")
    return str(earlier[name].product.absolute())


def _check_data(stage: Stage, where: str, products: list[Path]) -> None:
    """Raise InputError for data that is missing or no use, now and not after the stages before."""
    config, made = stage.config, {str(product.absolute()) for product in products}
    join = stage.pseudo_labels.join if stage.pseudo_labels is not None else None
    prompts = config.task.prompts if config.task is not None else None
    for key, name in (("task.prompts", prompts), ("pseudo_labels.join", join)):
        if name is not None and name not in made and name not in assets.ASSETS and not Path(name).is_file():
            raise InputError(f"{where}: {key}: no file {name}")
    try:
        for section in (config.sft, config.ppo.ptx):
            if section is not None and section.data not in made:
                build.build_demonstrations(section)
        if config.reward_model is not None and config.reward_model.data not in made:
            build.build_judgements(config)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _check_unchanged(stage: Stage) -> None:
    """Raise InputError if the stage was begun with other settings: it would not be what the file says."""
    begun = stage.folder / ("config.yaml" if stage.pseudo_labels is None else "pseudo_labels.yaml")
    if begun.is_file() and begun.read_text(encoding="utf-8") != _settings(stage):
        raise InputError(f"{begun} has other settings than stage {stage.name} has now; name another folder, or remove this one")


def _settings(stage: Stage) -> str:
    text = dump_config(absolute_paths(stage.config))
    labels = stage.pseudo_labels
    return text if labels is None else f"{text}# pseudo_labels: {json.dumps(labels.model_dump())}\n"


def _train(stage: Stage, verbose: int) -> None:
    config, is_begun = stage.config, (stage.folder / "config.yaml").is_file()
    model: PPO | SFT | RewardModel
    if config.supervised is not None:
        kind = SFT if config.sft is not None else RewardModel
        model = (
            kind.load(stage.folder, verbose=verbose) if is_begun else kind(config.policy.model, config=config, verbose=verbose)
        )
    elif is_begun:
        model = PPO.load(stage.folder, verbose=verbose)
    else:
        task = build.build_task(config) if config.env is None else None
        model = PPO(config.policy.model, task, config=config, verbose=verbose)
    model.learn()
    model.save(stage.product)


def _write_pseudo_labels(stage: Stage, labels: PseudoLabelsConfig) -> None:
    """The policy's best answers as examples, of those that are not empty and ended by themselves: where one was cut off is
    no place to learn to end at. Raises InputError if there is none.
    """
    config = stage.config
    task = build.build_task(config)
    policy = build.build_policy(config)
    policy.drop_reference()
    rollout = build.build_rollout(config, policy, task)
    batch = rollout.collect(first=0, count=labels.episodes)
    answers = [t for t in batch.trajectories if isinstance(t, Trajectory) and t.text.strip()]
    answers = [answer for answer in answers if answer.completion.stop_reason.ended_by_itself]
    if not answers:
        raise InputError(
            f"stage {stage.name}: of {labels.episodes} answers none says something and ended by itself; raise "
            "generation.max_new_tokens, or end them with generation.stop"
        )
    best = sorted(answers, key=lambda answer: -answer.score)[: max(1, int(labels.keep * labels.episodes))]
    given = b"" if labels.join is None else Path(labels.join).read_bytes().rstrip() + b"\n"
    rows = dict.fromkeys(json.dumps(_example(answer), ensure_ascii=False) for answer in best)  # the same one once
    stage.folder.mkdir(parents=True, exist_ok=True)
    write_durably(stage.folder / "pseudo_labels.yaml", _settings(stage).encode())
    write_durably(stage.product, given + "".join(row + "\n" for row in rows).encode())
    print(f"{len(rows)} of {labels.episodes} answers kept, rewards from {best[-1].score:.3f} up: {stage.product}")


def _example(answer: Trajectory) -> dict[str, Any]:
    """What `sft.data` takes."""
    if isinstance(answer.prompt, str):
        return {"prompt": answer.prompt, "completion": answer.text}
    return {"messages": [*answer.prompt, {"role": "assistant", "content": answer.text}]}
