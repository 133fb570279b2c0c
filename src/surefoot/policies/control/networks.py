"""Networks for control: observations to features, an LSTM, and the layers before action and value."""

import math
from collections.abc import Collection
from typing import Any, TypeAlias

import numpy
import torch
from torch import Tensor, nn
from torch.nn import functional

from surefoot.config import NetworkConfig
from surefoot.errors import InputError
from surefoot.types import LARGEST_BOUND, OBSERVATION

# By torch's names in lower case, `leaky_relu` with an underscore.
_NAMES = "Tanh ReLU ELU GELU SiLU Sigmoid Mish SELU CELU Softplus ReLU6 Softsign Hardtanh Hardswish Identity"
ACTIVATIONS: dict[str, type[nn.Module]] = {name.lower(): getattr(nn, name) for name in _NAMES.split()}
ACTIVATIONS["leaky_relu"] = nn.LeakyReLU
State: TypeAlias = tuple[Tensor, Tensor]  # h and c of an LSTM, [N, width]


class Extractor(nn.Module):
    """Observations [N, ...] by name -> features [N, features_dim], concatenated in the order of the space.

    Box is flattened, images and bytes scaled by what their space allows (`scale_of`), but those `normalized`;
    Discrete and MultiDiscrete become one-hot, MultiBinary numbers. With `images`, a Box that looks like an
    image goes through a Nature CNN, one like a board through a small CNN.
    """

    def __init__(
        self,
        spaces: dict[str, Any],
        *,
        images: bool,
        needs_images: bool = False,
        normalized: Collection[str] = (),
    ):
        super().__init__()
        self.parts: dict[str, Any] = {}
        self.cnns = nn.ModuleDict()
        self.features_dim = 0
        for name, space in spaces.items():
            kind = type(space).__name__
            scale = None if name in normalized else scale_of(space)
            if images and (is_image(space) or is_board(space)):
                cnn = (NatureCNN if is_image(space) else BoardCNN)(space.shape, scale or 1.0)
                self.cnns[name.replace(".", "_")] = self.parts[name] = cnn
                self.features_dim += cnn.features_dim
            elif kind in ("Discrete", "MultiDiscrete"):
                self.parts[name] = [int(space.n)] if kind == "Discrete" else space.nvec.flatten().tolist()
                self.features_dim += sum(self.parts[name])
            elif kind in ("Box", "MultiBinary"):
                self.parts[name] = scale
                self.features_dim += math.prod(space.shape)
            else:
                what = f"the observation space {kind} ({name}) is not supported"
                raise InputError(f"env: {what}; flatten it with a wrapper")
        if needs_images and not self.cnns:
            needed = "images (Box of 3 dimensions, at least 36 × 36) or boards (float, [H, W, C])"
            raise InputError(f"policy.model: CnnPolicy needs {needed}; use MlpPolicy")

    def forward(self, observations: dict[str, Tensor]) -> Tensor:
        """Features [N, features_dim] float32."""
        features = [self._features(observations[name], part) for name, part in self.parts.items()]
        return features[0] if len(features) == 1 else torch.cat(features, -1)

    def _features(self, values: Tensor, part: Any) -> Tensor:
        if isinstance(part, nn.Module):
            return part(values)  # type: ignore[no-any-return]
        if not isinstance(part, list):
            numbers = values.reshape(len(values), -1).float()
            return numbers if part is None else numbers * part
        columns = values.long().reshape(len(values), len(part)).unbind(-1)
        hot = [functional.one_hot(column, size) for column, size in zip(columns, part, strict=True)]
        return torch.cat(hot, -1).float()


class Preprocessed(nn.Module):
    """A features extractor of Stable-Baselines3's with what it expects.

    Images have their channels first and are divided by 255, counts are one-hot, all is float32.
    """

    def __init__(self, inner: Any, spaces: dict[str, Any]):
        super().__init__()
        self.inner, self.features_dim = inner, int(inner.features_dim)
        self.channels_last = {n for n, s in spaces.items() if len(s.shape) == 3 and s.shape[2] < s.shape[0]}
        counts = {n: s for n, s in spaces.items() if type(s).__name__ in ("Discrete", "MultiDiscrete")}
        self.counts = {n: Extractor({n: s}, images=False) for n, s in counts.items()}

    def forward(self, observations: Any) -> Tensor:
        """Features [N, features_dim]."""
        if isinstance(observations, Tensor):
            given: Any = self._part(OBSERVATION, observations)
        else:
            given = {name: self._part(name, values) for name, values in observations.items()}
        return self.inner(given)  # type: ignore[no-any-return]

    def _part(self, name: str, values: Tensor) -> Tensor:
        if name in self.counts:
            return self.counts[name]({name: values})  # type: ignore[no-any-return]
        if name in self.channels_last:
            values = values.permute(0, 3, 1, 2)
        is_image = values.dim() == 4 and values.dtype == torch.uint8
        return values.float() / 255 if is_image else values.float()


class NatureCNN(nn.Module):
    """Mnih et al. 2015 (doi:10.1038/nature14236): three convolutions and a layer of 512 with ReLU.

    Images are [N, C, H, W] or [N, H, W, C], whichever of the two puts the fewest channels first or last; they
    are multiplied by `scale`.
    """

    features_dim = 512

    def __init__(self, shape: tuple[int, ...], scale: float):
        super().__init__()
        self.channels_last, self.scale = shape[-1] < shape[0], scale
        channels, height, width = (shape[2], shape[0], shape[1]) if self.channels_last else shape
        # Channels last is what CPU kernels and tensor cores are fastest with.
        sizes = ((channels, 32, 8, 4), (32, 64, 4, 2), (64, 64, 3, 1))
        self.layers = nn.Sequential(*(part for size in sizes for part in (nn.Conv2d(*size), nn.ReLU())))
        with torch.no_grad():
            flat = self.layers(torch.zeros(1, channels, height, width)).numel()
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)
        self.linear = nn.Linear(flat, self.features_dim)

    def forward(self, images: Tensor) -> Tensor:
        """Features [N, 512]."""
        images = images.permute(0, 3, 1, 2) if self.channels_last else images
        # One copy, straight to what the convolutions compute in: bytes are exact in bfloat16 too. The scale
        # goes into the first weights, of which there are fewer.
        device = images.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
        values = images.to(dtype, memory_format=torch.channels_last)
        first: Any = self.layers[0]
        hidden = functional.conv2d(values, first.weight * self.scale, first.bias, first.stride)
        return torch.relu(self.linear(self.layers[1:](hidden).flatten(1)))


class BoardCNN(nn.Module):
    """Three 3 × 3 convolutions that keep the size of a board [N, H, W, C], and a layer of 256, with ReLU."""

    features_dim = 256

    def __init__(self, shape: tuple[int, ...], scale: float):
        super().__init__()
        height, width, channels = shape
        self.scale = scale
        pairs = [(nn.Conv2d(wide, 32, 3, padding=1), nn.ReLU()) for wide in (channels, 32, 32)]
        self.layers = nn.Sequential(*(part for pair in pairs for part in pair))
        self.linear = nn.Linear(32 * height * width, self.features_dim)

    def forward(self, boards: Tensor) -> Tensor:
        """Features [N, 256]."""
        scaled = self.scale * boards.float().permute(0, 3, 1, 2)
        return torch.relu(self.linear(self.layers(scaled).flatten(1)))


class EpisodicLSTM(nn.Module):
    """LSTM over sequences that are kept whole; its state is zero where an episode starts."""

    def __init__(self, features: int, width: int):
        super().__init__()
        self.lstm = nn.LSTM(features, width)

    def forward(self, features_BTF: Tensor, state: State, starts_BT: Tensor) -> tuple[Tensor, Any]:
        """Outputs [B, T, width] and the state after the last step. `starts_BT`: an episode begins there."""
        if features_BTF.shape[1] == 1 or not bool(starts_BT[:, 1:].any()):
            goes_on = (~starts_BT[:, :1]).float()
            h, c = ((part * goes_on)[None].contiguous() for part in state)
            output_TBF, (h, c) = self.lstm(features_BTF.transpose(0, 1), (h, c))
            return output_TBF.transpose(0, 1), (h[0], c[0])
        return self._in_segments(features_BTF, state, starts_BT)

    def _in_segments(self, features_BTF: Tensor, state: State, starts_BT: Tensor) -> tuple[Tensor, None]:
        """Each episode's part of a row is a sequence: one call of the LSTM over all of them, padded."""
        rows, steps = starts_BT.shape
        begins_BT = starts_BT.clone()
        begins_BT[:, 0] = True
        row_S, begin_S = begins_BT.nonzero(as_tuple=True)
        segment_BT = begins_BT.flatten().cumsum(0).reshape(rows, steps) - 1
        offset_BT = torch.arange(steps, device=starts_BT.device) - begin_S[segment_BT]
        longest = int(offset_BT.max()) + 1
        padded = features_BTF.new_zeros(longest, len(row_S), features_BTF.shape[-1])
        padded = padded.index_put((offset_BT, segment_BT), features_BTF)
        goes_on = ((begin_S == 0) & ~starts_BT[row_S, 0])[:, None].float()
        h, c = ((part[row_S] * goes_on)[None] for part in state)
        output, _ = self.lstm(padded, (h, c))
        # The state after a row is needed only where rows go on, which is while acting: one step at a time.
        return output[offset_BT, segment_BT], None


class Tower(nn.Sequential):
    """Linear layers with an activation after each, [N, width] -> [N, last width].

    Without gradient, in float32 on a CPU, tanh is NumPy's, which is several times as fast as torch's.
    """

    def __init__(self, width: int, widths: list[int], activation: type[nn.Module]):
        pairs = zip([width, *widths], widths, strict=False)
        super().__init__(*(part for pair in pairs for part in (nn.Linear(*pair), activation())))
        self.is_tanh = activation is nn.Tanh and bool(widths)

    def forward(self, values: Tensor) -> Tensor:
        """The last layer's activations."""
        is_plain = values.device.type == "cpu" and values.dtype == torch.float32
        is_traced = torch.jit.is_tracing() or torch.compiler.is_compiling()  # type: ignore[attr-defined]
        is_recorded = torch.is_grad_enabled() or is_traced
        if is_recorded or not (self.is_tanh and is_plain) or torch.is_autocast_enabled("cpu"):
            return super().forward(values)  # type: ignore[no-any-return]
        linears: Any = list(self)[::2]
        for linear in linears:
            values = torch.addmm(linear.bias, values, linear.weight.t())
            numbers = values.numpy()
            numpy.tanh(numbers, out=numbers)
        return values


class Layers(nn.Module):
    """The hidden layers before the action and before the value: two towers, or one that both share."""

    def __init__(self, width: int, config: NetworkConfig, default: list[int]):
        super().__init__()
        arch = default if config.net_arch is None else config.net_arch
        pi, vf = (arch.get("pi", []), arch.get("vf", [])) if isinstance(arch, dict) else (arch, arch)
        if config.share and pi != vf:
            raise InputError("policy.network: one shared trunk cannot have different widths for pi and vf")
        self.policy = Tower(width, pi, ACTIVATIONS[config.activation])
        self.value = self.policy if config.share else Tower(width, vf, ACTIVATIONS[config.activation])
        self.is_shared = config.share
        self.latent_dim_pi, self.latent_dim_vf = (widths[-1] if widths else width for widths in (pi, vf))

    def forward(self, actor_features: Tensor, critic_features: Tensor) -> tuple[Tensor, Tensor]:
        """Latents of actor and critic, [N, latent_dim_pi] and [N, latent_dim_vf]."""
        latent = self.policy(actor_features)
        return latent, latent if self.is_shared else self.value(critic_features)


def is_image(space: Any) -> bool:
    """Whether a space is a Box of 3 dimensions that three convolutions fit into."""
    return type(space).__name__ == "Box" and len(space.shape) == 3 and sorted(space.shape)[1] >= 36


def scale_of(space: Any) -> float | None:
    """What images and bytes are multiplied by to lie within [-1, 1]; None for numbers that are used as given.

    They are what has 3 dimensions or is unsigned; 1 over the largest value that the space allows, where that
    is more than 1 (of floats 10: boards may hold small counts) and no mere limit of the data type.
    """
    if type(space).__name__ != "Box" or not (len(space.shape) == 3 or space.dtype.kind == "u"):
        return None
    most = float(max(numpy.abs(space.low.astype(float)).max(), numpy.abs(space.high.astype(float)).max()))
    return 1.0 / most if (10 if space.dtype.kind == "f" else 1) < most <= LARGEST_BOUND else None


def is_board(space: Any) -> bool:
    """Whether a space is a Box of 3 dimensions of small numbers, [H, W, C], too small to be an image."""
    is_box = type(space).__name__ == "Box" and len(space.shape) == 3
    return is_box and space.dtype.kind == "f" and not is_image(space)


def orthogonal(module: nn.Module, gain: float) -> None:
    """Orthogonal weights and zero biases, linear and convolutional (Saxe et al. 2013, arXiv:1312.6120)."""
    for layer in module.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            # Drawn in the plain order of dimensions: torch refuses others, such as channels last.
            layer.weight.data.copy_(nn.init.orthogonal_(torch.empty(layer.weight.shape), gain))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
