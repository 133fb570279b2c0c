"""Rejection sampling: a policy's best completions become examples for SFT (Touvron et al. 2023, §3.2.3).

A run samples episode after episode, as PPO does, and updates nothing. Its folder holds config.yaml and
environment.json; every completion with its reward in samples.jsonl; a line for each batch in metrics.jsonl;
how far it is in progress.json; and at its end completions.jsonl, which `sft.data` takes.
"""

import json
import shlex
import time
from pathlib import Path
from typing import Any

from surefoot.build.inputs import code_inputs
from surefoot.build.language import build_demonstrations, build_policy, build_task, probe_functions
from surefoot.config import Config, SFTConfig
from surefoot.core.seeds import derived_seed
from surefoot.data import assets
from surefoot.envs.text import TextTask
from surefoot.errors import InputError, Interrupted
from surefoot.rewards.mixed import assign_rewards
from surefoot.rollout.text import TextRollout
from surefoot.storage.files import write_durably, writing
from surefoot.storage.run_folder import RunFolder
from surefoot.train import checkpoint
from surefoot.train.signals import RolloutAborted, StopRequest
from surefoot.types import Trajectory

PROGRESS = "progress.json"


class RejectionSampling:
    """One run of the section `rejection_sampling` of `config`; `run` is an existing run folder to go on in.

    `policy` is the model's name, as in `config`. Raises InputError for anything unusable, before the model is
    loaded where that can be known.
    """

    def __init__(self, policy: str, task: TextTask, *, config: Config, run: RunFolder | None = None):
        assert config.rejection_sampling is not None and policy == config.policy.model
        self.config, self.settings, self.task = config, config.rejection_sampling, task
        check_join(config, task)
        probe_functions(task)
        sampler = build_policy(config)
        model = {"policy.model": str(sampler.fingerprint())}  # before its frozen copy goes
        sampler.drop_reference()
        self.rollout = TextRollout(sampler, task, config=config, seed=config.seed)
        self._inputs = {**self.rollout.inputs, **code_inputs(config), **model}
        self._accept_changes = False
        self._folder, self._stop = run, StopRequest()

    @property
    def run_folder(self) -> Path | None:
        """Where the run lies, once it has begun."""
        return self._folder.path if self._folder else None

    @property
    def is_finished(self) -> bool:
        """Whether the examples are written."""
        return self._folder is not None and (self._folder.path / "completions.jsonl").exists()

    def learn(self) -> None:
        """Sample all completions.

        Raises Interrupted after a signal, once it has saved; the same call then goes on. Raises
        InputError if its inputs are not those that the run began with.
        """
        folder = self._folder = self._folder or RunFolder.create(self.config)
        folder.hold()
        folder.is_at_work = True
        try:
            with self._stop.listening():
                episodes = self._restore(folder)
                while episodes < self.settings.episodes:
                    episodes = self._sample_batch(folder, episodes)
        finally:
            folder.release()

    def save(self, path: Path) -> None:
        """Write the best usable completions as examples. Raises InputError if there are none."""
        assert self._folder is not None
        settings = self.settings
        usable = [row for row in self._folder.read("samples.jsonl") if row["reward"] is not None]
        if not usable:
            what = f"of {settings.episodes} completions none is usable (not empty, ended by itself)"
            raise InputError(f"{what}; raise generation.max_new_tokens, or end them with generation.stop")
        kept = max(1, round(settings.keep * len(usable)))
        best = sorted(usable, key=lambda row: -row["reward"]["reward"])[:kept]
        examples = [
            example_of(row["prompt"], row["completion"], chat=self.task.chat, tools=row.get("tools"))
            for row in best
        ]
        lines = dict.fromkeys(json.dumps(example, ensure_ascii=False) + "\n" for example in examples)
        given = b"" if settings.join is None else _joined(settings.join).read_bytes().rstrip() + b"\n"
        with writing(path):
            write_durably(path, given + "".join(lines).encode("utf-8", "backslashreplace"))
        best_of = f"kept the best {kept} ({len(lines)} different)"
        lowest = f"rewards from {best[-1]['reward']['reward']:.3f}"
        print(f"{settings.episodes} completions, {len(usable)} usable; {best_of}, {lowest}: {path}")

    @classmethod
    def load(cls, folder: str | Path, *, accept_changes: bool = False) -> "RejectionSampling":
        """Go on from a run folder, bit for bit. Raises InputError for a folder of another kind."""
        run = RunFolder.open(folder)
        config = run.config()
        sampling = cls(config.policy.model, build_task(config), config=config, run=run)
        sampling._accept_changes = accept_changes
        return sampling

    def _restore(self, folder: RunFolder) -> int:
        """Go back to the last whole batch, logs and global generators too; the episodes until then."""
        file = folder.path / PROGRESS
        if not file.is_file():
            checkpoint.seed_generators(derived_seed(self.config.seed, "global generators", 0))
            folder.cut_logs({})
            return 0
        try:
            progress = json.loads(file.read_bytes())
            then, accept = progress["inputs"], self._accept_changes
            checkpoint.check_inputs(folder.path, then, self._inputs, accept=accept)
            folder.cut_logs(progress["log_sizes"])
            checkpoint.restore_generators(progress["generators"])
            return int(progress["episodes"])
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{file} is damaged: {error!r}; sample into another run") from None

    def _sample_batch(self, folder: RunFolder, first: int) -> int:
        """Sample the next batch and log it durably; the number of episodes after it."""
        seed, group, started = self.config.seed, self.config.group.size, time.perf_counter()
        after = min(first + self.rollout.per_update, self.settings.episodes)
        examples = [self.task.training_example(number // group, seed) for number in range(first, after)]
        seeds = [derived_seed(seed, "sampling", number) for number in range(first, after)]
        generators = checkpoint.generator_states()
        try:
            with self._stop.abandonable():
                trajectories = self.rollout.play(examples, seeds, self._stop.raise_if_set)
                sampled = time.perf_counter()
                usable = [one for one in trajectories if is_usable(one)]
                assign_rewards(self.task.reward, usable)
                usable = [one for one in usable if one.is_rewarded]
            self._stop.raise_if_set()
        except RolloutAborted:
            checkpoint.restore_generators(generators)
            assert self._stop.signal_number is not None
            how = f"surefoot resume {shlex.quote(str(folder.path))}"
            message = f"stopped after {first} episodes, saved; continue with: {how}"
            raise Interrupted(self._stop.signal_number, message) from None
        batch, count = -(-after // self.rollout.per_update), len(trajectories)
        metrics = {
            "episodes": float(after),
            "length/mean": sum(len(one.completion_tokens) for one in trajectories) / count,
            "length/end_rate": sum(one.stop_reason.ended_by_itself for one in trajectories) / count,
            "time/rollout_s": sampled - started,
            "time/score_s": time.perf_counter() - sampled,
        }
        if usable:
            metrics["reward/mean"] = sum(one.reward for one in usable) / len(usable)
        of_batch = {"update": batch, "split": "train"}
        records = [one.record() | ({} if one.is_rewarded else {"reward": None}) for one in trajectories]
        folder.append("samples.jsonl", [of_batch | record for record in records])
        folder.append("metrics.jsonl", [{"update": batch, **metrics}])
        state = {"episodes": after, "inputs": self._inputs, "log_sizes": folder.log_sizes()}
        state["generators"] = checkpoint.generator_states()
        with writing(folder.path / PROGRESS):
            write_durably(folder.path / PROGRESS, json.dumps(state).encode())
        mean = f"  reward {metrics['reward/mean']:+.3f}" if usable else ""
        length = f"length {metrics['length/mean']:.1f}"
        print(f"episode {after}/{self.settings.episodes}{mean}  {length}", flush=True)
        return after


def is_usable(trajectory: Trajectory) -> bool:
    """Whether it is not empty and ended by itself: one that was cut off would teach to end there."""
    return bool(trajectory.completion_text.strip()) and trajectory.stop_reason.ended_by_itself


def example_of(prompt: Any, completion: str, *, chat: bool, tools: Any = None) -> dict[str, Any]:
    """A row that `sft.data` takes; a string that was sent as a chat is a user's message."""
    if isinstance(prompt, str) and not chat:
        return {"prompt": prompt, "completion": completion}
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    row = {"messages": [*turns, {"role": "assistant", "content": completion}]}
    return row | ({"tools": tools} if tools else {})


def check_join(config: Config, task: TextTask | None, *, is_made: bool = True) -> None:
    """Raise InputError unless the kept completions and the rows of `join` will be of one kind.

    `task` None: its prompts are still to be made; without `is_made` so is the file of `join`.
    """
    settings = config.rejection_sampling
    assert settings is not None
    examples = [] if task is None else [example_of(one.prompt, "", chat=task.chat) for one in task.train]
    kinds = {" and ".join(example) for example in examples}
    if len(kinds) > 1:
        raise InputError("task.prompts are strings and messages; task.chat: true makes messages of both")
    if settings.join is None or not is_made:
        return
    if not (source := _joined(settings.join)).is_file():
        raise InputError(f"rejection_sampling.join: no file {settings.join}")
    kind = " and ".join(build_demonstrations(SFTConfig(data=str(source), held_out=0.0)).train[0].contents)
    if kinds and kind not in kinds:
        which = f"rejection_sampling.join has {kind}, and the completions will be {min(kinds)}"
        raise InputError(f"{which}; a file holds one kind")


def _joined(name: str) -> Path:
    return Path(assets.resolve(name, key="rejection_sampling.join"))
