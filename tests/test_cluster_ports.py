"""Ports are checked before anything slow is started."""

import socket

import pytest

from cluster.ports import check_free
from protos import errors


def test_a_taken_port_is_named():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(errors.PortTaken, match=f"127.0.0.1:{port}"):
            check_free("127.0.0.1", port)
    check_free("127.0.0.1", port)


def test_an_address_that_is_not_ours_is_named():
    with pytest.raises(errors.PortTaken, match=r"192\.0\.2\.99:50051"):
        check_free("192.0.2.99", 50051)


def test_any_port_is_free():
    check_free("127.0.0.1", 0)
