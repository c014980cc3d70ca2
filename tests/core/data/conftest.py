"""One tiny model folder for the whole package, and ways to give its tokenizer another character."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, processors, trainers

from core.data.tokenizer import Tokenizer
from tests.tiny import build_tiny_model

Variant = Callable[..., Path]


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(tiny_folder)


@pytest.fixture
def variant(tiny_folder: Path, tmp_path: Path) -> Variant:
    """`variant(template=..., special=[...], plain=[...], post_processor=..., **config)`: a folder with another tokenizer."""

    def build(
        template: str | None = None,
        special: tuple[str, ...] = (),
        plain: tuple[str, ...] = (),
        post_processor: Any = None,
        **config: Any,
    ) -> Path:
        folder = tmp_path / "variant"
        folder.mkdir()
        for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
            shutil.copy(tiny_folder / name, folder / name)
        backend = Backend.from_file(str(folder / "tokenizer.json"))
        backend.add_special_tokens(list(special))
        backend.add_tokens(list(plain))
        if post_processor is not None:
            backend.post_processor = post_processor(backend)
        backend.save(str(folder / "tokenizer.json"))
        settings = json.loads((folder / "tokenizer_config.json").read_text()) | config
        settings.pop("chat_template", None)
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        if template is not None:
            (folder / "chat_template.jinja").write_text(template)
        return folder

    return build


@pytest.fixture(scope="session")
def pieces_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of the SentencePiece kind, as Llama 2 and Mistral have: ▁ for spaces, bytes for rare characters, a BOS."""
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("pieces")
    backend = Backend(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<unk>", "<s>", "</s>", *BYTES], initial_alphabet=list(ALPHABET), show_progress=False
    )
    backend.train_from_iterator(["The quick brown fox.", "The capital of France is Paris."], trainer)
    # Trained as special tokens to get their ids, the bytes must not be matched in text: only the first three stay special.
    state = json.loads(backend.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in BYTES]
    backend = Backend.from_str(json.dumps(state))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    return folder


BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
ALPHABET = "▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,?[]/<>|"
