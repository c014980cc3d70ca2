"""From the logits of a step to each row's next token: many requests at once, each as if it were alone.

What a request gets depends on its logits, its settings, its seed and how many tokens it has; never on the rows beside it,
their number or the device's load. Two things see to that. A row's chance is a hash of (seed, position), so there is no
generator whose state others could move. And probabilities are whole numbers (`core/infer/weights.py`), whose sums are the
same in whatever order a kernel adds them up.

Nothing here waits for the device before `Draws.read`.
"""

import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch

from core.errors import StropError
from core.infer.weights import ONE, largest_key, pick, weights_of

_WORD = 2**64
_GOLDEN = 0x9E3779B97F4A7C15

_GPU_SCORES = 1 << 24
"""Logits worked on at once: some 16 bytes each in passing, with top_k or top_p 40, so at most 640 MiB."""
_CPU_SCORES = 1 << 17
"""So few that they stay in a core's cache."""


class GenerationFailed(StropError):
    """The engine could not go on with a request; the message reaches the caller."""


@dataclass(frozen=True)
class Sampling:
    """How one answer is made.

    The order at each token: `repetition_penalty` (CTRL, arXiv 1909.05858: over prompt and answer), presence and frequency
    penalty (OpenAI's formula: over the answer), `logit_bias`, `temperature`, then `top_k` and `min_p` (arXiv 2407.01082), and
    `top_p` (arXiv 1904.09751) of what these left. Candidates of equal probability stay or go together.
    """

    max_tokens: int
    temperature: float = 0.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 is all
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # (id, what is added); each id once
    seed: int | None = None  # None: drawn at admission
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop: bool = False  # what ended the answer is part of its text
    min_tokens: int = 0  # before these are there nothing ends the answer
    ignore_eos: bool = False  # the template's stop ids do not end it
    top_logprobs: int = 0

    @property
    def asks_back(self) -> bool:
        """Whether a token's chances depend on which tokens came before, beyond the logits: the host must know them then."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    def ending_ids(self, stop_ids: tuple[int, ...]) -> tuple[int, ...]:
        """Ids that end the answer; `stop_ids` are the template's."""
        return self.stop_token_ids if self.ignore_eos else (*stop_ids, *self.stop_token_ids)

    def resolved_seed(self) -> int:
        """The request's seed as 64 bits, or a new one. Asked once, when a request is taken in."""
        return secrets.randbits(64) if self.seed is None else self.seed % _WORD


@dataclass(frozen=True)
class Drawing:
    """One row of a step. `generated_ids` are all of the answer so far, but for the last `unknown` ones, which are drawn and not
    read yet; the number of both is the position that is drawn. With settings that ask back (`Sampling`) none may be unknown.

    Ids of `prompt_ids` and of the logit bias must lie in the vocabulary: on a GPU one outside takes the process along.
    """

    sampling: Sampling
    seed: int
    prompt_ids: Sequence[int]
    generated_ids: Sequence[int]
    banned: tuple[int, ...]
    unknown: int = 0

    @classmethod
    def at(
        cls,
        sampling: Sampling,
        seed: int,
        prompt_ids: Sequence[int],
        generated_ids: Sequence[int],
        stop_ids: tuple[int, ...],
        unknown: int = 0,
    ) -> "Drawing":
        """The next token of an answer whose template ends with `stop_ids`: banned before there are `min_tokens`."""
        banned = sampling.ending_ids(stop_ids) if len(generated_ids) + unknown < sampling.min_tokens else ()
        return cls(sampling, seed, prompt_ids, generated_ids, banned, unknown)

    @property
    def is_plain(self) -> bool:
        """Whether it asks for no more than a temperature and min_p, which one kernel does on a GPU."""
        one = self.sampling
        is_edited = one.asks_back or one.logit_bias or self.banned
        return not (is_edited or one.top_k or one.top_p < 1 or one.top_logprobs)

    @property
    def position(self) -> int:
        return len(self.generated_ids) + self.unknown


@dataclass(frozen=True)
class Drawn:
    """`logprob` (nats) and `top` ((id, nats), best first) are the model's own: before penalties, temperature and filters.

    `is_finite` is False where the row's logits hold NaN or +inf, or nothing is left to choose from; the rest says nothing then.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    is_finite: bool


def choice_seed(seed: int, choice: int) -> int:
    """The seed of the n-th answer to one request; that of the first is the request's own."""
    return seed if choice == 0 else _mixed(_mixed(seed % _WORD) ^ choice)


class Draws:
    """Tokens that are being drawn."""

    def __init__(self, rows: Sequence[Drawing], count: int, told: torch.Tensor) -> None:
        """`told` as `_told` makes it, with the ids of the `count` likeliest."""
        self._rows, self._count = rows, count
        self._ready: torch.cuda.Event | None = None
        self._told = told
        if told.device.type == "cuda":
            self._told = torch.empty(told.shape, dtype=told.dtype, pin_memory=True)
            self._told.copy_(told, non_blocking=True)
            self._ready = torch.cuda.current_stream(told.device).record_event()

    def read(self) -> list[Drawn]:
        """Waits until they are drawn; what was launched since may still run."""
        if self._ready is not None:
            self._ready.synchronize()
        return [_drawn(row, line, self._count) for row, line in zip(self._rows, self._told.tolist(), strict=True)]


def draw(logits: torch.Tensor, rows: Sequence[Drawing]) -> list[Drawn]:
    """One token for each row of `logits` [N, V], on any device and of any float type; they are not changed."""
    return launch(logits, rows).read()


@torch.inference_mode()
def launch(logits: torch.Tensor, rows: Sequence[Drawing], into: torch.Tensor | None = None) -> Draws:
    """`draw` without waiting for the device. The tokens are put into the first N places of `into`, on the device, too."""
    count = min(logits.shape[1], max(row.sampling.top_logprobs for row in rows))
    plain = [number for number, row in enumerate(rows) if row.is_plain] if logits.device.type == "cuda" else []
    if plain:
        found = torch.empty(len(rows), 3 + 2 * count, dtype=torch.float64, device=logits.device)
        told_by_kernel(logits, rows, plain, found)
        others = [number for number, row in enumerate(rows) if not row.is_plain]
        if others:
            places = _placed(others, torch.int64, logits.device)
            found[places] = _all_told(logits.index_select(0, places), [rows[number] for number in others], count)
    else:
        found = _all_told(logits, rows, count)
    if into is not None:
        into[: len(rows)].copy_(found[:, 0])
    return Draws(rows, count, found)


def told_by_kernel(logits: torch.Tensor, rows: Sequence[Drawing], plain: Sequence[int], found: torch.Tensor) -> None:
    """The first three columns of `_told` in the rows `plain` of `found`, by one kernel."""
    from core.infer.gpu.draw import draw_rows  # Triton comes with torch for a GPU only

    settings = []
    for number in plain:
        sampling = rows[number].sampling
        heat = max(sampling.temperature, 1e-30) if sampling.temperature > 0 else 0.0
        settings.append((number, heat, sampling.min_p, _uniform(rows[number]) if heat else 0.0))
    draw_rows(logits.contiguous(), _placed(settings, torch.float64, logits.device), found)


def _all_told(logits: torch.Tensor, rows: Sequence[Drawing], count: int) -> torch.Tensor:
    """`_told`, of so many rows at once that memory suffices."""
    at_once = max(1, (_GPU_SCORES if logits.device.type == "cuda" else _CPU_SCORES) // logits.shape[1])
    told = [
        _told(logits[begin : begin + at_once], rows[begin : begin + at_once], count) for begin in range(0, len(rows), at_once)
    ]
    return torch.cat(told) if len(told) > 1 else told[0]


def _told(logits: torch.Tensor, rows: Sequence[Drawing], count: int) -> torch.Tensor:
    """[N, 3 + 2 x count] float64: token, log-probability, is_finite, ids of the likeliest, their log-probabilities."""
    raw = logits.float()
    best = raw.amax(-1, keepdim=True)
    # The normaliser from whole numbers too, so that log-probabilities don't depend on the batch either.
    log_total = best.double() + (weights_of(raw - best)[1].sum(-1, keepdim=True).double() / ONE).log()
    scores = _edited(raw, rows)
    peak = best if scores is raw else scores.amax(-1, keepdim=True)
    tokens = scores.argmax(-1, keepdim=True)
    if any(row.sampling.temperature > 0 for row in rows):
        tokens = torch.where(
            _placed([[row.sampling.temperature == 0] for row in rows], torch.bool, raw.device),
            tokens,
            _sampled(scores - peak, rows),
        )
    # Where the logits are no numbers the index may be any.
    tokens = tokens.clamp(0, raw.shape[1] - 1)
    is_finite = torch.isfinite(best) & torch.isfinite(peak)
    told = [tokens.double(), raw.gather(1, tokens).double() - log_total, is_finite.double()]
    if count:
        values, ids = raw.topk(count, dim=-1)
        told += [ids.double(), values.double() - log_total]
    return torch.cat(told, 1)


def _sampled(below: torch.Tensor, rows: Sequence[Drawing]) -> torch.Tensor:
    """[N, 1]: a draw from each row's filtered distribution; `below` is how far each score is below its row's best."""
    settings = [row.sampling for row in rows]
    # A temperature that no float32 can hold is as good as the smallest that is divided by here.
    numbers = [
        (max(one.temperature, 1e-30), one.top_p, one.min_p, _uniform(row)) for one, row in zip(settings, rows, strict=True)
    ]
    temperature, top_p, min_p, uniform = _placed(numbers, torch.float64, below.device).unbind(1)
    keys, weights = weights_of(below / temperature[:, None].float())
    if any(one.min_p > 0 for one in settings):
        weights = weights.where(weights >= (min_p * ONE).long()[:, None], 0)
    if any(0 < one.top_k < below.shape[1] for one in settings):
        wanted = _placed([one.top_k or below.shape[1] for one in settings], torch.int64, below.device)
        weights = weights.where(keys >= largest_key(keys, torch.ones_like(weights), wanted)[:, None], 0)
    if any(one.top_p < 1 for one in settings):
        wanted = (top_p * weights.sum(-1).double()).ceil().long()
        weights = weights.where(keys >= largest_key(keys, weights, wanted)[:, None], 0)
    return pick(weights, uniform)[:, None]


def _drawn(row: Drawing, line: list[float], count: int) -> Drawn:
    token, logprob, is_finite = line[:3]
    # Of a row that asks for none these places are not written where others ask.
    pairs = islice(zip(line[3 : 3 + count], line[3 + count :], strict=True), row.sampling.top_logprobs)
    top = tuple((int(number), value) for number, value in pairs)
    return Drawn(int(token), logprob, top, bool(is_finite))


def _edited(raw: torch.Tensor, rows: Sequence[Drawing]) -> torch.Tensor:
    """The logits with penalties, bias and bans; `raw` itself where no row asks for any."""
    places: list[tuple[int, int]] = []
    factors: list[float] = []
    added: dict[tuple[int, int], float] = {}
    for number, row in enumerate(rows):
        sampling = row.sampling
        if sampling.repetition_penalty != 1:
            # An id that comes twice is written twice with the same value, so there is no need to sort them out.
            places += [(number, token) for ids in (row.prompt_ids, row.generated_ids) for token in ids]
            factors += [sampling.repetition_penalty] * (len(row.prompt_ids) + len(row.generated_ids))
        if sampling.presence_penalty or sampling.frequency_penalty:
            for token, count in Counter(row.generated_ids).items():
                added[number, token] = -sampling.presence_penalty - sampling.frequency_penalty * count
        for token, bias in sampling.logit_bias:
            added[number, token] = added.get((number, token), 0.0) + bias
        for token in row.banned:
            if token < raw.shape[1]:  # a tokenizer may know marks that its model has no row for
                added[number, token] = float("-inf")
    if not places and not added:
        return raw
    scores = raw.clone()
    if places:
        row_ids, token_ids = _placed(places, torch.int64, raw.device).unbind(1)
        factor = _placed(factors, torch.float32, raw.device)
        scores[row_ids, token_ids] = torch.where(
            scores[row_ids, token_ids] > 0, scores[row_ids, token_ids] / factor, scores[row_ids, token_ids] * factor
        )
    if added:
        row_ids, token_ids = _placed(list(added), torch.int64, raw.device).unbind(1)
        scores[row_ids, token_ids] += _placed(list(added.values()), torch.float32, raw.device)
    return scores


def _placed(values: Sequence[object], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A small table on the device. From pinned memory: a copy from pageable memory may wait for the kernels before it."""
    table = torch.tensor(values, dtype=dtype)
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


def _uniform(row: Drawing) -> float:
    """A number in [0, 1) that depends on seed and position alone: SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    state = _mixed(row.seed % _WORD + _GOLDEN) + _GOLDEN * (1 + row.position)
    return (_mixed(state) >> 11) * 2.0**-53


def _mixed(word: int) -> int:
    word %= _WORD
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 % _WORD
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB % _WORD
    return word ^ (word >> 31)
