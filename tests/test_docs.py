"""Pages that are written from the code are current, and every claim in the algorithm table points at something real."""

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.recipes import load

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *ROOT.glob("recipes/**/*.md"), *ROOT.glob("benchmarks/**/*.md")])


def generated() -> dict[str, str]:
    module = load("docs/generate.py")
    return {"config.md": module.config_page(), "metrics.md": module.metrics_page()}


def test_generated_pages_are_current() -> None:
    for name, page in generated().items():
        assert (DOCS / name).read_text(encoding="utf-8") == page, f"run make docs: {name} is out of date"


def test_every_metric_that_is_logged_is_defined_and_every_defined_one_is_logged() -> None:
    from surefoot.train.metrics import METRICS

    source = "\n".join(path.read_text() for path in (ROOT / "src" / "surefoot").rglob("*.py"))
    prefixes = "reward|kl|ppo|critic|policy|length|sampler|time|throughput|eval|sft|reward_model|ptx|dpo|rewards|logps"
    named = set(re.findall(rf'"((?:{prefixes})/[a-z_0-9]+)"', source))
    assert named <= METRICS.keys()
    for name in METRICS:
        is_built = f'"{{name}}/{name.partition("/")[2]}"' in source  # of every objective's name
        times = source.count(f'"{name}"') + source.count(f"'{name}'")
        assert is_built or times >= 2, f"{name} is defined but never logged"


def algorithm_rows() -> list[list[str]]:
    lines = (DOCS / "algorithm.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines if line.startswith("|")]
    return [row for row in rows if not set("".join(row)) <= set("-: ") and row[0] != "detail"]


def test_the_algorithm_table_has_no_empty_cell_and_points_at_code_and_tests_that_exist() -> None:
    rows = algorithm_rows()
    assert len(rows) > 30
    for row in rows:
        assert len(row) == 4 and all(row), row
        detail, place, tests, _ = row
        for file, name in re.findall(r"`([\w/]+\.py)(?::(\w+))?`", place):
            text = (ROOT / "src" / "surefoot" / file).read_text()
            assert not name or re.search(rf"\b{name}\b", text), f"{detail}: no {name} in {file}"
        found = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", tests)
        assert found, f"{detail} names no test"
        for file, name in found:
            functions = {n.name for n in ast.walk(ast.parse((ROOT / file).read_text())) if isinstance(n, ast.FunctionDef)}
            assert not name or name in functions, f"{detail}: no test {name} in {file}"


def headings(page: Path) -> set[str]:
    """The anchors of a page, as GitHub makes them of its headings."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    lines = (line.lower().replace(" ", "-") for line in re.findall(r"^#+ (.*)$", text, flags=re.M))
    return {re.sub(r"[^\w-]", "", line) for line in lines}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)]*))?\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://")):
            there = page.parent / target if target else page
            assert there.exists(), f"{page.name} links to {target}"
            assert not anchor or anchor in headings(there), f"{page.name} links to {target}#{anchor}"


def test_both_readmes_link_to_the_same_pages_and_run_the_same_code() -> None:
    def skeleton(page: str) -> tuple[list[str], list[str]]:
        text = (ROOT / page).read_text(encoding="utf-8")
        blocks = re.findall(r"```\w+\n(.*?)```", text, flags=re.S)
        lines = [line.split("#")[0].rstrip() for block in blocks for line in block.splitlines()]
        return sorted(re.findall(r"\]\((?!README)([^)]*)\)", text)), [line for line in lines if line]

    assert skeleton("README.md") == skeleton("README.zh-CN.md")


@functools.cache
def subcommands() -> set[str]:
    command = [sys.executable, "-c", "from surefoot.cli.main import main; main(['--help'])"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"^ {2,4}([a-z-]+)(?: |$)", shown, flags=re.M))


def unknown_fields(data: object, fields: set[str], prefix: str = "") -> list[str]:
    """The keys in a piece of YAML that are no field and hold none."""
    if prefix in fields or not isinstance(data, dict):
        return [] if any(field == prefix or field.startswith(f"{prefix}.") for field in fields) else [prefix]
    return [key for name in data for key in unknown_fields(data[name], fields, f"{prefix}.{name}".lstrip("."))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_settings_and_commands_in_the_pages_are_real(page: Path) -> None:
    """Python blocks parse, make verbs and subcommands exist, and flags and YAML name fields."""
    from surefoot.config import field_table

    text = page.read_text(encoding="utf-8")
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.S):
        ast.parse(block)
    verbs = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    assert set(re.findall(r"`make ([a-z-]+)", text)) <= verbs
    assert set(re.findall(r"^surefoot ([a-z][a-z-]*)", text, flags=re.M)) <= subcommands()
    fields = {key for key, *_ in field_table()}
    for flag in re.findall(r"--((?!stages|common)[a-z][a-z_-]*\.[a-z][a-z_.-]+)", text):
        assert flag.replace("-", "_") in fields, f"--{flag}"
    pieces = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", text, flags=re.S)]
    stages = [stage for piece in pieces for stage in [piece.pop("common", {}), *piece.pop("stages", {}).values()]]
    inline = [yaml.safe_load(code) for code in re.findall(r"`([a-z_]+: \{[^`…]*\})`", text)]
    sections = {field.partition(".")[0] for field in fields}
    own = {"folder"}  # a pipeline's
    for piece in [*pieces, *stages, *({k: v for k, v in piece.items() if k in sections} for piece in inline)]:
        assert not unknown_fields({key: piece[key] for key in piece if key not in own}, fields)


def programs(page: str, *, with_name: str = "") -> list[str]:
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), flags=re.S)
    return [block for block in blocks if with_name in block]


RUN = [*programs("from-sb3.md"), *programs("understand.md"), *programs("extending.md", with_name="make_env")]


@pytest.mark.parametrize("program", RUN, ids=range(len(RUN)))
def test_programs_that_need_no_download_run(program: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", program]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
    assert ended.returncode == 0, ended.stderr


def test_the_version_is_in_the_changelog() -> None:
    from surefoot import __version__

    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
