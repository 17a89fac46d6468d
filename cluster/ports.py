"""Is a port free? Asked before anything slow is started."""

import socket

from protos import errors


def check_free(host: str, port: int) -> None:
    """Raises `PortTaken` where something listens on `host:port`. Port 0 is always free."""
    if not port:
        return
    try:
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        raise errors.PortTaken(
            f"cannot listen on {host}:{port} ({error.strerror}): choose other ports with --port and --operator-port, "
            "or end what uses it",
            stage="start",
        ) from error
