"""The command line: a table of verbs. Imports nothing heavy before a verb needs it."""

import argparse
import difflib
import errno
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from surefoot import __version__
from surefoot.errors import InputError, SurefootError, printable
from surefoot.storage.streams import Shown, outlived

if TYPE_CHECKING:
    from surefoot.api.runs import Run

EPILOG = """\
every field of the configuration is a flag: --seed 3 --kl.coef 0.02 --run.name mine
(surefoot ppo --help lists them). Exit codes: 0 done, 2 bad input, 3 stopped on non-finite steps,
129 SIGHUP, 130 Ctrl-C and 143 SIGTERM, all with a checkpoint saved.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `surefoot`. Ends with an exit code; mistakes are one line, bugs are tracebacks."""
    _silence()
    with outlived():
        try:
            options, overrides = _parse(list(sys.argv[1:] if arguments is None else arguments))
            VERBS[options.verb].run(options, overrides)
        except SurefootError as error:
            _fail(str(error), error.exit_code)
        except KeyboardInterrupt:
            _fail("stopped", 130)  # while loading or writing text: a run has its own words for it
        except OSError as error:
            _fail(f"OS error: {error}", 2)
        _check_shown()


def _start(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    from surefoot.api import runs
    from surefoot.config import load_config

    verb, file = options.verb, shlex.quote(options.file)
    own = ["rejection_sampling"] if verb == "rejection-sampling" else []  # is wanted where the file lacks it
    config = load_config(options.file, overrides, sections=own)
    if config.verb not in (verb, "ppo"):
        section = config.verb.replace("-", "_")
        raise InputError(f"{options.file}: its {section} section is for: surefoot {config.verb} {file}")
    runs.check(config, where=options.file, verb=verb)
    is_new, model = config.new_model is not None and "policy.model" not in overrides, config.policy.model
    if is_new and not os.path.isdir(model):
        raise InputError(f"policy.model: no folder {model}; make it first: surefoot new-model {file}")
    _finish(runs.start(config))


def _new_model(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    from surefoot.config import PolicyConfig, load_config

    config, file = load_config(options.file, overrides, sections=["new_model"]), options.file
    if config.sft is None or config.sft.data is None:
        raise InputError(f"{file}: the tokenizer has no text to learn from; name a JSONL file as sft.data")
    if config.policy.model == PolicyConfig().model:
        raise InputError(f"{file}: the new model needs a folder; name one as policy.model")
    if config.policy.adapter is not None:
        raise InputError(f"{file}: random weights are no base for an adapter; set policy.adapter: null")
    from surefoot.api.new_model import write_new_model

    print(f"model: {write_new_model(config)}\nnext:  surefoot sft {shlex.quote(file)}")


def _pipeline(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    from surefoot.api.pipeline import load_pipeline, run_pipeline

    run_pipeline(stages := load_pipeline(options.file, overrides))
    print(f"done:  {stages[-1].product}")


def _resume(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    from surefoot.api import runs
    from surefoot.config.messages import as_flag

    run = runs.resume(options.run, accept_changes=options.accept_changes, changes=overrides)
    product = runs.product(run.config, Path(options.run))
    if run.is_finished and runs.is_made(run.config, Path(options.run)):
        print(f"{options.run} is finished; its {'model' if product.is_dir() else 'examples'} is {product}")
        if product.is_dir():
            total = runs.total_key(run.config)
            print(f"next:  surefoot resume {shlex.quote(options.run)} {as_flag(total)} N, for a longer run")
    else:
        _finish(run)


def _generate(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    from surefoot.config import GenerationConfig, with_sampling

    names = ("max_new_tokens", "temperature", "top_k", "top_p")
    sampling = {name: value for name in names if (value := getattr(options, name)) is not None}
    with_sampling(GenerationConfig(), sampling)  # before the model is loaded
    if not options.text.strip():
        raise InputError("generate: the text is empty; give it something to continue")
    from surefoot.api.ppo import PPO

    prompt = [{"role": "user", "content": options.text}] if options.chat else options.text
    print(PPO.open(options.model).generate([prompt], seed=options.seed, **sampling)[0])


def _play(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    from surefoot.cli.play import play_run

    play_run(options.run, episodes=options.episodes, output=options.output, kind=options.format)


def _fetch(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    from surefoot.data import assets

    print(assets.fetch(options.name))


def _import_trl(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    output = options.output and Path(options.output)
    if output and os.path.lexists(output):
        raise InputError(f"--output {output}: exists; name a new one")
    if len(options.source) == 1 and (source := Path(options.source[0])).is_dir():
        if output is None:
            raise InputError(f"import-trl {source}: a folder is written; name a new one with --output")
        from surefoot.migrate.trl.value_head import import_value_head

        import_value_head(source, output)
        how = f"PPO.load({str(output)!r}, task) in Python keeps the critic; surefoot ppo starts another"
        print(f"model: {output}\nnext:  {how}")
        return
    from surefoot.migrate.trl.translate import import_settings

    imported = import_settings(options.source)
    if output is None:
        print(imported.yaml(), end="")
    else:
        output.write_text(imported.yaml(), encoding="utf-8")
    print(imported.notes(), file=sys.stderr)


def _demo(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    from surefoot.cli.demo import run_demo

    run_demo(overrides)


def _finish(run: "Run") -> None:
    """Bring a run to its end, and say what it left and what to do next."""
    from surefoot.api import runs

    product = runs.finish(run)
    config, folder = run.config, shlex.quote(str(run.run_folder))
    name = "model:" if config.rejection_sampling is None else "examples:"
    use = {
        "RejectionSampling": f"sft FILE --sft.data {shlex.quote(str(product))}",
        "RewardModel": f"ppo FILE --task.reward {folder}",
    }.get(config.opener, f"play {folder}" if config.env else f'generate {folder} "your text"')
    print(f"{name} {product}\nrun:   {run.run_folder}\nnext:  surefoot {use}")


class Verb(NamedTuple):
    """A verb: what it does, how it is called, and its arguments as argparse takes them."""

    run: Callable[[argparse.Namespace, dict[str, str]], None]
    summary: str
    usage: str
    arguments: dict[str, dict[str, Any]]


FILE: dict[str, Any] = {"file": {"metavar": "FILE", "help": "YAML file; of new-model, its sft run's"}}
RUN: dict[str, Any] = {"run": {"metavar": "RUN", "help": "run folder"}}
RESUMED = RUN | {"--accept-changes": {"action": "store_true", "help": "of prompts, reward, data or model"}}
GENERATION: dict[str, Any] = {
    "model": {"metavar": "RUN|MODEL", "help": "run folder, model folder, asset name or hub id"},
    "text": {"metavar": "TEXT", "help": "what to continue"},
    "--chat": {"action": "store_true", "help": "send TEXT as a user message in the chat template"},
    "--seed": {"type": int, "default": 0, "metavar": "N", "help": "another one gives another text"},
    "--max-new-tokens": {"type": int, "metavar": "N", "help": "longest completion"},
    "--temperature": {"type": float, "metavar": "T", "help": "0 is greedy"},
    "--top-k": {"type": int, "metavar": "K", "help": "sample from the K most probable tokens"},
    "--top-p": {"type": float, "metavar": "P", "help": "from the smallest set of this probability"},
}
EPISODES: dict[str, Any] = RUN | {
    "--episodes": {"type": int, "default": 10, "metavar": "N", "help": "how many; default 10"},
    "--output": {"metavar": "FOLDER", "help": "where video and plot go; default RUN/play"},
    "--format": {"choices": ("gif", "mp4"), "default": "gif", "help": "mp4 needs imageio-ffmpeg"},
}
NAME: dict[str, Any] = {"name": {"metavar": "NAME", "help": "a wrong one lists them"}}
SOURCE = ".json or .yaml file, a checkpoint's folder, or after -- the whole command that starts TRL"
TRL: dict[str, Any] = {
    "source": {"metavar": "SOURCE", "nargs": "+", "help": SOURCE},
    "--output": {"metavar": "FILE", "help": "for the YAML, else stdout; a checkpoint's new folder"},
}
FIELDS = "[--section.field value ...]"
NEW_MODEL = "Make a random language model and its tokenizer from examples."
STAGES = "Run the stages of a YAML file, or go on where they were stopped."
RESUME = "Continue a run from its newest checkpoint, or a finished one for longer (fields: docs/index.md)."
GENERATE = "Continue a text with a run's best policy, or with a model."
PLAY = "Play a run's best policy in its environment: returns, a video of one episode, a plot."
FETCH = "Get a pinned model or data set into the cache and print its path."
IMPORT = "Turn a TRL set-up into a YAML file for ppo, or its value-head checkpoint into a model folder."
DEMO = "Fine-tune a real model towards a real reward, about five minutes on two cores."
VERBS = {
    "ppo": Verb(_start, "Train with PPO from a YAML file.", f"FILE {FIELDS}", FILE),
    "sft": Verb(_start, "Fine-tune on examples (supervised).", f"FILE {FIELDS}", FILE),
    "new-model": Verb(_new_model, NEW_MODEL, f"FILE {FIELDS}", FILE),
    "reward-model": Verb(_start, "Train a reward model on pairs or ratings.", f"FILE {FIELDS}", FILE),
    "dpo": Verb(_start, "Train on pairs of preferences (DPO).", f"FILE {FIELDS}", FILE),
    "rejection-sampling": Verb(_start, "Sample, and keep the best as examples.", f"FILE {FIELDS}", FILE),
    "pipeline": Verb(_pipeline, STAGES, "FILE [--stages.name.section.field value ...]", FILE),
    "resume": Verb(_resume, RESUME, "RUN [--accept-changes] [--section.field value]", RESUMED),
    "generate": Verb(_generate, GENERATE, "RUN|MODEL TEXT [options]", GENERATION),
    "play": Verb(_play, PLAY, "RUN [options]", EPISODES),
    "fetch": Verb(_fetch, FETCH, "NAME", NAME),
    "import-trl": Verb(_import_trl, IMPORT, "SOURCE [--output FILE]", TRL),
    "demo": Verb(_demo, DEMO, FIELDS, {}),
}


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and in its help, where asked, the configuration's fields."""

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
    name = arguments[0] if arguments else ""
    if not name or (name not in VERBS and not name.startswith("-")):
        close = difflib.get_close_matches(name, VERBS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(VERBS)}"
        raise InputError(f"unknown verb {name!r}; {hint}" if name else f"a verb is needed; {hint}")
    overrides: dict[str, str] = {}
    if name in VERBS and "field value" in VERBS[name].usage:
        arguments, overrides = _split_fields(arguments)
    text = "PPO for language models, and for anything with a reward."
    parser = _Parser("surefoot", description=text, epilog=EPILOG, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--version", action="version", version=f"surefoot {__version__}")
    group = parser.add_subparsers(required=True, metavar="VERB", title="verbs", dest="verb")
    for name, verb in VERBS.items():
        usage = f"surefoot {name} {verb.usage}"
        texts: dict[str, Any] = {"help": verb.summary, "description": verb.summary, "usage": usage}
        sub = group.add_parser(name, **texts, allow_abbrev=False)
        sub.lists_fields = FIELDS in verb.usage
        for argument, settings in verb.arguments.items():
            sub.add_argument(argument, **settings)
    return parser.parse_args(arguments), overrides


def _split_fields(arguments: list[str]) -> tuple[list[str], dict[str, str]]:
    """Take `--section.field value` and `--section.field=value` out. Raises InputError without a value."""
    others: list[str] = []
    overrides: dict[str, str] = {}
    rest = iter(arguments)
    for argument in rest:
        if not argument.startswith("--") or argument in {"--", "--help", "--accept-changes"}:
            others.append(argument)
            continue
        key, equals, value = argument[2:].partition("=")
        if not equals:
            value = next(rest, "--")
            if value.startswith("--"):
                raise InputError(f"--{key} needs a value")
        overrides[key.replace("-", "_")] = value
    return others, overrides


def _silence() -> None:
    """Libraries warn about what the user can do nothing about; Surefoot's own messages are enough."""
    warnings.filterwarnings("ignore")
    settings = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    settings |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_VERBOSITY": "error"}
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    for stream in (sys.stdout, sys.stderr):
        # A completion may hold any character; a terminal or a pipe need not know it.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def _fail(message: str, code: int) -> NoReturn:
    print(f"surefoot: {printable(message)}", file=sys.stderr)
    sys.exit(code)


def _check_shown() -> None:
    """End with 2 where a full disk took stdout's words; a reader or a terminal may go when they like."""
    if isinstance(sys.stdout, Shown):
        sys.stdout.flush()
        error = sys.stdout.error
        if isinstance(error, OSError) and error.errno not in (errno.EPIPE, errno.EIO):
            _fail(f"stdout could not be written: {error.strerror}", 2)


if __name__ == "__main__":
    main()
