"""The router as a service: `diptych.v1.Inference` on one port."""

import asyncio
import logging
from pathlib import Path
from typing import Any

from kvstore.directory import DirectoryReader
from kvstore.redis_directory import RedisDirectoryReader
from protos.v1 import inference_pb2, inference_pb2_grpc
from router.admission import Admission
from router.config import RouterConfig
from router.fleet import Fleet
from router.inference import Inference
from router.placer import Placer
from router.prompt import PromptReader
from router.served_model import ServedModel
from router.tenant import Tenant
from router.tenants import Tenants
from rpc.server import RpcServer, start_server

log = logging.getLogger(__name__)

SERVICE = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name


class Router:
    """A running router. `address` is host:port as bound."""

    def __init__(self, directory: DirectoryReader, fleet: Fleet, prompts: PromptReader, inference: Inference) -> None:
        self.fleet = fleet
        self._directory = directory
        self._prompts = prompts
        self.inference = inference
        self._server: RpcServer | None = None

    @classmethod
    async def start(cls, config: RouterConfig, directory: DirectoryReader | None = None) -> "Router":
        """Read the model's tokenizer, find the workers, and listen.

        `directory` stands in for the one at `config.redis_url`, and is closed with the router.
        Raises `ModelUnusable`, `MetadataUnavailable` or `PortTaken`; nothing is left running then.
        """
        directory = directory or RedisDirectoryReader(config.redis_url, config.cluster)
        fleet = Fleet(directory, config.router_id)
        try:
            model = await asyncio.to_thread(ServedModel.load, config.model_id, Path(config.model))
            await fleet.start()
            router = cls._assemble(config, directory, fleet, model)
        except BaseException:
            await fleet.stop()
            await directory.aclose()
            raise
        try:
            await router._listen(config)
        except BaseException:
            await router.stop()
            raise
        log.info("router %s serves %s on %s", config.router_id, config.model_id, router.address)
        return router

    @classmethod
    def _assemble(cls, config: RouterConfig, directory: DirectoryReader, fleet: Fleet, model: ServedModel) -> "Router":
        placer = Placer(fleet, model, config.worker_wait_s)
        prompts = PromptReader(model, config.max_prompt_bytes)
        admission = Admission(model, prompts, config.max_inflight, placer.limits, placer.ttft_s)
        tenants = Tenants(config.tenants, alone=Tenant(config.tenant_secret))
        inference = Inference(model, tenants, admission, prompts, placer, config.default_deadline_s)
        return cls(directory, fleet, prompts, inference)

    @property
    def address(self) -> str:
        assert self._server is not None  # started
        return self._server.address

    async def stop(self) -> None:
        """End what runs with a typed error, then close everything. Nothing of it runs on afterwards."""
        await self.inference.stop()
        if self._server is not None:
            await self._server.stop()
        await self.fleet.stop()
        self._prompts.close()
        await self._directory.aclose()

    async def _listen(self, config: RouterConfig) -> None:
        def register(server: Any) -> None:
            inference_pb2_grpc.add_InferenceServicer_to_server(self.inference, server)

        self._server = await start_server(register, [SERVICE], config.host, config.port)
