"""Greedy tokens are peft's, every one: all tunings and the bare base mixed in one engine, in fp32 on a CPU.

The reference is the very model that was trained, as peft left it in memory. It reads prompt and answer once, whole and without
a cache: an answer whose every token is the likeliest behind all that stands before it is the greedy one.
"""

import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import torch

from core.infer.adapters import AdaptedBase
from core.infer.engine import Engine
from core.infer.progress import End
from core.infer.sampling import Sampling
from core.infer.servable import Servable
from core.models.load import LoadedBase, Quantization
from tests.core.infer.test_engine import Asked, prompt
from tests.core.models.adapters import TUNINGS, trained
from tests.tiny import build_tiny_model

PROMPTS, TOKENS = (200, 64) if os.environ.get("STROP_SOAK") else (4, 16)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_every_tuning_beside_every_other_and_the_base(
    quantization: Quantization, load_tiny: Callable[..., LoadedBase], tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    # Larger weights than usual: else a model that nobody trained says its last token again and again, whatever is added to it.
    folder = build_tiny_model(tmp_path / "lively", initializer_range=0.2)
    host = AdaptedBase(load_tiny(quantization, folder))
    assert host.runner is not None
    references = {"base": load_tiny(quantization, folder).model}
    servables = {"base": Servable(host, folder)}
    for name, tuning in TUNINGS.items():
        made = trained(folder, tuning, tmp_path / name, quantization)
        references[name] = made.model.eval()
        weights = host.runner.sites.read(made.folder, name)
        if weights is not None:
            host.runner.sites.install(weights)
        else:
            host.load(made.folder, name)
        servables[name] = Servable(host, folder, weights=weights, adapter=None if weights is not None else name)
    assert [name for name, servable in servables.items() if not servable.packed_tokens] == ["embeddings"]

    sampling = Sampling(max_tokens=TOKENS, ignore_eos=True)
    lengths = [1 + number * 200 // PROMPTS for number in range(PROMPTS)]
    requests = [(name, prompt(length, length), Asked()) for length in lengths for name in servables]
    with closing(Engine(max_waiting=len(requests))) as engine:
        engine.call(lambda: [engine.submit(servables[name], ids, sampling, asked) for name, ids, asked in requests])
        for _, _, asked in requests:
            while not isinstance(asked.wait(), End):
                pass
    wrong, answers = [], set()
    for name, ids, asked in requests:
        with torch.no_grad():
            logits = references[name](torch.tensor([ids + asked.ids[:-1]])).logits[0, len(ids) - 1 :]
        likeliest = logits.argmax(-1).tolist()
        if asked.ids != likeliest:
            place = next(place for place, (here, there) in enumerate(zip(asked.ids, likeliest, strict=True)) if here != there)
            lead = float(logits[place, likeliest[place]] - logits[place, asked.ids[place]])
            wrong.append(f"{name}, prompt of {len(ids)}: token {place} is {lead:.2e} behind the likeliest")
        answers.add((len(ids), *asked.ids))
    assert wrong == []
    assert len(answers) > 0.8 * len(requests), "the adapters answer differently"
