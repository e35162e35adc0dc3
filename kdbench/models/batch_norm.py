"""A guard against a fault of torch: on CPUs the gradients of batch and instance normalizations are wrong for some layouts of memory.

Seen in torch 2.14.1. Where a batch is of one image, or a map is one pixel high or wide, the strides of these dimensions mean nothing. A
tensor whose channels lie last can then have strides that torch takes for either layout. The backward pass of a batch normalization, in
training and in evaluation, reads its input or the gradient in the wrong one and says nothing. What is before and behind a layer decides on
the strides, such as a `permute` before a matrix product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def guard_batch_norms(module: nn.Module) -> None:
    """Make the gradients of every batch and instance normalization in `module` right. A network that is guarded already stays as it is.

    No other number changes: a tensor is copied where its strides are ambiguous, and nowhere else. The guards are hooks, which a deepcopy
    takes along; they do nothing in graphs that are compiled or exported, where torch has other code for these layers.
    """
    for layer in module.modules():
        if isinstance(layer, _BatchNorm) and _guard_gradient not in layer._forward_hooks.values():
            layer.register_forward_pre_hook(_guard_input)
            layer.register_forward_hook(_guard_gradient)
        if isinstance(layer, _InstanceNorm) and _guard_reshaped_gradient not in layer._forward_hooks.values():
            layer.register_forward_hook(_guard_reshaped_gradient)


def ambiguous(tensor: Tensor) -> bool:
    """Whether a tensor [B, C, H, W] or [B, C, D, H, W] has its channels last, and other strides than such tensors should have."""
    layout = _CHANNELS_LAST.get(tensor.ndim)
    if layout is None or tensor.is_contiguous() or not tensor.is_contiguous(memory_format=layout):
        return False
    return tensor.stride() != torch.empty(tensor.shape, device="meta", memory_format=layout).stride()


def _can_be(tensor: Tensor) -> bool:
    """Whether the strides of such a tensor can be ambiguous at all."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    return tensor.ndim in _CHANNELS_LAST and tensor.device.type == "cpu" and 1 in (len(tensor), *tensor.shape[2:])


def _guard_input(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    images = inputs[0] if inputs else None
    if not isinstance(images, Tensor) or not _can_be(images) or not ambiguous(images):
        return None
    return (images.contiguous(), *inputs[1:])


def _guard_gradient(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
    if isinstance(output, Tensor) and output.requires_grad and _can_be(output):
        output.register_hook(_unambiguous)


def _guard_reshaped_gradient(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
    """Torch runs it as a batch normalization of one image, so it reads every gradient wrong whose channels lie last."""
    if isinstance(output, Tensor) and output.requires_grad and output.device.type == "cpu" and not torch.compiler.is_compiling():
        output.register_hook(_contiguous)


def _unambiguous(gradient: Tensor | None) -> Tensor | None:
    return gradient.contiguous() if gradient is not None and ambiguous(gradient) else None


def _contiguous(gradient: Tensor | None) -> Tensor | None:
    return gradient.contiguous() if gradient is not None else None
