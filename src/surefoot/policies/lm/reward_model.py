"""A causal language model that scores whole texts: its value head, read at the last token."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from surefoot.data.batches import Texts, micro_batches, preference_batch
from surefoot.data.render import encode_scored_text
from surefoot.errors import InputError, one_line
from surefoot.policies.lm.policy import CausalLMPolicy
from surefoot.policies.lm.pretrained import REWARD
from surefoot.storage.safetensors import read_tensors
from surefoot.types import Batch, Evaluation, Poll

SCORED_TOKENS = 4096  # in one forward pass of `scores`


class RewardModelPolicy:
    """A reward model that `train/` can train: `evaluate` gives scores in place of log-probs.

    `trunk` is taken over, its value head initialized to N(0, 1/(D + 1)) of `seed` (Stiennon et al. 2020,
    arXiv:2009.01325): with unit hidden states scores start near variance 1. `shift` and `scale`, set after
    training, make them rewards of mean 0 and standard deviation 1 on reference texts, (score - shift) / scale
    (Ziegler et al. 2019, arXiv:1909.08593, §2).
    """

    reads_whole_rows = exact_logprobs = True

    def __init__(self, trunk: CausalLMPolicy, *, seed: int):
        self.trunk, self.device = trunk, trunk.device
        self.shift, self.scale = 0.0, 1.0
        trunk.drop_reference()
        width = trunk.value_head.in_features
        generator = torch.Generator().manual_seed(seed)
        trunk.value_head.weight.data.copy_(torch.randn(1, width, generator=generator) / (width + 1) ** 0.5)
        trunk.value_head.bias.data.zero_()
        self.tokenizer, self.context_length = trunk.tokenizer, trunk.context_length
        self.model_end_tokens, self.notice = trunk.model_end_tokens, trunk.notice

    def named_parameters_to_train(self) -> Iterable[tuple[str, nn.Parameter]]:
        """The adapter's parameters, or all of the model's, then the head's."""
        return self.trunk.named_parameters_to_train()

    def evaluate(self, batch: Batch, *, entropy_gradient: bool = False) -> Evaluation:
        """Scores before `shift` and `scale` as the evaluation's values, [B, K] float32: one a text.

        Of `batch` it reads the observations `tokens` [B, T, K], right-padded, and `lengths` [B, K].
        """
        tokens_BTK, lengths_BK = batch.observations["tokens"], batch.observations["lengths"]
        tokens_NT = tokens_BTK.transpose(1, 2).flatten(0, 1)
        scores = self.trunk.value_at_end(tokens_NT, lengths_BK.flatten()).unflatten(0, lengths_BK.shape)
        nothing_BK = torch.zeros_like(lengths_BK, dtype=torch.float32)
        return Evaluation(nothing_BK, scores, nothing_BK)

    def encode(self, prompt: Any, text: str, *, where: str) -> tuple[int, ...]:
        """Prompt (text, messages or None) and text as the tokens to score, with an end token.

        Raises InputError, naming `where`, for more tokens than the context, or messages without a template.
        """
        ends, context = self.model_end_tokens, self.context_length
        end = self.trunk.turn_end
        tokens = encode_scored_text(self.tokenizer, prompt, text, end_tokens=ends, end=end, where=where)
        if len(tokens) > context:
            found = f"{where}: has {len(tokens)} tokens, more than the model's context of {context}"
            raise InputError(f"{found}; shorten it")
        return tokens

    @torch.no_grad()
    def scores(self, rows: Sequence[Texts], poll: Poll = None) -> Tensor:
        """Scores of rows of K tokenized texts each, [B, K] float32 on the CPU, before `shift` and `scale`."""
        batch, sides = preference_batch(rows, device=self.device), len(rows[0])
        scores_BK = torch.zeros(len(rows), sides)
        for part in micro_batches(batch, torch.arange(len(rows)), SCORED_TOKENS // sides):
            if poll is not None:
                poll()
            scores_BK[part] = self.evaluate(batch.rows(part)).values_BT.float().cpu()
        return scores_BK

    def rewards(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        """One reward a completion, (score - shift) / scale: what a reward function gives.

        Strings are read as one text, message lists through the model's own chat template. What goes in is
        text: the policy may have another tokenizer. Raises InputError for one longer than the context.
        """
        if isinstance(prompts, str) or isinstance(completions, str):
            what = "prompts and completions are lists"
            raise InputError(f"score: {what}; for one text write [prompt] and [completion]")
        if len(prompts) != len(completions):
            counts = f"{len(prompts)} prompts and {len(completions)} completions"
            raise InputError(f"score: {counts}; one prompt each is needed")
        if not completions:
            return []
        texts = [c if isinstance(c, str) else "".join(str(m["content"]) for m in c) for c in completions]
        pairs = enumerate(zip(prompts, texts, strict=True), start=1)
        rows = [[self.encode(*pair, where=f"reward model: text {number}")] for number, pair in pairs]
        return ((self.scores(rows)[:, 0].double() - self.shift) / self.scale).tolist()

    def reference_logprobs(self, batch: Batch) -> None:
        """It has none."""

    def fingerprint(self) -> int:
        """Checksum of the frozen base."""
        return self.trunk.fingerprint()

    def save(self, folder: Path) -> None:
        """Write model (the adapter merged in) and tokenizer as transformers does, and the calibrated head."""
        self.trunk.save_model(folder)
        head, shift = self.trunk.value_head.state_dict(), torch.tensor(self.shift, dtype=torch.float64)
        save_file(head | {"shift": shift, "scale": torch.tensor(self.scale).double()}, folder / REWARD)

    def load_head(self, folder: Path) -> None:
        """Head and calibration that `save` wrote. Raises InputError if they do not fit."""
        tensors = read_tensors(folder / REWARD)
        try:
            self.shift, self.scale = float(tensors.pop("shift")), float(tensors.pop("scale"))
            self.trunk.value_head.load_state_dict(tensors)
        except (KeyError, RuntimeError) as error:  # torch's, for other names or shapes
            raise InputError(f"{folder / REWARD} does not fit this model: {one_line(error)}") from None
