"""The command line: one function a verb. Imports nothing heavy before a verb needs it."""

from __future__ import annotations

import argparse
import difflib
import os
import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from surefoot import __version__
from surefoot.errors import InputError, SurefootError

if TYPE_CHECKING:
    from surefoot.api.runs import Run
    from surefoot.config import Config

EPILOG = """\
every field of the configuration is a flag: --seed 3 --ppo.kl-coef 0.02 --run.name mine
(surefoot ppo --help lists them). Exit codes: 0 done, 2 bad input, 3 stopped on non-finite steps,
130 Ctrl-C and 143 SIGTERM, both with a checkpoint saved.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `surefoot`.

    Ends with an exit code; the user's mistakes are one line, bugs are tracebacks.
    """
    _quieten()
    try:
        options, overrides = _parse(list(sys.argv[1:] if arguments is None else arguments))
        options.verb(options, overrides)
    except SurefootError as error:
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        _fail("stopped", 130)  # while loading or writing text: a run has its own words for it
    except BrokenPipeError:
        pass
    except OSError as error:
        _fail(f"OS error: {error}", 2)  # a full disk behind stdout, say
    finally:
        _flush()


def ppo(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    """Train with PPO from a YAML file."""
    _start(options, overrides)


def sft(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    """Fine-tune on examples (supervised) from a YAML file."""
    _start(options, overrides)


def new_model(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    """Make a randomly initialized language model and its tokenizer from the examples of a YAML file."""
    from surefoot.config import PolicyConfig

    config = _config(options, overrides, "new_model")
    if config.sft is None or config.sft.data is None:
        raise InputError(
            f"{options.file}: no text for the tokenizer to learn from; name a JSONL file as sft.data"
        )
    if config.policy.model == PolicyConfig().model:
        raise InputError(f"{options.file}: the new model needs a folder; name one as policy.model")
    if config.policy.adapter is not None:
        raise InputError(
            f"{options.file}: random weights are no base for an adapter; train all: policy.adapter: null"
        )
    from surefoot.api.new_model import write_new_model

    print(f"model: {write_new_model(config)}\nnext:  surefoot sft {shlex.quote(options.file)}")


def reward_model(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    """Train a reward model on pairs or ratings from a YAML file."""
    _start(options, overrides)


def rejection_sampling(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    """Sample completions and keep the best as examples, from a YAML file."""
    _start(options, overrides)


def pipeline(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    """Run the stages of a YAML file one after the other, or go on with them where they were stopped."""
    from surefoot.api.pipeline import load_pipeline, run_pipeline

    stages = load_pipeline(options.file, overrides)
    run_pipeline(stages)
    print(f"done:  {stages[-1].product}")


def resume(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    """Continue a run from its newest whole checkpoint, as it was begun."""
    from surefoot.api import runs

    run = runs.resume(options.run)
    assert run.run_folder is not None
    product = runs.product(run.config, run.run_folder)
    if run.is_finished and product.exists():
        print(f"{options.run} is finished; its {_name_of(run.config)} is {product}")
    else:
        _finish(run)


def generate(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    """Continue a text with a run's best policy, or with a model."""
    from surefoot.config import GenerationConfig, with_sampling

    names = ("max_new_tokens", "temperature", "top_k", "top_p")
    sampling = {name: value for name in names if (value := getattr(options, name)) is not None}
    with_sampling(GenerationConfig(), sampling)  # before the model is loaded
    if not options.text.strip():
        raise InputError("generate: the text is empty; give it something to continue")
    from surefoot.api.ppo import PPO

    prompt = [{"role": "user", "content": options.text}] if options.chat else options.text
    print(PPO.open(options.model).generate([prompt], seed=options.seed, **sampling)[0])


def play(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    """Play a run's best policy in its environment: returns, a video of one episode, a plot."""
    from surefoot.cli.play import play_run

    play_run(options.run, episodes=options.episodes, output=options.output, kind=options.format)


def fetch(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    """Get a pinned model or data set into the cache and print its path."""
    from surefoot.data import assets

    print(assets.fetch(options.name))


def import_trl(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    """Turn a TRL set-up into a YAML file for ppo, or its value-head checkpoint into a model folder."""
    output = options.output and Path(options.output)
    if len(options.source) == 1 and (source := Path(options.source[0])).is_dir():
        if output is None:
            raise InputError(f"import-trl {source}: a folder is written; name a new one with --output")
        from surefoot.migrate.trl.value_head import import_value_head

        import_value_head(source, output)
        print(f"model: {output}")
        print(
            f"next:  PPO.load({str(output)!r}, task) in Python keeps the critic; surefoot ppo starts another"
        )
        return
    from surefoot.migrate.trl.translate import import_settings

    imported = import_settings(options.source)
    if output is None:
        print(imported.yaml(), end="")
    else:
        try:
            with output.open("x", encoding="utf-8") as file:
                file.write(imported.yaml())
        except FileExistsError:
            raise InputError(f"--output {output}: exists; name a new file") from None
    print(imported.notes(), file=sys.stderr)


def demo(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    """Fine-tune a real model towards a real reward, about five minutes on two cores."""
    from surefoot.cli.demo import run_demo

    run_demo(overrides)


def _config(options: argparse.Namespace, overrides: dict[str, str], section: str) -> Config:
    """The configuration in a verb's file; `section` may be missing where all of its defaults are wanted."""
    from surefoot.config import config_from, read_sections

    return config_from({section: {}} | read_sections(options.file), Path(options.file), overrides)


def _start(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    """Start the run of a verb's file and bring it to its end.

    Raises InputError for a file that is another verb's.
    """
    from surefoot.api import runs
    from surefoot.config import load_config

    verb = options.verb.__name__.replace("_", "-")
    config = (
        _config(options, overrides, "rejection_sampling")
        if verb == "rejection-sampling"
        else load_config(options.file, overrides)
    )
    if config.verb != verb and (verb == "ppo" or config.verb != "ppo"):
        section, file = config.verb.replace("-", "_"), shlex.quote(options.file)
        raise InputError(
            f"{options.file}: has {'an' if section == 'sft' else 'a'} {section} section; "
            f"that is for: surefoot {config.verb} {file}"
        )
    if config.verb != verb:
        section = verb.replace("-", "_")
        what = {"sft": "examples", "reward_model": "preferences"}[section]
        raise InputError(f"{options.file}: no {what} to learn from; name a JSONL file as {section}.data")
    runs.check(config, where=options.file)
    is_new = config.new_model is not None and "policy.model" not in overrides
    if is_new and not os.path.isdir(config.policy.model):
        first = f"surefoot new-model {shlex.quote(options.file)}"
        raise InputError(
            f"policy.model: no folder {config.policy.model} yet; make the new model first: {first}"
        )
    _finish(runs.start(config))


def _name_of(config: Config) -> str:
    return "model" if config.rejection_sampling is None else "examples"


def _finish(run: Run) -> None:
    """Bring a run to its end, and say what it left and what to do next."""
    from surefoot.api import runs

    product = runs.finish(run)
    config, folder = run.config, shlex.quote(str(run.run_folder))
    print(f"{_name_of(config) + ':':6} {product}\nrun:   {run.run_folder}")
    if config.rejection_sampling is not None:
        print(f"next:  surefoot sft FILE --sft.data {shlex.quote(str(product))}")
    elif config.reward_model is not None:
        print(f"next:  surefoot ppo FILE --task.reward {folder}")
    else:
        print(
            f'next:  surefoot generate {folder} "your text"'
            if config.env is None
            else f"next:  surefoot play {folder}"
        )


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and in its help, where asked, the configuration's fields."""

    takes_fields = False
    lists_fields = False

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see {self.prog} --help")

    def format_help(self) -> str:
        text = super().format_help()
        if not self.lists_fields:
            return text
        from surefoot.config import default_text, field_table

        rows = [f"  --{row.key.replace('_', '-'):32} {default_text(row.key)}" for row in field_table()]
        return f"{text}\nfields and their defaults (docs/config.md explains each):\n" + "\n".join(rows) + "\n"


def _parse(arguments: list[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    """The verb with its options, and the configuration's fields among the flags. Raises InputError."""
    parser, verbs = _parsers()
    name = arguments[0] if arguments else ""
    if not name or (name not in verbs and not name.startswith("-")):
        close = difflib.get_close_matches(name, verbs, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(verbs)}"
        raise InputError(f"unknown verb {name!r}; {hint}" if name else f"a verb is needed; {hint}")
    overrides: dict[str, str] = {}
    if name in verbs and verbs[name].takes_fields:
        arguments, overrides = _split_fields(arguments)
    return parser.parse_args(arguments), overrides


def _parsers() -> tuple[_Parser, dict[str, _Parser]]:
    parser = _Parser(
        prog="surefoot",
        description="PPO for language models, and for anything with a reward.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"surefoot {__version__}")
    group = parser.add_subparsers(required=True, metavar="VERB", title="verbs")
    verbs: dict[str, _Parser] = {}

    def verb(function: object, usage: str, *, takes_fields: bool = False) -> _Parser:
        summary = (getattr(function, "__doc__", "") or "").splitlines()[0]
        name = getattr(function, "__name__", "").replace("_", "-")
        sub = group.add_parser(
            name, help=summary, description=summary, usage=f"surefoot {name} {usage}", allow_abbrev=False
        )
        sub.takes_fields = takes_fields
        sub.lists_fields = (
            takes_fields and function is not pipeline
        )  # whose fields have its stages' names before them
        sub.set_defaults(verb=function)
        verbs[name] = sub
        return sub

    for function, described in (
        (ppo, "YAML file"),
        (sft, "YAML file"),
        (new_model, "YAML file of the sft run that will train it"),
        (reward_model, "YAML file"),
        (rejection_sampling, "YAML file"),
    ):
        reader = verb(function, "FILE [--section.field value ...]", takes_fields=True)
        reader.add_argument("file", metavar="FILE", help=described)
    stages = verb(pipeline, "FILE [--stages.name.section.field value ...]", takes_fields=True)
    stages.add_argument("file", metavar="FILE", help="YAML file with stages (docs/pipeline.md)")
    verb(resume, "RUN").add_argument("run", metavar="RUN", help="run folder")
    writer = verb(generate, "RUN|MODEL TEXT [options]")
    writer.add_argument("model", metavar="RUN|MODEL", help="run folder, model folder, asset name or hub id")
    writer.add_argument("text", metavar="TEXT", help="what to continue")
    writer.add_argument(
        "--chat", action="store_true", help="send TEXT as a user message through the chat template"
    )
    writer.add_argument("--seed", type=int, default=0, metavar="N", help="another one gives another text")
    writer.add_argument("--max-new-tokens", type=int, metavar="N", help="longest answer")
    writer.add_argument("--temperature", type=float, metavar="T", help="0 is greedy")
    writer.add_argument("--top-k", type=int, metavar="K", help="sample from the K most probable tokens")
    writer.add_argument(
        "--top-p", type=float, metavar="P", help="sample from the smallest set with this probability"
    )
    player = verb(play, "RUN [options]")
    player.add_argument("run", metavar="RUN", help="run folder")
    player.add_argument("--episodes", type=int, default=10, metavar="N", help="how many to play; default 10")
    player.add_argument("--output", metavar="FOLDER", help="where video and plot go; default RUN/play")
    player.add_argument(
        "--format", choices=("gif", "mp4"), default="gif", help="of the video; mp4 needs imageio-ffmpeg"
    )
    verb(fetch, "NAME").add_argument("name", metavar="NAME", help="name of the asset; a wrong one lists them")
    importer = verb(import_trl, "SOURCE [--output FILE]")
    what = ".json or .yaml file, a checkpoint's folder, or after -- the whole command that starts TRL"
    importer.add_argument("source", metavar="SOURCE", nargs="+", help=what)
    importer.add_argument(
        "--output",
        metavar="FILE",
        help="where the YAML goes, by default stdout; for a checkpoint a new folder",
    )
    verb(demo, "[--section.field value ...]", takes_fields=True)
    return parser, verbs


def _split_fields(arguments: list[str]) -> tuple[list[str], dict[str, str]]:
    """Take `--section.field value` and `--section.field=value` out of the arguments.

    Raises InputError without a value.
    """
    others: list[str] = []
    overrides: dict[str, str] = {}
    rest = iter(arguments)
    for argument in rest:
        if not argument.startswith("--") or argument in {"--", "--help"}:
            others.append(argument)
            continue
        key, equals, value = argument[2:].partition("=")
        if not equals:
            value = next(rest, "--")
            if value.startswith("--"):
                raise InputError(f"--{key} needs a value")
        overrides[key.replace("-", "_")] = value
    return others, overrides


def _quieten() -> None:
    """Kernels and libraries warn about things the user can do nothing about; Surefoot's own messages are
    enough.
    """
    warnings.filterwarnings("ignore")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for stream in (sys.stdout, sys.stderr):
        # A completion may hold any character; a terminal or a pipe need not know it.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def _fail(message: str, code: int) -> NoReturn:
    print(f"surefoot: {' '.join(message.splitlines())}", file=sys.stderr)
    sys.exit(code)


def _flush() -> None:
    """Find out now, not in the interpreter's last moment, that nobody reads stdout any more."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            _fail(f"stdout could not be written: {error.strerror}", 2)


if __name__ == "__main__":
    main()
