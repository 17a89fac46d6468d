"""Weights out of safetensors files, straight to the device that computes."""

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.fingerprint import weight_files
from engine.pinned_staging import PinnedStaging
from engine.tensor_source import Shapes, TensorSource
from protos.errors import ModelUnusable

_FLOATS = ("F64", "F32", "BF16", "F16")
_SHOWN = 4  # names in a message
_TELL_EVERY_S = 1.0


class SafetensorsSource(TensorSource):
    """The files of a model directory. Names and shapes are checked when they are opened, before any data is read.

    On a CPU, what is read alone and has the wanted dtype stays in the mapped file: processes share it. Raises
    `ModelUnusable` that names what is missing, left over or of a wrong shape. `progress` gets a line each second.
    """

    def __init__(self, path: Path, shapes: Shapes, device: torch.device, progress: Callable[[str], None]) -> None:
        super().__init__(shapes, device)
        self._path = path
        self._progress = progress
        self._staging = PinnedStaging(device) if device.type == "cuda" else None
        files = weight_files(path)
        self._files: dict[str, Any] = {}  # tensor's name to its opened file
        for file in files:
            try:
                opened: Any = safe_open(file, framework="pt")  # its stub has no types
            except (SafetensorError, OSError) as error:
                raise ModelUnusable(
                    f"{file} is broken or cut short ({error}): fetch the model's files again", stage="load"
                ) from error
            self._files |= dict.fromkeys(opened.keys(), opened)
        self._check()
        self._bytes, self._total = 0, sum(file.stat().st_size for file in files)
        self._told_at = time.monotonic()

    def read(self, names: list[str], dtype: torch.dtype) -> Tensor:
        """As `TensorSource.read`."""
        if self.device.type == "cpu" and len(names) == 1:
            return self._stored(names[0]).to(dtype)
        return super().read(names, dtype)

    def _fill(self, part: Tensor, name: str) -> None:
        if self._staging is None:
            part.copy_(self._stored(name))
        else:
            self._staging.copy(self._stored(name), part)

    def _stored(self, name: str) -> Tensor:
        """A view of the mapped file: its bytes are read when they are copied."""
        tensor: Tensor = self._files[name].get_tensor(name)
        self._bytes += tensor.nbytes
        if time.monotonic() - self._told_at >= _TELL_EVERY_S:
            self._told_at = time.monotonic()
            self._progress(f"loading the weights: {self._bytes / 1e9:.1f} of {self._total / 1e9:.1f} GB")
        return tensor

    def _check(self) -> None:
        shapes = self._shapes
        self._refuse("lacks {}: fetch the model's files again", (name for name in shapes if name not in self._files))
        # A tied head may be stored all the same; old Llama 2 files hold the rotary frequencies, which config.json says.
        extra = (name for name in self._files if name not in shapes and name != "lm_head.weight")
        self._refuse(
            "also holds {}, of which config.json says nothing: this kind of model is not built, choose another",
            (name for name in extra if not name.endswith("rotary_emb.inv_freq")),
        )
        stored = {name: self._files[name].get_slice(name) for name in shapes}
        found = {name: tuple(part.get_shape()) for name, part in stored.items()}
        self._refuse(
            "holds {}, as config.json has it: fetch the model's files again",
            (
                f"{name} {list(found[name])} and not {list(shape)}"
                for name, shape in shapes.items()
                if found[name] != shape
            ),
        )
        kinds = {name: part.get_dtype() for name, part in stored.items()}
        self._refuse(
            "holds {}, a quantisation that is not built: choose the model in float32, bfloat16 or float16",
            (f"{name} as {kind}" for name, kind in kinds.items() if kind not in _FLOATS),
        )

    def _refuse(self, why: str, names: Iterable[str]) -> None:
        found = list(names)
        if found:
            more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
            raise ModelUnusable(f"{self._path} {why.format(', '.join(found[:_SHOWN]) + more)}", stage="load")
