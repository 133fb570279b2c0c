"""The section `policy`: the model that is trained, its adapter, critic or network."""

from typing import Literal

from pydantic import field_validator, model_validator

from surefoot.config.fields import Fraction, ModelPath, Positive, Section, setting
from surefoot.config.messages import short

NETWORKS = tuple(f"{net}{lstm}Policy" for lstm in ("", "Lstm") for net in ("Mlp", "Cnn", "MultiInput"))


class AdapterConfig(Section):
    """A LoRA adapter (Hu et al. 2021, arXiv:2106.09685). With it switched off the model is the reference."""

    rank: Positive = setting(16, "Rank of the adapter.")
    alpha: float = setting(32.0, "The adapter's output is multiplied by alpha / rank.", gt=0)
    targets: str | list[str] = setting("all-linear", "List of module names to adapt, or `all-linear`.")

    @field_validator("targets")
    @classmethod
    def _names(cls, targets: str | list[str]) -> str | list[str]:
        if not targets or (isinstance(targets, str) and targets != "all-linear"):
            raise ValueError(f"write all-linear or a list such as [q_proj, v_proj], not {short(targets)}")
        return targets


class CriticConfig(Section):
    """The value function."""

    kind: Literal["shared", "adapter", "separate"] = setting(
        "shared",
        "A zero-initialized head on the policy's last hidden state, on that of a second LoRA adapter over "
        "its frozen base, or on a separate transformer that is trained whole.",
    )
    stop_gradient: bool = setting(False, "`shared`: value (or reward) losses train the head alone.")
    model: ModelPath | None = setting(
        None, "`separate`: model or reward model of the same tokenizer; `null`: the base."
    )
    learning_rate: float | None = setting(None, "Peak, if not `shared`; `null`: ppo.learning_rate.", gt=0)
    gae_lambda: Fraction | None = setting(None, "λ of the critic's targets; `null`: that of the advantages.")
    warmup_updates: int = setting(0, "First updates, in which the critic alone is trained.", ge=0)

    @model_validator(mode="after")
    def _of_one_kind(self) -> "CriticConfig":
        for name, kind in (("stop_gradient", "shared"), ("model", "separate")):
            if getattr(self, name) and self.kind != kind:
                raise ValueError(f"{name} is for kind: {kind}, and this is {self.kind}; leave it out")
        if self.learning_rate is not None and self.kind == "shared":
            raise ValueError("learning_rate is for kind: adapter or separate; leave it out with shared")
        return self


_Usual = Literal["tanh", "relu", "elu", "gelu", "silu", "leaky_relu", "sigmoid", "mish"]
_Rare = Literal["selu", "celu", "softplus", "relu6", "softsign", "hardtanh", "hardswish", "identity"]
Activation = Literal[_Usual, _Rare]


class NetworkConfig(Section):
    """The network of `MlpPolicy` and its kin; names as in Stable-Baselines3's `policy_kwargs`."""

    net_arch: list[Positive] | dict[Literal["pi", "vf"], list[Positive]] | None = setting(
        None, "Widths of hidden layers, or `{pi: [64], vf: [64]}`; `null`: `[64, 64]`, none after a CNN."
    )
    activation: Activation = setting("tanh", "Between layers.")
    share: bool = setting(False, "One trunk for policy and value instead of two (layers, and LSTM).")
    ortho_init: bool = setting(True, "Orthogonal initialization: gain √2; actions 0.01, the value 1.")
    log_std_init: float = setting(0.0, "Initial log standard deviation of continuous actions.")
    use_sde: bool = setting(False, "State-dependent exploration (Raffin et al. 2021, arXiv:2005.05719).")
    sde_sample_freq: int = setting(-1, "Steps between two samples of its noise; -1: once per update.", ge=-1)
    lstm_hidden_size: Positive = setting(256, "Width of the LSTM of recurrent policies.")


class PolicyConfig(Section):
    """The model that is trained."""

    model: ModelPath = setting(
        "smollm2-135m-instruct",
        "A name `surefoot fetch` knows, a local folder, or a Hugging Face hub id; with `env` the network: "
        "`MlpPolicy`, `CnnPolicy`, `MultiInputPolicy`, or recurrent: `MlpLstmPolicy` and so on.",
    )
    adapter: AdapterConfig | None = setting(AdapterConfig(), "LoRA adapter; `null`: all weights are trained.")
    critic: CriticConfig = setting(CriticConfig(), "The value function.")
    network: NetworkConfig = setting(NetworkConfig(), "The network of `MlpPolicy` and its kin.")
    dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", "Of computation and frozen weights; trained: float32; `auto`: bfloat16 where it is fast."
    )

    @model_validator(mode="after")
    def _adapters_together(self) -> "PolicyConfig":
        if self.critic.kind == "adapter" and self.adapter is None:
            raise ValueError("critic.kind: adapter needs policy.adapter, which is null; use separate")
        return self
