"""LoRA adapters over one frozen base: the policy's, a critic's, and none for the reference."""

import contextlib
import copy
import re
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from surefoot.config import AdapterConfig
from surefoot.config.messages import suggestion
from surefoot.data.silence import silence_transformers
from surefoot.errors import InputError, one_line

# Their names in peft; `default` is what peft calls the first one.
POLICY, CRITIC = "default", "critic"
# What experts and their router were called where each was a layer; peft knows the weights they are today.
OLDER_NAMES = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}


def add_adapter(lm: Any, config: AdapterConfig, seed: int) -> Any:
    """The PeftModel around `lm` with the policy's adapter, drawn from `seed`, at first 0; the base is frozen.

    Raises InputError for a target that is not there, and for a model without linear layers.
    """
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    linear = {name: m for name, m in lm.base_model.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
    if not linear:
        found = f"{type(lm).__name__} has no linear layers to adapt"
        raise InputError(f"policy.adapter: {found}; train all: policy.adapter: null")
    targets = config.targets
    weights = {} if isinstance(targets, str) else _in_no_layer(lm, targets)
    # Some routers of experts are linear layers that give more than one tensor.
    odd = [name for name, module in linear.items() if "Router" in type(module).__name__]
    settings = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=0.0,
        target_modules=targets if isinstance(targets, str) else [t for t in targets if t not in weights],
        target_parameters=[*weights.values()] or None,
        exclude_modules=odd or None,
        fan_in_fan_out=any(isinstance(m, Conv1D) for m in linear.values()),  # GPT-2 keeps weights transposed
        task_type="CAUSAL_LM",
    )
    try:
        with torch.random.fork_rng(devices=[]), silence_transformers():
            torch.manual_seed(seed)
            adapter = get_peft_model(lm, settings)
    except ValueError as error:
        raise InputError(f"policy.adapter.targets: {one_line(error)}") from None
    if not isinstance(targets, str):
        _check_targets(adapter, targets)
    return adapter


def left_alone(adapter: Any, targets: str | list[str]) -> str:
    """A line on the weights of blocks that `targets` means and no adapter is on; empty without any."""
    lm, adapted = adapter.get_base_model(), _adapted(adapter)
    meant = {
        name: weight.numel()
        for name, module, weight in _matrices(lm)
        if re.search(r"\.\d+\.", name) and not isinstance(module, nn.Embedding)
        if isinstance(targets, str) or any(_fits(name, target) for target in targets)
    }
    if not (left := meant.keys() - adapted):
        return ""
    share = sum(meant[name] for name in left) / sum(meant.values())
    kinds = ", ".join(sorted({re.sub(r"^.*?\.\d+\.", "", name) for name in left}))
    what = targets if isinstance(targets, str) else "the list"
    return f"policy.adapter.targets: {share:.0%} of the weights that {what} means have no adapter: {kinds}"


def merged(adapter: Any) -> Any:
    """A float32 copy of the model that computes with the policy's adapter in its weights.

    Where input and output layer share a weight and an adapter is on one of them, each has its own from here.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    plain = copy.deepcopy(adapter).float()
    lm = plain.get_base_model()
    ends = (lm.get_input_embeddings(), lm.get_output_embeddings())
    if ends[0].weight is ends[1].weight and any(isinstance(end, BaseTunerLayer) for end in ends):
        head = ends[1].get_base_layer() if isinstance(ends[1], BaseTunerLayer) else ends[1]
        head.weight = nn.Parameter(head.weight.detach().clone())
        for config in (lm.config, lm.config.get_text_config()):
            config.tie_word_embeddings = False
    return plain.merge_and_unload(adapter_names=[POLICY])


def _matrices(lm: nn.Module) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """What can have an adapter: `…q_proj` for its weight, `…experts.down_proj` for a weight of that name."""
    for path, module in lm.named_modules():
        name = path.replace(".base_layer", "")
        for own, weight in module.named_parameters(recurse=False):
            if weight.ndim > 1 and "bias" not in own and ".lora_" not in name:
                yield name if own == "weight" else f"{name}.{own}", module, weight


def _adapted(adapter: Any) -> set[str]:
    """Of `_matrices`, the names of those with an adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    names = set()
    for name, module in adapter.get_base_model().named_modules():
        if isinstance(module, BaseTunerLayer):
            own = getattr(module, "parameter_name", "weight")
            names.add((name.replace(".base_layer", "") + f".{own}").removesuffix(".weight"))
    return names


def _fits(name: str, target: str) -> bool:
    """Whether `target` is the name, or the end of it from a dot on, as peft has it."""
    return f".{name}".endswith(f".{target}")


def _in_no_layer(lm: Any, targets: list[str]) -> dict[str, str]:
    """Targets that are weights in no layer peft knows, as of experts and their routers, with peft's names.

    Raises InputError for a target that is no weight at all.
    """
    from transformers.pytorch_utils import Conv1D

    matrices, weights = list(_matrices(lm)), {}
    for target in targets:
        modules = [module for name, module, _ in matrices if _fits(name, target)]
        if not modules and target not in OLDER_NAMES:
            _refuse(target, lm)
        if modules and not any(isinstance(module, (nn.Linear, nn.Embedding, Conv1D)) for module in modules):
            has_it = hasattr(modules[0], target.rpartition(".")[2])
            weights[target] = target if has_it else f"{target}.weight"
    return weights


def _check_targets(adapter: Any, targets: list[str]) -> None:
    """Raise InputError for a target that no adapter is on, nor on what peft takes it for."""
    adapted, kept = _adapted(adapter), adapter.peft_config[POLICY].target_modules
    for target in targets:
        is_renamed = target in OLDER_NAMES and target not in kept
        if not is_renamed and not any(_fits(name, target) for name in adapted):
            _refuse(target, adapter.get_base_model())


def _refuse(target: str, lm: Any) -> NoReturn:
    names = {name.rpartition(".")[2] for name, *_ in _matrices(lm)}
    found = f"{type(lm).__name__} has no weight {target!r} that can be adapted"
    hint = suggestion(target, names - {target}, f"there are {', '.join(sorted(names))}")
    raise InputError(f"policy.adapter.targets: {found}{hint}")


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
