"""A policy for Gymnasium environments: features, memory if asked for, layers, an action head and a value head."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

from surefoot.config import NetworkConfig
from surefoot.core.losses import LossStats
from surefoot.core.running import RunningMoments, RunningStats
from surefoot.errors import InputError
from surefoot.policies.control import fast_mlp as closed_form
from surefoot.policies.control.actions import action_head
from surefoot.policies.control.networks import Extractor, Layers, Memory, is_image, orthogonal
from surefoot.storage.safetensors import read_tensors
from surefoot.types import ACTION_MASK, OBSERVATION, STARTS, Batch, Evaluation

WEIGHTS, MOMENTS = "policy.safetensors", "normalisation.json"
CLIP_OBSERVATION = 10.0
# What a policy with memory finds beside the observations of a batch: [B, T] where episodes begin, and the state [B, 1, H]
# before each row's first step.
MEMORY = ("memory/pi_h", "memory/pi_c", "memory/vf_h", "memory/vf_c", STARTS)
SMALL = 100_000  # parameters
State = dict[str, Tensor]


class ControlPolicy(nn.Module):
    """Policy and critic over one or two networks, trained by the same loop as a language model.

    `extractor` turns observations by name ([N, ...]) into features [N, features_dim]: ours, or any `nn.Module` with a
    `features_dim`. Weights are float32; with `dtype` bfloat16 the networks compute under autocast.
    """

    def __init__(
        self,
        spaces: dict[str, Any],
        action_space: Any,
        *,
        extractor: nn.Module | None = None,
        config: NetworkConfig | None = None,
        kind: str = "MlpPolicy",
        normalize: bool = False,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ):
        super().__init__()
        config = config or NetworkConfig()
        self.has_masks = ACTION_MASK in spaces
        self._closed_form: closed_form.ClosedForm | None = None
        self.reward_stats = RunningStats()  # of normalised rewards: no policy's business, but saved with it
        self.spaces = {name: space for name, space in spaces.items() if name != ACTION_MASK}
        self.dtype = dtype
        self.moments = (
            {n: RunningMoments.of(s.shape) for n, s in self.spaces.items() if _is_vector(s)}
            if normalize
            else {}
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if extractor is None:
                extractor = Extractor(
                    self.spaces, images="Cnn" in kind or "MultiInput" in kind, needs_images="Cnn" in kind
                )
            self.extractor = extractor
            width = int(getattr(self.extractor, "features_dim", 0))
            if not width:
                raise InputError(
                    "policy: a network of your own needs a features_dim, the width of what it returns"
                )
            self._build(width, action_space, config, kind)
        self._check_features(width)
        self.eval()

    def _build(self, width: int, action_space: Any, config: NetworkConfig, kind: str) -> None:
        self.memory = self.critic_memory = None
        if "Lstm" in kind:
            self.memory = Memory(width, config.lstm_hidden_size)
            self.critic_memory = self.memory if config.share else Memory(width, config.lstm_hidden_size)
            width = config.lstm_hidden_size
        self.layers = Layers((width, width), config, default=[] if "Cnn" in kind else [64, 64])
        self.head = action_head(
            action_space,
            self.layers.latent_dim_pi,
            log_std=config.log_std_init,
            use_sde=config.use_sde,
            sde_sample_freq=config.sde_sample_freq,
        )
        self.value_head = nn.Linear(self.layers.latent_dim_vf, 1)
        if config.ortho_init:
            if isinstance(self.extractor, Extractor):  # a network of the user's own may have learnt something
                orthogonal(self.extractor, 2**0.5)
            for module, gain in ((self.layers, 2**0.5), (self.head, 0.01), (self.value_head, 1.0)):
                orthogonal(module, gain)

    @property
    def exact_logprobs(self) -> bool:
        """Float32 repeats itself to rounding."""
        return self.dtype == torch.float32

    @property
    def threads(self) -> int | None:
        """A small network's operations are over before a second thread has begun; where cores are busy it waits for it."""
        return 1 if sum(p.numel() for p in self.parameters()) < SMALL else None

    @property
    def reads_whole_rows(self) -> bool:
        """With memory, what a step is worth depends on the steps before it."""
        return self.memory is not None

    def closed_form(
        self, optimizer: torch.optim.Optimizer
    ) -> contextlib.AbstractContextManager[tuple[Callable[..., LossStats], torch.optim.Adam]] | None:
        """The gradient written out, for the small networks that it is written out for."""
        if not closed_form.supports(self):
            return None
        self._closed_form = self._closed_form or closed_form.ClosedForm(self)
        return self._closed_form.lent(optimizer)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.value_head.weight.device

    def named_parameters_to_train(self) -> Iterable[tuple[str, nn.Parameter]]:
        """All parameters, but those that a network of the user's own keeps frozen."""
        return ((name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad)

    def prepare(self, observations: Mapping[str, NDArray[Any]], *, learn: bool = False) -> dict[str, Tensor]:
        """Arrays from an environment as tensors, normalised if asked for; `learn` counts them into the moments first."""
        prepared = {}
        for name, values in observations.items():
            first = getattr(self.spaces.get(name), "start", 0)  # of a count
            tensor = torch.from_numpy(numpy.ascontiguousarray(values - first if numpy.any(first) else values))
            moments = self.moments.get(name)
            if moments is not None:
                if learn:
                    moments.update(tensor)
                tensor = moments.normalized(tensor, clip=CLIP_OBSERVATION)
            elif tensor.dtype == torch.float64:
                tensor = tensor.float()
            prepared[name] = tensor.bool() if name == ACTION_MASK else tensor
        return {name: tensor.to(self.device) for name, tensor in prepared.items()}

    def initial_state(self, rows: int) -> State:
        """What is remembered before the first step, [rows, width] each; empty without memory."""
        if self.memory is None:
            return {}
        h, c = self.memory.initial_state(rows)
        names = MEMORY[:2] if self.critic_memory is self.memory else MEMORY[:4]
        return dict(zip(names, (h, c, h, c), strict=False))

    def acting(self) -> contextlib.AbstractContextManager[Any]:
        """To hold while weights stand still: under autocast, each is then rounded once and not at every step."""
        return self._autocast()

    def noise(self, steps: int, envs: int, generator: torch.Generator) -> Any:
        """Randomness of a rollout, entry t for step t."""
        noise = self.head.noise(steps, envs, generator)
        return (
            noise.to(self.device) if isinstance(noise, Tensor) else [part.to(self.device) for part in noise]
        )

    @torch.no_grad()
    def act(
        self, observations: dict[str, Tensor], state: State, *, starts: Tensor, noise: Any = None
    ) -> tuple[Tensor, State]:
        """An action a row, and what is remembered after it. Without `noise` the likeliest action.

        `starts` [N] (bool): an episode begins with this observation, so nothing before it is remembered.
        """
        with self._autocast():
            (features, _), state = self._remember(
                self._features(observations), state, starts, critic=self.memory is not None
            )
            latent = self.layers.forward_actor(features).float()
        mask = observations.get(ACTION_MASK)
        if noise is None:
            return self.head.mode(latent, mask), state
        return self.head.sample(latent, noise, mask), state

    @torch.no_grad()
    def values(self, observations: dict[str, Tensor], state: State, *, starts: Tensor) -> Tensor:
        """V [N] of observations, given what is remembered before them."""
        with self._autocast():
            (_, features), _ = self._remember(self._features(observations), state, starts, critic=True)
            latent = self.layers.forward_critic(features).float()
        return self.value_head(latent).squeeze(-1)  # type: ignore[no-any-return]

    def evaluate(self, batch: Batch, *, entropy_gradient: bool = False) -> Evaluation:
        """Log-probs, values and entropies [B, T] of the actions taken."""
        mask_BT = batch.mask_BT
        rows, steps = mask_BT.shape
        state = {name: values[:, 0] for name, values in batch.observations.items() if name in MEMORY}
        flat = {
            name: values.flatten(0, 1) for name, values in batch.observations.items() if name not in MEMORY
        }
        with self._autocast():
            both, _ = self._remember(
                self._features(flat), state, batch.observations.get(STARTS, mask_BT), critic=True
            )
            latent, value_latent = self.layers(*both)
        actions = batch.actions_BT.flatten(0, 1)
        logprobs, entropies = self.head.evaluate_actions(
            latent.float(), actions, flat.get(ACTION_MASK), entropy_gradient=entropy_gradient
        )
        values = self.value_head(value_latent.float()).squeeze(-1)
        return Evaluation(*(part.reshape(rows, steps) for part in (logprobs, values, entropies)))

    def reference_logprobs(self, batch: Batch) -> Tensor | None:
        """There is no reference: the policy starts from nothing worth staying near."""
        return None

    def fingerprint(self) -> int:
        """Nothing is frozen."""
        return 0

    def state(self) -> dict[str, Any]:
        """What has been learnt outside the weights: moments of observations and of rewards, numbers and tensors by name."""
        observations = {name: moments.state() for name, moments in self.moments.items()}
        return {"observations": observations, "rewards": asdict(self.reward_stats)}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self.moments = {
            name: RunningMoments.restored(values) for name, values in state["observations"].items()
        }
        self.reward_stats = RunningStats(**state["rewards"])

    def load_extras(self, folder: Path) -> None:
        """Take over what `save` wrote. Raises InputError if it does not fit."""
        try:
            self.load_state_dict(read_tensors(folder / WEIGHTS))
            self.restore(json.loads((folder / MOMENTS).read_text(encoding="utf-8")))
        except (RuntimeError, OSError, ValueError, LookupError, TypeError) as error:
            raise InputError(
                f"{folder} does not fit this environment's policy: {' '.join(str(error).split())[:300]}"
            ) from None

    def predict(
        self,
        observations: Mapping[str, NDArray[Any]],
        state: tuple[NDArray[Any], ...] | None = None,
        episode_start: NDArray[Any] | None = None,
        *,
        noise_from: torch.Generator | None = None,
    ) -> tuple[NDArray[Any], tuple[NDArray[Any], ...] | None]:
        """Actions [N, ...] for observations by name, and what is remembered; the likeliest without `noise_from`."""
        prepared = self.prepare(observations)
        rows = len(next(iter(prepared.values())))
        memory = self.initial_state(rows)
        if state is not None and [tuple(part.shape) for part in state] != [
            tuple(part.shape) for part in memory.values()
        ]:
            raise InputError(
                f"predict: the state is not one that predict gave for {rows} observations of this policy"
            )
        starts = (
            torch.zeros(rows, dtype=torch.bool)
            if episode_start is None
            else torch.as_tensor(episode_start).bool()
        )
        if state is not None:
            memory = {
                name: torch.as_tensor(part, device=self.device)
                for name, part in zip(memory, state, strict=True)
            }
        noise = None if noise_from is None else self.noise(1, rows, noise_from)[0]
        actions, memory = self.act(prepared, memory, starts=starts.reshape(rows).to(self.device), noise=noise)
        return actions.cpu().numpy(), tuple(part.cpu().numpy() for part in memory.values()) or None

    def save(self, folder: Path) -> None:
        """Write weights (safetensors) and the moments of observations and rewards (JSON)."""
        save_file(
            {name: value.detach().contiguous().cpu() for name, value in self.state_dict().items()},
            folder / WEIGHTS,
        )
        (folder / MOMENTS).write_text(
            json.dumps(self.state(), default=lambda tensor: tensor.tolist()), encoding="utf-8"
        )

    @torch.no_grad()
    def _check_features(self, width: int) -> None:
        """Raise InputError if a network of the user's own fails, or returns something else than it says."""
        if isinstance(self.extractor, Extractor):
            return
        seen = self.prepare(
            {name: numpy.zeros((2, *space.shape), space.dtype) for name, space in self.spaces.items()}
        )
        try:
            found = tuple(
                self._features(
                    {name: values.to(_device_of(self.extractor)) for name, values in seen.items()}
                ).shape
            )
        except Exception as error:
            message = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise InputError(
                f"policy: your network fails on observations of this environment: {message}"
            ) from error
        if found != (2, width):
            raise InputError(
                f"policy: your network returns {list(found)} for 2 observations; features_dim says [2, {width}]"
            )

    def _features(self, observations: dict[str, Tensor]) -> Tensor:
        """A network of the user's own gets what the environment gives: a tensor, or a dict of them."""
        is_plain = not isinstance(self.extractor, Extractor) and list(self.spaces) == [OBSERVATION]
        features: Tensor = self.extractor(observations[OBSERVATION] if is_plain else observations)
        return features

    def _remember(
        self, features: Tensor, state: State, starts: Tensor, *, critic: bool
    ) -> tuple[tuple[Tensor, Tensor], State]:
        """Features of actor and critic after memory; `features` [N, F] are the rows of `starts` [B, T] (or [N])."""
        if self.memory is None or self.critic_memory is None:
            return (features, features), state
        starts_BT = starts if starts.dim() == 2 else starts[:, None]
        features_BTF = features.reshape(*starts_BT.shape, -1)
        actor, after = self.memory(features_BTF, (state[MEMORY[0]], state[MEMORY[1]]), starts_BT)
        new = {} if after is None else dict(zip(MEMORY[:2], after, strict=True))
        value = actor
        if critic and self.critic_memory is not self.memory:
            value, after = self.critic_memory(features_BTF, (state[MEMORY[2]], state[MEMORY[3]]), starts_BT)
            new |= {} if after is None else dict(zip(MEMORY[2:4], after, strict=True))
        return (actor.flatten(0, 1), value.flatten(0, 1)), new

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.dtype != torch.bfloat16:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)


def _device_of(module: nn.Module) -> torch.device | str:
    return next((parameter.device for parameter in module.parameters()), "cpu")


def _is_vector(space: Any) -> bool:
    """Whether an observation is worth normalising: numbers that are no image, no count and no switch."""
    return type(space).__name__ == "Box" and space.dtype.kind in "fiu" and not is_image(space)
