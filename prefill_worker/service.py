"""A worker of the prefill pool."""

from engine.engine import Engine
from prefill_worker.role import PrefillRole
from worker.host import WorkerHost


class PrefillWorker(WorkerHost):
    """Computes prompts; `await PrefillWorker.start(config)` returns once it is registered."""

    pool_name = "prefill"

    def make_role(self, engine: Engine) -> PrefillRole:
        return PrefillRole(engine, self.make_puller())
