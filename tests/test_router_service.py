"""Starting and stopping a router, and what it must not import."""

import asyncio
import socket
import subprocess
import sys

import pytest

from fake_worker import echo
from kvstore.memory_directory import MemoryDirectory
from protos import errors
from router.config import RouterConfig
from router.service import Router
from router_rig import Rig, fails, until
from tiny_model import make_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"))


def config(model, **settings) -> RouterConfig:
    base = {"router_id": "r0", "model": str(model), "model_id": "tiny", "redis_url": "", "port": 0}
    return RouterConfig(**(base | settings))


async def assert_only_this_task():
    """What a failed start leaves running."""
    me = {asyncio.current_task()}
    await until(lambda: asyncio.all_tasks() == me, 2.0, asyncio.all_tasks)


def test_the_router_does_not_load_torch():
    code = "import router.service, sys; assert 'torch' not in sys.modules, 'torch'; assert 'ray' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


async def test_redis_down_at_start_is_told_without_its_password(model):
    with pytest.raises(errors.MetadataUnavailable) as caught:
        await Router.start(config(model, redis_url="redis://:secret@127.0.0.1:1/0"))
    assert "redis://127.0.0.1:1" in str(caught.value)
    assert "secret" not in str(caught.value)
    await assert_only_this_task()


async def test_a_taken_port_is_told_with_its_number(model):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(errors.PortTaken, match=str(port)):
            await Router.start(config(model, port=port), MemoryDirectory())
    await assert_only_this_task()


@pytest.mark.parametrize("broken", ["missing", "config.json", "tokenizer.json"])
async def test_a_broken_model_directory_is_told_with_its_path(tmp_path, broken):
    path = tmp_path / "model"
    if broken != "missing":
        (make_tiny_model(path) / broken).write_text("{")
    with pytest.raises(errors.ModelUnusable, match=str(path)):
        await Router.start(config(path), MemoryDirectory())
    await assert_only_this_task()


async def test_a_router_starts_before_any_worker_and_finds_those_that_come(model):
    async with Rig(model, prefill_count=0, decode_count=0) as rig:
        answer = asyncio.create_task(rig.complete([5, 6, 7]))
        await asyncio.sleep(0.1)
        rig.decodes.append(await rig.worker("decode"))
        rig.prefills.append(await rig.worker("prefill"))
        assert (await answer).token_ids == echo([5, 6, 7])[:8]


async def test_stopping_ends_requests_with_a_typed_error(model):
    async with Rig(model) as rig:
        rig.decode.pause_s = 0.05
        calls = [rig.generate(max_tokens=1000) for _ in range(3)]
        await rig.decode.hears("start", 3)
        failing = [asyncio.create_task(fails(call, errors.WorkerLost)) for call in calls]
        await asyncio.sleep(0)
        await rig.router.stop()
        for error in await asyncio.gather(*failing):
            assert error.stage == "router"
