"""Why a sequence ended, on the wire."""

from engine.sequence import Finish
from protos.v1 import common_pb2

_REASONS = {
    Finish.STOP: common_pb2.FINISH_REASON_STOP,
    Finish.LENGTH: common_pb2.FINISH_REASON_LENGTH,
}


def finish_reason(finish: Finish) -> common_pb2.FinishReason:
    """The message's value for a finish."""
    return _REASONS[finish]
