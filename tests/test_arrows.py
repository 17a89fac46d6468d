"""Imports go downwards only."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Each room may import the rooms that stand after it, never one in its own line.
FLOORS = [
    {"diptych"},
    {"cluster"},
    {"router", "prefill_worker", "decode_worker", "colocated_worker", "page_store"},
    {"worker"},
    {"engine"},
    {"kvstore"},
    {"kernels"},
    {"rpc"},
    {"protos"},
]
ROOMS = set.union(*FLOORS)
WORKERS = {"prefill_worker", "decode_worker", "colocated_worker", "worker"}
LIBRARIES = {  # rooms that may import these, at any depth of their own files
    "ray": {"cluster"},
    "grpc": {
        "diptych",
        "cluster",
        "router",
        "prefill_worker",
        "decode_worker",
        "colocated_worker",
        "page_store",
        "worker",
        "rpc",
        "protos",
    },
    "redis": {"kvstore"},
    "torch": {*WORKERS, "engine", "kernels"},
    "triton": {"kernels"},
    "transformers": set(),
    "pickle": set(),
}


def imports(path: Path) -> set[str]:
    """Top-level names that a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


def files() -> list[Path]:
    return sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))


def floor(room: str) -> int:
    return next(level for level, rooms in enumerate(FLOORS) if room in rooms)


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_downwards(path: Path):
    room = path.relative_to(ROOT).parts[0]
    used = imports(path)
    upwards = {other for other in used & ROOMS if other != room and floor(other) <= floor(room)}
    assert not upwards, f"{room} must not import {upwards}"
    foreign = {library for library, rooms in LIBRARIES.items() if library in used and room not in rooms}
    assert not foreign, f"{room} must not import {foreign}"


def test_every_room_is_known():
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages == ROOMS
