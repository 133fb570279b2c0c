"""The shape of the code, kept by tests that parse every file once and list all offenders: rooms, circles, sizes, safety."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "surefoot"
DOCS = ROOT / "docs"

# Room -> the rooms it may import besides itself; a room in two parts (policies.lm) takes precedence over its folder's.
# `errors` and `types` are nouns for all but core; the tables of `config` are for all that a run configures.
POLICIES = {"policies.base", "policies.lm", "policies.control"}
STEPS = {"core", "storage", "data", "envs", "rewards", "generation", "rollout"}
ROOMS: dict[str, set[str]] = {
    "errors": set(),
    "types": set(),
    "config": {"errors"},
    "core": {"errors"},
    "storage": {"config"},
    "generation": set(),
    "policies.base": {"core"},
    "policies.lm": {"config", "core", "storage", "data", "policies.base"},
    "policies.control": {"config", "core", "storage", "policies.base"},
    "data": {"config", "core", "storage"},
    "envs": {"config", "core", "data", "rewards"},
    "rewards": {"config", "core", "data", "storage"},
    "rollout": {"config", "core", "data", "envs", "rewards", "generation", "policies.base"},
    "train": {"config", "core", "storage", "data", "rollout", "policies.base"},
    "train.observers": {"config", "storage", "data", "train"},
    "build": {"config", "train", "train.observers", *STEPS, *POLICIES},
    "api": {"config", "train", "train.observers", "build", *STEPS, *POLICIES},
    "cli": {"config", "api", "build", "storage", "data", "envs", "rollout", "migrate"},
    "migrate": {"config", "build", "storage", "policies.lm"},
    "__init__": {"api", "build", "core", "train", *STEPS, *POLICIES},
}
NOUNS = {"errors", "types"}
# Heavy library -> the rooms that may import it.
HOMES = {
    **{"transformers": {"policies.lm", "data"}, "peft": {"policies.lm"}, "tokenizers": {"policies.lm"}},
    **{"gymnasium": {"envs"}, "pettingzoo": {"envs"}, "PIL": {"cli"}, "imageio_ffmpeg": {"cli"}},
    **{"tensorboard": {"train.observers"}, "rich": {"train.observers", "cli"}, "matplotlib": {"cli", "api"}},
    **{"vaderSentiment": {"rewards"}, "pydantic": {"config"}},
}
TORCH_FREE = {"config", "errors"}  # --help and a bad YAML file answer at once
CORE_LIBRARIES = {"torch", "numpy", "__future__", "collections", "dataclasses", "hashlib", "math", "typing"}
PICKLES = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
UNSAFE_CALLS = {"torch.load", "torch.save", "eval", "exec", "yaml.unsafe_load", "yaml.full_load", "os.system"}

FILE_LINES, FUNCTION_LINES, PARAMETERS, COLUMNS = 400, 60, 8, 110
# Where the lines stand. Rooms, and what came with models, texts, runs and user code as they are, were to take 13,900
# (12,956 when rooms were cut, 12,800 the aim); the doors for rewards, trackers, the family and Stable-Baselines3's programs
# have about 1,350 of the 1,900 that they were given. Tests are no longer than the source. Both go down, or up by what is given.
SOURCE_LINES = 15_257
TEST_LINES = 14_814
PAGES = {"examples/own_the_loop.py": 100, "examples/single_file/ppo_lm.py": 350, "examples/single_file/ppo_gym.py": 300}
READING = {"language": (14, 3_000), "gym": (12, 2_800)}
HOPS = 4  # calls from the loop to the surrogate's formula


@cache
def sources() -> dict[str, tuple[list[str], ast.Module]]:
    """Every file of the package by its name below it: lines and tree."""
    texts = {str(path.relative_to(SOURCE)): path.read_text(encoding="utf-8") for path in sorted(SOURCE.rglob("*.py"))}
    return {name: (text.splitlines(), ast.parse(text)) for name, text in texts.items()}


@cache
def modules() -> dict[str, str]:
    """Module -> file, `surefoot.core.losses` -> `core/losses.py`."""
    dotted = {name: "surefoot." + name.removesuffix(".py").replace("/", ".") for name in sources()}
    return {module.removesuffix(".__init__"): name for name, module in dotted.items()}


@cache
def imports(file: str) -> list[tuple[int, str]]:
    """What a file imports, type-only imports and those inside functions included, by line: modules where they are ours."""
    found: list[tuple[int, str]] = []
    for node in ast.walk(sources()[file][1]):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{file}:{node.lineno}: imports are absolute"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.append((node.lineno, inner if inner in modules() else node.module))
    return list(dict.fromkeys(found))


def nodes(*kinds: type[ast.AST], rooms: set[str] | None = None) -> Iterator[tuple[str, Any]]:
    """The nodes of these kinds in every file, or in those of some rooms, with the file."""
    for file, (_, tree) in sources().items():
        if rooms is None or room_of(file) in rooms:
            yield from ((file, node) for node in ast.walk(tree) if isinstance(node, kinds))


def room(module: str) -> str:
    """`surefoot.policies.lm.policy` -> `policies.lm`."""
    name = module.removeprefix("surefoot.") if module != "surefoot" else "__init__"
    rooms = [known for known in ROOMS if name == known or name.startswith(f"{known}.")]
    return max(rooms, key=len, default=name.split(".")[0])


def room_of(file: str) -> str:
    return room(next(module for module, name in modules().items() if name == file))


def listed(offenders: list[str]) -> None:
    assert not offenders, f"{len(offenders)} offenders:\n" + "\n".join(offenders)


def test_imports_go_one_way() -> None:
    offenders = [f"{file}: is in no room of the table" for file in sources() if room_of(file) not in {*ROOMS, "policies"}]
    for file in sources():
        here = room_of(file)
        allowed = ROOMS.get(here, set()) | {here} | (NOUNS if here not in {*NOUNS, "core", "config"} else set())
        for line, module in imports(file):
            if module.startswith("surefoot.") and room(module) not in allowed and module != "surefoot.__version__":
                offenders.append(f"{file}:{line}: {here} imports {module}")
    listed(offenders)


def test_no_file_leads_back_to_itself() -> None:
    """No cycle among the files, type-only imports and imports inside functions included."""
    arrows = {
        file: sorted({modules()[m] for _, m in imports(file) if m in modules() and modules()[m] != file}) for file in sources()
    }
    listed([" -> ".join(cycle) for cycle in cycles(arrows)])


def cycles(arrows: dict[str, list[str]]) -> list[list[str]]:
    """One cycle through every arrow that leads back into the path it was reached by (depth-first search)."""
    found: list[list[str]] = []
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> None:
        for target in arrows[node]:
            if target in path:
                found.append([*path[path.index(target) :], target])
            elif target not in done:
                visit(target, [*path, target])
        done.add(node)

    for node in arrows:
        if node not in done:
            visit(node, [node])
    return found


def test_the_search_for_cycles_finds_one() -> None:
    assert cycles({"a": ["b", "c"], "b": ["c"], "c": ["d"], "d": ["b"]}) == [["b", "c", "d", "b"]]
    assert cycles({"a": ["b", "c"], "b": ["c"], "c": []}) == []


def test_libraries_have_their_homes() -> None:
    offenders = []
    for file in sources():
        for line, module in imports(file):
            top, here = module.split(".")[0], room_of(file)
            is_foreign = here == "core" and top not in {*CORE_LIBRARIES, "surefoot"}
            if here not in HOMES.get(top, {here}) or is_foreign or (here in TORCH_FREE and top == "torch"):
                offenders.append(f"{file}:{line}: {here} imports {top}")
    listed(offenders)


def test_training_does_not_ask_what_it_trains() -> None:
    """Neither which policy, nor which task, nor which objective: protocols are asked, not types and names."""
    kinds = {"is_lm", "CausalLMPolicy", "ControlPolicy", "TextRollout", "TextTask", "tokenizer", "PPOObjective"}
    kind_of = re.compile(r"objective(\.name)? (==|!=|is(?! None)(?! not None)|in) |^isinstance\([^,]*(policy|objective|task)\b")
    offenders = []
    for file, node in nodes(ast.Compare, ast.Call, ast.Name, rooms={"train", "core"}):
        text = ast.unparse(node)
        is_asked = text in kinds if isinstance(node, ast.Name) else kind_of.search(text)
        if is_asked and "objective" not in Path(file).stem:
            offenders.append(f"{file}:{node.lineno}: {text}")
    listed(offenders)


def test_files_and_lines_stay_short() -> None:
    sizes = {name: len(lines) for name, (lines, _) in sources().items()}
    offenders = [f"{name}: {size} lines" for name, size in sizes.items() if size > FILE_LINES]
    lines = [(f"{name}:{i}", line) for name, (lines, _) in sources().items() for i, line in enumerate(lines, start=1)]
    offenders += [f"{place}: {len(line)} columns" for place, line in lines if len(line) > COLUMNS]
    if (total := sum(sizes.values())) > SOURCE_LINES:
        offenders.append(f"src: {total} lines, {SOURCE_LINES} at most")
    if (tests := sum(len(path.read_text(encoding="utf-8").splitlines()) for path in ROOT.glob("tests/**/*.py"))) > TEST_LINES:
        offenders.append(f"tests: {tests} lines, {TEST_LINES} at most")
    pages = {name: len((ROOT / name).read_text(encoding="utf-8").splitlines()) for name in PAGES}
    listed(offenders + [f"{name}: {size} lines, {PAGES[name]} at most" for name, size in pages.items() if size > PAGES[name]])


def test_functions_stay_short() -> None:
    offenders = []
    for file, node in nodes(ast.FunctionDef, ast.AsyncFunctionDef):
        size = node.end_lineno - node.lineno + 1
        given = {argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)}
        count = len(given - {"self", "cls", "ctx"})
        if size > FUNCTION_LINES or count > PARAMETERS:
            offenders.append(f"{file}:{node.lineno} {node.name}: {size} lines, {count} parameters")
    listed(offenders)


def test_classes_inherit_from_libraries_only() -> None:
    """But for the roots of the errors and of the configuration, for protocols and for PPO's other names."""
    classes = list(nodes(ast.ClassDef))
    protocols = {node.name for _, node in classes if any("Protocol" in ast.unparse(base) for base in node.bases)}
    errors = {node.name for file, node in classes if file == "errors.py"}
    own = {node.name for _, node in classes} - protocols - errors - {"Section", "OptimizerFields", "ExampleFields", "PPO"}
    listed([f"{f}:{n.lineno}: {n.name}" for f, n in classes if own & {ast.unparse(base).split(".")[-1] for base in n.bases}])


def test_there_is_no_drawer_for_everything() -> None:
    drawers = {"utils", "util", "helpers", "misc", "common", "base_utils"}
    listed([name for name in sources() if drawers & set(Path(name).with_suffix("").parts)])


def test_nothing_unsafe_loads_files() -> None:
    offenders = []
    for file in sources():
        offenders += [f"{file}:{line}: imports {module}" for line, module in imports(file) if module.split(".")[0] in PICKLES]
    for file, node in nodes(ast.Call):
        keywords = {(keyword.arg, getattr(keyword.value, "value", None)) for keyword in node.keywords}
        if ast.unparse(node.func) in UNSAFE_CALLS or keywords & {("trust_remote_code", True), ("shell", True)}:
            offenders.append(f"{file}:{node.lineno}: {ast.unparse(node)}")
    listed(offenders)


def reading_list(kind: str) -> list[Path]:
    """The files that docs/index.md links between `<!-- reading list: KIND -->` and `<!-- end -->`."""
    page = (DOCS / "index.md").read_text(encoding="utf-8")
    part = page.split(f"<!-- reading list: {kind} -->")[1].split("<!-- end -->")[0]
    return list(dict.fromkeys((DOCS / target).resolve() for target in re.findall(r"\]\(([^)]+\.py)\)", part)))


def test_a_newcomers_reading_is_short() -> None:
    offenders = []
    for kind, (most_files, most_lines) in READING.items():
        files = reading_list(kind)
        offenders += [f"{kind}: {file} is not there" for file in files if not file.is_file()]
        lines = sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files if file.is_file())
        if not files or len(files) > most_files or lines > most_lines:
            offenders.append(f"{kind}: {len(files)} files with {lines} lines; at most {most_files} with {most_lines}")
        entry = {"api/ppo.py", "train/loop.py", "train/update.py", "core/advantages.py", "core/losses.py"}
        missing = [name for name in sorted(entry) if (SOURCE / name).resolve() not in files]
        offenders += [f"{kind}: {name} is on the way and not in the list" for name in missing]
    listed(offenders)


def test_the_formula_is_few_calls_from_the_loop() -> None:
    """Breadth-first over calls by name, from `run` in train/loop.py to the function that has the clipped surrogate."""
    bodies: dict[str, list[ast.FunctionDef]] = {}
    formula: set[str] = set()
    for _, node in nodes(ast.FunctionDef, rooms={"train", "core"}):
        bodies.setdefault(node.name, []).append(node)
        words = set(re.findall(r"\w+", ast.unparse(node)))
        formula |= {node.name} if "ratio" in words and words & {"clamp", "clip"} else set()
    reached, hops = {"run"}, 0
    while not reached & formula and hops <= HOPS:
        walked = (node for name in reached for body in bodies.get(name, []) for node in ast.walk(body))
        reached = {ast.unparse(n.func).split(".")[-1] for n in walked if isinstance(n, ast.Call)} & bodies.keys()
        hops += 1
    assert reached & formula and hops <= HOPS, f"{hops} calls from train/loop.py:run, {HOPS} at most"
