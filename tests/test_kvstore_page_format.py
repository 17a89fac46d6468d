"""Page formats: size, difference, messages."""

import pytest

from kvstore.page_format import PageFormat
from protos import errors
from protos.v1 import common_pb2

LLAMA_8B = PageFormat(layers=32, kv_heads=8, page_size=64, head_dim=128, dtype="bfloat16")


def test_a_page_of_an_8b_model_is_8_mib():
    assert LLAMA_8B.page_bytes == 8 * 1024 * 1024


def test_difference_names_every_field_that_differs():
    other = PageFormat(layers=32, kv_heads=8, page_size=16, head_dim=128, dtype="float32")
    assert LLAMA_8B.difference(other) == "page_size 64 against 16, dtype bfloat16 against float32"
    assert LLAMA_8B.difference(PageFormat(32, 8, 64, 128, "bfloat16")) == ""


def test_a_message_and_back():
    assert PageFormat.from_proto(LLAMA_8B.to_proto()) == LLAMA_8B


@pytest.mark.parametrize(
    ("field", "value"), [("layers", 0), ("kv_heads", 0), ("page_size", -1), ("head_dim", 0), ("dtype", "int8")]
)
def test_an_impossible_field_is_named(field: str, value: object):
    fields = {"layers": 2, "kv_heads": 2, "page_size": 16, "head_dim": 8, "dtype": "float32", field: value}
    with pytest.raises(ValueError, match=f"^{field} must be"):
        PageFormat(**fields)


def test_an_empty_message_from_a_peer_is_a_format_mismatch():
    with pytest.raises(errors.FormatMismatch, match="layers"):
        PageFormat.from_proto(common_pb2.PageFormat())
