"""Packed steps on a GPU: greedy tokens and logits of mixed adapters and base rows equal those of plain torch, in fp32.

    python -m pytest -c /dev/null --rootdir=. --confcutdir=tests/gpu tests/gpu/test_serving_engine.py

With TRITON_INTERPRET=1 in the environment they run on a CPU, without graphs.
"""

import queue
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from core.adapter import ADAPTER_KIND
from core.infer.adapters import AdaptedBase
from core.infer.engine import Engine
from core.infer.progress import End, Token
from core.infer.runner import Context, Runner
from core.infer.sampling import Sampling
from core.infer.servable import Servable
from core.infer.ticket import Failed, Item
from core.manifest import closed_folder, folder_digest
from core.models.adapt import ADAPTER_WEIGHTS
from core.models.load import LoadedBase, load_base
from tests.lora import TARGETS, add_lora
from tests.tiny import build_tiny_model

pytestmark = pytest.mark.gpu
FUSED = ["llama", "qwen2", "qwen3", "glm", "glm4"]
OTHERS: dict[str, dict[str, Any]] = {"phi": {"tie_word_embeddings": False}, "gemma3_text": {"query_pre_attn_scalar": 16}}
OWN_TARGETS = {"phi": ["q_proj", "v_proj", "dense", "fc1", "fc2"]}
PROMPTS = (1, 40, 17, 5, 33, 2, 16)
TOKENS = 8 if torch.cuda.is_available() else 2  # the interpreter is slow


@pytest.fixture(scope="module")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def base_of(folder: Path, device: torch.device, quantization: Any = "none") -> LoadedBase:
    return load_base(folder, name="t", weights="0" * 64, quantization=quantization, precision="fp32", device=device)


def adapters_of(folder: Path, family: str, out: Path) -> list[Path]:
    """Two ranks, one of two pages; DoRA; and one on a few modules only."""
    targets = OWN_TARGETS.get(family, [*TARGETS, "gate_up_proj"])
    kinds: list[dict[str, Any]] = [
        {"rank": 4, "targets": targets},
        {"rank": 24, "targets": targets},
        {"rank": 8, "targets": targets, "use_dora": True},
        {"rank": 16, "targets": ["q_proj", "v_proj"]},
    ]
    return [add_lora(folder, out / f"a{seed}", seed, **kind) for seed, kind in enumerate(kinds)]


Found = tuple[list[Any], list[torch.Tensor]]


def answers(runner: Runner, prompts: list[list[int]], adapters: list[Any], tokens: int) -> Found:
    """Greedy ids of each prompt, and the logits behind them; prompts come in pieces of 13 beside answers that run."""
    contexts = [Context(list(ids), weights, [b"r"]) for ids, weights in zip(prompts, adapters, strict=True)]
    wanted = [len(ids) + tokens for ids in prompts]
    rows: list[list[torch.Tensor]] = [[] for _ in prompts]
    for context in contexts:
        runner.begin(context)
    while any(len(context.ids) < upto for context, upto in zip(contexts, wanted, strict=True)):
        running = [n for n in range(len(contexts)) if len(contexts[n].ids) < wanted[n]]
        # Of one adapter side by side, as the scheduler has them.
        running.sort(key=lambda n: id(contexts[n].weights))
        shares = [(contexts[n], min(contexts[n].left, 13)) for n in running]
        assert all(runner.reserve(*share) for share in shares)
        logits = runner.step(shares).float().cpu()
        for n, row in zip(running, logits, strict=True):
            if not contexts[n].left:
                rows[n].append(row.clone())
                contexts[n].ids.append(int(row.argmax()))
    for context in contexts:
        runner.release(context)
    return [context.ids[len(ids) :] for context, ids in zip(contexts, prompts, strict=True)], [torch.stack(row) for row in rows]


@pytest.mark.parametrize("family", [*FUSED, *OTHERS])
def test_mixed_steps_answer_what_plain_torch_does(family: str, device: torch.device, tmp_path: Path) -> None:
    folder = build_tiny_model(tmp_path / "model", family=family, initializer_range=0.1, **OTHERS.get(family, {}))
    base = base_of(folder, device)
    plain = Runner(base.model, kv_tokens=2048, kernels=False)
    fast = Runner(base.model, kv_tokens=2048, kernels=True)
    assert ("graphs of steps" in fast.form) == (family in FUSED), fast.form
    fast.warm_up(4)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 500, (count,), generator=generator).tolist() for count in PROMPTS]
    found: dict[str, Found] = {}
    for name, runner in (("plain", plain), ("fast", fast)):
        loaded = [runner.sites.read(path, path.name) for path in adapters_of(folder, family, tmp_path)]
        assert all(weights is not None for weights in loaded)
        for weights in loaded:
            runner.sites.install(weights)
        adapters = [None, loaded[0], loaded[1], None, loaded[1], loaded[2], loaded[3]]
        found[name] = answers(runner, prompts, adapters, TOKENS)
        bare = answers(runner, prompts, [None] * len(prompts), TOKENS)
        found[f"{name} bare"] = bare
        scored = [torch.cat(runner.score(prompts[1:4], weights)).float().cpu() for weights in [None, *loaded]]
        found[f"{name} scored"] = ([], scored)
        with runner.sites.tracing() as traces:
            runner.score([prompts[1]], loaded[2])
        found[f"{name} traced"] = (
            sorted(traces),
            [torch.tensor([t.rms, t.output_rms, *t.sample]) for _, t in sorted(traces.items())],
        )
    for what in ("", " bare", " scored", " traced"):
        ids, logits = found[f"fast{what}"]
        expected_ids, expected = found[f"plain{what}"]
        apart = [float((row - other).abs().max()) for row, other in zip(logits, expected, strict=True)]
        assert max(apart) <= 1e-3, f"{family}{what}: {apart}"
        assert ids == expected_ids, f"{family}{what}: {apart}"
    assert found["fast"][0] != found["fast bare"][0], "adapters do something"


@pytest.mark.parametrize("host_gib", [1.0, 0.0])
def test_more_adapters_than_room_take_turns(host_gib: float, device: torch.device, tmp_path: Path) -> None:
    folder = build_tiny_model(tmp_path / "model", initializer_range=0.1)
    # Room for one on the GPU, and beside it for all or one.
    host = AdaptedBase(base_of(folder, device), kv_gib=0.01, adapter_gib=1e-9, host_gib=host_gib, kernels=True)
    assert host.runner is not None
    assert host.runner.slots is not None
    plain = Runner(host.model, kv_tokens=2048, kernels=False)
    engine = Engine(running=4, step_tokens=24)
    generator = torch.Generator().manual_seed(0)
    asked: list[tuple[list[int], queue.Queue[Item]]] = []
    servables, paths = [Servable(host, folder)], [None]
    for seed in range(3):
        path = tmp_path / f"a{seed}"
        with closed_folder(path, ADAPTER_KIND, {}) as draft:
            add_lora(folder, draft, seed)
        weights = host.runner.sites.read(path, folder_digest(path))
        assert weights is not None
        servables.append(Servable(host, folder, weights=weights))
        paths.append(path)
    for number in range(12):
        prompt, items = torch.randint(3, 500, (5 + number,), generator=generator).tolist(), queue.Queue()
        engine.submit(servables[number % 4], prompt, Sampling(max_tokens=6, ignore_eos=True), items.put)
        asked.append((prompt, items))
    for number, (prompt, items) in enumerate(asked):
        ids = []
        while isinstance(item := items.get(timeout=120), Token):
            ids.append(item.id)
        assert isinstance(item, End), item
        path = paths[number % 4]
        weights = None if path is None else plain.sites.read(path, path.name)
        if weights is not None:
            plain.sites.install(weights)
        assert ids == answers(plain, [prompt], [weights], 6)[0][0]
        if number % 3 == 0:  # ends by an id, which is found when the next step runs already
            sampling = Sampling(max_tokens=6, ignore_eos=True, stop_token_ids=(ids[2],))
            engine.submit(servables[number % 4], prompt, sampling, items.put)
            found = []
            while isinstance(item := items.get(timeout=120), Token):
                found.append(item.id)
            assert isinstance(item, End), item
            assert found == ids[: ids.index(ids[2]) + 1]
    engine.call(lambda: None)
    assert host.runner.pages.available == host.runner.pages.count
    staged = [one.weights.staged for one in servables if one.weights is not None]
    assert sum(one.evictions for one in staged) >= 2
    assert (sum(one.host_evictions for one in staged) >= 2) == (host_gib == 0)
    assert host.runner.slots.resident == 1
    if host_gib == 0:
        number = next(number for number, one in enumerate(staged) if one.content is None and not one.is_resident)
        (tmp_path / f"a{number}" / ADAPTER_WEIGHTS).unlink()
        lost: queue.Queue[Item] = queue.Queue()
        base: queue.Queue[Item] = queue.Queue()
        for servable, items in ((servables[number + 1], lost), (servables[0], base)):
            engine.submit(servable, [5, 6, 7], Sampling(max_tokens=3, ignore_eos=True), items.put)
        assert isinstance(lost.get(timeout=120), Failed), "its files are gone"
        assert [type(base.get(timeout=120)) for _ in range(4)] == [Token] * 3 + [End]
    engine.close()


def test_weights_in_four_bits_stay_so(device: torch.device, tmp_path: Path) -> None:
    if device.type == "cpu":
        pytest.skip("on a CPU bitsandbytes computes with other numbers than a GPU")
    folder = build_tiny_model(tmp_path / "model", initializer_range=0.1)
    base = base_of(folder, device, "nf4")
    plain, fast = (Runner(base.model, kv_tokens=512, kernels=kernels) for kernels in (False, True))
    assert "transformers' own layers" in fast.form
    path, ids = add_lora(folder, tmp_path / "a", 0), list(range(3, 40))
    found = []
    for runner in (plain, fast):
        weights = runner.sites.read(path, "a")
        assert weights is not None
        runner.sites.install(weights)
        found.append(answers(runner, [ids, ids], [weights, None], 6)[0])
    assert found[0] == found[1]
