"""The engine's loop against transformers and peft in the same numerics."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from core.data.conversation import Message
from core.errors import ArtifactError
from core.infer.adapters import AdaptedBase
from core.infer.generate import generate
from core.infer.progress import End, Token
from core.infer.sampling import Sampling
from core.infer.servable import Servable
from core.models.load import LoadedBase
from tests.lora import fresh_answer

PROMPT = [Message("user", "What is the capital of France?")]
LoadTiny = Callable[..., LoadedBase]
Lora = Callable[[int], Path]


def answer(servable: Servable, sampling: Sampling, prompt: list[int] | None = None) -> tuple[list[Token], End]:
    servable.host.activate(servable.adapter)
    prompt_ids = prompt if prompt is not None else servable.prompt_ids(PROMPT)
    *tokens, end = generate(servable.host.model, prompt_ids, sampling, servable.tokenizer, servable.stop_ids)
    assert all(isinstance(token, Token) for token in tokens)
    assert isinstance(end, End)
    return tokens, end  # type: ignore[return-value]


def text_of(tokens: list[Token], end: End) -> str:
    return "".join(token.text for token in tokens) + end.text


def assert_equal(tokens: list[Token], fresh: tuple[list[int], list[float]]) -> None:
    ids, logprobs = fresh
    assert [token.id for token in tokens] == ids
    assert [token.logprob for token in tokens] == pytest.approx(logprobs, abs=1e-5)


@pytest.mark.parametrize("quantization", ["none", "nf4", "nf4-double"])
def test_lora_and_base_answers_equal_those_of_transformers_and_peft(
    quantization: str, tiny_model: Path, load_tiny: LoadTiny, lora_folder: Lora
) -> None:
    host = AdaptedBase(load_tiny(quantization))
    host.load(lora_folder(1), "one")
    host.load(lora_folder(2), "two")
    options = {}
    if quantization != "none":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=quantization == "nf4-double",
            bnb_4bit_compute_dtype=torch.float32,
        )

    def fresh(folder: Path | None) -> torch.nn.Module:
        model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32, **options)
        if quantization != "none":
            for module in model.modules():
                if hasattr(module, "support_avx512bf16_for_cpu"):
                    module.support_avx512bf16_for_cpu = False
        return model.eval() if folder is None else PeftModel.from_pretrained(model, str(folder)).eval()

    results = {}
    for name, folder in (("one", lora_folder(1)), (None, None), ("two", lora_folder(2)), ("one", lora_folder(1))):
        servable = Servable(host, tiny_model, adapter=name)
        tokens, _ = answer(servable, Sampling(max_tokens=24))
        assert_equal(tokens, fresh_answer(fresh(folder), servable.prompt_ids(PROMPT), 24))
        results[name] = [token.id for token in tokens]
    assert results["one"] != results[None] != results["two"] != results["one"]


def test_full_model_answers_equal_those_of_transformers(load_tiny: LoadTiny, tmp_path: Path, tiny_model: Path) -> None:
    from tests.tiny import build_tiny_model

    folder = build_tiny_model(tmp_path / "full", seed=7)
    servable = Servable(AdaptedBase(load_tiny(folder=folder)), folder)
    tokens, _ = answer(servable, Sampling(max_tokens=24))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert_equal(tokens, fresh_answer(model, servable.prompt_ids(PROMPT), 24))


def test_a_seed_gives_one_answer_and_another_seed_another(load_tiny: LoadTiny, tiny_model: Path) -> None:
    servable = Servable(AdaptedBase(load_tiny()), tiny_model)

    def ids(seed: int | None, top_p: float = 1.0) -> list[int]:
        return [t.id for t in answer(servable, Sampling(max_tokens=20, temperature=1.0, top_p=top_p, seed=seed))[0]]

    assert ids(3) == ids(3)
    assert ids(3) != ids(4)
    assert ids(3, top_p=0.5) == ids(3, top_p=0.5) != ids(3)
    assert ids(None) != ids(None)


def test_logprobs_are_the_models_own_whatever_the_temperature(load_tiny: LoadTiny, tiny_model: Path) -> None:
    from core.eval.logprobs import sequence_logprobs

    servable = Servable(AdaptedBase(load_tiny()), tiny_model)
    tokens, _ = answer(servable, Sampling(max_tokens=12, temperature=1.7, top_p=0.8, seed=1))
    prompt = servable.prompt_ids(PROMPT)
    known = sequence_logprobs(servable.host.model, prompt + [token.id for token in tokens], len(prompt))
    assert [token.logprob for token in tokens] == pytest.approx(known, abs=1e-5)


def test_pieces_add_up_to_the_whole_text_and_never_hold_half_a_character(load_tiny: LoadTiny, tiny_model: Path) -> None:
    servable = Servable(AdaptedBase(load_tiny()), tiny_model)
    for seed in range(8):  # a random model over bytes makes broken characters all the time
        tokens, end = answer(servable, Sampling(max_tokens=40, temperature=1.5, seed=seed))
        ids = [token.id for token in tokens if token.id not in servable.stop_ids]
        assert text_of(tokens, end) == servable.tokenizer.decode(ids, skip_special=True)


def test_the_end_of_turn_token_is_counted_but_not_shown(load_tiny: LoadTiny, tiny_model: Path) -> None:
    host = AdaptedBase(load_tiny())
    servable = Servable(host, tiny_model)
    plain, _ = answer(servable, Sampling(max_tokens=8))
    servable.stop_ids = (plain[3].id,)
    tokens, end = answer(servable, Sampling(max_tokens=8))
    first = [token.id for token in plain].index(plain[3].id)
    assert [token.id for token in tokens] == [token.id for token in plain[: first + 1]]
    assert end.reason == "stop"
    assert tokens[-1].text == ""


def test_what_a_request_says_about_its_end_is_obeyed(load_tiny: LoadTiny, tiny_model: Path) -> None:
    servable = Servable(AdaptedBase(load_tiny()), tiny_model)
    servable.stop_ids = ()
    plain = [token.id for token in answer(servable, Sampling(max_tokens=12))[0]]
    last = plain.index(plain[5])

    tokens, end = answer(servable, Sampling(max_tokens=12, stop_token_ids=(plain[5],)))
    assert [token.id for token in tokens] == plain[: last + 1]
    assert (tokens[-1].text, end.reason) == ("", "stop")
    tokens, end = answer(servable, Sampling(max_tokens=12, stop_token_ids=(plain[5],), include_stop=True))
    assert text_of(tokens, end) == servable.tokenizer.decode(plain[: last + 1], skip_special=True)

    servable.stop_ids = (plain[5],)
    tokens, end = answer(servable, Sampling(max_tokens=12, ignore_eos=True))
    assert ([token.id for token in tokens], end.reason) == (plain, "length")
    tokens, end = answer(servable, Sampling(max_tokens=12, min_tokens=10))
    assert len(tokens) >= 10
    assert plain[5] not in [token.id for token in tokens[:10]]


def test_the_likeliest_tokens_are_told_with_each(load_tiny: LoadTiny, tiny_model: Path) -> None:
    servable = Servable(AdaptedBase(load_tiny()), tiny_model)
    tokens, _ = answer(servable, Sampling(max_tokens=6, top_logprobs=3))
    assert all(token.top[0] == (token.id, token.logprob) for token in tokens)
    assert all(len(token.top) == 3 for token in tokens)


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_a_second_wrap_after_a_failed_first_load_leaves_the_base_as_it_was(
    load_tiny: LoadTiny, lora_folder: Lora, tiny_model: Path, tmp_path: Path
) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from safetensors.torch import load_file, save_file

    from tests.lora import add_lora

    host = AdaptedBase(load_tiny())
    base, _ = answer(Servable(host, tiny_model), Sampling(max_tokens=8))
    broken = add_lora(tiny_model, tmp_path / "broken", 9)
    tensors = load_file(broken / "adapter_model.safetensors")
    moved = {name.replace("layers.0", "layers.7"): tensor for name, tensor in tensors.items()}
    save_file(moved, broken / "adapter_model.safetensors")
    with pytest.raises(ArtifactError, match="match no module"):
        host.load(broken, "broken")
    assert not any(isinstance(module, BaseTunerLayer) for module in host.model.modules())
    host.load(lora_folder(1), "one")
    with pytest.raises(ArtifactError, match="match no module"):
        host.load(broken, "broken")
    one, _ = answer(Servable(host, tiny_model, adapter="one"), Sampling(max_tokens=8))
    again, _ = answer(Servable(host, tiny_model), Sampling(max_tokens=8))
    assert again == base != one
    host.unload("one")
    assert not any(isinstance(module, BaseTunerLayer) for module in host.model.modules())
    host.load(lora_folder(1), "one")
    assert answer(Servable(host, tiny_model, adapter="one"), Sampling(max_tokens=8))[0] == one
