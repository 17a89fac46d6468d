"""Environment variables for a private Ray. Ray reads some of them when it is imported, so they come before that."""

import secrets
from pathlib import Path


def local_environment(folder: Path) -> dict[str, str]:
    """What a supervisor needs in its environment. `folder` is private to the user, and gets Ray's token."""
    token = folder / "ray-token"  # Ray listens on every interface: without the token nobody can use it
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_memory_monitor_refresh_ms": "0",  # it kills actors of ours for the memory that others use
        "RAY_worker_niceness": "0",  # its workers are our servers: they must not yield to everything else
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # Ray's own wish, else it warns
    }
