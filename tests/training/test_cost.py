"""FLOPs against counts by hand: a multiply-add is two, attention is included whatever kernel computes it."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from kdbench.benchmark.outlines import forward_cost
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


STEPS, WIDTH = 28, 16  # the rows of an image, each of 28 numbers


class Recurrent(nn.Module):
    """A recurrent network over the rows of an image; mkldnn has a fused kernel for the LSTM, and cuDNN for all three."""

    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.layers = kind(28, WIDTH, batch_first=True, **options)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images.squeeze(1))[0].mean(1)


def recurrent(gates: int, inputs: int) -> int:
    """One layer and direction: each step multiplies its input and the last state with the weights of every gate."""
    return 2 * STEPS * gates * WIDTH * (inputs + WIDTH)


@pytest.mark.parametrize(
    ("kind", "options", "flops"),
    [
        (nn.LSTM, {}, recurrent(4, 28)),
        (nn.LSTM, {"bidirectional": True, "num_layers": 2}, 2 * recurrent(4, 28) + 2 * recurrent(4, 2 * WIDTH)),
        (nn.GRU, {}, recurrent(3, 28)),
        (nn.RNN, {"bidirectional": True}, 2 * recurrent(1, 28)),
    ],
)
def test_recurrent_layers_are_counted_in_a_record_and_in_a_dry_run(kind: type[nn.RNNBase], options: dict[str, Any], flops: int) -> None:
    model = Recurrent(kind, **options)
    assert measure(model, (1, 28, 28), CPU, repeats=1).flops == flops
    assert [forward_cost(model.to(device), (1, 28, 28))[0] for device in ("cpu", "meta")] == [flops, flops]


def test_the_backward_pass_of_a_recurrent_layer_is_counted() -> None:
    """Twice the forward pass: the gradients of the weights, and those of inputs and states."""
    layer = nn.LSTM(28, WIDTH)
    states = layer(torch.rand(STEPS, 1, 28, requires_grad=True))[0].sum()
    with counted_flops() as counter:
        states.backward()
    assert counter.get_total_flops() == 2 * recurrent(4, 28)


def test_a_gpus_recurrent_layers_are_counted_with_their_projections() -> None:
    """cuDNN takes all layers and directions at once, [T, B, D]; on the meta device its operator needs no GPU."""
    layer, images, lstm = nn.LSTM(28, WIDTH, proj_size=5, device="meta"), torch.rand(STEPS, 1, 28, device="meta"), 2
    states, cells = torch.zeros(1, 1, 5, device="meta"), torch.zeros(1, 1, WIDTH, device="meta")
    weights, shape = layer._flat_weights, (WIDTH, 5, 1, False, 0.0, False, False, [])
    with counted_flops() as counter:
        torch.ops.aten._cudnn_rnn(images, weights, 5, None, states, cells, lstm, *shape, None)
    assert counter.get_total_flops() == 2 * STEPS * (4 * WIDTH * (28 + 5) + 5 * WIDTH)


def test_the_backward_pass_of_attention_is_counted() -> None:
    """The kernel computes Q K^T anew, and then four products: the gradients of V, of the attention, of Q and of K."""
    query, key, value = (torch.rand(1, 2, 7, 8, requires_grad=True) for _ in range(3))
    attended = nn.functional.scaled_dot_product_attention(query, key, value).sum()
    with counted_flops() as counter:
        attended.backward()
    assert counter.get_total_flops() == 5 * 2 * 2 * 7 * 7 * 8
