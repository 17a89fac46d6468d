"""A short name for a model's weights and configuration, the same on every machine. No torch: the router has it too."""

import hashlib
import struct
from pathlib import Path

from engine.json_fields import read_json
from protos.errors import ModelUnusable

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_SAMPLES = 256  # of each file, evenly spread, its end included; a file of up to 1 MiB is read whole
_SAMPLE_BYTES = 4096


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a model directory, by name. Raises `ModelUnusable` where one is missing."""
    if (path / SINGLE_FILE).exists():
        return [path / SINGLE_FILE]
    if not (path / INDEX_FILE).exists():
        raise ModelUnusable(
            f"{path} holds neither {SINGLE_FILE} nor {INDEX_FILE}: give a model with safetensors weights", stage="load"
        )
    shards = read_json(path / INDEX_FILE).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ModelUnusable(f"{path / INDEX_FILE} names no files: fetch the model's files again", stage="load")
    names = sorted({str(name) for name in shards.values()})
    missing = [name for name in names if not (path / name).is_file()]
    if missing:
        raise ModelUnusable(
            f"{path} lacks {', '.join(missing)}, which {INDEX_FILE} names: fetch the model's files again", stage="load"
        )
    return [path / name for name in names]


def model_fingerprint(path: Path) -> str:
    """32 hex digits from config.json and, of each weight file, name, size, header and samples of its data.

    Milliseconds whatever the size. Raises `ModelUnusable`.
    """
    digest = hashlib.blake2b(digest_size=16)
    try:
        digest.update((path / "config.json").read_bytes())
        for file in weight_files(path):
            _add(digest, file)
    except OSError as error:
        raise ModelUnusable(f"{path} cannot be read ({error}): fetch the model's files again", stage="load") from error
    return digest.hexdigest()


def random_fingerprint(path: Path, seed: int) -> str:
    """Of weights made from config.json and a seed (`engine.random_source`): it says so. Raises `ModelUnusable`."""
    try:
        config = (path / "config.json").read_bytes()
    except OSError as error:
        raise ModelUnusable(f"{path} cannot be read ({error}): give a model's directory", stage="load") from error
    return f"random-{seed}-{hashlib.blake2b(config, digest_size=12).hexdigest()}"


def _add(digest: "hashlib.blake2b", file: Path) -> None:
    size = file.stat().st_size
    digest.update(f"{file.name} {size}".encode())
    with file.open("rb") as data:
        header = struct.unpack("<Q", data.read(8).ljust(8, b"\0"))[0]
        digest.update(data.read(min(header, size)))
        for index in range(_SAMPLES):
            data.seek(max(size - _SAMPLE_BYTES, 0) * index // (_SAMPLES - 1))
            digest.update(data.read(_SAMPLE_BYTES))
