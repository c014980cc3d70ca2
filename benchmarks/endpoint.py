"""The cases of benchmarks/serve.py that need a running endpoint: `http` and `ready`. Postgres is embedded.

For `http` the endpoint's app runs under uvicorn in this process, so that the engine it serves from can be asked directly too,
and adapters are put where a deployment would put them; the client is a process of its own, which streams. For `ready` the
endpoint is started as the whole service starts it.
"""

import argparse
import asyncio
import json
import multiprocessing
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from benchmarks.results import Results
from benchmarks.serve import add, spread_of
from standalone.stack import Stack

ADAPTERS, CLIENTS = 8, 32
_READY_SECONDS = 600.0
_LETTERS = list("QXZKVWJ")
"""The tiny tokenizer, which models of random weights have, joins them into nothing: a letter is a token."""

Ask = tuple[str, str]
"""(model, prompt)."""


def http(results: Results, name: str, model: Path, work: Path, arguments: argparse.Namespace) -> None:
    """Add the share of the bare engine's speed that is left over HTTP, wave by wave in turns. Raises NoMeasurementError."""
    from benchmarks.waves import NoMeasurementError, wave

    rng, shares, speeds, tokens = np.random.default_rng(0), [], [], arguments.tokens
    with Stack(work / "http", services=(), settings=_settings(model)) as stack, _app(stack) as (url, serving):
        names, servables = _adapters(serving, model, work / "http-adapters")
        pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        try:
            for repetition in range(arguments.waves + 1):
                asks, ids = [], []
                for number in range(CLIENTS):
                    asks.append((names[number % ADAPTERS], "".join(rng.choice(_LETTERS, arguments.prompt_tokens))))
                    ids.append(servables[0].prompt_ids("".join(rng.choice(_LETTERS, arguments.prompt_tokens))))
                bare = wave(serving.engine, servables, ids, tokens)
                seconds, received = pool.submit(stream_all, url, stack.headers, asks, tokens).result()
                if received != CLIENTS * tokens:
                    raise NoMeasurementError(f"{received} tokens came over HTTP, and {CLIENTS * tokens} were asked for")
                if repetition:  # the first warms up
                    speeds.append(received / seconds)
                    shares.append(speeds[-1] / bare)
        finally:
            pool.shutdown()
    add(results, name, "tokens_per_second", statistics.median(speeds), "tokens/s", n=len(speeds))
    add(results, name, "share_of_engine", statistics.median(shares), "", n=len(shares), spread=spread_of(shares))


def ready(results: Results, name: str, model: Path, work: Path, arguments: argparse.Namespace) -> None:
    """Add the seconds from the start of the endpoint's process to a token; weights in the page cache."""
    ask = {"model": model.name, "prompt": "QXZ", "max_tokens": 1, "temperature": 0}
    seconds = []
    with Stack(work / "ready", services=("serving",), settings=_settings(model), ready_seconds=_READY_SECONDS) as stack:
        for _ in range(min(3, arguments.waves)):
            stack.kill("serving")
            began = time.monotonic()
            stack.restart("serving")
            url = f"{stack.serving_url}/generate"
            httpx.post(url, json=ask, headers=stack.headers, timeout=_READY_SECONDS, trust_env=False).raise_for_status()
            seconds.append(time.monotonic() - began)
    metric = "started_to_first_token_seconds"
    add(results, name, metric, statistics.median(seconds), "s", better="lower", n=len(seconds), spread=spread_of(seconds))


def stream_all(url: str, headers: dict[str, str], asks: list[Ask], tokens: int) -> tuple[float, int]:
    """(seconds from the first request to the last byte, tokens that came) of streams begun at once."""
    return asyncio.run(_stream_all(url, headers, asks, tokens))


async def _stream_all(url: str, headers: dict[str, str], asks: list[Ask], tokens: int) -> tuple[float, int]:
    limits = httpx.Limits(max_connections=len(asks))
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=300, limits=limits, trust_env=False) as client:

        async def one(model: str, prompt: str) -> int:
            body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
            last: dict[str, Any] = {}
            async with client.stream("POST", "/generate", json=body) as answer:
                if answer.status_code != 200:
                    return 0
                async for line in answer.aiter_lines():
                    if line.startswith("data: {"):
                        last = json.loads(line.removeprefix("data: "))
            return int((last.get("usage") or {}).get("completion_tokens", 0))

        began = time.perf_counter()
        counts = await asyncio.gather(*(one(*ask) for ask in asks))
        return time.perf_counter() - began, sum(counts)


def _settings(model: Path) -> dict[str, str]:
    return {
        "STROP_MODELS": str(model.parent),
        "STROP_BASES": model.name,
        "STROP_POLL_SECONDS": "86400",
        "STROP_SERVING_KV_GIB": "6",
    }


@contextmanager
def _app(stack: Stack) -> Iterator[tuple[str, Any]]:
    """The endpoint in this process: its address, and what its routes work with, once it is ready."""
    import uvicorn

    from serving.app import create_app
    from store.settings import Settings

    fields: dict[str, Any] = stack.environment
    app = create_app(Settings(_env_file=None, **fields))
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        deadline = time.monotonic() + _READY_SECONDS
        while not server.started or httpx.get(f"{url}/readyz", trust_env=False).status_code != 200:
            if not thread.is_alive() or time.monotonic() > deadline:
                raise RuntimeError("the endpoint did not become ready; its log is above")
            time.sleep(0.05)
        yield url, app.state.serving
    finally:
        server.should_exit = True
        thread.join()


def _adapters(serving: Any, model: Path, folder: Path) -> tuple[list[str], list[Any]]:
    """Put adapters of random weights where deployed ones stand: their names, and what answers for them."""
    from benchmarks.waves import write_adapter
    from core.infer.servable import Servable
    from store.deployments import DesiredVersion
    from store.tables import DEFAULT_PROJECT

    (base,) = serving.directory.bases
    sites, names, servables = base.host.runner.sites, [], []
    for number in range(ADAPTERS):
        weights = sites.read(write_adapter(base.host.model, folder / f"a{number}", number), f"adapter {number}")
        serving.engine.call(lambda weights=weights: sites.install(weights))
        servables.append(Servable(base.host, model, weights=weights))
        version = DesiredVersion(DEFAULT_PROJECT, f"ada_{number}", f"a{number}", 1, "0" * 64, datetime.now(UTC))
        serving.directory.put(version, servables[-1])
        names.append(version.name)
    return names, servables
