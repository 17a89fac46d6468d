"""Page keys: the same everywhere, different wherever pages differ."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from kvstore.keys import PageKey, next_key, pack_keys, pack_tokens, page_keys, root_key, unpack_keys
from kvstore.page_format import PageFormat

FORMAT = PageFormat(layers=2, kv_heads=2, page_size=16, head_dim=8, dtype="float32")
FIELDS = {"tenant_secret": "s", "fingerprint": "f", "format": FORMAT, "rope": "r", "tokenizer": "t"}
TOKENS = list(range(100, 150))  # three full pages of 16 and 2 tokens


def test_keys_do_not_change_between_versions():
    """A change of these makes every worker of another version a stranger: it has to be meant."""
    keys = page_keys(root_key(**FIELDS), TOKENS, 16)
    assert [key.hex() for key in keys] == [
        "2c202aa3a929eaa6ac0829f8b8f034a2",
        "bae78a413b37ea59721e45ab9c8475d0",
        "94737fdf47729ba8c4681a3c4fe35408",
    ]


def test_keys_are_the_same_in_another_process():
    program = (
        "from kvstore.keys import *; from kvstore.page_format import PageFormat;"
        "format = PageFormat(2, 2, 16, 8, 'float32');"
        "root = root_key(tenant_secret='s', fingerprint='f', format=format, rope='r', tokenizer='t');"
        "print(pack_keys(page_keys(root, range(100, 150), 16)).hex())"
    )
    for seed in ("1", "2"):
        answer = subprocess.run(
            [sys.executable, "-c", program],
            cwd=Path(__file__).parent.parent,
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        assert answer.stdout.strip() == pack_keys(page_keys(root_key(**FIELDS), TOKENS, 16)).hex()


def test_the_root_differs_with_everything_that_makes_pages_differ():
    others = [
        {"tenant_secret": "another"},
        {"tenant_secret": ""},
        {"fingerprint": "g"},
        {"rope": "other"},
        {"tokenizer": "u"},
        # The same letters, cut elsewhere.
        {"fingerprint": "fr", "rope": ""},
        {"rope": "rt", "tokenizer": ""},
        *(
            {"format": replace(FORMAT, **change)}
            for change in (
                {"layers": 3},
                {"kv_heads": 1},
                {"page_size": 64},
                {"head_dim": 16},
                {"dtype": "bfloat16"},
                {"layers": 22, "kv_heads": 2},
            )
        ),
    ]
    roots = {root_key(**FIELDS), *(root_key(**(FIELDS | other)) for other in others)}
    assert len(roots) == 1 + len(others)


def test_a_secret_longer_than_a_blake2b_key_counts_in_full():
    long = "x" * 200
    assert root_key(**(FIELDS | {"tenant_secret": long})) != root_key(**(FIELDS | {"tenant_secret": long + "y"}))


def test_only_full_pages_have_keys():
    root = root_key(**FIELDS)
    assert [len(page_keys(root, TOKENS[:n], 16)) for n in (0, 15, 16, 31, 32, 50)] == [0, 0, 1, 1, 2, 3]


def test_a_key_names_all_that_stands_before_it():
    root = root_key(**FIELDS)
    keys = page_keys(root, TOKENS, 16)
    changed = page_keys(root, [7, *TOKENS[1:]], 16)
    assert all(a != b for a, b in zip(keys, changed, strict=True))
    later = page_keys(root, [*TOKENS[:20], 7, *TOKENS[21:]], 16)
    assert later[0] == keys[0]
    assert later[1:] != keys[1:]
    assert page_keys(root, TOKENS[:32], 16) == keys[:2]


def test_ids_and_their_bytes_give_the_same_keys():
    root = root_key(**FIELDS)
    packed = b"".join(token.to_bytes(4, "little") for token in TOKENS)
    assert pack_tokens(TOKENS) == packed
    assert page_keys(root, packed, 16) == page_keys(root, TOKENS, 16) == page_keys(root, tuple(TOKENS), 16)


def test_the_chain_can_be_carried_on_page_by_page():
    root = root_key(**FIELDS)
    key, chain = root, []
    for start in (0, 16, 32):
        key = next_key(key, pack_tokens(TOKENS[start : start + 16]))
        chain.append(key)
    assert chain == page_keys(root, TOKENS, 16)


@pytest.mark.parametrize("bad", [[-1] * 16, [2**32] * 16, b"123"])
def test_bad_tokens_are_refused(bad: object):
    with pytest.raises(ValueError, match="token"):
        page_keys(root_key(**FIELDS), bad, 16)


def test_packed_keys_and_back():
    keys = [PageKey(bytes([n]) * 16) for n in range(3)]
    assert unpack_keys(pack_keys(keys)) == keys
    assert unpack_keys(b"") == []
    with pytest.raises(ValueError, match="17 bytes"):
        unpack_keys(bytes(17))
