"""A worker of the decode pool."""

from collections.abc import Callable

from decode_worker.role import DecodeRole
from engine.engine import Engine
from worker.host import WorkerHost
from worker.puller import Puller


class DecodeWorker(WorkerHost):
    """Continues sequences; `await DecodeWorker.start(config)` returns once it is registered."""

    pool_name = "decode"

    def make_role(self, engine: Engine) -> DecodeRole:
        return DecodeRole(engine, Puller(self.segment, self.config.transports, self._post, self.launched))

    def _post(self, command: Callable[[], None]) -> None:
        self._loop.post_wait(command)
