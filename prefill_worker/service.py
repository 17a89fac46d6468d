"""A worker of the prefill pool."""

from engine.engine import Engine
from prefill_worker.role import PrefillRole
from worker.host import WorkerHost

# A GPU computes so many at nearly the rate of more at once, and meanwhile the pages before them leave: only the tail's
# are still to be moved when the first token is there. On a CPU moving costs next to nothing beside computing.
TAIL_TOKENS = 512


class PrefillWorker(WorkerHost):
    """Computes prompts; `await PrefillWorker.start(config)` returns once it is registered."""

    pool_name = "prefill"

    def make_role(self, engine: Engine) -> PrefillRole:
        if self._loaded.model.device.type == "cuda":
            engine.scheduler.tail_tokens = TAIL_TOKENS
        return PrefillRole(engine, self.make_puller())
