"""`SFT`: supervised fine-tuning on examples."""

from pathlib import Path
from typing import Any

from surefoot.api.generate import Generates
from surefoot.api.session import HasSession, Session, check_policy, open_folder, resume, supervised_config
from surefoot.build.language import build_demonstrations, build_policy
from surefoot.build.preflight import preflight
from surefoot.config import Config, CriticConfig, SFTConfig, setting_keys, with_settings
from surefoot.policies.lm.policy import CausalLMPolicy
from surefoot.storage.run_folder import RunFolder


@with_settings(setting_keys("sft"))
class SFT(HasSession, Generates):
    """Fine-tune a language model on examples of what it should write (supervised fine-tuning).

    `policy` is an asset's name, a local model folder, a Hugging Face hub id or a loaded `CausalLMPolicy`;
    `data` a JSONL file, a list or a `datasets.Dataset` of `{"text": …}` rows or strings, of `{"prompt": …,
    "completion": …}` or of `{"messages": […]}`, all of one kind. The loss is the negative log-likelihood of
    the text, of the completions, or of the assistant's messages, with their end tokens.
    """

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
        self.config = supervised_config("sft", policy, None if run else data, config, settings)
        if run is None:
            preflight(self.config)
        assert self.config.sft is not None
        self.data = build_demonstrations(self.config.sft, data)
        if "messages" in self.data.train[0].contents:  # what learnt chats is asked in one
            chat = self.config.generation.model_copy(update={"chat": True})
            self.config = self.config.model_copy(update={"generation": chat})
        self.policy = policy if isinstance(policy, CausalLMPolicy) else build_policy(self.config)
        self._session = Session(self.config, self.policy, self.data, run=run, verbose=verbose)

    def learn(self, total_epochs: int | None = None, callback: Any = None) -> "SFT":
        """Train for `total_epochs` more passes over the examples, or to the end that was asked for last.

        `callback` is a function, a `BaseCallback` or a list of them. Raises Interrupted after a signal.
        """
        self._session.learn(total_epochs, "total_epochs", callback=callback, model=self)
        return self

    def evaluate(self, examples: int | None = None) -> dict[str, float]:
        """`eval/…` metrics on the first `examples` held-out examples. Raises InputError without any."""
        return self._session.evaluate(examples, "examples")

    def save(self, folder: str | Path) -> None:
        """Write a Hugging Face folder that `AutoModelForCausalLM.from_pretrained` opens, the adapter merged
        in: what `PPO(folder, task)` takes next. Raises InputError if the disk does not take it.
        """
        self._session.save(folder)

    @classmethod
    def load(
        cls, folder: str | Path, data: Any = None, *, verbose: int = 1, accept_changes: bool = False
    ) -> "SFT":
        """Go on from a run folder, or train what `save` wrote further.

        `data` are the examples where they were given in Python, and always after `save`. Raises InputError
        for a folder of another kind, or, unless `accept_changes`, data or a model that the run didn't have.
        """
        config, run = open_folder(folder, "SFT", is_given=data is not None)
        if run is None:
            kept: dict[str, Any] = {name: getattr(config, name) for name in ("seed", "device", "generation")}
            kept["policy"] = config.policy.model_copy(update={"critic": CriticConfig()})
            return cls(str(folder), data, config=Config(sft=SFTConfig(), **kept), verbose=verbose)
        given: dict[str, Any] = {"config": config, "verbose": verbose, "accept_changes": accept_changes}
        return resume(run, cls, config.policy.model, data, **given)
