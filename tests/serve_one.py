"""Runs one service as a process of its own: `serve_one.py KIND JSON`. Says its address on stdout; SIGTERM ends it."""

import asyncio
import ctypes
import json
import logging
import signal
import sys
from pathlib import Path

from engine.config import EngineConfig, WorkerConfig
from protos.errors import DiptychError
from router.config import RouterConfig
from router.tenant import Tenant

PR_SET_PDEATHSIG = 1


async def start(kind: str, settings: dict):
    if kind == "router":
        from router.service import Router

        tenants = tuple(Tenant(**tenant) for tenant in settings.pop("tenants", ()))
        return await Router.start(RouterConfig(**settings, tenants=tenants))
    if kind == "store":
        from page_store.config import PageStoreConfig
        from page_store.store import PageStore

        disk_dir = Path(settings.pop("disk_dir")) if "disk_dir" in settings else None
        return await PageStore.start(PageStoreConfig(**settings, disk_dir=disk_dir))
    from colocated_worker.service import ColocatedWorker
    from decode_worker.service import DecodeWorker
    from prefill_worker.service import PrefillWorker

    engine = EngineConfig(**settings.pop("engine"))
    settings["transports"] = tuple(settings["transports"])
    worker = {"prefill": PrefillWorker, "decode": DecodeWorker, "colocated": ColocatedWorker}[kind]
    return await worker.start(WorkerConfig(**settings, engine=engine))


async def stay(service, **more: str) -> None:
    """Until SIGTERM. `more` is said together with the address."""
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    print(json.dumps({"address": service.address} | more), flush=True)
    await stopping.wait()
    await service.stop()


async def serve(kind: str, settings: dict) -> None:
    await stay(await start(kind, settings))


def main(serve=serve) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # no orphans where the test is killed
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    try:
        asyncio.run(serve(sys.argv[1], json.loads(sys.argv[2])))
    except DiptychError as error:
        print(json.dumps({"error": error.code, "message": str(error)}), flush=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
