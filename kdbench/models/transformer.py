"""Transformer blocks whose parts have timm's names, attention that can be tapped, and words that may be soft.

Weights of the blocks of timm's vision transformers load by name. `attn.weights` is a module that the attention's probabilities pass
through, so that a method can look at them or change them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kdbench.data.vocabulary import NOTHING

_EPSILON = 1e-6  # of layer norms, as in timm's vision transformers
_STD = 0.02  # of starting weights, as in BERT and in timm's vision transformers


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al., NIPS 2017, arXiv 1706.03762, section 3.2.2).

    It is written out, without a fused kernel, because a fused kernel never holds the probabilities.
    """

    def __init__(self, dim: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"{heads} heads can't share a width of {dim}; it must be a multiple of the heads")
        self.num_heads = heads
        self.head_dim = dim // heads
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.weights = nn.Identity()
        self.attn_drop = nn.Dropout(dropout)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, valid: Tensor | None = None) -> Tensor:
        """Each token's mixture of all valid tokens.

        Args:
            tokens: [B, T, D].
            valid: boolean [B, T], false for padding; None where all tokens are valid. Padding receives no attention. Its own rows of
                probabilities are finite and mean nothing. A sample of padding alone has probabilities 0.

        Returns:
            [B, T, D]. The probabilities [B, heads, T, T], queries before keys, pass through `weights` before dropout.
        """
        batch, length, dim = tokens.shape
        query, key, value = self.qkv(tokens).reshape(batch, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        probabilities = _softmax((query * self.scale) @ key.transpose(-2, -1), valid)
        mixed = self.attn_drop(self.weights(probabilities)) @ value
        attended: Tensor = self.proj_drop(self.proj(mixed.transpose(1, 2).reshape(batch, length, dim)))
        return attended


def _softmax(scores: Tensor, valid: Tensor | None) -> Tensor:
    """Softmax of scores [B, heads, T, T] over the valid keys; 0 for all others. valid: boolean [B, T]."""
    if valid is None:
        return scores.softmax(dim=-1)
    padding = ~valid[:, None, None, :]
    # The lowest number and not -inf: a softmax over nothing but -inf is nan, which anomaly detection stops at.
    lowest = torch.finfo(scores.dtype).min
    return scores.masked_fill(padding, lowest).softmax(dim=-1).masked_fill(padding, 0.0)


class Mlp(nn.Module):
    """Two linear layers with GELU between them, for each token by itself."""

    def __init__(self, dim: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.drop1 = nn.Dropout(dropout)
        self.fc2 = nn.Linear(hidden, dim)
        self.drop2 = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, T, D] of tokens [B, T, D]."""
        changed: Tensor = self.drop2(self.fc2(self.drop1(self.act(self.fc1(tokens)))))
        return changed


class Block(nn.Module):
    """Attention and MLP, each behind a layer norm and beside a skip connection (Dosovitskiy et al., ICLR 2021, arXiv 2010.11929, eq. 2-3).

    With `qkv_bias=True`, timm's `Block` has the same state_dict and gives the same tokens.
    """

    def __init__(self, dim: int, heads: int, mlp_ratio: float = 4.0, dropout: float = 0.0) -> None:
        """dim: width of a token. mlp_ratio: width of the MLP's hidden layer over `dim`. dropout: in attention, behind it and in the MLP."""
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=_EPSILON)
        self.attn = Attention(dim, heads, dropout)
        self.norm2 = nn.LayerNorm(dim, eps=_EPSILON)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), dropout)

    def forward(self, tokens: Tensor, valid: Tensor | None = None) -> Tensor:
        """[B, T, D] of tokens [B, T, D]. valid: boolean [B, T], false for padding, which changes no other token; None for no padding."""
        tokens = tokens + self.attn(self.norm1(tokens), valid)
        changed: Tensor = tokens + self.mlp(self.norm2(tokens))
        return changed


def soft_embedding(embedding: nn.Embedding, tokens: Tensor) -> Tensor:
    """The vectors of words, or the mean vectors of distributions over words, so that gradients reach whoever wrote the words.

    Args:
        embedding: the word table [V, D]. Its padding row counts as zeros and gets no gradient, for soft words too.
        tokens: int64 [B, L], or float [B, L, V] with one distribution a position.

    Returns:
        [B, L, D] in the table's dtype. One-hot distributions give what their words give.
    """
    if not tokens.is_floating_point():
        hard: Tensor = embedding(tokens)
        return hard
    table = embedding.weight
    if embedding.padding_idx is not None:
        rows = torch.arange(len(table), device=table.device)  # made on the device: a number from the host would stall a GPU
        table = table.masked_fill((rows == embedding.padding_idx).unsqueeze(1), 0.0)
    return tokens.to(table.dtype) @ table


def words_present(tokens: Tensor) -> Tensor:
    """Boolean [B, L]: where there is a word, in tokens int64 [B, L] or float [B, L, V].

    A soft position holds a word where some word is likelier than `NOTHING`, so it counts as the word that it would be rounded to.
    """
    if not tokens.is_floating_point():
        return tokens != NOTHING
    return tokens[..., NOTHING + 1 :].amax(dim=-1) > tokens[..., NOTHING]


def mean_token(tokens: Tensor, valid: Tensor) -> Tensor:
    """[B, D]: the mean of the valid tokens of [B, T, D], valid boolean [B, T]; 0 where none is."""
    counted = valid.unsqueeze(-1)
    return tokens.masked_fill(~counted, 0.0).sum(dim=1) / counted.sum(dim=1).clamp(min=1)


def small_weights(model: nn.Module) -> None:
    """Draw linear layers and word tables from N(0, 0.02^2); biases and the padding row are 0. All other layers are left alone."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.trunc_normal_(module.weight, std=_STD)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            with torch.no_grad():
                module.weight[module.padding_idx].zero_()


def position_table(*shape: int) -> nn.Parameter:
    """A learned table of positions, drawn as `small_weights` draws."""
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(*shape), std=_STD))
