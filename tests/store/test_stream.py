"""The live tail: events under their own places, a copy that may be lost."""

import asyncio
import logging

import pytest
import redis
import redis.asyncio

from core.events import Warned
from store.events import Place
from store.stream import Publisher, read_tail
from tests.conftest import RedisServer


def warned(seq: int) -> Warned:
    return Warned(seq=seq, code=f"c{seq}", message="m")


def tail(url: str, place: Place) -> list[str]:
    async def read() -> list[str]:
        client = redis.asyncio.Redis.from_url(url)
        try:
            return [record.id for record in await read_tail(client, "job_1", place, block_seconds=0.1)]
        finally:
            await client.aclose()

    return asyncio.run(read())


def test_a_reader_goes_on_behind_any_place(redis_server: RedisServer) -> None:
    publisher = Publisher(redis_server.url)
    publisher.publish("job_1", 1, [warned(1), warned(2)])
    publisher.publish("job_1", 2, [warned(1)])
    assert tail(redis_server.url, Place(0, 0)) == ["1-1", "1-2", "2-1"]
    assert tail(redis_server.url, Place(1, 2)) == ["2-1"]
    assert tail(redis_server.url, Place(2, 1)) == []
    publisher.close()


def test_a_stale_attempts_late_event_is_refused(redis_server: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    publisher = Publisher(redis_server.url)
    publisher.publish("job_1", 2, [warned(1)])
    publisher.publish("job_1", 1, [warned(9)])
    assert tail(redis_server.url, Place(0, 0)) == ["2-1"]
    assert "not streamed" in caplog.text
    publisher.close()


def test_a_redis_that_is_away_is_said_once_and_found_again(redis_server: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    publisher = Publisher(redis_server.url)
    redis_server.kill()
    with caplog.at_level(logging.WARNING):
        publisher.publish("job_1", 1, [warned(1)])
        publisher.publish("job_1", 1, [warned(2)])
    assert caplog.text.count("live stream away") == 1
    redis_server.start()
    publisher.publish("job_1", 1, [warned(3)])
    assert tail(redis_server.url, Place(0, 0)) == ["1-3"]
    publisher.close()
