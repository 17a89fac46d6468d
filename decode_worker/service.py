"""A worker of the decode pool."""

from decode_worker.role import DecodeRole
from engine.engine import Engine
from worker.host import WorkerHost


class DecodeWorker(WorkerHost):
    """Continues sequences; `await DecodeWorker.start(config)` returns once it is registered."""

    pool_name = "decode"

    def make_role(self, engine: Engine) -> DecodeRole:
        return DecodeRole(engine, self.make_puller())
