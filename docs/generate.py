"""Write docs/config.md and docs/metrics.md from the code. Run by `make docs`."""

from __future__ import annotations

from pathlib import Path

from surefoot.config import Config, default_text, field_table
from surefoot.config.fields import section_in
from surefoot.config.kinds import SECTIONS
from surefoot.train.metrics import METRICS

COMMON = ("run", "policy", "evaluate")
HERE = Path(__file__).parent

CONFIG_INTRO = """\
# Configuration

Written by `make docs` from the models in `src/surefoot/config/`; change it there.

A run is one YAML file, and every field is also a flag (`--kl.coef 0.02`). Relative paths in a file are
relative to the file. A key that does not exist is an error that names the nearest one that does.

The kind of run follows from one section: `task` (text; also what `PPO` trains a language model on), `env`
(Gymnasium), `sft`, `reward_model` or `dpo`. Each kind has its own sections, and another's are refused by name:

SECTIONS

In Python a field is a keyword without its section: `PPO(..., learning_rate=1e-4, n_steps=128)`; fields of `run`
and `evaluate` keep theirs as a prefix (`run_name`, `evaluate_every`). `kl`, `group`, `shaping`, `ptx`,
`adapter`, `critic`, `network` and `self_play` are given as dictionaries: `kl={"coef": 0.02, "target": 6.0}`.
`help(PPO)` lists all of them.

Where kinds of run have different defaults, each is shown with its kind; `recurrent` is `env` with an LSTM policy.
"""

METRICS_INTRO = """\
# Metrics

Written by `make docs` from `METRICS` in `src/surefoot/train/metrics.py`; change it there.

Each update writes one line to `metrics.jsonl` in the run folder and one point per metric to TensorBoard. Evaluations on
held-out prompts write a separate line (`eval/…`). "Completion tokens" are those the policy itself wrote, the end token
included; prompt and padding never count. nats are natural-log units: 1 nat is 1.44 bits.
"""


def config_page() -> str:
    """docs/config.md."""
    sections = "\n".join(
        f"- `{name}`: {', '.join(f'`{other}`' for other in COMMON + others)}"
        for name, others in SECTIONS.items()
    )
    lines, section = [CONFIG_INTRO.replace("SECTIONS", sections)], None
    for key, kind, _, description in field_table():
        name, dot, _ = key.partition(".")
        if (name if dot else "") != section:
            section = name if dot else ""
            model = section_in(Config.model_fields[name].annotation)
            about = (model.__doc__ or "").split("\n")[0] if model else "The run as a whole."
            lines += [
                f"\n## {section or 'Top level'}\n\n{about}\n",
                "| field | type | default | meaning |",
                "|---|---|---|---|",
            ]
        lines.append(f"| `{key}` | {_cell(kind)} | {default_text(key, quote='`')} | {description} |")
    return "\n".join(lines) + "\n"


def metrics_page() -> str:
    """docs/metrics.md."""
    rows = [f"| `{name}` | {_cell(meaning)} |" for name, meaning in METRICS.items()]
    return "\n".join([METRICS_INTRO, "| metric | meaning |", "|---|---|", *rows]) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    (HERE / "config.md").write_text(config_page(), encoding="utf-8")
    (HERE / "metrics.md").write_text(metrics_page(), encoding="utf-8")
