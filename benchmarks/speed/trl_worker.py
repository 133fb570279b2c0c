"""TRL's PPO, one update each time a line comes in on stdin. Runs in TRL's own environment; started by `peer_trl.py`.

In TRL's favor: the reward model is a stub that costs nothing, and the value model's trunk can be frozen
(`--frozen-value-trunk`), which its users have to do by hand.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings

import torch
from datasets import Dataset
from peft import LoraConfig
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer

UPDATES = 1_000  # more than will be asked for


class FreeReward(nn.Module):
    """Looks like a sequence classifier; its score is the last token id modulo 7, for next to no work."""

    base_model_prefix = "backbone"

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def backbone(self, input_ids, **_):
        hidden = (input_ids % 7).float()[..., None]
        return type("Output", (), {"hidden_states": (hidden,)})()

    def score(self, hidden):
        return hidden


class WaitForTurn(TrainerCallback):
    def on_train_begin(self, *_, **__):
        wait()

    def on_step_end(self, *_, **__):
        wait()


def wait():
    print("done", flush=True)
    if not sys.stdin.readline().strip():
        sys.exit(0)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--episodes", type=int, required=True)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--frozen-value-trunk", action="store_true")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    tokenizer = AutoTokenizer.from_pretrained(options.model, padding_side="left")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    policy = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    value = AutoModelForSequenceClassification.from_pretrained(
        options.model, num_labels=1, dtype=torch.float32
    )
    if options.frozen_value_trunk:
        value.base_model.requires_grad_(False)
    prompts = torch.randint(
        100, 40_000, (options.episodes * 8, 6), generator=torch.Generator().manual_seed(0)
    ).tolist()
    with tempfile.TemporaryDirectory() as folder:
        config = PPOConfig(
            output_dir=folder,
            per_device_train_batch_size=16,
            gradient_accumulation_steps=options.episodes // 16,
            num_mini_batches=options.episodes // 16,
            num_ppo_epochs=1,
            total_episodes=options.episodes * UPDATES,
            response_length=24,
            temperature=1.0,
            stop_token="eos",
            learning_rate=1e-3,
            kl_coef=0.05,
            local_rollout_forward_batch_size=options.episodes,
            num_sample_generations=0,
            save_strategy="no",
            logging_steps=1_000_000,
            report_to=[],
            use_cpu=True,
            bf16=options.bf16,
            gradient_checkpointing=False,
            disable_tqdm=True,
        )
        PPOTrainer(
            args=config,
            processing_class=tokenizer,
            model=policy,
            ref_model=None,
            reward_model=FreeReward(),
            value_model=value,
            train_dataset=Dataset.from_dict({"input_ids": prompts}),
            eval_dataset=Dataset.from_dict({"input_ids": prompts[:16]}),
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[WaitForTurn()],
        ).train()


if __name__ == "__main__":
    # What the trainer prints must not be mistaken for the signal.
    main()
