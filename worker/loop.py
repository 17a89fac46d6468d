"""The thread that owns an engine: it takes messages, steps, and publishes."""

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from protos.errors import DiptychError, Overloaded
from protos.v1 import worker_pb2
from worker.outbox import Outbox
from worker.role import Role

log = logging.getLogger(__name__)
T = TypeVar("T")

_INBOX = 8192  # messages; past it, the stream that brings one more ends
_IDLE_S = 0.02  # how late a deadline may be noticed while nothing runs


class WorkerLoop:
    """Runs a role in a thread of its own. Everything else talks to the role through messages."""

    def __init__(self, role: Role) -> None:
        self._role = role
        self._inbox: queue.Queue[Callable[[], None]] = queue.Queue(_INBOX)
        self._outboxes: dict[str, Outbox] = {}
        self.load = role.load()  # as of the last step; any thread may read it
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="worker-loop", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float = 10.0) -> None:
        """End after the step in hand."""
        self._stopping.set()
        if self.alive:
            self._thread.join(timeout_s)
        self._role.close()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def post(self, command: Callable[[], None]) -> None:
        """Run this in the loop's thread, before its next step. Raises `Overloaded` where too much waits."""
        try:
            self._inbox.put_nowait(command)
        except queue.Full:
            raise Overloaded("the worker's inbox is full", stage="queue") from None

    def post_wait(self, command: Callable[[], None]) -> None:
        """As `post`, from a thread that may wait for room: what it has to tell must not be lost."""
        self._inbox.put(command, timeout=60)

    def ask(self, act: Callable[[Role], T]) -> Future[T]:
        """As `post`; the future gets what `act` returns or raises. One that was cancelled by then is not run."""
        future: Future[T] = Future()
        self.post(lambda: _settle(future, lambda: act(self._role)))
        return future

    def attach(self, router_id: str, outbox: Outbox) -> None:
        """From now on this router's updates go here; what an earlier stream of its left behind is dropped."""
        self.post(lambda: self._attach(router_id, outbox))

    def detach(self, router_id: str, outbox: Outbox) -> None:
        """The router's stream ended: drop its work, unless a newer stream has taken over."""
        self.post(lambda: self._detach(router_id, outbox))

    def handle(self, router_id: str, message: worker_pb2.RouterMessage) -> None:
        self.post(lambda: self._role.handle(router_id, message))

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._take_commands()
            try:
                self._role.expire(time.monotonic())
                self._role.step()
            except Exception as error:
                # One broken batch must not take the worker, nor leave its requests without an answer.
                log.exception("a step failed; its sequences end with an error")
                if not isinstance(error, DiptychError):
                    error = DiptychError("the engine failed in a step; the worker's log has the trace")
                self._role.fail_running(error)
            self.load = self._role.load()
            self._publish()

    def _take_commands(self) -> None:
        """Run what waits; where there is nothing to compute, wait for a message."""
        try:
            command = self._inbox.get(block=self._role.engine.idle, timeout=_IDLE_S)
            while True:
                self._do(command)
                command = self._inbox.get_nowait()
        except queue.Empty:
            return

    @staticmethod
    def _do(command: Callable[[], None]) -> None:
        try:
            command()
        except Exception:
            # A message that breaks its handler must not end the thread: nobody would be answered any more.
            log.exception("a message failed; its request ends at its deadline")

    def _publish(self) -> None:
        for router_id, updates in self._role.take_updates().items():
            if outbox := self._outboxes.get(router_id):
                outbox.post(updates, self.load)

    def _attach(self, router_id: str, outbox: Outbox) -> None:
        self._role.drop_router(router_id)
        self._outboxes[router_id] = outbox

    def _detach(self, router_id: str, outbox: Outbox) -> None:
        if self._outboxes.get(router_id) is outbox:
            del self._outboxes[router_id]
            self._role.drop_router(router_id)


def _settle(future: Future[T], act: Callable[[], T]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(act())
    except Exception as error:
        future.set_exception(error)
