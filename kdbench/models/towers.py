"""Small transformers over images and over words: the two towers of an image-text network, and a classifier of texts."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdbench.data.vocabulary import NOTHING
from kdbench.models.initial_weights import he_by_fan_out
from kdbench.models.transformer import Block, mean_token, position_table, small_weights, soft_embedding, words_present

# CLIP's learned temperature (arXiv 2103.00020, section 2.5): similarities are multiplied by 1 / 0.07 at the start and by 100 at most.
FIRST_LOGIT_SCALE = math.log(1 / 0.07)
LARGEST_LOGIT_SCALE = math.log(100.0)


class ImageTower(nn.Module):
    """Patches of an image, transformer blocks, and one linear layer on the mean token."""

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        *,
        outputs: int,
        in_channels: int,
        image_size: int,
        patch: int,
        stem: int = 1,
        dropout: float = 0.0,
    ) -> None:
        """outputs: numbers that the last layer gives.

        image_size: pixels of the longest side that an image may have. patch: pixels a side of what one token sees; it divides the size.
        stem: convolutions that make a token of a patch, see `_stem`.
        """
        super().__init__()
        if image_size % patch:
            raise ValueError(f"patches of {patch} pixels do not divide an image of {image_size}")
        side = image_size // patch
        self.patches = _stem(in_channels, width, patch, stem)
        self.positions = position_table(width, side, side)
        self.blocks = nn.ModuleList(Block(width, heads, dropout=dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, outputs)
        small_weights(self.blocks)
        he_by_fan_out(self.patches)

    def forward(self, images: Tensor) -> Tensor:
        """[B, outputs] of normalised images [B, in_channels, H, W], neither side longer than `image_size`."""
        patches = self.patches(images)
        height, width = patches.shape[-2:]
        tokens = (patches + self.positions[:, :height, :width]).flatten(2).transpose(1, 2)
        for block in self.blocks:
            tokens = block(tokens)
        outputs: Tensor = self.head(self.norm(tokens).mean(dim=1))
        return outputs

    def no_weight_decay(self) -> set[str]:
        return {"positions"}


def _stem(in_channels: int, width: int, patch: int, convolutions: int) -> nn.Sequential:
    """What makes one token of each patch.

    One convolution is the patch embedding of the vision transformer. Of more, all but the last are 3x3 with stride 2 and GELU, which learn
    from fewer images (Xiao et al., NeurIPS 2021, arXiv 2106.14881); the last embeds what is left of a patch.
    """
    shrunk = 2 ** (convolutions - 1)
    if patch % shrunk:
        raise ValueError(
            f"a stem of {convolutions} convolutions halves an image {convolutions - 1} times, which patch {patch} does not allow"
        )
    widths = [in_channels, *(max(1, width // 2**step) for step in range(convolutions - 1, 0, -1))]
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GELU()]
    left = patch // shrunk
    return nn.Sequential(*layers, nn.Conv2d(widths[-1], width, left, stride=left))


class TextTower(nn.Module):
    """Words and their positions, transformer blocks, and one linear layer on the mean of the words that are there."""

    def __init__(self, width: int, depth: int, heads: int, *, outputs: int, vocabulary: int, length: int, dropout: float = 0.0) -> None:
        """outputs: numbers that the last layer gives. vocabulary: words, `NOTHING` counted. length: words of the longest text."""
        super().__init__()
        self.words = nn.Embedding(vocabulary, width, padding_idx=NOTHING)
        self.positions = position_table(length, width)
        self.blocks = nn.ModuleList(Block(width, heads, dropout=dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, outputs)  # with a bias, so that a text without words has an embedding other than 0 too
        small_weights(self.words)
        small_weights(self.blocks)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, outputs] of tokens int64 [B, L] or float [B, L, V], L at most `length`. Padding with `NOTHING` changes nothing."""
        valid = words_present(tokens)
        states = soft_embedding(self.words, tokens) + self.positions[: tokens.shape[1]]
        for block in self.blocks:
            states = block(states, valid)
        outputs: Tensor = self.head(mean_token(self.norm(states), valid))
        return outputs

    def no_weight_decay(self) -> set[str]:
        return {"positions"}


class TwoTowers(nn.Module):
    """Images and texts in one space, as in CLIP (Radford et al., ICML 2021, arXiv 2103.00020).

    The learned temperature is inside the embeddings: each has the length sqrt(exp(logit_scale)), so that the inner product of an image
    and a text is the logit of the pair. The prediction needs no entry that is not one of a sample, and who ranks by cosines loses nothing.
    """

    def __init__(self, image: ImageTower, text: TextTower) -> None:
        super().__init__()
        self.image = image
        self.text = text
        self.logit_scale = nn.Parameter(torch.tensor(FIRST_LOGIT_SCALE))

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Embeddings whose inner products are logits.

        Args:
            inputs: `image`, normalised float [B, C, H, W], and `tokens`, int64 [B, L] or float [B, L, V].

        Returns:
            `image` and `text`, [B, D] each, float32 or wider, of length sqrt(exp(logit_scale)), which is 10 at most.
        """
        radius = (0.5 * _AtMost.apply(self.logit_scale, LARGEST_LOGIT_SCALE)).exp()
        return {"image": radius * _unit(self.image(inputs["image"])), "text": radius * _unit(self.text(inputs["tokens"]))}

    def no_weight_decay(self) -> set[str]:
        return {"logit_scale", *(f"{tower}.{name}" for tower in ("image", "text") for name in getattr(self, tower).no_weight_decay())}


def _unit(embeddings: Tensor) -> Tensor:
    """[B, D] divided by their lengths, in float32 or wider."""
    return F.normalize(embeddings.to(torch.promote_types(embeddings.dtype, torch.float32)), dim=1)


class _AtMost(torch.autograd.Function):
    """Clamp a parameter from above, and drop only the part of its gradient that would raise it further.

    CLIP clamps the parameter itself after each step. `clamp` in the forward pass would drop the gradient that leads back, too, so that a
    parameter that has stepped over its bound would never move again.
    """

    @staticmethod
    def forward(value: Tensor, bound: float) -> Tensor:
        return value.clamp(max=bound)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        value, ctx.bound = inputs
        ctx.save_for_backward(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (value,) = ctx.saved_tensors
        return gradient.where((value < ctx.bound) | (gradient > 0), 0.0), None


def tiny_towers(
    *,
    in_channels: int,
    image_size: int,
    vocabulary: int,
    length: int,
    width: int = 32,
    depth: int = 2,
    heads: int = 2,
    patch: int = 8,
    stem: int = 3,
    embedding: int = 32,
) -> TwoTowers:
    """embedding: length of the vectors that images and texts share. The other options hold for both towers."""
    image = ImageTower(width, depth, heads, outputs=embedding, in_channels=in_channels, image_size=image_size, patch=patch, stem=stem)
    return TwoTowers(image, TextTower(width, depth, heads, outputs=embedding, vocabulary=vocabulary, length=length))


def tiny_text(*, num_classes: int, vocabulary: int, length: int, width: int = 32, depth: int = 2, heads: int = 2) -> TextTower:
    """A classifier of texts: logits [B, num_classes] of tokens int64 [B, length] or float [B, length, vocabulary]."""
    return TextTower(width, depth, heads, outputs=num_classes, vocabulary=vocabulary, length=length)
