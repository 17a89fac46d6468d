"""The error tree, named for what the caller can do. Every error that crosses a wire is one of these.

Each class has a `code` that travels in `ErrorDetail.code`; `rpc/status.py` maps it to a gRPC status and back.
"""


class DiptychError(Exception):
    """Anything that Diptych reports. `request_id` and `stage` say whose and where."""

    code = "internal"

    def __init__(self, message: str, *, request_id: str = "", stage: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.request_id = request_id
        self.stage = stage

    def __str__(self) -> str:
        where = ", ".join(part for part in (self.stage, self.request_id) if part)
        return f"{self.message} [{where}]" if where else self.message


class FixTheRequest(DiptychError):
    """The same call will fail again: change it."""


class InvalidRequest(FixTheRequest):
    """A field of the request is wrong; `field` names it."""

    code = "invalid_request"

    def __init__(self, message: str, *, field: str = "", request_id: str = "", stage: str = "admission") -> None:
        super().__init__(message, request_id=request_id, stage=stage)
        self.field = field


class UnknownModel(FixTheRequest):
    """No such model is served, or none is found where it should be loaded from."""

    code = "unknown_model"


class Unauthenticated(FixTheRequest):
    """The call carries no API key of a tenant."""

    code = "unauthenticated"


class FixTheSetup(DiptychError):
    """An operator must change something: a port, a path, a URL, a file."""

    code = "setup"


class PortTaken(FixTheSetup):
    """Another process listens on the port."""

    code = "port_taken"


class ModelUnusable(FixTheSetup):
    """Weights, tokenizer or configuration are missing, broken or of an architecture that is not built."""

    code = "model_unusable"


class FormatMismatch(FixTheSetup):
    """Two workers' page formats differ; the message says in what."""

    code = "format_mismatch"


class TryAgain(DiptychError):
    """The same call may succeed later or elsewhere."""


class Overloaded(TryAgain):
    """Refused at admission, or no room; `retry_after_s` says when to come back."""

    code = "overloaded"

    def __init__(
        self, message: str, *, retry_after_s: float = 0.0, request_id: str = "", stage: str = "admission"
    ) -> None:
        super().__init__(message, request_id=request_id, stage=stage)
        self.retry_after_s = retry_after_s


class NoWorkers(TryAgain):
    """A pool has no worker that is alive."""

    code = "no_workers"


class WorkerLost(TryAgain):
    """A worker died, or cannot be reached, while it held the request."""

    code = "worker_lost"


class StalePage(TryAgain):
    """A page's generation changed while it was copied: the copy was thrown away."""

    code = "stale_page"


class CorruptPage(TryAgain):
    """A page's copy has another checksum than its owner has named: it was thrown away."""

    code = "corrupt_page"


class MetadataUnavailable(TryAgain):
    """Redis does not answer."""

    code = "metadata_unavailable"


class DeadlineExceeded(DiptychError):
    """The request's own deadline passed."""

    code = "deadline_exceeded"


class Cancelled(DiptychError):
    """The caller went away."""

    code = "cancelled"
