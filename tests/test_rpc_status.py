"""Errors keep their class and what they carry across the wire."""

import grpc
import pytest

from protos import errors
from protos.v1 import common_pb2
from rpc import status


def all_errors(cls=errors.DiptychError):
    yield cls
    for sub in cls.__subclasses__():
        yield from all_errors(sub)


CONCRETE = [cls for cls in all_errors() if "code" in vars(cls) and cls.__module__ == "protos.errors"]


@pytest.mark.parametrize("cls", CONCRETE)
def test_an_error_survives_the_wire(cls):
    error = cls("what happened", request_id="r1", stage="decode")
    back = status.from_detail(common_pb2.ErrorDetail.FromString(status.to_detail(error).SerializeToString()))
    assert type(back) is cls
    assert (back.message, back.request_id, back.stage) == ("what happened", "r1", "decode")
    assert status.status_of(error) is not grpc.StatusCode.OK


def test_field_and_retry_time_survive():
    back = status.from_detail(status.to_detail(errors.InvalidRequest("no", field="top_p")))
    assert back.field == "top_p"
    back = status.from_detail(status.to_detail(errors.Overloaded("later", retry_after_s=2.5)))
    assert back.retry_after_s == 2.5


def test_codes_are_unique():
    codes = [cls.code for cls in CONCRETE]
    assert len(codes) == len(set(codes))


def test_a_code_from_a_newer_peer_is_a_plain_error():
    back = status.from_detail(common_pb2.ErrorDetail(code="melted", message="oh"))
    assert type(back) is errors.DiptychError
    assert back.message == "oh"


def test_a_subclass_without_a_code_of_its_own_travels_as_its_parent():
    class OutOfPages(errors.Overloaded):
        pass

    assert status.status_of(OutOfPages("none left")) is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert type(status.from_detail(status.to_detail(OutOfPages("none left")))) is errors.Overloaded


def test_the_message_says_stage_and_request():
    assert str(errors.WorkerLost("gone", request_id="r1", stage="decode")) == "gone [decode, r1]"
    assert str(errors.WorkerLost("gone")) == "gone"
