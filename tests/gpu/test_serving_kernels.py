"""Kernels of the serving path against plain math in fp64: ragged contexts, groups of heads, odd widths, ranks, empty rows.

    python -m pytest -c /dev/null --rootdir=. --confcutdir=tests/gpu tests/gpu/test_serving_kernels.py

With TRITON_INTERPRET=1 in the environment they run on a CPU.
"""

from collections.abc import Sequence

import pytest
import torch

pytest.importorskip("triton")

from core.infer.ahead import mark, resolved
from core.infer.gpu.attend import Paging, attend_last, attend_pieces, piece_tokens
from core.infer.gpu.elementwise import embed, gate, norm, turn
from core.infer.gpu.low_rank import DECODE_ROWS, PROMPT_ROWS, expand, shrink
from core.infer.gpu.pool import RANKS, Pool, SiteShape

pytestmark = pytest.mark.gpu
PAGE = 16
HEADS = [(64, 8), (80, 7), (128, 4), (256, 1)]
"""(width, queries that share a key). Each is compiled anew; tests/gpu/test_serving_engine.py has other ones."""


@pytest.fixture(scope="module")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request: pytest.FixtureRequest, device: torch.device) -> torch.dtype:
    if device.type == "cpu" and request.param == torch.bfloat16:
        pytest.skip("the interpreter multiplies no bf16")
    return request.param


def allowed(dtype: torch.dtype) -> dict[str, float]:
    return {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}


class Contexts:
    """Requests with random keys and values of these lengths, their pages in no order."""

    def __init__(self, lengths: Sequence[int], kv_heads: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(len(lengths) + width)
        counts = [-(-length // PAGE) for length in lengths]
        shuffled = torch.randperm(sum(counts) + 3, generator=generator)[: sum(counts)].to(torch.int32)
        slots = (sum(counts) + 3) * PAGE
        self.keys, self.values = (torch.randn(slots, kv_heads, width, generator=generator).to(device, dtype) for _ in range(2))
        starts = torch.tensor([0, *counts]).cumsum(0)[:-1].to(torch.int32)
        self.paging = Paging(shuffled.to(device), starts.to(device), torch.tensor(lengths, dtype=torch.int32).to(device), PAGE)
        self._pages = shuffled.split(counts)
        self._lengths = lengths

    def attended(self, request: int, query: torch.Tensor, position: int) -> torch.Tensor:
        """query [H, D] at a position -> [H, D], fp64."""
        slots = (self._pages[request].long()[:, None] * PAGE + torch.arange(PAGE)).flatten()[: position + 1].to(query.device)
        group = query.shape[0] // self.keys.shape[1]
        keys, values = (kept[slots].double().repeat_interleave(group, 1) for kept in (self.keys, self.values))
        scores = torch.einsum("hd,shd->hs", query.double(), keys) * query.shape[1] ** -0.5
        return torch.einsum("hs,shd->hd", scores.softmax(-1), values)


@pytest.mark.parametrize(("width", "group"), HEADS)
def test_one_query_sees_its_own_pages(device: torch.device, dtype: torch.dtype, width: int, group: int) -> None:
    lengths, kv_heads = [1, 17, 300, 0, 64, 65, 0], 2
    contexts = Contexts(lengths, kv_heads, width, dtype, device)
    query = torch.randn(9, group * kv_heads, width, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    rows = torch.tensor([3, 8, 0, 0, 5, 1, 0], dtype=torch.int32, device=device)
    result = torch.zeros_like(query)
    attend_last(result, query, contexts.keys, contexts.values, rows, contexts.paging, scale=width**-0.5)
    expected = torch.zeros_like(query, dtype=torch.float64)
    for request, (row, length) in enumerate(zip(rows.tolist(), lengths, strict=True)):
        if length:
            expected[row] = contexts.attended(request, query[row], length - 1)
    torch.testing.assert_close(result.double(), expected, **allowed(dtype))


@pytest.mark.parametrize(("width", "group"), HEADS)
def test_pieces_of_prompts_see_what_is_before_them(device: torch.device, dtype: torch.dtype, width: int, group: int) -> None:
    kv_heads, asked = 2, [(0, 0, 40), (1, 90, 7), (2, 0, 1), (3, 63, 2)]  # request, position, tokens
    contexts = Contexts([position + count for _, position, count in asked], kv_heads, width, dtype, device)
    query = torch.randn(55, group * kv_heads, width, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    most = piece_tokens(group * kv_heads, kv_heads)
    pieces, expected, row = [], torch.zeros_like(query, dtype=torch.float64), 2
    for request, position, count in asked:
        for begin in range(0, count, most):
            pieces.append((request, row + begin, min(most, count - begin), position + begin))
        for number in range(count):
            expected[row + number] = contexts.attended(request, query[row + number], position + number)
        row += count
    result = torch.zeros_like(query)
    table = torch.tensor(pieces, dtype=torch.int32, device=device)
    attend_pieces(result, query, contexts.keys, contexts.values, table, contexts.paging, scale=width**-0.5)
    torch.testing.assert_close(result.double(), expected, **allowed(dtype))


@pytest.mark.parametrize("outputs", [(64, 32, 32), (8200, 300)])
@pytest.mark.parametrize("rows", [DECODE_ROWS, PROMPT_ROWS])
@pytest.mark.parametrize("gains", [False, True])
def test_each_row_gets_its_own_adapter(
    device: torch.device, dtype: torch.dtype, outputs: tuple[int, ...], rows: int, gains: bool
) -> None:
    inputs, total = 2500, sum(outputs)
    generator = torch.Generator().manual_seed(0)
    site = SiteShape(1, inputs, outputs, 64, 64 + len(outputs) * RANKS * inputs, 32)
    memory = torch.randn(7, site.up_at + total * RANKS, generator=generator).mul(0.1).to(device, dtype)
    pages = torch.tensor([[5, 0, 0, 0], [0, 3, 1, 6], [2, 0, 0, 0], [0, 0, 0, 0]], dtype=torch.int32, device=device)
    counts = torch.tensor([[9, 1], [9, 4], [9, 1], [9, 0]], dtype=torch.int32, device=device)
    gain = torch.rand(4, 32 + total, generator=generator).to(device) + 0.5 if gains else None
    bias = torch.randn(total, generator=generator).to(device, dtype)
    pool = Pool(memory, pages, counts, gain)
    groups = [(0, 0, 3), (1, 3, 1), (2, 4, min(rows, 20)), (0, 0, 0), (3, 25, 4)]
    x, y = (torch.randn(30, width, generator=generator).to(device, dtype) for width in (inputs, total))
    expected = y.double()
    for slot, first, count in groups:
        for part, (begin, width) in enumerate(zip([0, *torch.tensor(outputs).cumsum(0).tolist()], outputs, strict=False)):
            here = (slice(first, first + count), slice(begin, begin + width))
            added = torch.zeros_like(expected[here])
            for page in pages[slot, : int(counts[slot, 1])].tolist():
                down = memory[page, site.down_at : site.up_at].view(len(outputs), RANKS, inputs)[part].double()
                up = memory[page, site.up_at :].view(total, RANKS)[begin : begin + width].double()
                added += x[here[0]].double() @ down.T @ up.T
            if gain is not None and counts[slot, 1] > 0:
                plain = y[here].double() - bias[here[1]].double()
                added += (gain[slot, 32:][here[1]].double() - 1) * plain
            expected[here] += added
    table = torch.tensor(groups, dtype=torch.int32, device=device)
    expand(y, shrink(x, pool, site, table, rows=rows), pool, site, table, bias, rows=rows)
    torch.testing.assert_close(y.double(), expected, **allowed(dtype))


@pytest.mark.parametrize(("size", "plus"), [(48, "nothing"), (48, "normed"), (2048, "normed"), (4096, "plus")])
def test_the_norm_adds_what_came_before(device: torch.device, dtype: torch.dtype, size: int, plus: str) -> None:
    generator = torch.Generator().manual_seed(0)
    stream, more = (torch.randn(5, size, generator=generator).to(device, dtype) for _ in range(2))
    scale, after = (torch.rand(size, generator=generator).to(device, dtype) for _ in range(2))

    def plain(x: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * by.double()

    total = stream.double()
    if plus != "nothing":
        total = total + (more.double() if plus == "plus" else plain(more.double(), after))
    found = norm(stream, None if plus == "nothing" else more, scale, 1e-5, after if plus == "normed" else None)
    torch.testing.assert_close(stream.double(), total, **allowed(dtype))
    torch.testing.assert_close(found.double(), plain(total, scale), **allowed(dtype))


@pytest.mark.parametrize(
    ("width", "turned", "is_paired", "is_normed"),
    [(80, 80, False, False), (128, 64, True, False), (128, 64, True, True), (128, 128, False, True)],
)
def test_heads_are_turned_and_written(
    device: torch.device, dtype: torch.dtype, width: int, turned: int, is_paired: bool, is_normed: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    heads, kv_heads, count = 6, 2, 5
    mixed = torch.randn(count, (heads + 2 * kv_heads) * width, generator=generator).to(device, dtype)
    angles = torch.rand(40, turned // 2, generator=generator).mul(6).to(device)
    cosines, sines = angles.cos().to(dtype), angles.sin().to(dtype)
    positions = torch.tensor([0, 39, 7, 7, 0], dtype=torch.int32, device=device)
    written = torch.tensor([12, 3, 40, 41, -1], dtype=torch.int32, device=device)
    keys, values = (torch.zeros(48, kv_heads, width, dtype=dtype, device=device) for _ in range(2))
    scales = [torch.rand(width, generator=generator).to(device, dtype) for _ in range(2)]
    norms = (scales[0], scales[1], 1e-6) if is_normed else None
    query = turn(mixed, keys, values, cosines, sines, positions, written, heads=heads, is_paired=is_paired, norms=norms)
    parts = mixed.double().view(count, -1, width).split([heads, kv_heads, kv_heads], 1)

    def plain(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        if is_normed:
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * scale.double()
        cos, sin = (table.double()[positions.long()][:, None] for table in (cosines, sines))
        part = x[..., :turned]
        first, second = (part[..., 0::2], part[..., 1::2]) if is_paired else part.chunk(2, -1)
        ends = (first * cos - second * sin, second * cos + first * sin)
        whole = torch.stack(ends, -1).flatten(-2) if is_paired else torch.cat(ends, -1)
        return torch.cat((whole, x[..., turned:]), -1)

    torch.testing.assert_close(query.double(), plain(parts[0], scales[0]), **allowed(dtype))
    expected_keys, expected_values = torch.zeros_like(keys).double(), torch.zeros_like(values).double()
    places = written[:4].long()
    expected_keys[places], expected_values[places] = plain(parts[1], scales[1])[:4], parts[2][:4]
    torch.testing.assert_close(keys.double(), expected_keys, **allowed(dtype))
    torch.testing.assert_close(values.double(), expected_values, rtol=0, atol=0)


def test_the_gate(device: torch.device, dtype: torch.dtype) -> None:
    both = torch.randn(5, 2 * 1500, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    opened, up = both.double().chunk(2, -1)
    torch.testing.assert_close(gate(both).double(), torch.nn.functional.silu(opened) * up, **allowed(dtype))


def test_rows_of_the_embedding_and_marks_of_drawn_tokens(device: torch.device, dtype: torch.dtype) -> None:
    table = torch.randn(50, 1500, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    ids = torch.tensor([3, mark(2), 49, mark(0)], dtype=torch.int32, device=device)
    drawn = torch.tensor([7, 8, 9], dtype=torch.int32, device=device)
    torch.testing.assert_close(embed(ids, drawn, table), table[[3, 9, 49, 7]], rtol=0, atol=0)
    assert resolved(ids, drawn).tolist() == [3, 9, 49, 7]
