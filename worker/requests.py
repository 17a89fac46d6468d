"""A router's message as a sequence."""

from engine.sampling_params import SamplingParams
from engine.sequence import Sequence
from kvstore.keys import KEY_BYTES, PageKey, unpack_keys, unpack_tokens
from kvstore.pool import PagePool
from protos.errors import InvalidRequest
from protos.v1 import worker_pb2


def sequence_of(
    message: worker_pb2.Prefill | worker_pb2.Decode, answer_len: int, page_size: int, pool: PagePool
) -> Sequence:
    """The sequence that a Prefill or a Decode asks for, to end after `answer_len` tokens, with its tenant's quota.

    Raises `InvalidRequest` where the packed fields do not fit each other.
    """
    try:
        tokens, keys = unpack_tokens(message.token_ids), unpack_keys(message.page_keys)
    except ValueError as error:
        raise InvalidRequest(str(error), field="token_ids", stage="queue") from error
    if len(message.root_key) != KEY_BYTES:
        raise InvalidRequest(f"the root key has {len(message.root_key)} bytes", field="root_key", stage="queue")
    if not tokens or answer_len < 1 or len(keys) != len(tokens) // page_size:
        raise InvalidRequest(
            f"{len(tokens)} tokens with {len(keys)} page keys and {answer_len} to answer",
            field="page_keys",
            stage="queue",
        )
    root = PageKey(message.root_key)
    return Sequence(
        request_id=message.request_id,
        tokens=tokens,
        prompt_len=len(tokens),
        max_len=len(tokens) + answer_len,
        sampling=SamplingParams.from_proto(message.sampling, default_seed=0),  # the router has drawn one
        end_ids=frozenset(message.end_token_ids),
        keys=keys,
        root=root,
        quota=pool.quota(root, message.max_pages) if message.max_pages else None,
    )
