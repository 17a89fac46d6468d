"""What the controller makes of Ray's errors and of an actor's answers."""

import pytest
from ray.exceptions import GetTimeoutError, RayError

from cluster.actors import describe_error
from cluster.ray_process import explain, unpack
from protos import errors


def test_an_actors_error_comes_back_with_its_type():
    with pytest.raises(errors.ModelUnusable, match="no weights"):
        unpack(("", describe_error(errors.ModelUnusable("no weights"))))
    assert unpack(("host:1", b"")) == "host:1"


def test_what_nobody_foresaw_comes_back_as_a_plain_error():
    with pytest.raises(errors.DiptychError, match="KeyError: 'layers'") as caught:
        unpack(("", describe_error(KeyError("layers"))))
    assert type(caught.value) is errors.DiptychError


def test_rays_paragraphs_become_a_line():
    died = RayError(
        "The actor died unexpectedly before finishing this task.\n\tclass_name: A\n\tpid: 6574\n"
        "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR "
        "Worker exit detail: End of file. Some common causes include: (1) the process was killed by the OOM killer"
    )
    assert explain(died) == (
        "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR "
        "Worker exit detail: End of file."
    )
    assert explain(GetTimeoutError("too late")) == "too late"
    assert explain(GetTimeoutError()) == "GetTimeoutError"
