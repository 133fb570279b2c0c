"""`SFT` and `DPO`: a language model learns from rows of data."""

from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from surefoot.api.generate import Generates
from surefoot.api.session import HasSession, Session, check_policy, open_folder, resume, supervised_config
from surefoot.build.language import build_examples, build_policy
from surefoot.build.preflight import preflight
from surefoot.config import SUPERVISED, Config, CriticConfig, setting_keys, with_settings
from surefoot.data.demonstrations import Demonstrations
from surefoot.data.preferences import PreferenceDataset
from surefoot.policies.lm.policy import CausalLMPolicy
from surefoot.storage.run_folder import RunFolder
from surefoot.types import Demonstration

Self = TypeVar("Self", bound="Supervised")


class Supervised(HasSession, Generates, Protocol):
    """A language model and rows of data; `section` is that of its settings."""

    section: ClassVar[str]
    data: Demonstrations | PreferenceDataset

    def __init__(
        self,
        policy: str | Path | CausalLMPolicy,
        data: Any = None,
        *,
        config: Config | None = None,
        verbose: int = 1,
        run: RunFolder | None = None,
        **settings: Any,
    ):
        check_policy(policy, settings, CausalLMPolicy)
        self.config = supervised_config(self.section, policy, None if run else data, config, settings)
        if run is None:
            preflight(self.config)
        self.data = build_examples(self.config, data)
        first = self.data.train[0]
        asked = first.contents.get("messages") if isinstance(first, Demonstration) else first.prompt
        if isinstance(asked, list):
            chat = self.config.generation.model_copy(update={"chat": True})  # as it has learned
            self.config = self.config.model_copy(update={"generation": chat})
        self.policy = policy if isinstance(policy, CausalLMPolicy) else build_policy(self.config)
        self._session = Session(self.config, self.policy, self.data, run=run, verbose=verbose)

    def learn(self: Self, total_epochs: int | None = None, callback: Any = None) -> Self:
        """Train for `total_epochs` more passes over the data, or to the end that was asked for last.

        `callback` is a function, a `BaseCallback` or a list of them. Raises Interrupted after a signal.
        """
        self._session.learn(total_epochs, "total_epochs", callback=callback, model=self)
        return self

    def evaluate(self, examples: int | None = None) -> dict[str, float]:
        """`eval/…` metrics on the first `examples` held-out rows. Raises InputError without any."""
        return self._session.evaluate(examples, "examples")

    def save(self, folder: str | Path) -> None:
        """Write a Hugging Face folder that `AutoModelForCausalLM.from_pretrained` opens, the adapter merged
        in: what `PPO(folder, task)` takes next. Raises InputError if the disk does not take it.
        """
        self._session.save(folder)

    @classmethod
    def load(
        cls: type[Self],
        folder: str | Path,
        data: Any = None,
        *,
        verbose: int = 1,
        accept_changes: bool = False,
    ) -> Self:
        """Go on from a run folder, or train what `save` wrote further.

        `data` are the rows where they were given in Python, and always after `save`. Raises InputError for a
        folder of another kind, or, unless `accept_changes`, data or a model that the run didn't have.
        """
        config, run = open_folder(folder, SUPERVISED[cls.section], is_given=data is not None)
        if run is None:
            kept: dict[str, Any] = {name: getattr(config, name) for name in ("seed", "device", "generation")}
            kept |= {"policy": config.policy.model_copy(update={"critic": CriticConfig()}), cls.section: {}}
            return cls(str(folder), data, config=Config(**kept), verbose=verbose)
        given: dict[str, Any] = {"config": config, "verbose": verbose, "accept_changes": accept_changes}
        return resume(run, cls, config.policy.model, data, **given)


@with_settings(setting_keys("sft"))
class SFT(Supervised):
    """Fine-tune a language model on examples of what it should write (supervised fine-tuning).

    `policy` is an asset's name, a local model folder, a Hugging Face hub id or a loaded `CausalLMPolicy`;
    `data` a JSONL file, a list or a `datasets.Dataset` of `{"text": …}` rows or strings, of `{"prompt": …,
    "completion": …}` or of `{"messages": […]}`, all of one kind. The loss is the negative log-likelihood of
    the text, of the completions, or of the assistant's messages, with their end tokens.
    """

    section = "sft"


@with_settings(setting_keys("dpo"))
class DPO(Supervised):
    """Train a language model to prefer the better completion of each pair (direct preference optimization).

    `policy` is an asset's name, a local model folder, a Hugging Face hub id or a loaded `CausalLMPolicy`;
    `data` a JSONL file, a list or a `datasets.Dataset` of pairs, `{"prompt"?, "chosen", "rejected"}`, as
    `RewardModel` takes them. The reference is the model as it is given: with the adapter off, or a frozen
    copy.
    """

    section = "dpo"
