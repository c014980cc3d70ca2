"""New tokens in a tokenizer: one id each, in every text, for us and for transformers; what can't be one is refused by name."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from core.data.conversation import Message, PlainText
from core.data.render import check_new_tokens, marks_of, render, render_prompt, render_text, visualize
from core.data.template import choose_template
from core.data.tokenizer import TextStream, Tokenizer
from core.data.tokens import TokenCache
from core.errors import BadSpec
from core.prepare import prepare_tokens
from core.run import ROWS_FILE, TOKENS_FOLDER, TokenizeInput, token_key
from core.spec import DatasetRef, DataSpec, EvalSpec, JobSpec, SftObjective
from core.states import Reason
from tests.core.data.folders import build_tokenizer
from tests.core.test_prepare import finish, start

NEW = ["<tool>", "<tool>!", "海鸥号", "naïve x", "two  spaces", "a\nb"]
TEXTS = [
    "<tool>",
    " <tool> <tool>!<tool>\n",
    "x海鸥号y 海鸥 号",
    "it is naïve x, with two  spaces and two spaces",
    "Tool <Tool> tool> a\nb\nba",
]


def copied(folder: Path, to: Path) -> Path:
    to.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"):
        if (folder / name).is_file():
            shutil.copy(folder / name, to / name)
    return to


def assert_as_in_transformers(folder: Path, to: Path, tokens: list[str]) -> None:
    """What is written to `to` gives transformers and us the ids that the tokenizer in memory gives."""
    from transformers import AutoTokenizer

    before, tokenizer = AutoTokenizer.from_pretrained(folder), Tokenizer.from_folder(folder, tokens)
    tokenizer.save_new_tokens(copied(folder, to))
    reference, again = AutoTokenizer.from_pretrained(to), Tokenizer.from_folder(to)
    assert type(reference) is type(before)
    assert again.new == ()
    assert [reference.convert_tokens_to_ids(token.text) for token in tokenizer.new] == [token.id for token in tokenizer.new]
    for text in TEXTS:
        ids, _ = tokenizer.encode(text, parse_special=True)
        assert again.encode(text, parse_special=True)[0] == ids == reference(text, add_special_tokens=False).input_ids, text
        assert reference.decode(ids) == again.decode(ids, skip_special=True)
    plain = "The quick brown fox <|im_end|></s> jumps."
    assert reference(plain).input_ids == before(plain).input_ids, "other texts stay what they were"


def test_they_are_ids_of_their_own_and_come_back_as_text(tiny_folder: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(tiny_folder, NEW)
    assert [token.text for token in tokenizer.new] == NEW
    assert [token.id for token in tokenizer.new] == list(range(432, 432 + len(NEW)))
    old = Tokenizer.from_folder(tiny_folder)
    for token in tokenizer.new:
        assert list(token.pieces) == old.encode(token.text, parse_special=False)[0]
        assert tokenizer.encode(token.text, parse_special=True)[0] == [token.id]
    for text in TEXTS:
        for parse_special in (True, False):
            ids, offsets = tokenizer.encode(text, parse_special=parse_special)
            assert tokenizer.decode(ids, skip_special=True) == text
            found = [(NEW[token - 432], text[slice(*place)]) for token, place in zip(ids, offsets, strict=True) if token >= 432]
            assert all(token == there for token, there in found)
        stream = TextStream(tokenizer)
        assert "".join(map(stream.push, ids)) + stream.finish() == text
    ids, _ = tokenizer.encode("<tool>!!", parse_special=True)
    assert ids[0] == 433, "the longest of those that begin here"
    assert_as_in_transformers(tiny_folder, tmp_path / "saved", NEW)


@pytest.mark.parametrize("kind", ["TokenizersBackend", "Qwen2Tokenizer"])
def test_a_folder_that_lists_its_added_tokens_twice_gets_the_new_ones_in_both_lists(
    tiny_folder: Path, tmp_path: Path, kind: str
) -> None:
    """transformers builds Qwen2Tokenizer from the words alone, and then adds what tokenizer_config.json lists."""
    folder = copied(tiny_folder, tmp_path / "listed")
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    config = json.loads((folder / "tokenizer_config.json").read_text())
    listed = {str(token["id"]): {key: value for key, value in token.items() if key != "id"} for token in added}
    # A token that only the configuration knows stands before the new ones, here as there.
    listed["432"] = listed["1"] | {"content": "<only-listed>"}
    config |= {"tokenizer_class": kind, "added_tokens_decoder": listed}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert [token.id for token in Tokenizer.from_folder(folder, ["<tool>"]).new] == [433]
    assert_as_in_transformers(folder, tmp_path / "saved", ["<tool>", "<tool>!", "海鸥号"])


@pytest.mark.parametrize("name", ["mistral-v1", "mistral-v3"])
def test_published_tokenizers_take_them(tmp_path: Path, shared_data: Path, name: str) -> None:
    source = shared_data / "tokenizers"
    if not (source / name).is_dir():
        pytest.skip(f"{name} is not among the shared tokenizers")
    folder = build_tokenizer(name, source, tmp_path / "base")
    assert_as_in_transformers(folder, tmp_path / "saved", ["<tool>", "<tool>!", "海鸥号"])


def test_sentencepiece_words_may_be_made_of_what_it_has_no_pieces_for(pieces_folder: Path, tmp_path: Path) -> None:
    assert_as_in_transformers(pieces_folder, tmp_path / "saved", ["<tool>", "海鸥号"])


@pytest.mark.parametrize(
    ("token", "reason"),
    [
        ("<|im_end|>", "'<|im_end|>' is a special token"),
        ("The", "'The' is one token already"),
        (" the", "' the' is one token already"),
        ("Ġthe", "'Ġthe' is one token already"),
        ("café", "'café' would be read back as 'caf\ufffd'"),
    ],
)
def test_what_the_tokenizer_has_or_can_not_write_is_refused(tiny_folder: Path, token: str, reason: str) -> None:
    with pytest.raises(BadSpec) as caught:
        Tokenizer.from_folder(tiny_folder, ["fine-1", token, "fine-2"])
    assert str(caught.value) == f"data.new_tokens: {reason}"


def test_every_reason_is_named_at_once(tiny_folder: Path) -> None:
    with pytest.raises(BadSpec, match=r"'The' is one token already; '<\|pad\|>' is a special token"):
        Tokenizer.from_folder(tiny_folder, ["The", "<|pad|>"])


def test_a_tokenizer_whose_ids_have_gaps_takes_none(tiny_folder: Path, tmp_path: Path) -> None:
    folder = copied(tiny_folder, tmp_path / "gaps")
    state = json.loads((folder / "tokenizer.json").read_text())
    last = max(state["model"]["vocab"], key=state["model"]["vocab"].__getitem__)
    state["model"]["vocab"][last] += 5
    (folder / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(BadSpec, match="have gaps"):
        Tokenizer.from_folder(folder, ["<tool>"])


CONVERSATION = [
    Message("system", "Use <tool>."),
    Message("user", "<tool> of 海鸥号?<|im_end|>"),
    Message("assistant", "海鸥号<tool>"),
    Message("user", "and?"),
    Message("assistant", "<tool>!"),
]


def test_in_conversations_and_texts_they_are_ordinary_words(tiny_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = Tokenizer.from_folder(tiny_folder, NEW[:3])
    template = choose_template("model", tokenizer)
    check_new_tokens(tokenizer, template)
    rendered = render(CONVERSATION, tokenizer, template, "all_turns")
    trained = [token for token, has_loss in zip(rendered.ids, rendered.mask, strict=True) if has_loss]
    assert [rendered.ids.count(token.id) for token in tokenizer.new] == [3, 1, 2]
    assert trained == [434, 432, 2, 433, 2]
    assert rendered.ids.count(2) == 5, "what somebody wrote is no end of turn"
    assert "海鸥号<tool><|im_end|>" in [text for text, has_loss in visualize(rendered, tokenizer) if has_loss]
    prompt = render_prompt(CONVERSATION[:2], tokenizer, template)
    assert rendered.ids[: len(prompt)] == prompt
    control = marks_of(tokenizer, template).control
    assert control is not None
    assert not any(control.search(token.text) for token in tokenizer.new), "no new token is taken for a mark"

    tokenizer.save_new_tokens(copied(tiny_folder, tmp_path / "saved"))
    reference = AutoTokenizer.from_pretrained(tmp_path / "saved")
    chat = [{"role": message.role, "content": message.content.removesuffix("<|im_end|>")} for message in CONVERSATION]
    clean = [message._replace(content=message.content.removesuffix("<|im_end|>")) for message in CONVERSATION]
    ids = reference.apply_chat_template(chat, tokenize=True, return_dict=False)
    assert render(clean, tokenizer, template, "all_turns").ids == ids

    (text,) = render_text(PlainText("<tool> <|im_end|>海鸥号"), tokenizer, 64)
    assert (text.ids[0], text.ids[-2:]) == (432, [434, 2])
    assert text.ids.count(2) == 1


INST = (
    "{{ bos_token or '' }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% else %}{{ raise_exception('') }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "token", "reason"),
    [
        ("model", "assistant\n", "stands in what the chat template writes"),
        ("model", "|im_", "stands in what the chat template writes"),
        ("model", "user\n", "stands in what the chat template writes"),
        ("model", "Yes<", "would run into"),  # would swallow the beginning of <|im_end|>
        ("model", "\nYes", "would run into"),  # would join the prompt's end and the answer's beginning
        ("model", "<|pad|>s", "can't be told from the special token '<|pad|>'"),
        ("model", "|pad", "can't be told from the special token '<|pad|>'"),
        ("alpaca", "### Resp", "stands in what the chat template writes"),
        ("alpaca", "qq\n", "would run into"),
        ("inst", " [/INST", "stands in what the chat template writes"),
        ("inst", " qq", "would run into"),
    ],
)
def test_what_would_get_in_the_way_of_the_template_is_refused(
    tiny_folder: Path, tmp_path: Path, template: Any, token: str, reason: str
) -> None:
    folder = copied(tiny_folder, tmp_path / "model")
    if template == "inst":
        (folder / "chat_template.jinja").write_text(INST)
    tokenizer = Tokenizer.from_folder(folder, ["fine-1", token])
    with pytest.raises(BadSpec) as caught:
        check_new_tokens(tokenizer, choose_template("model" if template == "inst" else template, tokenizer))
    assert str(caught.value).startswith(f"data.new_tokens: {token!r} {reason}")


@pytest.mark.parametrize("template", ["model", "chatml", "alpaca"])
def test_ordinary_words_get_in_no_template_s_way(tiny_folder: Path, template: Any) -> None:
    tokenizer = Tokenizer.from_folder(tiny_folder, ["<tool>", "</tool>", "<think-hard>", "[CALL]", "海鸥号", "SKU-1B", "x B"])
    check_new_tokens(tokenizer, choose_template(template, tokenizer))


def write_rows(folder: Path) -> Path:
    row = {"row": 1, "messages": [{"role": "user", "content": "<tool>?"}, {"role": "assistant", "content": "海鸥号"}]}
    path = folder / ROWS_FILE
    path.write_text(json.dumps(row) + "\n")
    return path


def test_the_preparer_writes_their_ids_and_refuses_before_any_row_is_read(tiny_folder: Path, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"dataset_id": "ds_1", "rows": write_rows(tmp_path), "model_folder": tiny_folder}
    fields |= {"template": "model", "max_length": 64, "train_on": "all_turns"}
    prepare_tokens(TokenizeInput(**fields, new_tokens=NEW[:3]), tmp_path)
    cache = TokenCache.open(tmp_path / TOKENS_FOLDER)
    ids, mask = cache.row(0)
    assert ids[mask == 1].tolist() == [434, 2]
    assert 432 in ids
    assert cache.facts["new_tokens"] == NEW[:3]

    work = tmp_path / "refused"
    work.mkdir()
    code, said = finish(start(work, TokenizeInput(**fields, new_tokens=["user\n", "<|im"])))
    assert code == Reason.BAD_SPEC.facts.exit_code
    assert said.strip().splitlines()[-1].startswith("data.new_tokens: 'user\\n' stands in")
    assert not (work / TOKENS_FOLDER).exists()


def data(**changes: Any) -> dict[str, Any]:
    return {"datasets": [{"dataset_id": "ds_aaaaaaaaaaaa"}], **changes}


def test_only_jobs_that_have_them_get_another_token_cache() -> None:
    def key(*tokens: str) -> str:
        spec = DataSpec(datasets=[DatasetRef(dataset_id="ds_aaaaaaaaaaaa")], max_length=256, new_tokens=list(tokens))
        return token_key("d" * 64, "t" * 64, spec, SftObjective())

    assert key() == "e83b60cddba299202b61b3be205ba7080341e14a"
    assert len({key(), key("a-1"), key("b-1"), key("a-1", "b-1"), key("b-1", "a-1")}) == 5, "their order decides their ids"


@pytest.mark.parametrize(
    "tokens",
    [[""], ["  "], ["a\x00b"], ["\x00"], ["x" * 65], ["a-1", "b", "a-1"], [f"t{n}" for n in range(1025)], ["\n"]],
    ids=str,
)
def test_what_is_no_word_is_refused_at_submit(tokens: list[str]) -> None:
    with pytest.raises(ValidationError, match="new_tokens"):
        JobSpec.model_validate({"base_model": "t/t", "data": data(new_tokens=tokens)})
    with pytest.raises(ValidationError, match="panel"):
        EvalSpec(panel=["a\x00b"])


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("tuning", ["lora", "mora"])
def test_a_quantized_base_takes_none(quantization: str, tuning: str) -> None:
    fields = {"base_model": "t/t", "data": data(new_tokens=["a-1"]), "tuning": {"kind": tuning}}
    JobSpec.model_validate(fields)
    with pytest.raises(ValidationError, match=r"data\.new_tokens makes a whole model"):
        JobSpec.model_validate(fields | {"quantization": {"kind": quantization}})
