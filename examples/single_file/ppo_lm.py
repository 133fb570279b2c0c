"""PPO for a language model, on one page: plain loops, one completion at a time. Read it from top to bottom.

The language model is a policy. Its state is the text so far, its action the next token, and when its completion ends a
reward function says how good it was. One update of PPO (Schulman et al. 2017, arXiv:1707.06347) is six steps,
each of them a function below, and `train` at the end repeats them:

    1. generate    the policy completes each prompt, token by token, and records each token's log-prob;
    2. reward      plain Python says how good each completion is;
    3. spread      the reward goes on the last token; every token pays for leaving the reference model behind;
    4. advantages  how much better than expected was each token? A critic, trained along, predicts what was expected;
    5. update      gradient steps make good tokens more probable, but none by more than a trusted range;
    6. adapt       on request, the price of leaving the reference follows a target.

Left out is what should change no number (key/value cache, batches with padding and masks, micro-batches), and adapters,
low precision and checkpoints. In float32 on a CPU, the `surefoot` package gives the same losses and the same weights
as this page, to rounding; `tests/oracle` holds both to it.

    python ppo_lm.py                            # a tiny random model learns to write vowels, in some ten seconds
    python ppo_lm.py --model path/or/hub-id     # the same with a real model: two updates in a minute
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import torch
import transformers


def setting(default: Any, meaning: str) -> Any:
    return field(default=default, metadata={"help": meaning})


@dataclass(frozen=True)
class Settings:
    """Every number of the algorithm, named as in the package."""

    seed: int = setting(0, "all randomness follows from it")
    total_episodes: int = setting(768, "completions in the whole run, rounded up to whole updates; with --model 32")
    episodes_per_update: int = setting(16, "completions sampled for one update")
    batch_size: int = setting(8, "completions in a minibatch, which is one optimizer step")
    n_epochs: int = setting(2, "passes over the completions of an update")
    max_new_tokens: int = setting(8, "longest completion")
    temperature: float = setting(1.0, "divides the logits of policy and reference, in sampling and in training")
    learning_rate: float = setting(3e-3, "Adam's step size; with --model 1e-5")
    lr_schedule: str = setting("constant", "constant, or linear: falling to 0 over the run")
    adam_epsilon: float = setting(1e-5, "Adam's epsilon")
    max_grad_norm: float = setting(1.0, "the gradient is shortened to this length")
    clip_range: float = setting(0.2, "how far a token's probability ratio is trusted")
    clip_range_vf: float | None = setting(None, "the same for the critic's values; none by default")
    gamma: float = setting(1.0, "discount per token")
    gae_lambda: float = setting(0.95, "how far advantages look ahead: 0 trusts the critic, 1 the outcome")
    normalize_advantage: bool = setting(True, "give each minibatch's advantages mean 0 and variance 1")
    vf_coef: float = setting(0.1, "weight of the critic's loss")
    ent_coef: float = setting(0.0, "weight of the entropy bonus")
    kl_coef: float = setting(0.05, "beta: the price of each nat of log-prob above the reference")
    kl_target: float | None = setting(None, "adapt beta so that a completion's KL stays near this many nats")
    kl_horizon: float = setting(10_000.0, "episodes in which beta moves by a fifth at most")
    target_kl: float | None = setting(None, "end an update once a minibatch is this far from the old policy, nats per token")
    missing_eos_penalty: float | None = setting(None, "subtracted from the reward of a completion that hit the length limit")
    whiten_rewards: bool = setting(False, "scale the tokens' rewards to variance 1, keeping their mean")


@dataclass
class Episode:
    """One prompt, its completion, and what each step of the algorithm adds. Lists have one entry per completion token."""

    prompt: str
    tokens: list[int]  # prompt and completion
    start: int  # where the completion begins
    logprobs: list[float] = field(default_factory=list)  # of its tokens, under the policy that sampled them
    values: list[float] = field(default_factory=list)  # the critic's, before each token
    ended: bool = False  # by an end token, not by the length limit
    text: str = ""
    reward: float = 0.0
    reference_logprobs: list[float] = field(default_factory=list)
    token_rewards: list[float] = field(default_factory=list)
    advantages: list[float] = field(default_factory=list)
    returns: list[float] = field(default_factory=list)

    @property
    def kl(self) -> float:
        """An estimate of KL(policy || reference) over the whole completion, nats."""
        return sum(p - q for p, q in zip(self.logprobs, self.reference_logprobs, strict=True))


def seeded(seed: int, purpose: str, number: int) -> torch.Generator:
    """A fresh generator for one purpose: which episode or update it serves decides its numbers, nothing before it."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{number}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") // 2)


def prompt_of_episode(episode: int, prompts: list[str], seed: int) -> str:
    """Every pass over the prompts has its own shuffled order."""
    order = torch.randperm(len(prompts), generator=seeded(seed, "prompt order", episode // len(prompts)))
    return prompts[int(order[episode % len(prompts)])]


class Policy(torch.nn.Module):
    """A language model and its critic, one linear layer on the model's last hidden state."""

    def __init__(self, lm: Any, temperature: float):
        super().__init__()
        self.lm, self.temperature = lm, temperature
        self.critic = torch.nn.Linear(lm.get_output_embeddings().weight.shape[1], 1)
        torch.nn.init.zeros_(self.critic.weight)  # zero at first, or a random critic's noise would be taken for advantages
        torch.nn.init.zeros_(self.critic.bias)

    def forward(self, tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """After each of the tokens: log-probs of the next one [T, V], and the value [T]."""
        out = self.lm(input_ids=torch.tensor([tokens]), use_cache=False, output_hidden_states=True)
        values = self.critic(out.hidden_states[-1][0])[:, 0]
        return torch.log_softmax(out.logits[0] / self.temperature, dim=-1), values

    def evaluate(self, e: Episode) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of a completion: log-probs of its tokens [N], values [N], log-probs of the whole vocabulary [N, V]."""
        before = slice(e.start - 1, -1)  # a token is sampled from the output one place before it
        logprobs, values = (x[before] for x in self(e.tokens))
        return logprobs.gather(1, torch.tensor(e.tokens[e.start :])[:, None])[:, 0], values, logprobs


def end_tokens_of(lm: Any, tokenizer: Any) -> set[int]:
    """Sampling one of these ends the completion. It is an action like any other: rewarded, charged for, trained."""
    named = getattr(getattr(lm, "generation_config", None), "eos_token_id", None)
    return {*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id} - {None}


@torch.no_grad()
def generate(policy: Policy, tokenizer: Any, prompt: str, number: int, s: Settings) -> Episode:
    """Step 1: the policy completes one prompt. Read everything so far, sample one token, repeat."""
    tokens = list(tokenizer.encode(prompt))
    episode = Episode(prompt, tokens, start=len(tokens))
    ends = end_tokens_of(policy.lm, tokenizer)
    # One uniform number decides each token: the first token at which the cumulative probability passes it.
    uniforms = torch.rand(s.max_new_tokens, generator=seeded(s.seed, "sampling", number), dtype=torch.float64)
    for uniform in uniforms:
        logprobs, values = policy(tokens)
        cumulative = logprobs[-1].double().exp().cumsum(0)
        token = int((cumulative > uniform * cumulative[-1]).nonzero()[0])
        tokens.append(token)
        episode.logprobs.append(float(logprobs[-1, token]))
        episode.values.append(float(values[-1]))
        if token in ends:
            episode.ended = True
            break
    written = tokens[episode.start :]
    episode.text = tokenizer.decode(written[:-1] if episode.ended else written, skip_special_tokens=True)
    return episode


def compute_rewards(episodes: list[Episode], reward: Callable[..., list[float]]) -> None:
    """Step 2: how good each completion is. The policy never sees how the number comes about."""
    rewards = reward(prompts=[e.prompt for e in episodes], completions=[e.text for e in episodes])
    for e, r in zip(episodes, rewards, strict=True):
        e.reward = r


@torch.no_grad()
def spread_rewards(episodes: list[Episode], reference: Policy, kl_coef: float, s: Settings) -> None:
    """Step 3: r_t = -beta (log p_t - log p_ref,t), plus the reward on the last token (Ziegler et al. 2019, arXiv:1909.08593).

    Without the price, the policy would find text that fools the reward function and is no longer language.
    """
    for e in episodes:
        e.reference_logprobs = reference.evaluate(e)[0].tolist()
        e.token_rewards = [-kl_coef * (p - q) for p, q in zip(e.logprobs, e.reference_logprobs, strict=True)]
        e.token_rewards[-1] += e.reward
        if s.missing_eos_penalty is not None and not e.ended:
            e.token_rewards[-1] -= s.missing_eos_penalty
    if s.whiten_rewards:
        mean, scale = mean_and_scale([r for e in episodes for r in e.token_rewards])
        for e in episodes:
            e.token_rewards = [(r - mean) * scale + mean for r in e.token_rewards]


def mean_and_scale(numbers: list[float]) -> tuple[float, float]:
    """Mean, and one over the (population) standard deviation."""
    mean = sum(numbers) / len(numbers)
    variance = sum((x - mean) ** 2 for x in numbers) / len(numbers)
    return mean, 1 / math.sqrt(variance + 1e-8)


def estimate_advantages(e: Episode, s: Settings) -> None:
    """Step 4: generalized advantage estimation (Schulman et al. 2015, arXiv:1506.02438, eq. 16), as it is defined.

        delta_t = r_t + gamma V_t+1 - V_t        was this token better than the critic expected?
        A_t = sum over k of (gamma lambda)^k delta_t+k

    After the last token nothing more can be earned, so the value there is 0, also where the length limit cut it off.
    """
    n = len(e.token_rewards)
    values = [*e.values, 0.0]
    deltas = [e.token_rewards[t] + s.gamma * values[t + 1] - values[t] for t in range(n)]
    e.advantages = [sum((s.gamma * s.gae_lambda) ** k * deltas[t + k] for k in range(n - t)) for t in range(n)]
    e.returns = [advantage + value for advantage, value in zip(e.advantages, e.values, strict=True)]


def update(policy: Policy, optimizer: torch.optim.Adam, episodes: list[Episode], number: int, s: Settings) -> dict[str, float]:
    """Step 5: one gradient step a minibatch, for some epochs. Returns means over the tokens of all minibatches."""
    sums = dict.fromkeys(("policy_loss", "value_loss", "entropy", "approx_kl", "clip_fraction"), 0.0)
    tokens_seen, norms = 0, []
    shuffle = seeded(s.seed, "minibatches", number)
    epochs = [torch.randperm(len(episodes), generator=shuffle) for _ in range(s.n_epochs)]
    for rows in [rows for order in epochs for rows in order.split(s.batch_size)]:
        minibatch = [episodes[int(row)] for row in rows]
        n_tokens = sum(len(e.token_rewards) for e in minibatch)
        shift, scale = mean_and_scale([a for e in minibatch for a in e.advantages]) if s.normalize_advantage else (0.0, 1.0)
        optimizer.zero_grad()
        distance = 0.0
        for e in minibatch:
            loss, parts = losses(policy, e, shift, scale, s)
            # The completions' gradients add up. Every token weighs the same, whether its completion is long or short.
            (loss.sum() / n_tokens).backward()
            distance += float(parts["approx_kl"].sum()) / n_tokens
            for name, part in parts.items():
                sums[name] += float(part.sum())
        tokens_seen += n_tokens
        if s.target_kl is not None and distance > s.target_kl:
            break
        norms.append(float(torch.nn.utils.clip_grad_norm_(policy.parameters(), s.max_grad_norm)))
        optimizer.step()
    return {name: total / tokens_seen for name, total in sums.items()} | {"grad_norm": sum(norms) / max(len(norms), 1)}


def losses(policy: Policy, e: Episode, shift: float, scale: float, s: Settings) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """PPO's loss for each token of one completion [N], and what it is made of."""
    logprobs, values, of_all_tokens = policy.evaluate(e)
    old_logprobs, old_values, returns = (torch.tensor(x) for x in (e.logprobs, e.values, e.returns))
    advantages = (torch.tensor(e.advantages) - shift) * scale

    # The policy: raise the probability of tokens with a positive advantage, lower the others. Once the ratio of new to
    # old probability has left 1 ± clip_range in the wanted direction, the clipped branch is constant: no more gradient.
    log_ratio = logprobs - old_logprobs
    ratio = log_ratio.exp()
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - s.clip_range, 1 + s.clip_range) * advantages)

    # The critic should be right about the return.
    value_loss = (values - returns) ** 2
    if s.clip_range_vf is not None:
        near_old = old_values + (values - old_values).clamp(-s.clip_range_vf, s.clip_range_vf)
        value_loss = torch.maximum(value_loss, (near_old - returns) ** 2)
    value_loss = value_loss / 2

    entropy = -(of_all_tokens.exp() * of_all_tokens).sum(1)
    loss = -gain + s.vf_coef * value_loss - s.ent_coef * entropy
    parts = {
        "policy_loss": -gain,
        "value_loss": value_loss,
        "entropy": entropy,
        "approx_kl": ratio - 1 - log_ratio,  # KL(old || new), estimated from old samples; never negative
        "clip_fraction": ((ratio - 1).abs() > s.clip_range).float(),
    }
    return loss, {name: part.detach() for name, part in parts.items()}


def adapt_kl_coef(kl_coef: float, kl: float, s: Settings) -> float:
    """Step 6: leaving the reference costs more while the policy is too far from it (Ziegler et al. 2019, section 2.2)."""
    if s.kl_target is None:
        return kl_coef
    error = max(-0.2, min(0.2, kl / s.kl_target - 1))
    return kl_coef * (1 + error * s.episodes_per_update / s.kl_horizon)


def train(
    lm: Any, tokenizer: Any, prompts: list[str], reward: Callable[..., list[float]], s: Settings, *, report: Callable[..., None]
) -> Policy:
    """All of it together. Trains `lm` in place; `report` gets the numbers of every update."""
    policy = Policy(lm.eval(), s.temperature)  # eval: with dropout, the policy trained would not be the one that sampled
    reference = copy.deepcopy(policy)
    optimizer = torch.optim.Adam(policy.parameters(), eps=s.adam_epsilon)
    kl_coef = s.kl_coef
    updates = math.ceil(s.total_episodes / s.episodes_per_update)
    for number in range(updates):
        numbers = range(number * s.episodes_per_update, (number + 1) * s.episodes_per_update)
        episodes = [generate(policy, tokenizer, prompt_of_episode(i, prompts, s.seed), i, s) for i in numbers]
        compute_rewards(episodes, reward)
        spread_rewards(episodes, reference, kl_coef, s)
        for episode in episodes:
            estimate_advantages(episode, s)
        optimizer.param_groups[0]["lr"] = s.learning_rate * (1 - number / updates if s.lr_schedule == "linear" else 1)
        measured = update(policy, optimizer, episodes, number, s)
        mean, kl = (sum(column) / len(episodes) for column in ([e.reward for e in episodes], [e.kl for e in episodes]))
        report({"update": number + 1, "reward": mean, "kl": kl, "kl_coef": kl_coef, **measured})
        kl_coef = adapt_kl_coef(kl_coef, kl, s)
    return policy


PROMPTS = ["the river is ", "a song about ", "my friend said ", "in the morning "]


def share_of_vowels(prompts: list[str], completions: list[str]) -> list[float]:
    return [sum(character in "aeiou" for character in text) / max(len(text), 1) for text in completions]


class Letters:
    """A tokenizer for the tiny model: one token a letter."""

    alphabet, eos_token_id = "abcdefghijklmnopqrstuvwxyz ", 27

    def encode(self, text: str) -> list[int]:
        return [self.alphabet.index(character) for character in text]

    def decode(self, tokens: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(self.alphabet[token] for token in tokens if token != self.eos_token_id)


def tiny_model() -> Any:
    """A random model of the Llama family, small enough to learn while you watch."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=28, eos_token_id=27, bos_token_id=None, max_position_embeddings=64, **sizes)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a causal language model's folder or hub id; without it, a tiny random one")
    for f in fields(Settings):
        flag = "--episodes" if f.name == "total_episodes" else "--" + f.name.replace("_", "-")
        kind = {"int": int, "str": str, "bool": lambda text: text.lower() == "true"}.get(str(f.type), float)
        help_text = f"{f.metadata['help']} (default {f.default})"
        parser.add_argument(flag, dest=f.name, type=kind, metavar="X", help=help_text)
    given = {name: value for name, value in vars(parser.parse_args()).items() if value is not None}
    model = given.pop("model", None)
    if model is None:
        lm, tokenizer = tiny_model(), Letters()
        torch.set_num_threads(1)  # in a model this small, threads would only wait for each other
    else:
        lm = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        given = {"total_episodes": 32, "learning_rate": 1e-5, **given}  # large steps soon ruin a pretrained model
    settings = Settings(**given)
    policy = train(lm, tokenizer, PROMPTS, share_of_vowels, settings, report=show)
    for number, prompt in enumerate(PROMPTS):
        print(repr(prompt + generate(policy, tokenizer, prompt, -1 - number, settings).text))


def show(row: dict[str, float]) -> None:
    print("  ".join(f"{name} {value:.4g}" for name, value in row.items()), flush=True)


if __name__ == "__main__":
    main()
