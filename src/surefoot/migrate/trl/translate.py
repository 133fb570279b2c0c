"""TRL's settings as ours, with a report of what became what. Imports no torch."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surefoot.config import make_config, strict_yaml
from surefoot.config.messages import short
from surefoot.errors import InputError
from surefoot.migrate.trl.files import Found, read
from surefoot.migrate.trl.settings import ASIDE, ASIDE_FAMILIES, NO_CLIP, OLD, PER_UPDATE, Kind, Row

# What a run of ours needs, whether or not TRL's settings say it.
NEEDED = {
    "task.prompts": "a JSONL file with a column prompt",
    "task.reward": "the reward function, as file.py:function; the signature is TRL's",
    "policy.model": "the model, as the name or folder that from_pretrained was given",
    "rollout.total_episodes": "the budget in episodes: passes over the prompts × prompts × answers to each",
    "generation.max_new_tokens": "the longest answer, which TRL's scripts give to generate",
}
# What a trainer takes besides its configuration.
OUTSIDE = {
    "callbacks": "none for text tasks; the run folder has metrics, samples and checkpoints",
    "optimizers": "Adam, with ppo's settings",
    "ref_model": "the reference is the policy as the run begins",
    "mixed_precision": "policy.dtype says it",
    "vllm_importance_sampling_cap": "generation.tis_cap is the like, for each token",
    "LoraConfig.use_rslora": "LoRA's scale is alpha / rank; with it alpha / √rank: set policy.adapter.alpha to that end",
    "generation_kwargs.do_sample": "answers are always drawn at generation.temperature",
}


@dataclass
class Imported:
    """Our settings by dotted key, and the report: what became what, what is left to the user, what is not there."""

    kind: Kind
    where: str
    settings: dict[str, Any] = field(default_factory=dict)
    mapped: list[str] = field(default_factory=list)
    by_hand: list[str] = field(default_factory=list)
    no_counterpart: list[str] = field(default_factory=list)
    aside: list[str] = field(default_factory=list)

    def put(self, key: str, value: Any, source: str, note: str = "") -> None:
        """Set one of our keys."""
        self.settings[key] = value
        self.mapped.append(f"{source} -> {key}: {_text(value)}" + (f" ({note})" if note else ""))

    def report(self) -> str:
        """For the user, several lines."""
        lines = [f"{self.where}: read as {self.kind.title}"]
        parts = {"mapped": self.mapped, "set by hand": self.by_hand, "no counterpart": self.no_counterpart}
        for title, entries in parts.items():
            lines += [f"{title}:", *(f"  {entry}" for entry in entries)] if entries else []
        if self.aside:
            lines.append(f"no part in what is learned: {', '.join(sorted(self.aside))}")
        return "\n".join(lines)

    def yaml(self) -> str:
        """The file for `surefoot ppo`; what is to be set by hand stands at its top as comments."""
        lines = [
            f"# From {self.where}: {self.kind.title}. Set by hand:",
            *(f"#   {entry}" for entry in self.by_hand),
        ]
        tree: dict[str, Any] = {name: {} for name in ("seed", "run", "policy", "task", "generation", "ppo")}
        for key, value in self.settings.items():
            *sections, leaf = key.split(".")
            inner = tree
            for section in sections:
                inner = inner.setdefault(section, {})
            inner[leaf] = value
        for name, section in tree.items():
            if section == {} and name != "task":
                continue
            if name == "task":
                lines += ["task:", "  # prompts: FILE.jsonl", "  # reward: FILE.py:FUNCTION"]
            elif isinstance(section, dict):
                lines += [f"{name}:", *(f"  {leaf}: {_text(value)}" for leaf, value in section.items())]
            else:
                lines.append(f"{name}: {_text(section)}")
        return "\n".join(lines) + "\n"


def import_settings(path: Path) -> Imported:
    """TRL's settings in a script, a command line, a YAML or a JSON file as ours. Raises InputError for what cannot be one."""
    imported = translate(read(path))
    data = {
        name: section for name, section in strict_yaml.parse(imported.yaml()).items() if section is not None
    }
    make_config(data, where=f"{path}, in our words")
    return imported


def translate(found: Found) -> Imported:
    """Go through the table of the kind that was found."""
    done = Imported(found.kind, found.where)
    for row in found.kind.rows:
        if row.theirs in found.expressions:
            done.by_hand.append(
                f"{row.ours or row.theirs}: TRL's {row.theirs} is {found.expressions[row.theirs]}"
            )
        elif row.by_hand and row.theirs in found.values:
            done.by_hand.append(
                f"{row.ours}: TRL's {row.theirs} is {short(found.values[row.theirs])}; {row.note}"
            )
        elif not (row.computed or row.by_hand):
            _put_row(done, row, found.values)
    for key, value in found.kind.always.items():
        if key not in done.settings:
            done.put(key, value, found.kind.title)
    _put_sizes(done, found)
    _put_adapter(done, found)
    _put_rest(done, found)
    _list_others(done, found)
    _list_unused(done, found)
    return done


def _put_row(done: Imported, row: Row, given: dict[str, Any]) -> None:
    """A row that stands for itself: given, or by TRL's default."""
    is_adaptive = given.get("adap_kl_ctrl", True) and given.get("init_kl_coef") != 0
    if row.ours in ("kl.target", "kl.horizon") and not is_adaptive:
        return
    is_given = row.theirs in given
    value = given.get(row.theirs, row.default)
    said = f"{row.theirs} {_text(value)}" + ("" if is_given else " by default")
    if not row.ours:
        if is_given and value != row.default:
            done.no_counterpart.append(f"{said}: {row.note}")
        return
    if value is None:
        return
    if row.values:
        ours = [our for their, our in row.values if their == value and isinstance(value, type(their))]
        value = ours[0] if ours else row.values[0][1]
        if not ours:
            done.no_counterpart.append(f"{said}; {row.ours}: {value} is written in its place ({row.note})")
            said = f"in place of {said}"
    if row.ours == "ppo.max_grad_norm" and value == 0:
        value = NO_CLIP  # transformers' word for none
    done.put(row.ours, value, said, "" if row.values else row.note)


def _put_sizes(done: Imported, found: Found) -> None:
    """Episodes of an update and of an optimiser step from TRL's per-device numbers, and the budget that is counted in steps."""
    rows = {
        row.theirs: row.default
        for row in found.kind.rows
        if row.computed and row.ours in ("ppo.batch_size", PER_UPDATE)
    }
    if rows.keys() & found.expressions.keys():
        return  # they are listed
    n = rows | {name: found.values[name] for name in rows if name in found.values}
    for name, value in n.items():
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise InputError(f"{found.where}: {name} is {short(value)}; a whole number above 0 is needed")
    processes, accumulated = n["num_processes"], n["gradient_accumulation_steps"]
    if found.kind is OLD:
        per_update = n["batch_size"] * processes
        step = (n["forward_batch_size"] or n["mini_batch_size"]) * accumulated * processes
    elif "num_mini_batches" in n:
        # accelerate steps once in so many micro-batches, whatever TRL's own minibatch is.
        per_update = n["per_device_train_batch_size"] * accumulated * processes
        step = min(per_update, per_update * accumulated // n["num_mini_batches"])
    else:
        per_step = n["per_device_train_batch_size"] * processes
        step = per_step * accumulated
        # Answers that are generated between two steps come from the same weights: one update.
        per_update = max(
            n["generation_batch_size"] or per_step * (n["steps_per_generation"] or accumulated), step
        )
        _put_max_steps(done, found, step)
    used = ", ".join(f"{name} {value}" for name, value in n.items() if value is not None)
    done.put(PER_UPDATE, per_update, used)
    done.put("ppo.batch_size", step, "the same", "the episodes of one optimiser step")
    if n.get("num_mini_batches", 1) > 1:
        done.by_hand.append(f"{PER_UPDATE}: up to TRL 0.16 it was num_mini_batches times as large")
    if "num_processes" not in found.values:
        done.by_hand.append(
            f"{PER_UPDATE}, ppo.batch_size: for one process; on W of them both were W times as large"
        )


def _put_max_steps(done: Imported, found: Found, step: int) -> None:
    steps, again = found.values.get("max_steps", -1), found.values.get("num_iterations", 1)
    if isinstance(steps, int) and isinstance(again, int) and steps > 0 and again > 0:
        done.put(
            "rollout.total_episodes",
            steps * step // again,
            f"max_steps {steps} × {step} answers / num_iterations {again}",
        )


def _put_adapter(done: Imported, found: Found) -> None:
    given = found.values
    if not given.get("use_peft"):
        if "use_peft" not in found.expressions:
            done.put("policy.adapter", None, "no use_peft and no LoraConfig", "all weights are trained")
        return
    names = {"lora_r": ("rank", 16), "lora_alpha": ("alpha", 32), "lora_target_modules": ("targets", None)}
    adapter = {
        ours: given.get(theirs, default)
        for theirs, (ours, default) in names.items()
        if theirs not in found.expressions
    }
    if adapter.get("targets", "") is None:
        del adapter["targets"]
        done.by_hand.append(
            "policy.adapter.targets: TRL leaves them to peft, which picks some by the architecture; all-linear here"
        )
    elif isinstance(targets := adapter.get("targets"), str) and targets != "all-linear":
        if re.fullmatch(r"[\w-]+", targets):
            adapter["targets"] = [targets]
        else:
            del adapter["targets"]
            done.by_hand.append(
                f"policy.adapter.targets: TRL's lora_target_modules is the pattern {short(targets)}; list the layers it fits"
            )
    done.put("policy.adapter", adapter, "use_peft, lora_r, lora_alpha, lora_target_modules")


def _put_rest(done: Imported, found: Found) -> None:
    """What comes from a setting in a way of its own."""
    given, names = found.values, {row.theirs for row in found.kind.rows}
    if given.get("adap_kl_ctrl") is False:
        done.mapped.append("adap_kl_ctrl false -> no kl.target: kl.coef stays as it is")
    if given.get("early_stopping") and "early_stopping" in names:
        stop = 1.5 * _number(found, "target_kl", given.get("target_kl", 1.0))
        done.put("ppo.target_kl", stop, "early_stopping, 1.5 × target_kl", "TRL stops there")
    if "stop_token_id" in names and "stop_token_id" in given:
        done.put(
            "generation.stop_token_ids",
            [given["stop_token_id"]],
            "stop_token_id",
            "besides the model's own end tokens",
        )
    elif "stop_token" in names and not {"stop_token", "stop_token_id"} & (
        given.keys() | found.expressions.keys()
    ):
        done.no_counterpart.append(
            "stop_token None by default: TRL writes on to response_length; here an end token ends an answer"
        )
    name = "reward_clip_range"
    if name in names and (ends := given.get(name)) is not None:
        if (
            isinstance(ends, list)
            and len(ends) == 2
            and -_number(found, name, ends[0]) == _number(found, name, ends[1])
        ):
            done.put("shaping.clip", ends[1], f"{name} {ends}")
        else:
            done.no_counterpart.append(f"{name} {ends}: shaping.clip is ± one number")
    warmup = given.get("warmup_steps", 0) if "warmup_steps" in names else 0
    if isinstance(warmup, (int, float)) and 0 < warmup < 1:
        done.put("ppo.lr_warmup", warmup, f"warmup_steps {warmup}", "a share of the run")
    elif warmup:
        done.by_hand.append(
            f"ppo.lr_warmup: TRL's warmup_steps is {warmup} steps; write the share of the run they are"
        )


def _number(found: Found, name: str, value: Any) -> float:
    if not isinstance(value, (int, float)):
        raise InputError(f"{found.where}: {name} has {short(value)}; a number is needed")
    return value


def _list_others(done: Imported, found: Found) -> None:
    """What the table does not know, and what a run needs and TRL's settings do not have."""
    known = {row.theirs for row in found.kind.rows}
    said = {name: f" {short(value)}" for name, value in found.values.items()}
    said |= {name: f", {what}" for name, what in found.expressions.items()}
    for name in [name for name in said if name not in known]:
        value = found.values.get(name)
        if _is_aside(name, found) or value is False or value in ("", [], {}):
            done.aside.append(name)
        else:
            done.no_counterpart.append(f"{name}{said[name]}: {OUTSIDE.get(name, 'not known here')}")
    done.no_counterpart += found.kind.notes
    done.by_hand += found.remarks
    for key, how in NEEDED.items():
        if key not in done.settings and not any(entry.startswith(key) for entry in done.by_hand):
            done.by_hand.append(f"{key}: {how}")


def _list_unused(done: Imported, found: Found) -> None:
    """What the table knows, and the other settings left without a use: nothing that was given goes unsaid."""
    said = set(
        re.findall(r"(?<![\w.])\w+", " ".join(done.mapped + done.by_hand + done.no_counterpart + done.aside))
    )
    for row in found.kind.rows:
        if row.theirs not in found.values or row.theirs in said:
            continue
        said.add(row.theirs)
        value = found.values[row.theirs]
        if value is None or value == row.default:
            done.mapped.append(f"{row.theirs} {_text(value)}: as TRL has it by default")
        else:
            note = f"; {row.note}" if row.note else ""
            done.no_counterpart.append(
                f"{row.theirs} {short(value)}: not carried over beside the other settings{note}"
            )


def _is_aside(name: str, found: Found) -> bool:
    is_unused = name.startswith("vllm_") and not found.values.get("use_vllm", "use_vllm" in found.expressions)
    return is_unused or name in ASIDE or name.startswith(ASIDE_FAMILIES)


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)  # JSON is YAML, on one line
