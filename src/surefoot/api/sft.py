"""`SFT`: supervised fine-tuning on examples, with the loop, the run folder and the resume of `PPO`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

from surefoot.api.ppo import check_count, generate_text, merge, save_policy
from surefoot.build.language import build_demonstrations, build_policy
from surefoot.build.preflight import preflight
from surefoot.build.training import build_training
from surefoot.config import Config, make_config, nested, sections_for
from surefoot.errors import InputError
from surefoot.policies.lm.policy import CausalLMPolicy
from surefoot.rollout.demonstrations import DemonstrationRollout
from surefoot.storage.run_folder import RunFolder
from surefoot.train import loop
from surefoot.train.observers.watch import watched


class SFT:
    """Teach a language model to write as examples do.

    `policy` is an asset's name, a local model folder, a Hugging Face hub id or a loaded `CausalLMPolicy`; `data` a JSONL
    file, a list or a `datasets.Dataset` of `{"text": …}` rows or strings, of `{"prompt": …, "completion": …}` or of
    `{"messages": […]}`, all of one kind. The loss is the negative log-likelihood of the text, of the completions, or of the
    assistant's messages, with their end tokens.

    Settings are the fields of the configuration by their plain names: `learning_rate=1e-4`, `epochs=2`, `max_tokens=256`,
    `adapter=None`, `seed=3`, `run_name="mine"`; `config` gives them all at once. `verbose=0` shows nothing; `run` is an
    existing run folder to go on in (`SFT.load` passes it). Raises InputError for anything unusable, before a model is
    loaded where that can be known.
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
        settings_of_run = sections_for(config, "sft")
        settings_of_run["sft"] = settings_of_run.get("sft") or {}
        settings_of_run["new_model"] = (
            None  # made before; with it policy.model could be nothing but a folder's path
        )
        merge(settings_of_run, nested(settings, "sft"))
        if data is not None and run is None:  # what is given goes before what the configuration names
            settings_of_run["sft"]["data"] = str(data) if isinstance(data, (str, Path)) else None
        if isinstance(policy, (str, Path)):
            settings_of_run.setdefault("policy", {})["model"] = str(policy)
        elif not isinstance(policy, CausalLMPolicy):
            kind = type(policy).__name__
            raise InputError(
                f"policy: expected a model's name or folder, or what load_policy gives, got a {kind}"
            )
        self.config = make_config(settings_of_run, where="SFT(...)")
        self.verbose = verbose
        if run is None:
            preflight(self.config)
        # A file may be named once more for a run that goes on; its own name for it stays.
        assert self.config.sft is not None
        self.data = build_demonstrations(self.config.sft, data)
        self.policy = policy if isinstance(policy, CausalLMPolicy) else build_policy(self.config)
        self._folder = run
        self._training: loop.Training | None = None

    @property
    def run_folder(self) -> Path | None:
        """Where the run lies, once `learn` has begun."""
        return self._folder.path if self._folder else None

    @property
    def is_finished(self) -> bool:
        """Whether the run that `learn` began has been trained to its end."""
        return self._training is not None and self._training.is_finished

    def learn(self, total_epochs: int | None = None) -> SFT:
        """Train for `total_epochs` more passes over the examples, or, without a number, to the end that was asked for last.

        Everything the run leaves is in `run_folder`. A new run starts Python's, NumPy's and torch's global generators from
        its seed. Raises Interrupted after SIGTERM or Ctrl-C, once it has saved; `learn()` then goes on.
        """
        check_count("total_epochs", total_epochs)
        training = self._prepare_training()
        if total_epochs is not None:
            training.total = training.progress.collected + total_epochs * len(self.data.train)
        with watched(training, show=bool(self.verbose)):
            if not training.is_finished:
                loop.run(training)
        return self

    def evaluate(self, examples: int | None = None) -> dict[str, float]:
        """`eval/nll` and `eval/perplexity` of the current policy on held-out examples, the first `examples` of them or all.

        Raises InputError without any.
        """
        check_count("examples", examples)
        training = self._prepare_training()
        if not training.rollout.can_evaluate:
            raise InputError(
                "no held-out examples to evaluate on; give SFT more examples, or a larger held_out"
            )
        metrics, _ = training.rollout.evaluate(examples or len(self.data.held_out))
        return metrics

    @overload
    def generate(self, prompts: str, *, seed: int = 0, **sampling: Any) -> str: ...
    @overload
    def generate(self, prompts: Sequence[Any], *, seed: int = 0, **sampling: Any) -> list[str]: ...
    def generate(self, prompts: Any, *, seed: int = 0, **sampling: Any) -> str | list[str]:
        """Continue one prompt or several; a string each. `sampling` overrides the run's `max_new_tokens`,
        `temperature`, `top_k` and `top_p`.
        """
        return generate_text(self.policy, prompts, config=self.config, seed=seed, **sampling)

    def save(self, folder: str | Path) -> None:
        """Write a Hugging Face folder that `AutoModelForCausalLM.from_pretrained` opens, the adapter merged in: what
        `PPO(folder, task)` takes next. Raises InputError if the disk does not take it.
        """
        save_policy(self.policy, self.config, Path(folder))

    @classmethod
    def load(cls, folder: str | Path, data: Any = None, *, verbose: int = 1) -> SFT:
        """Go on from a run folder, bit for bit, with its optimiser and counters.

        `data` is for a run whose examples were given in Python. Raises InputError if it is no supervised run, or the data
        is not what the run was begun with.
        """
        run = RunFolder.open(folder)
        config = run.config()
        if config.sft is None:
            raise InputError(f"{folder} is no supervised run; open it with {config.opener}.load")
        if data is None and config.sft.data is None:
            raise InputError(
                f"{folder} was started from Python; go on there with its examples: SFT.load(folder, data)"
            )
        run.hold()
        try:
            model = cls(config.policy.model, data, config=config, verbose=verbose, run=run)
            model._prepare_training()
        except BaseException:
            run.release()
            raise
        return model

    def _prepare_training(self) -> loop.Training:
        if self._training is None:
            self._training = build_training(self.config, self.policy, self.data, self._folder)
            self._folder = self._training.folder
            rollout = self._training.rollout
            assert isinstance(rollout, DemonstrationRollout)
            if rollout.notice and self.verbose:
                print(rollout.notice)
        return self._training
