"""A worker of the colocated pool."""

from colocated_worker.role import ColocatedRole
from engine.engine import Engine
from worker.host import WorkerHost


class ColocatedWorker(WorkerHost):
    """Answers whole requests; `await ColocatedWorker.start(config)` returns once it is registered."""

    pool_name = "colocated"

    def make_role(self, engine: Engine) -> ColocatedRole:
        return ColocatedRole(engine, self.make_puller())
