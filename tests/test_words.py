"""The words that the field has no use for stay out: of code and its messages, configuration keys, pages and recipes."""

import ast
import re
from pathlib import Path

from tests.test_architecture import ROOT, listed

CODE = sorted([*ROOT.glob("src/**/*.py"), *ROOT.glob("src/**/*.yaml")])
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("docs/*.py"), *ROOT.glob("examples/**/*.py")]
    + [p for top in ("recipes", "benchmarks") for end in ("md", "yaml", "py") for p in ROOT.glob(f"{top}/**/*.{end}")]
)

# Retired, as a regular expression -> what a native engineer of the field writes.
ANYWHERE = {
    r"\blikelie(?:st|r)\b": "greedy; more probable",
    r"\b[Ii]mitat\w*": "negative log-likelihood (NLL)",
    r"\b[Jj]udge?ments?\b|\bjudged_\w+": "preference (pair) or rating",
    r"\b[Ll]essons?\b": "tokenized example",
    r"\b(?:[Uu]n)?taught\b": "randomly initialized; fine-tuned",
    r"(?<!standard )(?<!absolute )\b[Dd]eviations?\b": "standard deviation, std",
    r"\bequal[ _]groups?\b|\bgroups without signal\b|\bhave_signal\b": "zero-variance groups",
    r"\bsampler_ratio_cap\b": "generation.tis_cap (truncated importance sampling)",
    r"\b(?:past|newest) sel(?:f|ves)\b|\b[Bb]lunders?\b|\b[Ll]eagues?\b": "opponent pool, latest snapshot, random move",
    r"\b[Mm]end(?:s|ed|ing)?\b": "fix",
    r"\bis no (?:name|flag|run|setting|checkpoint|model)\b|\bno whole run\b": "is not a …; incomplete run",
    r"\bgo(?:es)? before\b": "takes precedence over",
    r"\b[Bb]esides\b|\banew\b|\bof (?:its|their) own\b": "in addition (to); again; own, separate",
    r"\bthe system refused\b": "OS error:",
    r"\bkl_target\b|\bkl_horizon\b|\bkl_in\b": "kl.target, kl.horizon, kl.placement",
    r"\bsamples_per_prompt\b|\bgae_lambda_critic\b|\bcritic_warmup_updates\b": "group.size, policy.critic.…",
    r"\bscore_(?:batch|actions|values)\b|\bneeds_scores\b|\bscores_like_sampler\b": "logprobs, values",
    r"\bcheck_places\b|\bclosed_form\b|\bwording\.py\b|\bquiet_transformers\b": "preflight, fast_mlp, messages, silence",
    r"\b[Ww]ritten tokens?\b": "completion tokens",
    r"\bthought of it\b|\bthinks? of\b": "log-probs and values",
    r"\bcopies (?:that are stepped|of (?:an|the) environment)\b|\ball copies\b": "sub-environments, num_envs",
}
IN_CODE = {
    r"\banswers?\b(?!\")": "completion",
    r"\bFilm\b\W|\bfilm(?:ed)? (?:of|and|is)\b": "video",
    r"\b[Cc]opies\b": "sub-environments (or a verb: copy)",
    r"\b_?[Ww]atch(?:ed|es|ing)?\b": "observers",
    r"\bsay=|\bsay:|\btell=|\btell\(|\btold\(": "log=",
    r"\bso many\b": "N, that many",
    r"\b[Pp]seudo[-_ ]?labels?\b": "rejection sampling",
    r"\b_undone\w*|\b_put_back\b|\bAbandon\w*": "snapshot, roll_back, RolloutAborted",
    r"\bstep\.real\b|\b_Played\b|\bmemory/": "valid, rollout buffer, state/",
}
# A file that uses such a word rightly: a data set's column, or the settings of a page that has its own.
ALLOWED = {
    "src/surefoot/data/rows.py": {"answer"},
    "src/surefoot/policies/control/fast_mlp.py": {"copies"},
    "src/surefoot/rollout/opponents.py": {"copies"},
    "src/surefoot/config/keywords.py": {"samples_per_prompt"},
    "examples/single_file/ppo_lm.py": {"kl_horizon", "kl_target", "samples_per_prompt"},
}
BRITISH = r"optimis|normalis|initialis|generalis|behaviour|colour|centre|centring|serialis|summaris"


def offenders(paths: list[Path], words: dict[str, str]) -> list[str]:
    found = []
    for path in paths:
        name = str(path.relative_to(ROOT))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            for pattern, instead in words.items():
                for match in re.finditer(pattern, line):
                    if match[0] not in ALLOWED.get(name, ()):
                        found.append(f"{name}:{number}: {match[0]!r} -> {instead}: {line.strip()[:90]}")
    return found


def test_retired_words_stay_out_of_the_code() -> None:
    listed(offenders(CODE, ANYWHERE | IN_CODE))


def test_retired_words_stay_out_of_the_pages() -> None:
    listed(offenders(PAGES, ANYWHERE))


def test_identifiers_are_spelled_as_americans_do() -> None:
    found = []
    for path in (path for path in CODE if path.suffix == ".py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = {str(getattr(node, key, None)) for key in ("id", "name", "attr", "arg")}
            line = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            found += [f"{line}: {name}" for name in names if re.search(BRITISH, name)]
    listed(found)


def test_no_page_has_a_conflict_in_it() -> None:
    listed([str(path) for path in (*CODE, *PAGES) if re.search(r"^(<{7}|>{7}) ", path.read_text(encoding="utf-8"), re.M)])
