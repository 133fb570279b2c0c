"""The shape of the code, kept by a test: which room may import which, and how large things may grow."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "surefoot"
FILES = sorted(SOURCE.rglob("*.py"))

# Room -> the rooms of ours it may import. `errors` and `types` are nouns that any room but core may use, and a room
# may import its own section of `config`; both are left out of the table.
ALLOWED = {
    "errors": set(),
    "types": set(),
    "config": {"config", "strict_yaml", "wording"},
    "strict_yaml": set(),
    "wording": set(),
    "core": {"core"},
    "tensors": set(),
    "run": {"config"},
    "policies": {"core", "policies", "tensors"},
    "generation": {"generation"},
    "envs": {"core", "rewards", "envs"},
    "rewards": {"core", "rewards"},
    "rollout": {"core", "policies", "envs", "generation", "rewards", "rollout"},
    "train": {"core", "run", "rollout", "policies", "train", "tensors"},
    "assets": {"policies"},
    "build": {"core", "run", "policies", "envs", "rewards", "rollout", "train", "assets"},
    "build_text": {"policies", "envs", "rewards", "rollout", "train", "assets", "build"},
    "sb3": {"envs", "policies", "rollout", "train", "build", "ppo"},
    "ppo": {"core", "run", "policies", "envs", "generation", "rollout", "train", "build", "build_text", "sb3"},
    "sft": {"run", "policies", "rollout", "train", "build", "ppo"},
    "from_scratch": {"core", "policies", "assets", "build"},
    "reward_model": {"core", "run", "policies", "envs", "rollout", "train", "build", "build_text", "ppo"},
    "pipeline": {"core", "policies", "envs", "rewards", "run", "ppo", "sft", "reward_model", "build", "build_text", "assets"},
    "play": {"run", "ppo", "build", "envs", "rollout"},
    "demo": {"run", "ppo", "build", "build_text"},
    "trl": {"strict_yaml", "wording", "policies", "tensors", "build", "trl"},
    "cli": {"run", "ppo", "sft", "from_scratch", "reward_model", "pipeline", "play", "demo"}
    | {"build", "build_text", "assets", "trl"},
    "__init__": {"ppo", "sft", "from_scratch", "reward_model", "sb3", "envs", "policies", "rollout", "train"},
}
NOUNS = {"errors", "types", "config"}
# Of the policies, rollout and train know the protocol alone.
PROTOCOL_ONLY = {"rollout", "train"}
# Heavy library -> where it may be imported.
HOMES = {
    "transformers": {"policies", "assets"},
    "peft": {"policies"},
    "tokenizers": {"policies"},
    "tensorboard": {"train"},
    "rich": {"train", "demo"},
    "vaderSentiment": {"rewards"},
    "pydantic": {"config"},
    "gymnasium": {"envs"},
    "pettingzoo": {"envs"},
    "matplotlib": {"play", "reward_model"},
    "PIL": {"play"},
    "imageio_ffmpeg": {"play"},
}
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_PARAMETERS = 8
MAX_SOURCE_LINES = 14_000


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports_of(tree: ast.AST) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, "imports are absolute"
            # `from surefoot import build` names modules, not a room of its own.
            names |= {f"{node.module}.{alias.name}" for alias in node.names} if node.module == "surefoot" else {node.module}
    return names


def functions_of(tree: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


@pytest.fixture(params=FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def source_file(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_imports_go_one_way(source_file: Path) -> None:
    room = room_of(source_file)
    for name in imports_of(ast.parse(source_file.read_text())):
        if not name.startswith("surefoot."):
            continue
        target = name.split(".")[1]
        if target == "__version__" or (target in NOUNS and room not in NOUNS | {"core"}):
            continue
        if room == "config" and target == "errors":
            continue
        assert target in ALLOWED[room], f"{room} imports {name}"
        if room in PROTOCOL_ONLY and target == "policies":
            assert name == "surefoot.policies.base", f"{room} imports {name}; it should know the protocol alone"


def test_core_imports_torch_and_numpy_alone(source_file: Path) -> None:
    if room_of(source_file) == "core":
        outside = {name.split(".")[0] for name in imports_of(ast.parse(source_file.read_text()))}
        plain = {"__future__", "collections", "dataclasses", "hashlib", "math", "typing"}
        assert outside <= {"torch", "numpy", "surefoot"} | plain, outside


def test_each_heavy_library_has_one_home(source_file: Path) -> None:
    for name in imports_of(ast.parse(source_file.read_text())):
        top = name.split(".")[0]
        assert room_of(source_file) in HOMES.get(top, {room_of(source_file)}), f"{source_file} imports {top}"


def test_training_does_not_ask_what_kind_of_policy_it_has(source_file: Path) -> None:
    if room_of(source_file) in {"train", "core"}:
        words = {node.id for node in ast.walk(ast.parse(source_file.read_text())) if isinstance(node, ast.Name)}
        assert not words & {"is_lm", "CausalLMPolicy", "TextRollout", "TextTask", "tokenizer"}


def test_files_functions_and_parameter_lists_stay_short(source_file: Path) -> None:
    text = source_file.read_text()
    assert text.count("\n") <= MAX_FILE_LINES
    for function in functions_of(ast.parse(text)):
        where = f"{source_file.name}:{function.lineno} {function.name}"
        body_lines = (function.end_lineno or 0) - function.lineno + 1
        assert body_lines <= MAX_FUNCTION_LINES, f"{where} has {body_lines} lines"
        arguments = function.args
        positional = [a for a in (*arguments.posonlyargs, *arguments.args) if a.arg not in {"self", "cls", "ctx"}]
        assert len(positional) + len(arguments.kwonlyargs) <= MAX_PARAMETERS, f"{where} has too many parameters"


def test_classes_inherit_from_libraries_only(source_file: Path) -> None:
    tree = ast.parse(source_file.read_text())
    own = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    shallow = {"SurefootError", "Section"}  # the root of the errors, and of the configuration's models
    for node in own.values():
        for base in (b.id for b in node.bases if isinstance(b, ast.Name)):
            is_protocol = base in own and any(isinstance(b, ast.Name) and b.id == "Protocol" for b in own[base].bases)
            assert base not in own or base in shallow or is_protocol, f"{node.name} inherits from {base}"


def test_there_is_no_drawer_for_everything() -> None:
    assert not [path for path in FILES if path.stem in {"utils", "util", "helpers", "misc", "common"}]


def test_the_whole_package_stays_readable() -> None:
    assert sum(path.read_text().count("\n") for path in FILES) <= MAX_SOURCE_LINES


def test_nothing_unsafe_loads_files(source_file: Path) -> None:
    tree = ast.parse(source_file.read_text())
    assert not imports_of(tree) & {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in {"torch.load", "torch.save", "eval", "exec", "yaml.unsafe_load", "yaml.full_load", "os.system"}
            for keyword in node.keywords:
                value = getattr(keyword.value, "value", None)
                assert (keyword.arg, value) not in {("trust_remote_code", True), ("shell", True)}
