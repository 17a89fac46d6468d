"""How fast pages move between two processes, by each transport, beside the plainest way to move as many bytes.

    python -m benchmarks.transports                    shm beside a copy in memory, tcp beside one raw socket
    python -m benchmarks.transports --gpus 0 1         cuda_ipc from cuda:1 into cuda:0, beside one contiguous copy
    python -m benchmarks.transports --nixl             nixl where it is installed, with --gpus between these
    python -m benchmarks.transports --host-tier 0      between host memory and cuda:0, beside one copy of pinned memory

Pages are scattered on both sides. Both sides of a ratio take turns in one run, and a figure is the median of them:
the machine may be shared.
"""

import argparse
import json
import random
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from benchmarks.product_step import ProductStep, repeating
from benchmarks.record import write_result
from kvstore import cuda
from kvstore.device_segment import DeviceSegment
from kvstore.page_format import PageFormat
from kvstore.pool import PageId
from kvstore.segment import Segment
from kvstore.segment_base import SegmentBase
from kvstore.transports import registry
from protos.v1 import worker_pb2

MIB = 1 << 20
INCARNATION = 1
TIMEOUT_S = 60.0
Call = Callable[[], object]
Row = dict[str, Any]


def page_format(page_mib: int) -> PageFormat:
    """Of 8 KV heads of 128, 64 tokens: a page of an 8B model has 32 layers and 8 MiB."""
    return PageFormat(layers=4 * page_mib, kv_heads=8, page_size=64, head_dim=128, dtype="bfloat16")


def make_segment(page_mib: int, pages: int, device: int | None) -> Segment | DeviceSegment:
    """Written once, so that its memory is there."""
    if device is not None:
        return DeviceSegment.create(page_format(page_mib), pages, INCARNATION, device)
    segment = Segment.create(page_format(page_mib), pages, INCARNATION)
    segment.pages[:] = 1
    return segment


def own(page_mib: int, pages: int, device: int | None) -> None:
    """The owner's process: serve until the input ends."""
    segment = make_segment(page_mib, pages, device)
    servers = registry.serve(["cuda_ipc", "shm", "nixl", "tcp"], segment, "127.0.0.1")
    raw = socket.create_server(("127.0.0.1", 0))
    endpoints = {server.endpoint.transport: server.endpoint.address for server in servers}
    print(json.dumps({"endpoints": endpoints, "raw": raw.getsockname()[1]}), flush=True)
    threading.Thread(target=send_raw, args=(raw,), daemon=True).start()
    sys.stdin.read()


def send_raw(listener: socket.socket) -> None:
    """As many bytes as each message asks for, out of one buffer; one reader after the other."""
    buffer = bytes(8 * MIB)
    while True:
        connection, _ = listener.accept()
        while request := connection.recv(8, socket.MSG_WAITALL):
            for _ in range(int.from_bytes(request, "little") // len(buffer)):
                connection.sendall(buffer)


@contextmanager
def owner(page_mib: int, pages: int, device: int | None) -> Iterator[Row]:
    """What the owner's process says of itself."""
    arguments = [str(page_mib), str(pages), "-" if device is None else str(device)]
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks.transports", "--own", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())
        process.stdin.close()


def medians(calls: dict[str, Call], rounds: int) -> dict[str, float]:
    """Seconds of each, taking turns."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for i in range(rounds):
        for name in list(calls)[:: 1 if i % 2 else -1]:
            started = time.perf_counter()
            calls[name]()
            taken[name].append(time.perf_counter() - started)
    return {name: statistics.median(times) for name, times in taken.items()}


def pull_call(transport: str, peer: Row, local: SegmentBase, pages: int, of: int) -> Call:
    """A pull of so many of the owner's pages, scattered in both pools."""
    endpoint = worker_pb2.Endpoint(transport=transport, address=peer["endpoints"][transport])
    source = worker_pb2.PageSource(
        worker_id="owner", incarnation=INCARNATION, format=local.format.to_proto(), endpoints=[endpoint]
    )
    reader = registry.connect(source, local, [transport])
    shuffled = random.Random(0)
    refs = [(page, 0) for page in shuffled.sample(range(of), pages)]
    into = [PageId(page) for page in shuffled.sample(range(of), pages)]
    return lambda: reader.pull(refs, into, TIMEOUT_S)


def raw_call(connection: socket.socket, size: int) -> Call:
    """As many bytes through one socket into one buffer."""
    buffer = memoryview(np.ones(8 * MIB, np.uint8).data)

    def receive() -> None:
        connection.sendall(size.to_bytes(8, "little"))
        left = size
        while left:
            left -= connection.recv_into(buffer)

    return receive


def contiguous_call(peer: Row, local: DeviceSegment, size: int) -> Call:
    """As many bytes of the owner's GPU memory in one piece."""
    theirs = SegmentBase.open(peer["endpoints"]["cuda_ipc"], INCARNATION, local.format)
    mapped = cuda.MappedMemory(theirs.header.ipc_handle, size, local.device)
    stream = cuda.CopyStream(local.device)
    target = local.pages.pointer
    return lambda: (mapped, stream.copy([mapped.pointer], [target], size))


def pinned_call(device: int, address: int, size: int, to_gpu: bool) -> Call:
    """As many bytes between CUDA's own pinned memory and the GPU's at `address`, in one piece."""
    pinned, stream = cuda.PinnedMemory(size, device), cuda.CopyStream(device)
    ends = [pinned.pointer], [address]
    return lambda: (pinned, stream.copy(*(ends if to_gpu else ends[::-1]), size))


def memory_call(size: int) -> Call:
    """As many bytes from one array to another."""
    source, target = np.ones(size, np.uint8), np.ones(size, np.uint8)
    return lambda: np.copyto(target, source)


def row(name: str, plain: str, page_mib: int, pages: int, times: dict[str, float]) -> Row:
    size = page_mib * MIB * pages
    rates = {key: size / seconds / 1e9 for key, seconds in times.items()}
    result = {
        "transport": name,
        "page_mib": page_mib,
        "mib": page_mib * pages,
        "gb_per_s": round(rates[name], 2),
        f"{plain}_gb_per_s": round(rates[plain], 2),
        "ratio": round(rates[name] / rates[plain], 3),
    }
    print(result, flush=True)
    return result


def host_rows(page_mib: int, sizes_mib: Sequence[int], rounds: int) -> Iterator[Row]:
    of = 2 * max(sizes_mib) // page_mib
    local = make_segment(page_mib, of, None)
    with owner(page_mib, of, None) as peer:
        for mib in sizes_mib:
            pages = mib // page_mib
            calls = {"shm": pull_call("shm", peer, local, pages, of), "memory": memory_call(mib * MIB)}
            yield row("shm", "memory", page_mib, pages, medians(calls, rounds))
        for mib in sizes_mib:
            pages = mib // page_mib
            with socket.create_connection(("127.0.0.1", peer["raw"])) as raw:
                calls = {"tcp": pull_call("tcp", peer, local, pages, of), "raw": raw_call(raw, mib * MIB)}
                yield row("tcp", "raw", page_mib, pages, medians(calls, rounds))
    local.close()


def gpu_rows(name: str, page_mib: int, sizes_mib: Sequence[int], rounds: int, gpus: Sequence[int]) -> Iterator[Row]:
    of = 2 * max(sizes_mib) // page_mib
    local = make_segment(page_mib, of, gpus[0])
    assert isinstance(local, DeviceSegment)
    with owner(page_mib, of, gpus[1]) as peer:
        for mib in sizes_mib:
            pages = mib // page_mib
            calls = {
                name: pull_call(name, peer, local, pages, of),
                "contiguous": contiguous_call(peer, local, mib * MIB),
            }
            yield row(name, "contiguous", page_mib, pages, medians(calls, rounds))
    local.close()


def nixl_rows(page_mib: int, sizes_mib: Sequence[int], rounds: int) -> Iterator[Row]:
    of = 2 * max(sizes_mib) // page_mib
    local = make_segment(page_mib, of, None)
    with owner(page_mib, of, None) as peer:
        for mib in sizes_mib:
            pages = mib // page_mib
            calls = {"nixl": pull_call("nixl", peer, local, pages, of), "memory": memory_call(mib * MIB)}
            yield row("nixl", "memory", page_mib, pages, medians(calls, rounds))
    local.close()


def host_tier_rows(page_mib: int, sizes_mib: Sequence[int], rounds: int, gpu: int) -> Iterator[Row]:
    of = 2 * max(sizes_mib) // page_mib
    for to_gpu in (True, False):
        name, transport = ("host to GPU", "shm") if to_gpu else ("GPU to host", "cuda_ipc")
        local = make_segment(page_mib, of, gpu if to_gpu else None)
        on_gpu = local if isinstance(local, DeviceSegment) else make_segment(page_mib, of, gpu)
        assert isinstance(on_gpu, DeviceSegment)
        with owner(page_mib, of, None if to_gpu else gpu) as peer:
            for mib in sizes_mib:
                pages = mib // page_mib
                pull = pull_call(transport, peer, local, pages, of)
                plain = pinned_call(gpu, on_gpu.pages.pointer, mib * MIB, to_gpu)
                yield row(name, "pinned", page_mib, pages, medians({name: pull, "pinned": plain}, rounds))
        on_gpu.close()
        local.close()


def pinning(gpu: int) -> Row:
    """Milliseconds that it takes to pin a GiB, once, of this process's own memory and of another's."""
    own = make_segment(8, 256, None)
    assert isinstance(own, Segment)
    with owner(8, 256, None) as peer:
        theirs = Segment.open(peer["endpoints"]["shm"], INCARNATION, own.format)
        result = {}
        for name, segment in (("own", own), ("another's", theirs)):
            started = time.perf_counter()
            segment.addresses([PageId(page) for page in range(256)], gpu)
            result[name] = round((time.perf_counter() - started) / 2 * 1e3, 1)
        theirs.close()
    own.close()
    return result


def slowdown(gpu: int, owner_on: int | None, rounds: int = 60) -> Row:
    """What a decode step loses while pulls of 1 GiB follow one another."""
    step_ms = ProductStep(gpu)
    local = make_segment(8, 256, gpu)
    with owner(8, 256, owner_on) as peer:
        pull = pull_call("shm" if owner_on is None else "cuda_ipc", peer, local, 128, 256)
        pull()
        step_ms()
        alone = statistics.median(step_ms() for _ in range(rounds))
        with repeating(pull) as taken:
            time.sleep(0.05)
            during = statistics.median(step_ms() for _ in range(rounds))
    local.close()
    result = {
        "alone_ms": round(alone, 3),
        "during_ms": round(during, 3),
        "slowdown": round(during / alone, 3),
        "gb_per_s": round((1 << 30) / statistics.median(taken) / 1e9, 1),
    }
    print(result, flush=True)
    return result


def gpu_name(device: int) -> str:
    import torch

    return torch.cuda.get_device_name(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs=2, metavar=("LOCAL", "OWNER"), help="the devices of both pools")
    parser.add_argument("--host-tier", type=int, metavar="GPU", help="between this device and host memory")
    parser.add_argument("--nixl", action="store_true")
    parser.add_argument("--page-mib", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--mib", type=int, nargs="+", default=[64, 256], help="bytes of one pull")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--name", default="transports", help="of the result's file")
    parser.add_argument("--own", nargs=3, metavar=("PAGE_MIB", "PAGES", "DEVICE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.own:
        page_mib, pages, device = args.own
        own(int(page_mib), int(pages), None if device == "-" else int(device))
        return
    rows: list[Row] = []
    result: Row = {"rows": rows}
    for page_mib in args.page_mib:
        sizes = [mib for mib in args.mib if mib >= page_mib]
        if args.gpus:
            rows += gpu_rows("nixl" if args.nixl else "cuda_ipc", page_mib, sizes, args.rounds, args.gpus)
        elif args.nixl:
            rows += nixl_rows(page_mib, sizes, args.rounds)
        elif args.host_tier is not None:
            rows += host_tier_rows(page_mib, sizes, args.rounds, args.host_tier)
        else:
            rows += host_rows(page_mib, sizes, args.rounds)
    if args.gpus:
        result["gpus"] = [gpu_name(device) for device in args.gpus]
    if args.gpus and not args.nixl:
        result["step_while_1_gib_arrives"] = slowdown(*args.gpus)
    elif args.host_tier is not None:
        result["gpus"] = [gpu_name(args.host_tier)]
        result["pinning_ms_a_gib"] = pinning(args.host_tier)
        result["step_while_1_gib_arrives"] = slowdown(args.host_tier, None)
    print(write_result(args.name, result))


if __name__ == "__main__":
    main()
