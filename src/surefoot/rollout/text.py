"""Policy × text task -> batch: prompts become tokens once; what an engine writes is never re-tokenized."""

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any, Protocol

import torch

from surefoot.config import Config, GenerationConfig
from surefoot.core.running import RunningStats
from surefoot.core.seeds import derived_seed
from surefoot.data.render import check_length, encode_prompt
from surefoot.envs.text import Example, TextTask
from surefoot.errors import InputError
from surefoot.generation.engine import Engine, TokenEngine, TokenModel, generate
from surefoot.policies.base import Policy
from surefoot.rewards.functions import RewardLog, compute_rewards
from surefoot.rewards.mixed import PART, assign_rewards
from surefoot.rewards.shaping import shape_rewards
from surefoot.rollout.base import Evaluated, Rollout, digest
from surefoot.rollout.batch import text_batch
from surefoot.rollout.logprobs import fill_logprobs, sequence_kl
from surefoot.types import Batch, Completion, Poll, Request, SamplingParams, StopReason, Trajectory, Turn


class LanguagePolicy(Policy, TokenModel, Protocol):
    """A policy that writes text: what `policies/lm/policy.py` provides."""

    tokenizer: Any

    @property
    def compute_values(self) -> Callable[[Batch], torch.Tensor] | None:
        """What gives values [B, T] after the rollout, where `step` has none to give."""

    @property
    def context_length(self) -> int:
        """Most tokens of prompt and completion together."""


class TextRollout(Rollout):
    """Collects training batches and evaluations of one policy, for which `engine` writes, on one task.

    All its randomness follows from `seed` and the episode's number: only the rewards' statistics are state.
    """

    unit = "episodes"
    throughput = "throughput/tokens_per_s"

    def __init__(
        self,
        policy: LanguagePolicy,
        task: TextTask,
        *,
        config: Config,
        seed: int,
        engine: Engine | None = None,
    ):
        generation = config.generation
        if generation.top_k is not None or generation.top_p is not None:
            why = "log-probs are over the full vocabulary"
            raise InputError(f"generation.top_k and top_p contradict training: {why}")
        self.policy, self.task, self.seed = policy, task, seed
        self.engine = engine or text_engine(policy, generation)
        self.config, self.generation, self.ppo = config, generation, config.ppo
        self.per_update, self.can_evaluate = config.rollout.episodes_per_update, bool(task.held_out)
        self.reward_stats = RunningStats()
        self.params = SamplingParams(generation.max_new_tokens, generation.temperature)
        rows = ((one.text, one.columns, self.encode(one)) for one in (*task.train, *task.held_out))
        self.inputs = {"task.prompts": digest(rows)}

    def collect(self, *, first: int, count: int, version: int = 0, poll: Poll = None) -> Batch:
        """Play `count` episodes, the first of them number `first` of the run; a batch with shaped rewards."""
        numbers, group = range(first, first + count), self.config.group.size
        if first % group or count % group:
            episodes = f"episodes {first} to {first + count}"
            raise InputError(f"{episodes} are no whole groups of group.size ({group})")
        examples = [self.task.training_example(number // group, self.seed) for number in numbers]
        seeds = [derived_seed(self.seed, "sampling", number) for number in numbers]
        started = time.perf_counter()
        self.engine.sync(self.policy, version)
        trajectories = self.play(examples, seeds, poll)
        greedy: list[Trajectory] = []  # one a prompt: what ReMax compares with, and not trained on
        if self.ppo.advantage == "remax":
            params = replace(self.params, temperature=0.0)
            greedy = self.play(examples[::group], seeds[::group], poll, params)
        played = time.perf_counter()
        log = RewardLog(version)
        assign_rewards(self.task.reward, trajectories + greedy, log)
        self.reward_stats = shape_rewards(trajectories + greedy, self.config.shaping, self.reward_stats)
        for trajectory in trajectories:
            trajectory.turns[-1].reward = trajectory.reward_parts.get("shaped", 0.0)
        device = self.policy.device
        batch = text_batch(trajectories, device=device)
        batch.step_limit = self.params.max_new_tokens
        batch.groups_B = torch.tensor([number // group for number in numbers], device=device)
        is_rewarded_B = torch.tensor([t.is_rewarded for t in trajectories], device=device)
        if greedy:
            baselines = torch.tensor([t.reward_parts.get("shaped", torch.nan) for t in greedy], device=device)
            batch.baselines_B = baselines.repeat_interleave(group)
            is_rewarded_B &= ~batch.baselines_B.isnan()
        self._fill_logprobs(batch, values=self.policy.compute_values if self.ppo.has_critic else None)
        batch.metrics = episode_metrics(batch) | log.means("reward/log/<name>")
        batch.mask_BT = batch.mask_BT & is_rewarded_B[:, None]  # the others teach nothing
        batch.metrics |= {"time/rollout_s": played - started, "time/score_s": time.perf_counter() - played}
        return batch

    def evaluate(self, episodes: int, *, version: int = 0, poll: Poll = None) -> Evaluated:
        """A completion of each of the first `episodes` held-out prompts, with the same seeds every time.

        Written with the weights that the policy has now, number `version`. Returns metrics named as in
        `docs/metrics.md`, and the trajectories.
        """
        self.engine.sync(self.policy, version)
        examples = self.task.held_out[:episodes]
        seeds = [derived_seed(self.seed, "evaluation", number) for number in range(len(examples))]
        trajectories = self.play(examples, seeds, poll)
        log = RewardLog(version)
        assign_rewards(self.task.reward, trajectories, log)
        batch = text_batch(trajectories, device=self.policy.device)
        self._fill_logprobs(batch)
        rewards = measured = [t.reward for t in trajectories]
        if self.task.metric is not None:
            measured = compute_rewards(self.task.metric, trajectories, name="metric", log=log)
        n = len(trajectories)
        metrics = {
            "eval/reward": _mean(rewards, "reward"),
            "eval/metric": _mean(measured, "metric"),
            "eval/kl": sum(t.kl for t in trajectories) / n,
            "eval/distinct_2": distinct_2([t.completion_tokens for t in trajectories]),
            "eval/length": sum(len(t.completion_tokens) for t in trajectories) / n,
            "eval/end_rate": sum(t.stop_reason.ended_by_itself for t in trajectories) / n,
        }
        metrics |= _part_means(trajectories, "eval/part/<label>") | log.means("eval/log/<name>")
        return metrics, trajectories

    def play(
        self,
        examples: Sequence[Example],
        seeds: Sequence[int],
        poll: Poll,
        params: SamplingParams | None = None,
    ) -> list[Trajectory]:
        """Write one completion per example, still without rewards. `params` replaces the run's."""
        requests = [
            Request(self.encode(example), seed, params or self.params, tuple(self.generation.stop))
            for example, seed in zip(examples, seeds, strict=True)
        ]
        completions = generate(self.engine, requests, poll=poll)
        trajectories = []
        for example, request, completion in zip(examples, requests, completions, strict=True):
            names = ("tokens", "logprobs", "values", "entropies", "version")
            columns = {name: getattr(completion, name) for name in names}
            text = completion_text(self.policy, request, completion)
            written = Turn(text=text, by_policy=True, **columns)
            shown = example.prompt  # to the reward function: as given, or what `prompt_tokens` left of it
            if isinstance(shown, str) and len(request.prompt) == self.task.prompt_tokens:
                shown = self.policy.decode(request.prompt)
            turns = [Turn(request.prompt), written]
            trajectories.append(Trajectory(shown, turns, completion.stop_reason, example.columns))
        return trajectories

    def encode(self, example: Example) -> tuple[int, ...]:
        """The prompt as tokens. Raises InputError for one that is empty or longer than the context."""
        tools = example.columns.get("tools")
        tokens = encode_prompt(self.policy.tokenizer, example.prompt, chat=self.task.chat, tools=tools)
        tokens = tokens[: self.task.prompt_tokens]
        limits = {"context": self.policy.context_length, "new_tokens": self.generation.max_new_tokens}
        check_length(tokens, example.text, **limits)
        return tokens

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold to go on from here."""
        return {"reward_stats": asdict(self.reward_stats)}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's `state`."""
        self.reward_stats = RunningStats(**state["reward_stats"])

    def _fill_logprobs(self, batch: Batch, *, values: Callable[[Batch], torch.Tensor] | None = None) -> None:
        batch.temperature = self.params.temperature
        budget, is_exact = self.ppo.micro_batch_tokens, self.engine.exact_logprobs
        fill_logprobs(self.policy, batch, token_budget=budget, exact_logprobs=is_exact, values=values)
        for trajectory, kl in zip(batch.trajectories, sequence_kl(batch).tolist(), strict=True):
            assert isinstance(trajectory, Trajectory)
            trajectory.kl = kl


@torch.no_grad()
def episode_metrics(batch: Batch) -> dict[str, float]:
    """What the episodes of a text batch were like: their rewards and lengths."""
    mask_BT = batch.mask_BT
    acted_B = mask_BT.any(1)  # rows in which the policy did nothing are not counted
    totals_B = torch.where(mask_BT, batch.rewards_BT, 0.0).sum(1)
    trajectories = [t for t in batch.trajectories if isinstance(t, Trajectory)]
    ended = [t.stop_reason.ended_by_itself for t in trajectories]
    metrics = {}
    rewards = torch.tensor([t.reward for t in trajectories if t.is_rewarded])
    counts_B = acted_B & torch.tensor([t.is_rewarded for t in trajectories], device=acted_B.device)
    if len(rewards):
        metrics["reward/mean"] = float(rewards.mean())
        metrics["reward/std"] = float(rewards.std(unbiased=False))
        metrics["reward/shaped"] = float(totals_B[counts_B].sum() / counts_B.sum().clamp(min=1))
    if len(rewards) < len(trajectories):
        metrics["reward/left_out"] = 1 - len(rewards) / len(trajectories)
    metrics["length/mean"] = float(mask_BT.sum() / acted_B.sum().clamp(min=1))
    metrics["length/end_rate"] = sum(ended) / len(ended)
    return metrics | _part_means(trajectories, "reward/part/<label>")


def _part_means(trajectories: Sequence[Trajectory], name: str) -> dict[str, float]:
    """Mean of each part of a mixed reward where it applies, by the metric's `name` with its label put in."""
    given: dict[str, list[float]] = {}
    for trajectory in trajectories:
        for key, value in trajectory.reward_parts.items():
            if key.startswith(PART):
                given.setdefault(name.replace("<label>", key.removeprefix(PART)), []).append(value)
    return {key: sum(values) / len(values) for key, values in given.items()}


def _mean(values: Sequence[float], name: str) -> float:
    """Mean of the numbers that there are. Raises InputError for none."""
    if not (given := [value for value in values if not math.isnan(value)]):
        what = f"the {name} function returned None for all {len(values)} held-out prompts evaluated"
        raise InputError(f"{what}; give the task prompts that it applies to, or raise evaluate.episodes")
    return sum(given) / len(given)


def text_engine(policy: LanguagePolicy, generation: GenerationConfig) -> TokenEngine:
    """Our own engine over `policy`, as `generation` has it. Raises InputError for an end that is no token."""
    given = generation.stop_token_ids
    if given and (unknown := {*given} - {*policy.tokenizer.get_vocab().values()}):
        raise InputError(f"generation.stop_token_ids: the model's tokenizer has no token {min(unknown)}")
    ends = policy.model_end_tokens | frozenset(given)
    return TokenEngine(policy, slots=generation.slots, end_tokens=ends)


def completion_text(policy: LanguagePolicy, request: Request, completion: Completion) -> str:
    """The text that the completion adds to the request's prompt, without the end token."""
    has_end = completion.stop_reason is StopReason.END_TOKEN
    return policy.decode(completion.tokens[:-1] if has_end else completion.tokens, request.prompt)


def distinct_2(sequences: Sequence[Sequence[int]]) -> float:
    """Distinct token bigrams over all of them, in all sequences (Li et al. 2016, arXiv:1510.03055)."""
    bigrams = [pair for sequence in sequences for pair in itertools.pairwise(sequence)]
    return len(set(bigrams)) / len(bigrams) if bigrams else 0.0
