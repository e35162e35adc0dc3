"""What a model costs: parameters, arithmetic, latency, memory."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from kdbench.models.inputs import model_inputs
from kdbench.models.trace import Example, samples


@dataclass(frozen=True)
class Cost:
    """params: trainable and frozen; flops: of one forward pass of one image, a multiply-add counted as two; latency: of a batch of one."""

    params: int
    flops: int
    latency_ms_p50: float
    latency_ms_p95: float
    device: str
    batch: int = 1


def _attention(query: torch.Size, key: torch.Size, value: torch.Size, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _attention_backward(gradient: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_backward_flop_count(gradient, query, key, value))


def _recurrent(inputs: torch.Size, weights: Sequence[torch.Size]) -> int:
    """A recurrent layer multiplies each weight matrix with every step of every sample. inputs: [..., D]; biases have one dimension."""
    return 2 * math.prod(inputs[:-1]) * sum(math.prod(shape) for shape in weights if len(shape) == 2)


def _recurrent_mkldnn(inputs: torch.Size, of_input: torch.Size, of_state: torch.Size, *args: Any, **kwargs: Any) -> int:
    return _recurrent(inputs, (of_input, of_state))


def _recurrent_mkldnn_backward(inputs: torch.Size, of_input: torch.Size, of_state: torch.Size, *args: Any, **kwargs: Any) -> int:
    """The gradients of the weights, and those of inputs and states."""
    return 2 * _recurrent(inputs, (of_input, of_state))


def _recurrent_cudnn(inputs: torch.Size, weights: list[torch.Size], *args: Any, **kwargs: Any) -> int:
    return _recurrent(inputs, weights)


# Fused kernels that torch's counter leaves out: the CPU's attention (it knows the GPU's), and recurrent layers on either.
_FUSED = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    torch.ops.aten.mkldnn_rnn_layer: _recurrent_mkldnn,
    torch.ops.aten.mkldnn_rnn_layer_backward: _recurrent_mkldnn_backward,
    torch.ops.aten._cudnn_rnn: _recurrent_cudnn,
}


@contextmanager
def counted_flops() -> Iterator[FlopCounterMode]:
    """Count the FLOPs of what runs inside, a multiply-add as two, attention and recurrent layers included: the same number on every device.

    torch's fast path of `nn.MultiheadAttention` and `nn.TransformerEncoderLayer` is off inside, since no counter sees into it.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with FlopCounterMode(display=False, custom_mapping=_FUSED) as counter:
            yield counter
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@torch.no_grad()
def measure(model: nn.Module, example: Example, device: torch.device, repeats: int = 30) -> Cost:
    """Count and time an eval-mode forward pass of one sample in float32. The model's mode is restored."""
    training = model.training
    model.eval()
    sample = samples(example, 1, device=device, dtype=next(model.parameters()).dtype)
    with counted_flops() as counter:
        model(model_inputs(model, sample))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        model(model_inputs(model, sample))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(1e3 * (time.perf_counter() - start))
    model.train(training)
    p50, p95 = torch.tensor(times, dtype=torch.float64).quantile(torch.tensor([0.5, 0.95], dtype=torch.float64)).tolist()
    return Cost(sum(p.numel() for p in model.parameters()), int(counter.get_total_flops()), p50, p95, device_name(device))


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def peak_memory_mb(device: torch.device) -> float:
    """Of the device's allocator on a GPU; of the whole process on a CPU, which in a reused actor includes earlier trainings."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
