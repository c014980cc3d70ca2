"""Greedy answers equal peft's, token for token, in fp32: every tuning that can be served, mixed with the bare base in one run.

Whole (200 prompts of 64 tokens) with STROP_SOAK, a part of it else.
"""

import os
import queue
import random
from collections.abc import Callable
from pathlib import Path

from core.infer.adapters import AdaptedBase
from core.infer.engine import Engine
from core.infer.progress import Token
from core.infer.sampling import Sampling
from core.infer.servable import Servable
from core.infer.ticket import Item
from core.models.load import LoadedBase
from tests.core.models.adapters import TUNINGS, trained
from tests.lora import copy_tokenizer, fresh_answer

SOAK = bool(os.environ.get("STROP_SOAK"))
PROMPTS, TOKENS = (200, 64) if SOAK else (20, 16)


def test_every_tuning_beside_every_other(tiny_model: Path, load_tiny: Callable[..., LoadedBase], tmp_path: Path) -> None:
    host = AdaptedBase(load_tiny())
    assert host.runner is not None
    servables = {"base": Servable(host, tiny_model)}
    models = {"base": load_tiny().model}
    models["base"].generation_config.eos_token_id = None
    engine = Engine(max_waiting=PROMPTS)
    for name, tuning in TUNINGS.items():
        made = trained(tiny_model, tuning, tmp_path / name)
        models[name] = made.model.eval()
        models[name].generation_config.eos_token_id = None
        copy_tokenizer(tiny_model, made.folder)
        weights = host.runner.sites.read(made.folder, name)
        if weights is not None:
            host.runner.sites.install(weights)
            servables[name] = Servable(host, made.folder, weights=weights)
        else:
            engine.call(lambda folder=made.folder, name=name: host.load(folder, name))  # type: ignore[misc]
            servables[name] = Servable(host, made.folder, adapter=name)
    assert [name for name, servable in servables.items() if servable.adapter] == ["embeddings"], "the others go packed"
    chance = random.Random(0)
    asked = []
    done: queue.Queue[None] = queue.Queue()
    for number in range(PROMPTS):
        name, ids = list(servables)[number % len(servables)], chance.choices(range(3, 500), k=chance.randint(1, 120))
        items: list[Item] = []

        def deliver(item: Item, items: list[Item] = items) -> None:
            items.append(item)
            if not isinstance(item, Token):
                done.put(None)

        engine.submit(servables[name], ids, Sampling(max_tokens=TOKENS, ignore_eos=True), deliver)
        asked.append((name, ids, items))
    for _ in asked:
        done.get(timeout=120)
    engine.close()
    for name, ids, items in asked:
        expected, _ = fresh_answer(models[name], ids, TOKENS)
        assert [item.id for item in items if isinstance(item, Token)] == expected, name
