"""`new_model`: a randomly initialized language model for `SFT`, written as an ordinary model folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from surefoot.build.language import build_demonstrations
from surefoot.config import Config, make_config
from surefoot.core.seeds import derived_seed
from surefoot.data.assets import log_to_stderr
from surefoot.data.silence import silence_transformers
from surefoot.errors import InputError
from surefoot.storage.files import whole_folder, writing


def new_model(
    folder: str | Path,
    texts: Any,
    *,
    columns: Mapping[str, str] | None = None,
    held_out: float = 0.1,
    seed: int = 0,
    **sizes: Any,
) -> Path:
    """Write a language model with random weights, and a tokenizer learned from `texts`; the folder.

    `texts`, `columns` and `held_out` are what `SFT` takes: a JSONL file, a list or a `datasets.Dataset`. The
    tokenizer learns from what SFT trains on and sees nothing of what is held out. `sizes` are the fields of
    `new_model` in the configuration: `kind="transformer"` or `"lstm"`, `vocab=2048`, `width=128`, `layers=2`.
    Raises InputError for sizes or texts that make no model, or a folder that has something in it.
    """
    data = {"columns": dict(columns or {}), "held_out": held_out}
    policy = {"model": str(folder), "adapter": None}
    settings = {"policy": policy, "sft": data, "new_model": sizes, "seed": seed}
    return write_new_model(make_config(settings, where="new_model(...)"), texts)


def write_new_model(config: Config, data: Any = None) -> Path:
    """The model that `config` describes, in the folder `policy.model`, from `data` or `sft.data`."""
    from surefoot.policies.lm.from_scratch import learn_tokenizer, plain_texts, random_lm

    assert config.new_model is not None and config.sft is not None
    folder = Path(config.policy.model)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        what = "exists and is not empty" if folder.is_dir() else "is a file"
        raise InputError(f"policy.model: {folder} {what}; name a new folder for the new model")
    contents = [example.contents for example in build_demonstrations(config.sft, data).train]
    tokenizer = learn_tokenizer(plain_texts(contents), config.new_model.vocab, chat="messages" in contents[0])
    lm = random_lm(config.new_model, tokenizer, seed=derived_seed(config.seed, "new model", 0))
    with writing(folder), whole_folder(folder) as aside:
        with silence_transformers():
            lm.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
    made = f"{config.new_model.kind} of {sum(p.numel() for p in lm.parameters()):,} weights"
    log_to_stderr(f"{folder}: {made} over {len(tokenizer):,} tokens, from {len(contents):,} examples")
    return folder
