"""A policy for Gymnasium environments: features, an LSTM on request, layers, action head and value head."""

import contextlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeAlias

import numpy
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

from surefoot.config import NetworkConfig
from surefoot.core.running import RunningMoments
from surefoot.errors import InputError, one_line
from surefoot.policies.base import Arrays, Memory, Tensors
from surefoot.policies.control.actions import action_head
from surefoot.policies.control.networks import EpisodicLSTM, Extractor, Layers, is_image, orthogonal
from surefoot.storage.safetensors import read_tensors
from surefoot.types import ACTION_MASK, EPISODE_STARTS, OBSERVATION, Batch, Evaluation

Recurred: TypeAlias = tuple[tuple[Tensor, Tensor], Tensors]  # features of actor and critic; the new state
WEIGHTS, MOMENTS = "policy.safetensors", "normalization.json"
CLIP_OBSERVATION = 10.0
# The recurrent state of actor and critic, [N, H]; in a batch [B, 1, H], before each row's first step.
STATE = ("state/pi_h", "state/pi_c", "state/vf_h", "state/vf_c")


class ControlPolicy(nn.Module):
    """Policy and critic over one or two networks, trained by the same loop as a language model.

    `extractor` turns observations by name ([N, ...]) into features [N, features_dim]: ours, or any
    `nn.Module` with a `features_dim`. Weights are float32; with `dtype` bfloat16 it computes under autocast.
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
        self.observation_spaces, self.action_space = spaces, action_space
        self.spaces = {name: space for name, space in spaces.items() if name != ACTION_MASK}
        self.dtype, self.exact_logprobs = dtype, dtype == torch.float32
        self.reads_whole_rows = "Lstm" in kind
        # Numbers are normalized: no image, no count and no switch.
        boxes = {name: space for name, space in self.spaces.items() if type(space).__name__ == "Box"}
        vectors = {n: box for n, box in boxes.items() if box.dtype.kind in "fiu" and not is_image(box)}
        self.moments = {n: RunningMoments.of(box.shape) for n, box in vectors.items() if normalize}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if extractor is None:
                images = "Cnn" in kind or "MultiInput" in kind
                needs = "Cnn" in kind
                extractor = Extractor(self.spaces, images=images, needs_images=needs, normalized=self.moments)
            self.extractor = extractor
            width = int(getattr(self.extractor, "features_dim", 0))
            if not width:
                raise InputError("policy: your network needs a features_dim, the width of what it returns")
            self._build(width, action_space, config, kind)
        if not isinstance(self.extractor, Extractor):
            self._check_features(width)
        self.eval()

    def _build(self, width: int, action_space: Any, config: NetworkConfig, kind: str) -> None:
        self.lstm = self.critic_lstm = None
        if self.reads_whole_rows:
            self.lstm = EpisodicLSTM(width, config.lstm_hidden_size)
            self.critic_lstm = self.lstm if config.share else EpisodicLSTM(width, config.lstm_hidden_size)
            width = config.lstm_hidden_size
        self.layers = Layers(width, config, default=[] if "Cnn" in kind else [64, 64])
        self.head = action_head(action_space, self.layers.latent_dim_pi, config)
        self.value_head = nn.Linear(self.layers.latent_dim_vf, 1)
        if config.ortho_init:
            if isinstance(self.extractor, Extractor):  # the user's network may have been trained
                orthogonal(self.extractor, 2**0.5)
            for module, gain in ((self.layers, 2**0.5), (self.head, 0.01), (self.value_head, 1.0)):
                orthogonal(module, gain)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.value_head.weight.device

    def named_parameters_to_train(self) -> Iterable[tuple[str, nn.Parameter]]:
        """All parameters, but those that the user's network keeps frozen."""
        return ((name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad)

    def prepare(self, observations: Arrays, *, learn: bool = False) -> Tensors:
        """Arrays from an environment as tensors, normalized on request; `learn` first updates the moments."""
        prepared = {}
        for name, values in observations.items():
            first = getattr(self.spaces.get(name), "start", 0)  # of a count
            tensor = torch.from_numpy(numpy.ascontiguousarray(values - first if numpy.any(first) else values))
            if (moments := self.moments.get(name)) is not None:
                if learn:
                    moments.update(tensor)
                tensor = moments.normalized(tensor, clip=CLIP_OBSERVATION)
            elif tensor.dtype == torch.float64:
                tensor = tensor.float()
            prepared[name] = tensor.bool() if name == ACTION_MASK else tensor
        return {name: tensor.to(self.device) for name, tensor in prepared.items()}

    def initial_state(self, rows: int) -> Tensors:
        """The recurrent state before the first step, [rows, width] each; empty without an LSTM."""
        if self.lstm is None:
            return {}
        zeros = torch.zeros(rows, self.lstm.lstm.hidden_size, device=self.device)
        return dict.fromkeys(STATE[:2] if self.critic_lstm is self.lstm else STATE, zeros)

    def acting(self) -> contextlib.AbstractContextManager[Any]:
        """To hold while weights stand still: under autocast, each is rounded once then, not at every step."""
        return self._autocast()

    def noise(self, steps: int, envs: int, generator: torch.Generator) -> Any:
        """Randomness of a rollout, entry t for step t."""
        noise, device = self.head.noise(steps, envs, generator), self.device
        return noise.to(device) if isinstance(noise, Tensor) else [part.to(device) for part in noise]

    @torch.no_grad()
    def act(
        self, observations: Tensors, state: Tensors, *, episode_starts: Tensor, noise: Any = None
    ) -> tuple[Tensor, Tensors]:
        """An action for each row, and the recurrent state after it; the greedy action without `noise`.

        Where `episode_starts` [N] (bool), an episode begins with this observation: the state is not read.
        """
        with self._autocast():
            features = self._features(observations)
            (features, _), state = self._recur(features, state, episode_starts, critic=self.lstm is not None)
            latent = self.layers.policy(features).float()
        return self.head.sample(latent, noise, observations.get(ACTION_MASK)), state

    @torch.no_grad()
    def values(self, observations: Tensors, state: Tensors, *, episode_starts: Tensor) -> Tensor:
        """V [N] of observations, given the recurrent state before them."""
        with self._autocast():
            features = self._features(observations)
            (_, features), _ = self._recur(features, state, episode_starts, critic=True)
            latent = self.layers.value(features).float()
        return self.value_head(latent).squeeze(-1)  # type: ignore[no-any-return]

    def evaluate(self, batch: Batch, *, entropy_gradient: bool = False) -> Evaluation:
        """Log-probs, values and entropies [B, T] of the actions taken."""
        rows, steps = batch.mask_BT.shape
        given = dict(batch.observations)
        starts = given.pop(EPISODE_STARTS, batch.mask_BT)
        state = {name: given.pop(name)[:, 0] for name in STATE if name in given}
        flat = {name: values.flatten(0, 1) for name, values in given.items()}
        with self._autocast():
            both, _ = self._recur(self._features(flat), state, starts, critic=True)
            latent, value_latent = self.layers(*both)
        actions = batch.actions_BT.flatten(0, 1)
        logprobs, entropies = self.head.evaluate_actions(latent.float(), actions, flat.get(ACTION_MASK))
        values = self.value_head(value_latent.float()).squeeze(-1)
        entropies = entropies if entropy_gradient else entropies.detach()
        return Evaluation(*(part.reshape(rows, steps) for part in (logprobs, values, entropies)))

    def forward(self, observations: Any, deterministic: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Actions, values [N, 1] and log-probs of a tensor or tensors by name: what is exported elsewhere."""
        given = dict(observations) if isinstance(observations, dict) else {OBSERVATION: observations}
        for name, moments in self.moments.items():
            given[name] = moments.normalized(given[name], clip=CLIP_OBSERVATION)
        features, mask = self._features(given), given.get(ACTION_MASK)
        latent, value_latent = self.layers(features, features)
        noise = None if deterministic else self.noise(1, len(features), torch.default_generator)[0]
        actions = self.head.sample(latent, noise, mask)
        return actions, self.value_head(value_latent), self.head.evaluate_actions(latent, actions, mask)[0]

    def reference_logprobs(self, batch: Batch) -> Tensor | None:
        """There is no reference: the policy is randomly initialized."""
        return None

    def fingerprint(self) -> int:
        """Nothing is frozen."""
        return 0

    def state(self) -> dict[str, Any]:
        """What was learned outside of the weights: the moments of observations, by name."""
        return {name: moments.state() for name, moments in self.moments.items()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self.moments = {name: RunningMoments.restored(values) for name, values in state.items()}

    def load_extras(self, folder: Path) -> None:
        """Take over what `save` wrote. Raises InputError if it does not fit."""
        try:
            self.load_state_dict(read_tensors(folder / WEIGHTS))
            self.restore(json.loads((folder / MOMENTS).read_text(encoding="utf-8")))
        except (RuntimeError, OSError, ValueError, LookupError, TypeError) as error:
            raise InputError(f"{folder} does not fit this environment's policy: {one_line(error)}") from None

    def predict(
        self,
        observations: Arrays,
        state: Memory = None,
        episode_start: NDArray[Any] | None = None,
        *,
        noise_from: torch.Generator | None = None,
    ) -> tuple[NDArray[Any], Memory]:
        """Actions [N, ...] for observations by name, and the recurrent state; greedy without `noise_from`."""
        prepared = self.prepare(observations)
        rows = len(next(iter(prepared.values())))
        recurrent = self.initial_state(rows)
        if state is not None:
            parts = [torch.as_tensor(part, device=self.device) for part in state]
            if [part.shape for part in parts] != [part.shape for part in recurrent.values()]:
                raise InputError(f"predict: the state is not one that predict gave for {rows} observations")
            recurrent = dict(zip(recurrent, parts, strict=True))
        given = numpy.zeros(rows) if episode_start is None else episode_start
        starts = torch.as_tensor(given).bool().reshape(rows).to(self.device)
        noise = None if noise_from is None else self.noise(1, rows, noise_from)[0]
        actions, recurrent = self.act(prepared, recurrent, episode_starts=starts, noise=noise)
        return actions.cpu().numpy(), tuple(part.cpu().numpy() for part in recurrent.values()) or None

    def save(self, folder: Path) -> None:
        """Write weights (safetensors) and the moments of observations (JSON)."""
        tensors = {name: value.detach().contiguous().cpu() for name, value in self.state_dict().items()}
        save_file(tensors, folder / WEIGHTS)
        moments = json.dumps(self.state(), default=lambda tensor: tensor.tolist())
        (folder / MOMENTS).write_text(moments, encoding="utf-8")

    @torch.no_grad()
    def _check_features(self, width: int) -> None:
        """Raise InputError if the user's network fails, or returns something else than it says."""
        arrays = {name: numpy.zeros((2, *space.shape), space.dtype) for name, space in self.spaces.items()}
        device = next((parameter.device for parameter in self.extractor.parameters()), "cpu")
        try:
            shape = [*self._features({name: v.to(device) for name, v in self.prepare(arrays).items()}).shape]
        except Exception as error:
            failed = f"policy: your network fails on observations of this environment: {type(error).__name__}"
            raise InputError(f"{failed}: {one_line(error)}") from error
        if shape != [2, width]:
            raise InputError(f"policy: your network returns {shape} for 2 observations; not [2, {width}]")

    def _features(self, observations: Tensors) -> Tensor:
        """The user's network gets what the environment gives: a tensor, or a dict of them."""
        is_plain = not isinstance(self.extractor, Extractor) and list(self.spaces) == [OBSERVATION]
        features: Tensor = self.extractor(observations[OBSERVATION] if is_plain else observations)
        return features

    def _recur(self, features: Tensor, state: Tensors, starts: Tensor, *, critic: bool) -> Recurred:
        """Features of actor and critic after the LSTM; `features` [N, F] are rows of `starts` [B, T]."""
        if self.lstm is None or self.critic_lstm is None:
            return (features, features), state
        starts_BT = starts if starts.dim() == 2 else starts[:, None]
        features_BTF = features.reshape(*starts_BT.shape, -1)

        def after(lstm: EpisodicLSTM, names: tuple[str, ...]) -> Tensor:
            output_BTF, last = lstm(features_BTF, tuple(state[name] for name in names), starts_BT)
            new.update({} if last is None else zip(names, last, strict=True))
            return torch.flatten(output_BTF, 0, 1)

        new: Tensors = {}
        actor = after(self.lstm, STATE[:2])
        has_two = critic and self.critic_lstm is not self.lstm
        return (actor, after(self.critic_lstm, STATE[2:]) if has_two else actor), new

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.dtype != torch.bfloat16:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)
