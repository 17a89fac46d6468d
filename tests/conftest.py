"""What every test shares."""

import os
import signal

# Read when torch is first imported: tests that need no torch never load it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from engine import hub

# A shell starts its background jobs with SIGINT ignored, which children inherit: Ctrl-C could not be tested there.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def demo_model() -> hub.ResolvedModel:
    """The demo model (SmolLM2-135M-Instruct), in the user's own cache: downloaded and converted once a machine."""
    return hub.resolve(hub.DEMO_MODEL, print)
