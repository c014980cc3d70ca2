"""What fused layers keep for the backward pass, and what a compiler makes of them."""

import pytest
import torch
from transformers.models.glm import modeling_glm
from transformers.models.llama import modeling_llama

from core.adapter import Quantization
from core.models import documents
from core.spec import LoraTuning
from core.train.fused import elementwise
from core.train.fused.install import install_fused
from tests.core.train.fused import (
    FAMILIES,
    Flash,
    Folders,
    adapted,
    base_of,
    folders_in,
    kept,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return folders_in(tmp_path_factory.mktemp)


@pytest.mark.parametrize("quantization", ["none", "nf4-double", "fp8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_keeps_what_can_t_be_made_again(
    folders: Folders, monkeypatch: pytest.MonkeyPatch, family: str, quantization: Quantization
) -> None:
    monkeypatch.setattr(documents, "_row_by_row", lambda q, k, v, *_: Flash.apply(q.to(v.dtype), k.to(v.dtype), v))
    rank = 1

    def of_a_layer(fused: bool) -> tuple[float, float]:
        """Bytes for each token, and whatever the number of tokens."""
        found = {}
        for layers in (1, 3):
            model = adapted(base_of(folders(family, layers=layers), "bf16", quantization), LoraTuning(rank=rank))
            if fused:
                install_fused(model)
            found[layers] = [kept(model, tokens) for tokens in (100, 300)]
        few, many = (found[3][n] - found[1][n] for n in (0, 1))
        each = (many - few) / 200 / 2
        return each, few / 2 - 100 * each

    hidden, heads, keys, size, inner = 64, 4, 2, 16, 128
    width = 2 * hidden + heads * size + 2 * keys * size + 2 * inner
    width += {"qwen3": (heads + keys) * size, "glm4": 2 * hidden}.get(family, 0)
    adapted_modules = 6 if family.startswith("glm") else 7
    wide = 2 + {"qwen3": heads + keys, "glm4": 2}.get(family, 0)  # in fp32: of each norm
    each, constant = of_a_layer(fused=True)
    assert each == 2 * (width + rank * adapted_modules) + 4 * wide
    before, _ = of_a_layer(fused=False)
    assert each < 0.55 * before
    weights = hidden * (2 * heads + 2 * keys) * size + 3 * hidden * inner
    assert constant < weights, "no dequantised weight: that would be twice as many bytes"


def test_attention_s_result_is_kept_where_rows_are_long(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "_row_by_row", lambda q, k, v, *_: Flash.apply(q.to(v.dtype), k.to(v.dtype), v))
    model = adapted(base_of(folders("llama", layers=1), "bf16"), LoraTuning(rank=1))
    install_fused(model)
    again = kept(model, 300)
    monkeypatch.setattr("core.train.fused.layer.ATTENDED_AGAIN", 200)
    assert kept(model, 300) - again == 300 * 4 * (2 * 16 + 4)


def test_element_wise_gradients_are_those_of_the_functions() -> None:
    """Against autograd, in double precision of what is under them."""
    torch.manual_seed(0)
    x, scale = torch.randn(5, 3, 8, requires_grad=True), torch.randn(3, 8, requires_grad=True)
    result, inverse = elementwise.normed(x, scale, 1e-5, torch.float32)
    gradient, further = torch.randn_like(result), torch.randn_like(x)
    of_x, of_scale = torch.autograd.grad(result, (x, scale), gradient)
    assert torch.equal(elementwise.normed_again(x, scale, inverse, torch.float32), result)
    back, again = elementwise.normed_back_and_again(gradient, x, scale, inverse, further)
    torch.testing.assert_close(back, of_x + further)
    assert torch.equal(again, result)
    torch.testing.assert_close(elementwise.normed_back_scale(gradient, x, inverse), of_scale)
    logits, labels = torch.randn(5, 16, requires_grad=True), torch.tensor([3, 0, 15, 3, 7])
    nats = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    (of_logits,) = torch.autograd.grad(nats, logits, torch.ones(5))
    over = logits.detach().clone()
    torch.testing.assert_close(elementwise.nats_in_place(over, labels), nats)
    torch.testing.assert_close(over, of_logits)
    both = torch.randn(5, 16, requires_grad=True)
    product = elementwise.gated(both, torch.float32)
    (of_both,) = torch.autograd.grad(product, both, torch.ones_like(product))
    over, of_product = both.detach().clone(), torch.ones_like(product)
    elementwise.gate_back_in_place(of_product, over)
    torch.testing.assert_close(over, of_both)
    torch.testing.assert_close(of_product, product.detach(), msg="what the gate gave takes the gradient's place")
    for paired in (False, True):
        heads = torch.randn(5, 3, 8, requires_grad=True)
        angles = torch.randn(5, 2)
        cos, sin = angles.cos(), angles.sin()
        turned = elementwise.turned(heads, cos, sin, paired)
        assert torch.equal(turned[..., 4:], heads[..., 4:]), "only the first four of eight are turned"
        torch.testing.assert_close(turned.norm(dim=-1), heads.norm(dim=-1))
        (of_heads,) = torch.autograd.grad(turned, heads, torch.ones_like(turned))
        found = elementwise.turned_back(*(torch.ones(5, 1, 8),) * 3, cos, sin, paired)
        torch.testing.assert_close(found[:, :16], of_heads[:, :2].flatten(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_and_turn_are_transformers_own_to_the_last_bit(dtype: torch.dtype) -> None:
    """But for turns in bf16, which transformers rounds three times."""
    torch.manual_seed(0)
    x = torch.randn(1, 5, 32).to(dtype)
    norm = modeling_llama.LlamaRMSNorm(32, eps=1e-5).to(dtype)
    norm.weight.data.normal_()
    assert torch.equal(elementwise.normed(x, norm.weight, norm.variance_epsilon, dtype)[0], norm(x))
    angles = torch.randn(1, 5, 4)
    cos, sin = (part.repeat(1, 1, 2).to(dtype) for part in (angles.cos(), angles.sin()))
    for own, paired in ((modeling_llama, False), (modeling_glm, True)):
        heads = torch.randn(1, 3, 5, 16 if paired else 8).to(dtype)  # GLM turns half of a head
        expected, _ = own.apply_rotary_pos_emb(heads, heads, cos, sin)
        found = elementwise.turned(heads[0].transpose(0, 1), cos[0, :, :4], sin[0, :, :4], paired).transpose(0, 1)[None]
        torch.testing.assert_close(found, expected, rtol=0, atol=0 if dtype == torch.float32 else 4e-2)
