"""Rejection sampling: the best of a policy's completions become examples to fine-tune on (Touvron et al.
2023, §3.2.3).

A run samples episode after episode, as PPO does, and updates nothing. Its folder holds config.yaml and
environment.json; every completion with its reward in samples.jsonl; a line for each batch in metrics.jsonl;
how far it is in progress.json; and at its end completions.jsonl, which `sft.data` takes.
"""

from __future__ import annotations

import json
import shlex
import time
from pathlib import Path
from typing import Any

from surefoot.build.language import build_demonstrations, build_policy, build_task, probe_functions
from surefoot.build.preflight import preflight
from surefoot.build.training import build_rollout
from surefoot.config import Config, SFTConfig
from surefoot.core.seeds import derived_seed
from surefoot.data import assets
from surefoot.envs.text import TextTask
from surefoot.errors import InputError, Interrupted
from surefoot.rewards.mixed import assign_rewards
from surefoot.rollout.text import TextRollout
from surefoot.storage.files import write_durably
from surefoot.storage.run_folder import RunFolder
from surefoot.train import checkpoint
from surefoot.train.signals import RolloutAborted, StopRequest
from surefoot.types import Trajectory

PRODUCT = "completions.jsonl"
PROGRESS = "progress.json"


class RejectionSampling:
    """One run of the section `rejection_sampling` of `config`; `run` is an existing run folder to go on in.

    Raises InputError for anything unusable, before the model is loaded where that can be known.
    """

    def __init__(self, config: Config, *, run: RunFolder | None = None, verbose: int = 1):
        if config.rejection_sampling is None:
            raise InputError("rejection_sampling: the configuration has no such section; add it")
        if run is None:
            preflight(config)
        self.config, self.settings, self.verbose = config, config.rejection_sampling, verbose
        self.task = build_task(config)
        check_join(config, self.task)
        probe_functions(self.task)
        policy = build_policy(config)
        policy.drop_reference()
        rollout = build_rollout(config, policy, self.task)
        assert isinstance(rollout, TextRollout)
        self.policy, self.rollout = policy, rollout
        self._folder = run
        self._stop = StopRequest()

    @property
    def run_folder(self) -> Path | None:
        """Where the run lies, once it has begun."""
        return self._folder.path if self._folder else None

    @property
    def is_finished(self) -> bool:
        """Whether the examples are written."""
        return self._folder is not None and (self._folder.path / PRODUCT).exists()

    def sample(self) -> Path:
        """Sample all completions and write the best; the file.

        Raises Interrupted after SIGTERM or Ctrl-C, once it has saved; the same call then goes on. Raises
        InputError if no completion is of use.
        """
        folder = self._folder = self._folder or RunFolder.create(self.config)
        folder.hold()
        try:
            with self._stop.listening():
                episodes = self._restore(folder)
                while episodes < self.settings.episodes:
                    episodes = self._sample_batch(folder, episodes)
            if not self.is_finished:
                self._write_best(folder)
        finally:
            folder.release()
        return folder.path / PRODUCT

    @classmethod
    def load(cls, folder: str | Path, *, verbose: int = 1) -> RejectionSampling:
        """Go on from a run folder, bit for bit. Raises InputError for a folder of another kind."""
        run = RunFolder.open(folder)
        config = run.config()
        if config.rejection_sampling is None:
            raise InputError(f"{folder} is a run of {config.opener}; go on with: surefoot resume {folder}")
        return cls(config, run=run, verbose=verbose)

    def _restore(self, folder: RunFolder) -> int:
        """Put logs and global generators where the last whole batch left them; the number of episodes until
        then.
        """
        file = folder.path / PROGRESS
        if not file.exists():
            checkpoint.seed_generators(derived_seed(self.config.seed, "global generators", 0))
            folder.cut_logs({})
            return 0
        progress = json.loads(file.read_bytes())
        folder.cut_logs(progress["log_sizes"])
        checkpoint.restore_generators(progress["generators"])
        return int(progress["episodes"])

    def _sample_batch(self, folder: RunFolder, first: int) -> int:
        """Sample the next batch and log it durably; the number of episodes after it."""
        seed, group, started = self.config.seed, self.config.group.size, time.perf_counter()
        after = min(first + self.rollout.per_update, self.settings.episodes)
        examples = [self.task.training_example(number // group, seed) for number in range(first, after)]
        seeds = [derived_seed(seed, "sampling", number) for number in range(first, after)]
        generators = checkpoint.generator_states()
        try:
            trajectories = self.rollout.play(examples, seeds, self._stop.raise_if_set)
            sampled = time.perf_counter()
            usable = [one for one in trajectories if is_usable(one)]
            assign_rewards(self.task.reward, usable)
            self._stop.raise_if_set()
        except RolloutAborted:
            checkpoint.restore_generators(generators)
            assert self._stop.signal_number is not None
            how = f"surefoot resume {shlex.quote(str(folder.path))}"
            message = f"stopped after {first} episodes, saved; continue with: {how}"
            raise Interrupted(self._stop.signal_number, message) from None
        batch = -(-after // self.rollout.per_update)
        rows = [{"update": batch, "split": "train", **one.record()} for one in trajectories]
        for row, one in zip(rows, trajectories, strict=True):
            row["reward"] = row["reward"] if is_usable(one) else None
        metrics = {
            "episodes": float(after),
            "length/mean": sum(len(one.completion_tokens) for one in trajectories) / len(trajectories),
            "length/end_rate": sum(one.stop_reason.ended_by_itself for one in trajectories)
            / len(trajectories),
            "time/rollout_s": sampled - started,
            "time/score_s": time.perf_counter() - sampled,
        }
        if usable:
            metrics["reward/mean"] = sum(one.reward for one in usable) / len(usable)
        folder.append("samples.jsonl", rows)
        folder.append("metrics.jsonl", [{"update": batch, **metrics}])
        self._save(folder, after)
        if self.verbose:
            mean = f"reward {metrics['reward/mean']:+.3f}  " if usable else ""
            print(
                f"episode {after}/{self.settings.episodes}  {mean}length {metrics['length/mean']:.1f}",
                flush=True,
            )
        return after

    def _save(self, folder: RunFolder, episodes: int) -> None:
        state = {
            "episodes": episodes,
            "log_sizes": folder.log_sizes(),
            "generators": checkpoint.generator_states(),
        }
        try:
            write_durably(folder.path / PROGRESS, json.dumps(state).encode())
        except OSError as error:
            raise InputError(f"{folder.path / PROGRESS} could not be written: {error.strerror}") from error

    def _write_best(self, folder: RunFolder) -> None:
        """The best completions as examples, of those that are not empty and ended by themselves: one that was
        cut off would teach to end there.
        """
        usable = [row for row in folder.read("samples.jsonl") if row["reward"] is not None]
        if not usable:
            raise InputError(
                f"of {self.settings.episodes} completions none is usable (not empty, ended by itself); raise "
                "generation.max_new_tokens, or end them with generation.stop"
            )
        best = sorted(usable, key=lambda row: -row["reward"]["reward"])
        best = best[: max(1, round(self.settings.keep * len(usable)))]
        rows = dict.fromkeys(
            json.dumps(example_of(row["prompt"], row["completion"], chat=self.task.chat), ensure_ascii=False)
            for row in best
        )
        given = b""
        if self.settings.join is not None:
            source = assets.resolve(self.settings.join, key="rejection_sampling.join")
            given = Path(source).read_bytes().rstrip() + b"\n"
        text = "".join(row + "\n" for row in rows)
        try:
            write_durably(folder.path / PRODUCT, given + text.encode("utf-8", "backslashreplace"))
        except OSError as error:
            raise InputError(f"{folder.path / PRODUCT} could not be written: {error.strerror}") from error
        print(
            f"{self.settings.episodes} completions, {len(usable)} usable; kept the best {len(best)} "
            f"({len(rows)} different), rewards from {best[-1]['reward']['reward']:.3f}: "
            f"{folder.path / PRODUCT}"
        )


def is_usable(trajectory: Trajectory) -> bool:
    """Whether a completion can be an example: it is not empty and ended by itself."""
    return bool(trajectory.completion_text.strip()) and trajectory.stop_reason.ended_by_itself


def example_of(prompt: Any, completion: str, *, chat: bool) -> dict[str, Any]:
    """What `sft.data` takes: a string that goes through the chat template becomes a user's message, as it did
    there.
    """
    if isinstance(prompt, str) and not chat:
        return {"prompt": prompt, "completion": completion}
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return {"messages": [*turns, {"role": "assistant", "content": completion}]}


def check_join(config: Config, task: TextTask | None, *, is_made: bool = True) -> None:
    """Raise InputError unless the kept completions and the rows of `join` will be of one kind.

    `task` None: its prompts are still to be made; without `is_made` so is the file of `join`.
    """
    settings = config.rejection_sampling
    assert settings is not None
    examples = [] if task is None else task.train
    chat = task is not None and task.chat
    kinds = {" and ".join(example_of(example.prompt, "", chat=chat)) for example in examples}
    if len(kinds) > 1:
        raise InputError(
            "task.prompts are strings and messages; task.chat: true makes examples of one kind from both"
        )
    if settings.join is None or not is_made:
        return
    if not Path(source := assets.resolve(settings.join, key="rejection_sampling.join")).is_file():
        raise InputError(f"rejection_sampling.join: no file {settings.join}")
    kind = " and ".join(build_demonstrations(SFTConfig(data=source, held_out=0.0)).train[0].contents)
    if kinds and kind not in kinds:
        raise InputError(
            f"rejection_sampling.join has {kind}, and the completions will be {min(kinds)}; "
            "a file holds one kind"
        )
