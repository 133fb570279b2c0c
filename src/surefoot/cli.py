"""The command line: one function a verb. Imports nothing heavy before a verb needs it."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from surefoot import __version__
from surefoot.errors import InputError, SurefootError

if TYPE_CHECKING:
    from surefoot.ppo import PPO

EPILOG = """\
every field of the configuration is a flag: --seed 3 --ppo.kl-coef 0.02 --run.name mine
(surefoot ppo --help lists them). Exit codes: 0 done, 2 bad input, 3 stopped on non-finite steps,
130 Ctrl-C and 143 SIGTERM, both with a checkpoint saved.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `surefoot`. Ends with an exit code; the user's mistakes are one line, bugs are tracebacks."""
    parser = _parser()
    options, flags = parser.parse_known_args(arguments)
    # Kernels and libraries warn about things the user can do nothing about; Surefoot's own messages are enough.
    warnings.filterwarnings("ignore")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        options.verb(options, _overrides(flags, allowed=options.takes_fields))
    except SurefootError as error:
        print(f"surefoot: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def ppo(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    """Train from a YAML file."""
    from surefoot.config import load_config

    config = load_config(options.file, overrides)
    if config.task is None:
        raise InputError(f"{options.file}: no task; name task.prompts and task.reward")
    from surefoot.build import build_task
    from surefoot.ppo import PPO

    model = PPO(config.policy.model, build_task(config), config=config)
    _train(model)


def resume(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    """Continue a run from its newest whole checkpoint."""
    from surefoot.ppo import PPO
    from surefoot.run import RunFolder

    if RunFolder.open(options.run).config().task is None:
        raise InputError(f"{options.run} was started from Python with its own task; continue it there: PPO.load(folder, task)")
    _train(PPO.load(options.run))


def generate(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    """Continue a text with a run's best policy, or with a model."""
    from surefoot.ppo import PPO

    model = PPO.open(options.model)
    print(
        model.generate(
            [[{"role": "user", "content": options.text}]] if options.chat else [options.text],
            seed=options.seed,
            **_sampling(options),
        )[0]
    )


def _train(model: PPO) -> None:
    """Run to the end and leave the trained model beside the run."""
    model.learn()
    assert model.run_folder is not None
    model.save(model.run_folder / "model")
    print(f"model: {model.run_folder / 'model'}\nrun:   {model.run_folder}")
    print(f'next:  surefoot generate {model.run_folder} "your text"')


def fetch(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    """Get a pinned model or data set into the cache and print its path."""
    from surefoot import assets

    print(assets.fetch(options.name, say=lambda line: print(line, file=sys.stderr)))


def demo(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    """Fine-tune a real model towards a real reward, about five minutes on two cores."""
    from surefoot.demo import run_demo

    run_demo(overrides)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="surefoot",
        description="PPO for language models, and for anything with a reward.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"surefoot {__version__}")
    verbs = parser.add_subparsers(required=True, metavar="VERB", title="verbs")

    def verb(function: object, usage: str, *, takes_fields: bool = False) -> argparse.ArgumentParser:
        summary = (getattr(function, "__doc__", "") or "").splitlines()[0]
        name = getattr(function, "__name__", "")
        kind = _FieldsHelp if takes_fields else argparse.ArgumentParser
        sub = verbs.add_parser(name, help=summary, description=summary, usage=f"surefoot {name} {usage}", allow_abbrev=False)
        sub.__class__ = kind
        sub.set_defaults(verb=function, takes_fields=takes_fields)
        return sub

    verb(ppo, "FILE [--section.field value ...]", takes_fields=True).add_argument("file", metavar="FILE", help="YAML file")
    verb(resume, "RUN").add_argument("run", metavar="RUN", help="run folder")
    writer = verb(generate, "RUN|MODEL TEXT [options]")
    writer.add_argument("model", metavar="RUN|MODEL", help="run folder, model folder, asset name or hub id")
    writer.add_argument("text", metavar="TEXT", help="what to continue")
    writer.add_argument("--chat", action="store_true", help="send TEXT as a user message through the chat template")
    writer.add_argument("--seed", type=int, default=0)
    writer.add_argument("--max-new-tokens", type=int, metavar="N")
    writer.add_argument("--temperature", type=float, metavar="T", help="0 is greedy")
    writer.add_argument("--top-k", type=int, metavar="K")
    writer.add_argument("--top-p", type=float, metavar="P")
    verb(fetch, "NAME").add_argument("name", metavar="NAME", help="name of the asset; a wrong one lists them")
    verb(demo, "[--section.field value ...]", takes_fields=True)
    return parser


class _FieldsHelp(argparse.ArgumentParser):
    """A verb whose help lists the configuration's fields."""

    def format_help(self) -> str:
        from surefoot.config import field_table

        rows = [f"  --{key.replace('_', '-'):32} {default}" for key, _, default, _ in field_table()]
        return super().format_help() + "\nfields and their defaults (docs/config.md explains each):\n" + "\n".join(rows) + "\n"


def _overrides(flags: list[str], *, allowed: bool) -> dict[str, str]:
    """`--section.field value` and `--section.field=value` as a dict. Raises InputError for anything else."""
    overrides: dict[str, str] = {}
    rest = list(flags)
    while rest:
        flag = rest.pop(0)
        if not allowed or not flag.startswith("--") or len(flag) < 3:
            raise InputError(f"unknown argument {flag!r}; see surefoot --help")
        key, equals, value = flag[2:].partition("=")
        if not equals:
            if not rest:
                raise InputError(f"{flag} needs a value")
            value = rest.pop(0)
        overrides[key] = value
    return overrides


def _sampling(options: argparse.Namespace) -> dict[str, float]:
    names = ("max_new_tokens", "temperature", "top_k", "top_p")
    return {name: value for name in names if (value := getattr(options, name)) is not None}


if __name__ == "__main__":
    main()
