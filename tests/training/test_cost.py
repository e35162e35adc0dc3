"""FLOPs against counts by hand: a multiply-add is two, attention is included whatever kernel computes it."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from kdbench.benchmark.dry_run import forward_cost
from kdbench.training.cost import counted_flops, measure

CPU = torch.device("cpu")
DIM, DEPTH, TOKENS, PATCH, CLASSES = 192, 12, 17, 8, 10  # of images of 32 x 32: 4 x 4 patches and the class token


def layer(tokens: int, dim: int, hidden: int) -> int:
    """Queries, keys and values; Q K^T and its product with V; the projection; two layers of an MLP."""
    linear = tokens * dim * 3 * dim + tokens * dim * dim + 2 * tokens * dim * hidden
    attention = 2 * tokens * tokens * dim
    return 2 * (linear + attention)


def vit_tiny() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=PATCH, num_classes=CLASSES)


VIT_TINY = 2 * (TOKENS - 1) * 3 * PATCH**2 * DIM + DEPTH * layer(TOKENS, DIM, 4 * DIM) + 2 * DIM * CLASSES


class Encoder(nn.Module):
    """torch's own transformer, on the rows of an image: 28 tokens of 28 numbers."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.layers = nn.TransformerEncoderLayer(28, 4, 56, batch_first=True, **options)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images.squeeze(1)).mean(1)


class Attention(nn.Module):
    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        self.attention, self.need_weights = nn.MultiheadAttention(28, 4, batch_first=True), need_weights

    def forward(self, images: Tensor) -> Tensor:
        rows = images.squeeze(1)
        return self.attention(rows, rows, rows, need_weights=self.need_weights)[0].mean(1)


def test_a_vision_transformers_flops_include_its_attention() -> None:
    assert measure(vit_tiny(), (3, 32, 32), CPU, repeats=1).flops == VIT_TINY


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_dry_run_counts_what_a_record_does(device: str) -> None:
    flops, _ = forward_cost(vit_tiny().to(device), (3, 32, 32))
    assert flops == VIT_TINY


@pytest.mark.parametrize("norm_first", [False, True])
def test_torchs_own_transformer_is_counted_without_its_fast_path(norm_first: bool) -> None:
    before = torch.backends.mha.get_fastpath_enabled()
    assert measure(Encoder(norm_first=norm_first), (1, 28, 28), CPU, repeats=1).flops == layer(28, 28, 56)
    assert torch.backends.mha.get_fastpath_enabled() == before


@pytest.mark.parametrize("need_weights", [False, True])
def test_multihead_attention_is_counted_with_and_without_its_weights(need_weights: bool) -> None:
    assert measure(Attention(need_weights), (1, 28, 28), CPU, repeats=1).flops == layer(28, 28, 0)


def test_the_backward_pass_of_attention_is_counted() -> None:
    """The kernel computes Q K^T anew, and then four products: the gradients of V, of the attention, of Q and of K."""
    query, key, value = (torch.rand(1, 2, 7, 8, requires_grad=True) for _ in range(3))
    attended = nn.functional.scaled_dot_product_attention(query, key, value).sum()
    with counted_flops() as counter:
        attended.backward()
    assert counter.get_total_flops() == 5 * 2 * 2 * 7 * 7 * 8
