"""LoRA adapters over one frozen base: the policy's, a critic's, and none for the reference."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from surefoot.config import AdapterConfig
from surefoot.data.silence import silence_transformers
from surefoot.errors import InputError, one_line

# Their names in peft; `default` is what peft calls the first one.
POLICY, CRITIC = "default", "critic"


def add_adapter(lm: Any, config: AdapterConfig, seed: int) -> Any:
    """The PeftModel around `lm` with the policy's adapter, drawn from `seed`, at first 0; the base is frozen.

    Raises InputError for targets that are not there, and for a model without linear layers.
    """
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    if not any(isinstance(module, (nn.Linear, Conv1D)) for module in lm.base_model.modules()):
        found = f"{type(lm).__name__} has no linear layers to adapt"
        raise InputError(f"policy.adapter: {found}; train all: policy.adapter: null")
    is_transposed = any(isinstance(module, Conv1D) for module in lm.modules())  # GPT-2's weights are
    shape = {"r": config.rank, "lora_alpha": config.alpha, "target_modules": config.targets}
    settings = LoraConfig(**shape, lora_dropout=0.0, fan_in_fan_out=is_transposed, task_type="CAUSAL_LM")
    try:
        with torch.random.fork_rng(devices=[]), silence_transformers():
            torch.manual_seed(seed)
            return get_peft_model(lm, settings)
    except ValueError as error:
        raise InputError(f"policy.adapter.targets: {one_line(error)}") from None


@contextlib.contextmanager
def using(adapter: Any, *names: str) -> Iterator[None]:
    """Compute with the adapters of these names, or with the bare base; afterwards with the policy's again.

    Every adapter stays trainable: peft's switches freeze those not in use, and gradients would miss them.
    Nothing is done where `adapter` is None.
    """
    if adapter is None:
        yield
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in adapter.modules() if isinstance(module, BaseTunerLayer)]
    trained = [parameter for layer in layers for parameter in layer.parameters() if parameter.requires_grad]

    def use(*names: str) -> None:
        for layer in layers:
            layer.set_adapter(list(names))
        for parameter in trained:
            parameter.requires_grad_(True)

    use(*names)
    try:
        yield
    finally:
        use(POLICY)
