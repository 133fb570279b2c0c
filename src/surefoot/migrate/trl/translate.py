"""TRL's settings, in a file or in the words of a command, as ours. Imports no torch."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from surefoot.config import make_config, read_sections, strict_yaml
from surefoot.config.messages import short
from surefoot.errors import InputError
from surefoot.migrate.trl import settings as table
from surefoot.migrate.trl.settings import EPISODES, KINDS, NO_CLIP, PER_UPDATE, STEP, TOKENS, Kind

# What a run of ours needs, whether or not TRL's settings say it.
NEEDED = {
    "task.prompts": "a JSONL file with a column prompt",
    "task.reward": "the reward function, as file.py:function; the signature is TRL's",
    "policy.model": "the model, as the name or folder that from_pretrained was given",
    EPISODES: "the budget in episodes: passes over the prompts × prompts × completions of each",
    TOKENS: "the longest completion, which TRL's scripts give to generate",
}
_ARGS = "open('trl.json', 'w').write(args.to_json_string())"
_CONFIG = "json.dump(config.to_dict(), open('trl.json', 'w'), default=str)"
_PICKLE = "import torch; print(torch.load('training_args.bin', weights_only=False).to_json_string())"
REFUSED = {
    ".py": "scripts are not read; TRL says what one comes to: put this line after its configuration, run it "
    f"and import trl.json: {_ARGS} (up to TRL 0.11: {_CONFIG})",
    ".sh": "shell scripts are not read; put before TRL's command in one, and run it: surefoot import-trl --",
    ".bin": "a pickle, which is not read since reading one can run code; where you trust it and TRL is "
    f'installed: python -c "{_PICKLE}" > trl.json',
}
SETTINGS = "TRL's settings by name"
SAME = {".bash": ".sh"} | dict.fromkeys((".pt", ".pth", ".pkl", ".pickle", ".ckpt"), ".bin")


@dataclass
class Imported:
    """TRL's settings, ours by dotted key, what each comes from, and what the user should know."""

    where: str
    kind: Kind
    given: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    by_hand: list[str] = field(default_factory=list)
    no_counterpart: list[str] = field(default_factory=list)

    def number(self, name: str) -> Any:
        """A number of TRL's, given or by default, or None. Raises InputError for anything else."""
        value = self.given.get(name, self.kind.computed.get(name, self.kind.maps.get(name, ("", None))[1]))
        if isinstance(value, bool) or not isinstance(value, (int, float, type(None))):
            raise InputError(f"{self.where}: {name} has {short(value)}; a number is needed")
        return value

    def put(self, key: str, value: Any, source: str) -> None:
        """Set one of our keys."""
        self.settings[key], self.sources[key] = value, source

    def notes(self) -> str:
        """What is to be set by hand and what has no counterpart, several lines."""
        lines = [f"From {self.where}, read as {self.kind.title}."]
        for title, entries in (("Set by hand", self.by_hand), ("No counterpart", self.no_counterpart)):
            lines += [f"{title}:", *(f"  {entry}" for entry in entries)] if entries else []
        return "\n".join(lines)

    def yaml(self) -> str:
        """The file for `surefoot ppo`: the notes, then every setting beside its source."""
        lines = [f"# {line}" for line in self.notes().splitlines()]
        lines += ["task:", "  # prompts: FILE.jsonl", "  # reward: FILE.py:FUNCTION"]
        sections: dict[str, list[str]] = {}
        for key, value in self.settings.items():
            section, _, leaf = key.rpartition(".")
            first = [f"{section}:"] if section else []
            entry = f"{'  ' * bool(section)}{leaf}: {_text(value)}  # {self.sources[key]}"
            sections.setdefault(section, first).append(entry)
        lines += [line for entries in sections.values() for line in entries]
        return "\n".join(lines) + "\n"


def import_settings(source: Sequence[str]) -> Imported:
    """TRL's settings as ours: the path of a YAML or JSON file, or a command's words. Raises InputError."""
    imported = _read_command(source) if len(source) > 1 else _read_file(Path(source[0]))
    translate(imported)
    data = {name: part for name, part in strict_yaml.parse(imported.yaml()).items() if part is not None}
    make_config(data, where=f"{imported.where}, in our words")
    return imported


def _read_file(path: Path) -> Imported:
    suffix = SAME.get(path.suffix, path.suffix)
    if suffix in REFUSED:
        raise InputError(f"{path}: {REFUSED[suffix]}")
    if suffix not in (".yaml", ".yml", ".json"):
        wanted = "a .json or .yaml file, a checkpoint's folder, or -- and TRL's command"
        raise InputError(f"{path}: expected {wanted}")
    return _of_kind(str(path), read_sections(path, SETTINGS), path.name)


def _read_command(words: Sequence[str]) -> Imported:
    """`trl grpo --beta 0.1`, `accelerate launch --num_processes 2 ppo.py --lam 0.9`: as argparse reads it."""
    at = next((i for i, word in enumerate(words) if re.search(r"\.py$|^(ppo|grpo|rloo)$", word)), None)
    if at is None:
        command = short(" ".join(words))
        raise InputError(f"no script, and none of ppo, grpo and rloo, in the command {command}")
    launch, flags = _flags(words[:at]), _flags(words[at + 1 :])
    values = {name: launch[name] for name in ("num_processes",) if name in launch} | flags
    if file := values.pop("config", None):
        values = read_sections(str(file), SETTINGS) | values
    return _of_kind("the command", values, words[at])


def _flags(words: Sequence[str]) -> dict[str, Any]:
    given: dict[str, list[Any]] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            flag, equals, value = word[2:].partition("=")
            given[name := flag.replace("-", "_")] = [strict_yaml.scalar(value)] if equals else []
        elif name:
            given[name].append(strict_yaml.scalar(word))
    return {name: True if not v else v[0] if len(v) == 1 else v for name, v in given.items()}


def _of_kind(where: str, given: dict[str, Any], hint: str) -> Imported:
    """Of the kind that knows the most of the settings; of several, the first that `hint` names."""
    known = [len({*kind.maps, *kind.computed, *kind.without} & given.keys()) for kind in KINDS]
    best = [kind for kind, count in zip(KINDS, known, strict=True) if 0 < count == max(known)]
    if not best:
        raise InputError(f"{where}: no setting of TRL's PPO, GRPO or RLOO in it")
    named = [kind for kind in best if re.search(rf"(?<![a-z]){kind.word}(?![a-z])", hint.lower())]
    if len(best) > 1 and not named:
        titles = " and ".join(kind.title for kind in best)
        raise InputError(f"{where}: fits {titles} alike; put ppo, grpo or rloo into the file's name")
    return Imported(where, best[0] if len(best) == 1 else named[0], given)


def translate(done: Imported) -> None:
    """Fill in our settings and the notes. Raises InputError for a loss that is not here."""
    given = done.given
    for name in ("loss_type", "importance_sampling_level") if done.kind is table.GRPO else ():
        if (value := given.get(name, done.kind.maps[name][1])) not in list(table.VALUES[name]):
            found = f"{name} {short(value)}: not there, and its epsilon bounds another ratio"
            raise InputError(f"{done.where}: {found}")
    for name, (ours, default) in done.kind.maps.items():
        if (value := given.get(name, default)) is not None:
            _put_one(done, name, ours, value)
    for key, value in done.kind.always.items():
        done.put(key, value, done.kind.title)
    _put_sizes(done)
    _put_adapter(done)
    own = {table.OLD.title: _put_old, table.GRPO.title: _put_grpo, table.PPO.title: lambda done: None}
    own.get(done.kind.title, _put_rloo)(done)
    _list_others(done)


def _put_one(done: Imported, name: str, ours: str, value: Any) -> None:
    """A setting that stands for itself: given, or by TRL's default."""
    source = f"{name} {_text(value)}"
    if name not in done.given:
        other = table.ELSEWHERE.get((name, value))
        source += " by TRL's default" + (f", {other}" if other else "")
    if name in table.VALUES:
        words = table.VALUES[name]
        fits = [our for their, our in words.items() if their == value and type(their) is type(value)]
        value = fits[0] if fits else next(iter(words.values()))
        if not fits:
            done.no_counterpart.append(f"{source}: {ours}: {value} is written in its place")
    done.put(ours, NO_CLIP if name == "max_grad_norm" and value == 0 else value, source)  # 0: none


def _put_sizes(done: Imported) -> None:
    """Episodes of an update and of an optimizer step from TRL's numbers per device; budget, warm-up."""
    number = done.number
    rows, accumulated = number("per_device_train_batch_size"), number("gradient_accumulation_steps")
    processes = number("num_processes")
    if done.kind is table.OLD:
        per_update = number("batch_size") * processes
        step = (number("forward_batch_size") or number("mini_batch_size")) * accumulated * processes
    elif minibatches := number("num_mini_batches"):
        # accelerate steps once in that many micro-batches, whatever TRL's own minibatch is.
        per_update = rows * accumulated * processes
        step = min(per_update, per_update * accumulated // minibatches)
    else:
        step = rows * accumulated * processes
        generated = rows * processes * (number("steps_per_generation") or accumulated)
        # Completions that are generated between two steps come from the same weights: one update.
        per_update = max(number("generation_batch_size") or generated, step)
        if (steps := number("max_steps")) > 0 and (again := number("num_iterations")):
            done.put(EPISODES, steps * step // again, f"max_steps {steps} × {step} / num_iterations {again}")
    names = [name for name in done.kind.computed if re.search("batch|accumul|processes|per_generation", name)]
    done.put(PER_UPDATE, per_update, ", ".join(f"{name} {number(name)}" for name in names if number(name)))
    done.put(STEP, step, "of the same: the episodes of one optimizer step")
    if "num_processes" not in done.given:
        done.by_hand.append(f"{PER_UPDATE}, {STEP}: for one process; on W of them both were W times as large")
    if 0 < (warmup := number("warmup_steps") or 0) < 1:
        done.put("ppo.lr_warmup", warmup, f"warmup_steps {warmup}, a share of the run")
    elif warmup:
        done.by_hand.append(f"ppo.lr_warmup: warmup_steps is {warmup} steps; write their share of the run")


def _put_adapter(done: Imported) -> None:
    if not done.given.get("use_peft"):
        done.put("policy.adapter", None, "no use_peft: all weights are trained")
        if "use_peft" not in done.given:  # as in TRL's own arguments, where no LoRA stands
            lora = "{rank: its r, alpha: lora_alpha, targets: target_modules}"
            done.by_hand.append(f"policy.adapter: where TRL was given a peft_config, write {lora} for null")
        return
    adapter = {"rank": done.number("lora_r"), "alpha": done.number("lora_alpha")}
    if targets := done.given.get("lora_target_modules"):
        adapter["targets"] = targets if isinstance(targets, list) or targets == "all-linear" else [targets]
    else:
        done.by_hand.append("policy.adapter.targets: all-linear here; peft picks some by the architecture")
    done.put("policy.adapter", adapter, "use_peft, lora_r, lora_alpha, lora_target_modules")


def _put_old(done: Imported) -> None:
    if done.given.get("adap_kl_ctrl") is False or done.number("init_kl_coef") == 0:
        del done.settings["kl.target"], done.settings["kl.horizon"]
        source = "init_kl_coef, which stays: adap_kl_ctrl false, or 0"
        done.put("kl.coef", done.number("init_kl_coef"), source)
    if done.given.get("early_stopping"):
        done.put("ppo.target_kl", 1.5 * done.number("target_kl"), "early_stopping, 1.5 × target_kl")


def _put_grpo(done: Imported) -> None:
    """TRL's bounds min(min(r, δ) A, clip(r, 1 - ε, 1 + ε_high) A), and its entropy's mean over tokens."""
    high, delta, entropy = (done.number(name) for name in ("epsilon_high", "delta", "entropy_coef"))
    if done.given.get("loss_type") == "cispo":
        cap = done.number("epsilon") if high is None else high
        if cap <= 1:
            how = "give TRL's cap itself, such as 5.0"
            what = f"epsilon_high {cap}: with cispo the ratio's cap, not 1 + it"
            raise InputError(f"{done.where}: {what}; {how}")
        done.put("ppo.policy_loss", "cispo", "loss_type cispo")
        note = f"epsilon_high {cap}, TRL's cap of the ratio, - 1"
        done.put("ppo.clip_range_high", round(cap - 1, 12), note)
        high = delta = None  # said, and without use
    top = 1 + (done.number("epsilon") if high is None else high)
    if high is not None:
        done.put("ppo.clip_range_high", high, f"epsilon_high {high}")
    if delta is not None:
        done.put("ppo.dual_clip", max(delta, top), f"delta {delta}, or 1 + epsilon_high where that is more")
        if delta < top:
            done.put("ppo.clip_range_high", round(delta - 1, 12), f"delta {delta} - 1, below epsilon_high")
    if entropy and done.settings["ppo.loss_aggregation"] == "token":
        done.put("ppo.ent_coef", entropy, f"entropy_coef {entropy}")
    elif entropy:
        done.no_counterpart.append(f"entropy_coef {entropy}: of a mean over tokens, whatever loss_type is")


def _put_rloo(done: Imported) -> None:
    """Our loss is TRL's divided by max_new_tokens, so what is compared with its gradient is, too."""
    for name in ("max_grad_norm", "adam_epsilon"):
        if f"ppo.{name}" not in done.settings:
            value = done.number(name)
            scaled = value / max(done.number("max_completion_length") or done.number("response_length"), 1)
            done.put(f"ppo.{name}", scaled or NO_CLIP, f"{name} {value} / {TOKENS}, as the loss here is")
    match done.given.get("reward_clip_range"):
        case [int() | float() as low, int() | float() as high] if low == -high:
            done.put("shaping.clip", high, f"reward_clip_range [{low}, {high}]")


def _list_others(done: Imported) -> None:
    """What the table does not know, what has no use beside the rest, and what a run still needs."""
    kind, needed = done.kind, dict(NEEDED)
    asides = table.ASIDE.split() + ([] if done.given.get("use_vllm") else ["vllm_*"])
    used = [done.sources[key] for key in done.settings]
    said = set(re.findall(r"\w+", " ".join([*used, *done.by_hand, *done.no_counterpart])))
    defaults = {name: default for name, (_, default) in kind.maps.items()} | {**kind.computed, **kind.without}
    for name, value in done.given.items():
        default = defaults.get(name)
        if ours := table.BY_HAND.get(name):
            done.by_hand.append(f"{ours}: {needed.pop(ours, 'too')}; TRL's {name} is {short(value)}")
        elif value in ("", [], {}, default, "adamw_torch_fused") or (value is False and default is not True):
            continue
        elif name in kind.without:
            done.no_counterpart.append(f"{name} {short(value)} (docs/from-trl.md says why)")
        elif name in defaults and name not in said:
            done.no_counterpart.append(f"{name} {short(value)}: without use beside the other settings")
        elif name not in defaults and not any(fnmatchcase(name, known) for known in asides):
            done.no_counterpart.append(f"{name} {short(value)}: not known here")
    done.no_counterpart += kind.notes
    if "stop_token" in kind.without and not done.given.get("stop_token"):
        done.no_counterpart.append(f"stop_token none: TRL writes on to {TOKENS}; here an end token ends it")
    done.by_hand += [f"{key}: {how}" for key, how in needed.items() if key not in done.settings]


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)  # JSON is YAML, on one line
