"""Runs one service as a process of its own: `serve_one.py KIND JSON`. Says its address on stdout; SIGTERM ends it."""

import asyncio
import ctypes
import json
import logging
import signal
import sys

from engine.config import EngineConfig, WorkerConfig
from protos.errors import DiptychError
from router.config import RouterConfig

PR_SET_PDEATHSIG = 1


async def serve(kind: str, settings: dict) -> None:
    if kind == "router":
        from router.service import Router

        service = await Router.start(RouterConfig(**settings))
    else:
        from colocated_worker.service import ColocatedWorker
        from decode_worker.service import DecodeWorker
        from prefill_worker.service import PrefillWorker

        engine = EngineConfig(**settings.pop("engine"))
        settings["transports"] = tuple(settings["transports"])
        worker = {"prefill": PrefillWorker, "decode": DecodeWorker, "colocated": ColocatedWorker}[kind]
        service = await worker.start(WorkerConfig(**settings, engine=engine))
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    print(json.dumps({"address": service.address}), flush=True)
    await stopping.wait()
    await service.stop()


if __name__ == "__main__":
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # no orphans where the test is killed
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    try:
        asyncio.run(serve(sys.argv[1], json.loads(sys.argv[2])))
    except DiptychError as error:
        print(json.dumps({"error": error.code, "message": str(error)}), flush=True)
        sys.exit(1)
