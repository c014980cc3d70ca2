"""The one way from text to ids and back, for training and serving alike, over the `tokenizers` library alone.

transformers' AutoTokenizer would load torch, and would be a second path. What a model folder says about its special
tokens (tokenizer_config.json, special_tokens_map.json, generation_config.json) is read here and nowhere else, and here alone
a job's new tokens are added to it.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from core.errors import ArtifactError, BadSpec

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_MAX_PENDING = 8


@dataclass(frozen=True)
class NewToken:
    """A word that a job makes one token of. `pieces` are the ids that its text was before."""

    text: str
    id: int
    pieces: tuple[int, ...]


class Tokenizer:
    """A tokenizer of a model folder. `from_folder` makes one; it is never changed afterwards.

    `named` holds the special tokens by the names that chat templates use ("bos_token" -> "<s>"); `bos_id`, `pad_id` and
    `eos_ids` their ids; `added` every added token (text -> id), `special` those of them flagged special.
    `adds_bos` says that the folder's own post-processor puts the BOS before a text. `new` are the tokens that the folder
    does not have.
    """

    def __init__(
        self,
        backend: Backend,
        named: dict[str, str],
        more_eos: Sequence[int],
        chat_template: str | None,
        new: tuple[NewToken, ...] = (),
    ) -> None:
        self._backend = backend
        self._lock = Lock()
        self.named = named
        self.new = new
        self.chat_template = chat_template
        added = backend.get_added_tokens_decoder()
        self.added: dict[str, int] = {token.content: number for number, token in added.items()}
        self.special: dict[str, int] = {token.content: number for number, token in added.items() if token.special}
        self.bos_id = self._named_id("bos_token")
        self.pad_id = self._named_id("pad_token")
        eos_id = self._named_id("eos_token")
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys([*([] if eos_id is None else [eos_id]), *more_eos]))
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.adds_bos = self.bos_id is not None and backend.encode("a").ids[:1] == [self.bos_id]
        # Its BOS is known now, and left in place it would go on to shift offsets past a token's leading space.
        backend.post_processor = None

    @classmethod
    def from_folder(cls, folder: Path, new_tokens: Sequence[str] = ()) -> "Tokenizer":
        """Read a model folder, and add new tokens to what it holds.

        These are ordinary text: found wherever they stand, the longest where several begin, and the whitespace around them
        stays. Raises ArtifactError when there is no usable tokenizer, BadSpec with every new token that can't be one.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ArtifactError(f"{folder.name}: tokenizer.json is missing")
        try:
            backend = Backend.from_file(str(path))
        except Exception as error:  # the library raises bare Exception on every kind of bad file
            raise ArtifactError(f"{folder.name}: tokenizer.json can't be read: {error}") from None
        config = _read_json(folder / "tokenizer_config.json")
        backend.no_truncation()
        backend.no_padding()
        named = _named_tokens(config, _read_json(folder / "special_tokens_map.json"))
        _add_missing(backend, config, named)
        generation = _read_json(folder / "generation_config.json").get("eos_token_id")
        more_eos = generation if isinstance(generation, list) else [] if generation is None else [generation]
        new = _add_new(backend, new_tokens, named.get("unk_token")) if new_tokens else ()
        return cls(backend, named, more_eos, _chat_template(folder, config), new)

    def save_new_tokens(self, folder: Path) -> None:
        """Write the new tokens into the copied tokenizer files of a folder, so that any loader gives them the same ids."""
        if not self.new:
            return
        entries = {number: token.__getstate__() for number, token in sorted(self._backend.get_added_tokens_decoder().items())}
        path = folder / "tokenizer.json"
        state = _read_json(path)
        state["added_tokens"] = [{"id": number} | entry for number, entry in entries.items()]
        path.write_text(json.dumps(state, ensure_ascii=False, indent=2), encoding="utf-8")
        path = folder / "tokenizer_config.json"
        config = _read_json(path)
        # Where this list is, transformers builds some families' tokenizers anew and takes the added tokens from it alone.
        if "added_tokens_decoder" in config:
            config["added_tokens_decoder"] = {str(number): entry for number, entry in entries.items()}
            path.write_text(json.dumps(config, ensure_ascii=False, indent=2), encoding="utf-8")

    def encode(self, text: str, *, parse_special: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """(ids, (begin, end) character offsets) of a text; nothing is put before or behind it.

        `parse_special` false reads special-token strings as ordinary text. It holds for tokens flagged special only, so
        conversations go through the renderer instead.
        """
        with self._lock:  # the flag is the backend's, not the call's
            self._backend.encode_special_tokens = not parse_special
            encoding = self._backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: Sequence[int], *, skip_special: bool) -> str:
        text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special)
        return text

    def token_id(self, token: str) -> int | None:
        """Id of one token by its exact text, or None."""
        number: int | None = self._backend.token_to_id(token)
        return number

    def _named_id(self, name: str) -> int | None:
        token = self.named.get(name)
        return None if token is None else self.token_id(token)


class TextStream:
    """Ids in, text out, for one answer: what `decode` gives of the whole, in pieces that never hold half a character."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._ids: list[int] = []
        self._sent = 0  # ids before this one are out; the last piece stays as context, since spaces depend on neighbours
        self._context = 0

    def push(self, token: int) -> str:
        """The text that became certain with this token; often empty inside a character of several tokens."""
        self._ids.append(token)
        return self._take(is_last=len(self._ids) - self._sent > _MAX_PENDING)

    def finish(self) -> str:
        """What was held back. A broken character comes out as U+FFFD."""
        return self._take(is_last=True)

    def _take(self, *, is_last: bool) -> str:
        before = self._decode(self._ids[self._context : self._sent])
        whole = self._decode(self._ids[self._context :])
        if not is_last and (whole.endswith("\N{REPLACEMENT CHARACTER}") or len(whole) <= len(before)):
            return ""
        self._context, self._sent = self._sent, len(self._ids)
        return whole[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special=self._skip_special)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArtifactError(f"{path.name} is not JSON: {error}") from None
    return value if isinstance(value, dict) else {}


def _named_tokens(config: dict[str, Any], special_map: dict[str, Any]) -> dict[str, str]:
    named = {}
    for name in _NAMED:
        token = config.get(name, special_map.get(name))
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str) and text:
            named[name] = text
    return named


def _add_missing(backend: Backend, config: dict[str, Any], named: dict[str, str]) -> None:
    """Make sure that every token the configuration calls added or special is one to the backend, as transformers does."""
    known = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    listed = config.get("added_tokens_decoder")
    entries = sorted(listed.items(), key=lambda item: int(item[0])) if isinstance(listed, dict) else []
    for _, entry in entries:
        if entry["content"] not in known:
            flags = {key: entry[key] for key in ("lstrip", "rstrip", "normalized", "single_word") if key in entry}
            backend.add_tokens([AddedToken(entry["content"], special=bool(entry.get("special")), **flags)])
    for text in named.values():
        if text not in known or not known[text].special:
            backend.add_special_tokens([AddedToken(text, special=True, normalized=False)])


def _add_new(backend: Backend, texts: Sequence[str], unknown: str | None) -> tuple[NewToken, ...]:
    taken = backend.get_vocab(with_added_tokens=True)
    special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    pieces = {text: tuple(backend.encode(text, add_special_tokens=False).ids) for text in texts}
    wrong = []
    for text in texts:
        if text in special:
            wrong.append(f"{text!r} is a special token")
        elif text in taken or (len(pieces[text]) == 1 and backend.id_to_token(pieces[text][0]) != unknown):
            wrong.append(f"{text!r} is one token already")
    _refuse(wrong)
    backend.add_tokens([AddedToken(text, special=False, normalized=False) for text in texts])
    first = 1 + max(taken.values())
    new = tuple(NewToken(text, first + place, pieces[text]) for place, text in enumerate(texts))
    if any(backend.token_to_id(token.text) != token.id for token in new):
        _refuse(["the ids of this tokenizer have gaps, so no token can be added behind them"])
    # Byte-level decoders take a word for bytes whose letters are all ones that they write bytes with: é is one.
    before = backend.encode("a", add_special_tokens=False).ids
    said = {token.text: backend.decode([*before, token.id]) for token in new}
    _refuse([f"{text!r} would be read back as {back[1:]!r}" for text, back in said.items() if text not in back])
    return new


def _refuse(reasons: list[str]) -> None:
    if reasons:
        raise BadSpec(f"data.new_tokens: {'; '.join(reasons)}")


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several by name, as older folders have them
        template = next((one.get("template") for one in template if one.get("name") == "default"), None)
    return template if isinstance(template, str) else None
