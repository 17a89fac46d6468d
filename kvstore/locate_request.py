"""What is asked of a holder of pages."""

from kvstore.keys import KEY_BYTES, PageKey, unpack_keys
from protos.errors import InvalidRequest
from protos.v1 import worker_pb2

_MOST_KEYS = 2**16  # pages of one prompt; 1 MiB of keys


def keys_of(request: worker_pb2.LocateRequest) -> list[PageKey]:
    """The keys of a prompt's pages, in order. `InvalidRequest` where they are too many, or not whole."""
    if len(request.page_keys) > _MOST_KEYS * KEY_BYTES:
        raise InvalidRequest(f"at most {_MOST_KEYS} pages can be asked for", field="page_keys", stage="locate")
    try:
        return unpack_keys(request.page_keys)
    except ValueError as error:
        raise InvalidRequest(str(error), field="page_keys", stage="locate") from error
