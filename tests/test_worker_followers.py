"""Who follows a worker hears of every page that is held or sealed, behind its parent."""

import asyncio

import pytest

from kvstore.keys import PageKey
from kvstore.lineage import Lineage
from kvstore.pool import PageId, PagePool
from kvstore.sealed_page import SealedPage
from protos.v1 import worker_pb2
from worker import follow_buffer
from worker.follow_buffer import FollowBuffer
from worker.followers import Followers

KEYS = [PageKey(bytes([number]) * 16) for number in range(8)]
LINEAGES = [Lineage(key, KEYS[0], KEYS[index - 1] if index else None) for index, key in enumerate(KEYS)]


class Worker:
    """A pool that tells its followers."""

    def __init__(self, num_pages: int = 8) -> None:
        self.pool = PagePool(num_pages, on_evict=lambda key: self.followers.evicted(key))
        self.followers = Followers(self.pool)

    def seal(self, *lineages: Lineage) -> list[PageId]:
        pages = []
        for lineage in lineages:
            page = self.pool.promise(1).take()
            self.pool.begin_fill(page)
            self.pool.seal(page, lineage.key)
            self.followers.sealed(lineage)
            pages.append(page)
        self.pool.release(list(reversed(pages)))
        return pages

    def follow(self, most: int | None = None) -> FollowBuffer:
        buffer = FollowBuffer(asyncio.get_running_loop(), most or self.followers.most_pages)
        self.followers.join(buffer)
        return buffer


async def heard(buffer: FollowBuffer, count: int) -> list[SealedPage]:
    """The next pages."""
    pages: list[SealedPage] = []
    while len(pages) < count:
        message = await asyncio.wait_for(buffer.take(), 10)
        pages += [SealedPage.from_proto(page) for page in message.pages]
    return pages


async def test_first_what_is_held_and_then_what_is_sealed():
    worker = Worker()
    held = worker.seal(*LINEAGES[:3])
    buffer = worker.follow()
    later = worker.seal(*LINEAGES[3:5])
    pages = await heard(buffer, 5)
    assert [page.lineage for page in pages] == LINEAGES[:5]
    assert [page.page for page in pages] == held + later
    assert [page.generation for page in pages] == [worker.pool.generation(page.page) for page in pages]


async def test_what_was_evicted_is_not_named_to_who_comes_after_it():
    worker = Worker(num_pages=3)
    worker.seal(*LINEAGES[:3])
    early = worker.follow()
    stale = (await heard(early, 3))[2]
    other = Lineage(KEYS[7], KEYS[7], None)
    worker.seal(other)  # takes the room of the third page
    assert [page.lineage for page in await heard(worker.follow(), 3)] == [*LINEAGES[:2], other]
    [fresh] = await heard(early, 1)
    assert stale.page == fresh.page
    assert fresh.generation == worker.pool.generation(fresh.page) == stale.generation + 1


async def test_a_slow_follower_misses_the_oldest_and_holds_up_nobody(caplog):
    worker = Worker()
    slow, quick = worker.follow(most=3), worker.follow()
    worker.seal(*LINEAGES)
    assert [page.lineage for page in await heard(quick, 8)] == LINEAGES
    assert [page.lineage for page in await heard(slow, 3)] == LINEAGES[5:]
    assert slow.missed == 5
    assert caplog.text.count("misses pages") == 1


async def test_messages_are_bounded_and_nothing_waits_when_all_is_told(monkeypatch):
    monkeypatch.setattr(follow_buffer, "_AT_ONCE", 3)
    worker = Worker()
    buffer = worker.follow()
    worker.seal(*LINEAGES)
    assert [len((await buffer.take()).pages) for _ in range(3)] == [3, 3, 2]
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(buffer.take(), 0.05)
    worker.seal(Lineage(KEYS[7], KEYS[7], None))


async def test_who_has_hung_up_is_forgotten():
    worker = Worker()
    gone = worker.follow()
    waiting = asyncio.create_task(gone.take())
    await asyncio.sleep(0)
    gone.close()
    assert await asyncio.wait_for(waiting, 10) is None
    worker.seal(*LINEAGES[:2])
    worker.follow()
    assert gone not in worker.followers._buffers
    assert len(worker.followers._buffers) == 1


@pytest.mark.parametrize("field", ["key", "family", "parent"])
def test_a_key_of_another_length_is_no_page(field):
    message = worker_pb2.SealedPages.Page(key=KEYS[1], family=KEYS[0], parent=KEYS[0])
    assert SealedPage.from_proto(message).lineage == LINEAGES[1]
    setattr(message, field, b"short")
    with pytest.raises(ValueError, match="16 bytes"):
        SealedPage.from_proto(message)
