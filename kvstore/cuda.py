"""CUDA's runtime as the store needs it: memory that other processes can map, and batched copies.

Everything goes through `cuda.bindings`, which comes with CUDA builds of torch and is imported at the first use, so that
workers without a GPU need neither. A thread that calls in here works on the `device` it names from then on.
"""

import ctypes
import math
import weakref
from typing import Any, Protocol

from protos import errors

# The driver packs smaller allocations into shared blocks of this size, and shares whole blocks with other processes.
_BLOCK = 2 << 20
# A batch of copies begins when all of it has been submitted, which takes 1 to 2 us for each. So the first is small, and
# the next ones, each larger, are submitted while the one before it is copied.
_FIRST_BATCH = 4
_BATCH_GROWTH = 4
STAGE = "segment"


class Event(Protocol):
    """A `torch.cuda.Event`, or whatever else has a CUDA event's address."""

    @property
    def cuda_event(self) -> int: ...


def unavailable() -> str:
    """Why there is no CUDA here; empty where there is."""
    try:
        runtime = _runtime()
    except ImportError:
        return "the package cuda-bindings is not installed"
    error, count = runtime.cudaGetDeviceCount()
    if error != runtime.cudaError_t.cudaSuccess:
        return f"CUDA does not start: {_text(error)}"
    return "" if count else "no GPU is visible"


def device_of(gpu: bytes) -> int:
    """This process's number for the GPU with that UUID; 0, from which it may be reached, where it is not visible."""
    devices = range(_call("cudaGetDeviceCount"))
    return next((device for device in devices if _uuid(device) == gpu), 0)


def wait(event: Event) -> None:
    """Until it has happened."""
    _call("cudaEventSynchronize", event.cuda_event)


class CudaError(errors.DiptychError):
    """A call of the runtime failed."""


class DeviceMemory:
    """Bytes of a GPU in one allocation, zeroed. It lives as long as this object, and tensors made from it keep it.

    `torch.as_tensor(memory, device="cuda:0")` is a uint8 tensor of `shape`. Raises `CudaError` where the device has
    not so much room.
    """

    def __init__(self, shape: tuple[int, ...], device: int) -> None:
        self.shape = shape
        self.device = device
        _use(device)
        rounded = -(-math.prod(shape) // _BLOCK) * _BLOCK
        self.pointer = int(_call("cudaMalloc", rounded))
        weakref.finalize(self, _free, self.pointer)
        _call("cudaMemset", self.pointer, 0, rounded)
        _call("cudaDeviceSynchronize")

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"shape": self.shape, "typestr": "|u1", "data": (self.pointer, False), "version": 3}

    def export(self) -> bytes:
        """A handle of 64 bytes by which another process can map it."""
        _use(self.device)
        return bytes(_call("cudaIpcGetMemHandle", self.pointer).reserved)

    def gpu(self) -> bytes:
        """The GPU's UUID, 16 bytes: processes number their devices each in its own way."""
        return _uuid(self.device)


class PinnedMemory:
    """Host memory that `device` reads and writes at the full rate of its link; [size] as `bytes`."""

    def __init__(self, size: int, device: int) -> None:
        _use(device)
        self.pointer = int(_call("cudaMallocHost", size))
        weakref.finalize(self, _free_host, self.pointer)
        self.bytes = memoryview((ctypes.c_ubyte * size).from_address(self.pointer)).cast("B")


class PinnedRange:
    """Host memory of this process that is pinned for every GPU, from now until `close`.

    Where it is mapped for reading only, GPUs can only read it too. Raises `CudaError` where it cannot be pinned.
    """

    def __init__(self, pointer: int, size: int, device: int, read_only: bool) -> None:
        runtime = _runtime()
        _use(device)
        flags = runtime.cudaHostRegisterPortable | (runtime.cudaHostRegisterReadOnly if read_only else 0)
        _call("cudaHostRegister", pointer, size, flags)
        self._close = weakref.finalize(self, _unpin, pointer)

    def close(self) -> None:
        """May be called again."""
        self._close()


class MappedMemory:
    """Another process's `DeviceMemory` as `device` reaches it. While it is mapped the memory is not given back.

    Raises `WorkerLost` where this device cannot map it, or where there is less of it than `size` bytes.
    """

    def __init__(self, handle: bytes, size: int, device: int) -> None:
        self._device = device
        name = _runtime().cudaIpcMemHandle_t()
        name.reserved = handle
        try:
            _use(device)
            self.pointer = int(_call("cudaIpcOpenMemHandle", name, _runtime().cudaIpcMemLazyEnablePeerAccess))
        except CudaError as error:
            raise errors.WorkerLost(f"cuda:{device} cannot map it: {error.message}", stage=STAGE) from error
        self._close = weakref.finalize(self, _unmap, self.pointer, device)
        if (found := _length(self.pointer)) < size:
            self.close()
            raise errors.WorkerLost(f"the owner's GPU memory has {found} bytes, not {size}", stage=STAGE)

    def close(self) -> None:
        """May be called again."""
        self._close()


class CopyStream:
    """Copies of one device beside everything else that it does, on its copy engines."""

    def __init__(self, device: int) -> None:
        runtime = _runtime()
        self._device = device
        _use(device)
        self._stream = _call("cudaStreamCreateWithFlags", runtime.cudaStreamNonBlocking)
        # A thread that waits for it sleeps: it spins on no core that the engine needs.
        flags = runtime.cudaEventBlockingSync | runtime.cudaEventDisableTiming
        self._done = _call("cudaEventCreateWithFlags", flags)
        self._close = weakref.finalize(self, _destroy, self._stream, self._done)
        self._attributes = runtime.cudaMemcpyAttributes()
        self._attributes.srcAccessOrder = runtime.cudaMemcpySrcAccessOrder.cudaMemcpySrcAccessOrderStream

    def copy(self, sources: list[int], targets: list[int], size: int, after: Event | None = None) -> None:
        """Copy `size` bytes from each address to the one beside it, and wait until all have arrived.

        The copies begin when `after` has happened. Raises `CudaError` where the device fails.
        """
        _use(self._device)
        if after is not None:
            _call("cudaStreamWaitEvent", self._stream, after.cuda_event, 0)
        try:
            at, count = 0, _FIRST_BATCH
            while at < len(sources):
                self._submit(sources[at : at + count], targets[at : at + count], size)
                at, count = at + count, count * _BATCH_GROWTH
        finally:  # whatever was begun must have ended: the caller may use the targets otherwise when this raises
            _call("cudaEventRecord", self._done, self._stream)
            _call("cudaEventSynchronize", self._done)

    def _submit(self, sources: list[int], targets: list[int], size: int) -> None:
        # Not a loop of copies: between two GPUs that reaches 15% to 80% of a contiguous copy's rate.
        count = len(sources)
        sizes, attributes, first = [size] * count, [self._attributes], [0]
        _call("cudaMemcpyBatchAsync", targets, sources, sizes, count, attributes, first, 1, self._stream)

    def close(self) -> None:
        """May be called again."""
        self._close()


def _runtime() -> Any:
    from cuda.bindings import runtime

    return runtime


def _call(name: str, *arguments: object) -> Any:
    """One function of the runtime; its only result, or None."""
    runtime = _runtime()
    error, *results = getattr(runtime, name)(*arguments)
    if error != runtime.cudaError_t.cudaSuccess:
        runtime.cudaGetLastError()  # else a later call reports it once more
        raise CudaError(f"{name}: {_text(error)}", stage=STAGE)
    return results[0] if results else None


def _text(error: Any) -> str:
    text: bytes = _runtime().cudaGetErrorString(error)[1]
    return text.decode()


def _use(device: int) -> None:
    _call("cudaSetDevice", device)


def _uuid(device: int) -> bytes:
    return bytes(_call("cudaGetDeviceProperties", device).uuid.bytes)


def _length(pointer: int) -> int:
    """Bytes from `pointer` to the end of its allocation."""
    from cuda.bindings import driver

    error, base, size = driver.cuMemGetAddressRange(pointer)
    return int(base) + int(size) - pointer if error == driver.CUresult.CUDA_SUCCESS else 0


def _free(pointer: int) -> None:
    _runtime().cudaFree(pointer)


def _free_host(pointer: int) -> None:
    _runtime().cudaFreeHost(pointer)


def _unpin(pointer: int) -> None:
    _runtime().cudaHostUnregister(pointer)


def _unmap(pointer: int, device: int) -> None:
    _runtime().cudaSetDevice(device)
    _runtime().cudaIpcCloseMemHandle(pointer)


def _destroy(stream: object, done: object) -> None:
    _runtime().cudaEventDestroy(done)
    _runtime().cudaStreamDestroy(stream)
