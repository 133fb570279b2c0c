"""Write docs/config.md and docs/metrics.md from the code. Run by `make docs`."""

from __future__ import annotations

from pathlib import Path

from surefoot.config import Config, field_table
from surefoot.train.metrics import METRICS

HERE = Path(__file__).parent

CONFIG_INTRO = """\
# Configuration

Written by `make docs` from the models in `src/surefoot/config/`; change it there.

A run is one YAML file, and every field is also a flag (`--kl.coef 0.02`). In Python it is a keyword without its section: fields
of `ppo` of `PPO(...)`, of `sft` of `SFT(...)`, of `reward_model` of `RewardModel(...)`; those of `run` and `evaluate` keep theirs as a
prefix (`run_name`, `evaluate_every`). Relative paths in a file are relative to the file. A key that does not
exist is an error that names the nearest one that does.
"""

METRICS_INTRO = """\
# Metrics

Written by `make docs` from `METRICS` in `src/surefoot/train/metrics.py`; change it there.

Each update writes one line to `metrics.jsonl` in the run folder and one point per metric to TensorBoard. Evaluations on
held-out prompts write a line of their own (`eval/…`). "Written tokens" are those the policy itself wrote, the end token
included; prompt and padding never count. nats are natural-log units: 1 nat is 1.44 bits.
"""


def config_page() -> str:
    """docs/config.md."""
    lines, section = [CONFIG_INTRO], None
    for key, kind, default, description in field_table():
        name, dot, _ = key.partition(".")
        if (name if dot else "") != section:
            section = name if dot else ""
            about = (
                (Config.model_fields[name].description or "").split("\n")[0]
                if section
                else "The run as a whole."
            )
            lines += [
                f"\n## {section or 'Top level'}\n\n{about}\n",
                "| field | type | default | meaning |",
                "|---|---|---|---|",
            ]
        lines.append(f"| `{key}` | {_cell(kind)} | `{default}` | {description} |")
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
