"""Several runs from one file, each with what the ones before it left: `surefoot pipeline FILE`.

Every stage is an ordinary run in its own folder. A pipeline that was stopped goes on where it stood, and one
that is finished does nothing: what a stage left is never made twice.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surefoot.api import runs
from surefoot.api.rejection import check_join
from surefoot.api.session import merge
from surefoot.build.language import check_sources
from surefoot.build.preflight import check_models
from surefoot.config import Config, make_config, make_paths_relative_to, read_sections, set_field
from surefoot.config.messages import validated
from surefoot.config.pipeline import PipelineConfig, Product, with_products
from surefoot.errors import InputError
from surefoot.storage.run_folder import RunFolder


@dataclass(frozen=True)
class Stage:
    """One run of a pipeline. All its paths are absolute."""

    name: str
    config: Config

    @property
    def folder(self) -> Path:
        """Its run folder."""
        return Path(self.config.run.folder) / self.name

    @property
    def product(self) -> Path:
        """What later stages call `stage:NAME`: a model's folder, or a JSONL file."""
        return runs.product(self.config, self.folder)

    @property
    def kind(self) -> Product:
        """What the product is."""
        of_policy: Product = "an environment's policy" if self.config.env else "a language model"
        kinds: dict[str, Product] = {"RejectionSampling": "examples", "RewardModel": "a reward model"}
        return kinds.get(self.config.opener, of_policy)


def load_pipeline(path: Path | str, overrides: Mapping[str, str] | None = None) -> list[Stage]:
    """Read and check a whole pipeline. `overrides` are dotted keys of the file, `stages.ppo.kl.coef`.

    Relative paths in the file are relative to the file; those in overrides to the working directory. Raises
    InputError with one line for a stage that no run could be made of, models, functions or data that are not
    there or of no use, and a `stage:` that is not an earlier one, or leaves another kind of thing.
    """
    data, here = read_sections(path), Path(path).parent.absolute()
    given = data.get("stages")
    for sections in (data.get("common"), *(given.values() if isinstance(given, dict) else ())):
        if isinstance(sections, dict):
            make_paths_relative_to(here, sections)
    make_paths_relative_to(here, {"run": data})  # the pipeline's folder
    for key, text in (overrides or {}).items():
        set_field(data, key, text)
    pipeline = validated(PipelineConfig, data, where=str(path))
    stages: dict[str, Stage] = {}
    for name in pipeline.stages:
        if not re.fullmatch(r"[a-z][a-z0-9_]{,63}", name):
            how = "take lower-case letters, digits and _"
            raise InputError(f"{path}: {name[:60]!r} is not a valid name of a stage; {how}")
        stages[name] = _stage(name, pipeline, f"{path}, stage {name}", stages)
    made = {str(stage.product) for stage in stages.values()}
    for name, stage in stages.items():
        try:
            check_models(stage.config, made=made)
            task = check_sources(stage.config, made=made)
            if (rejection := stage.config.rejection_sampling) is not None:
                check_join(stage.config, task, is_made=rejection.join not in made)
        except InputError as error:
            raise InputError(f"{path}, stage {name}: {error}") from None
    return list(stages.values())


def run_pipeline(stages: list[Stage]) -> None:
    """Bring every stage to its end, in order. Raises what a run raises; the same call then goes on."""
    for stage in stages:
        _check_begun(stage, stages)
    for number, stage in enumerate(stages, start=1):
        note = ", finished before" if (is_finished := runs.is_made(stage.config, stage.folder)) else ""
        print(f"stage {number} of {len(stages)}: {stage.name}{note}", flush=True)
        if not is_finished:
            is_begun = (stage.folder / "config.yaml").is_file()
            runs.finish(runs.resume(stage.folder) if is_begun else runs.start(stage.config))


def _stage(name: str, pipeline: PipelineConfig, where: str, earlier: Mapping[str, Stage]) -> Stage:
    left = {before: (stage.kind, str(stage.product)) for before, stage in earlier.items()}
    data: dict[str, Any] = {}
    merge(data, with_products(pipeline.common, {}, where))
    merge(data, with_products(pipeline.stages[name], left, where))
    if data.get("rejection_sampling", {}) is None:  # its lines are all comments
        data["rejection_sampling"] = {}
    data = {key: value for key, value in data.items() if value is not None}
    run = data.setdefault("run", {})
    if isinstance(run, dict):  # what is none is refused below
        if run.keys() & {"name", "folder"}:
            raise InputError(f"{where}: run.name and run.folder follow from the pipeline; leave them out")
        run |= {"folder": pipeline.folder, "name": name}
    if "new_model" in data:
        how = "make the model before, and name its folder"
        raise InputError(f"{where}: new_model is read by surefoot new-model; {how}")
    make_paths_relative_to(Path.cwd(), data)  # those that came as flags
    config = make_config(data, where=where)
    runs.check(config, where=where)
    return Stage(name, config)


def _check_begun(stage: Stage, stages: list[Stage]) -> None:
    """Raise InputError for a stage that was begun with other settings, or from what is no longer there."""
    now = _leaves(stage.config.model_dump())
    used = [other for other in stages if str(other.product) in now.values()]
    gone = [other.name for other in used if not other.product.exists()]
    if gone and stage.folder.exists():
        how = f"remove {stage.folder} too"
        raise InputError(f"stage {stage.name} was made from what stage {gone[0]} no longer is; {how}")
    if not (stage.folder / "config.yaml").is_file():
        RunFolder.check_free(stage.config)
        return
    then = _leaves(RunFolder.open(stage.folder).config().model_dump())
    for key in (*now, *then):
        if now.get(key) != then.get(key):
            change = f"{key} {then.get(key)!r:.60}, and now has {now.get(key)!r:.60}"
            how = f"name another folder, or remove {stage.folder}"
            raise InputError(f"stage {stage.name} was begun with {change}; {how}")


def _leaves(value: Any, key: str = "") -> dict[str, Any]:
    """Nested data by dotted keys."""
    if not isinstance(value, (dict, list)):
        return {key: value}
    leaves: dict[str, Any] = {}
    for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
        leaves |= _leaves(inner, f"{key}.{name}".lstrip("."))
    return leaves
