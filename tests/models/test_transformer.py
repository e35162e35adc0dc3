"""Transformer blocks: timm's numbers and names, attention that can be tapped, padding that nobody sees, and soft words."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from timm.models.vision_transformer import Block as TimmBlock
from torch import Tensor, nn
from torch.autograd import gradcheck

from kdbench.models.transformer import Attention, Block, mean_token, small_weights, soft_embedding, words_present
from tests.tolerances import rounding

WIDTH, HEADS, TOKENS = 8, 2, 5
LENGTHS = (5, 3, 1)  # valid tokens of each sample

DOUBLE = rounding(torch.float64, 200, 10.0)


def block() -> Block:
    return Block(WIDTH, HEADS).double()


def tokens() -> Tensor:
    return torch.randn(len(LENGTHS), TOKENS, WIDTH, dtype=torch.float64)


def prefixes(lengths: tuple[int, ...] = LENGTHS) -> Tensor:
    return torch.arange(TOKENS) < torch.tensor(lengths)[:, None]


def probabilities(network: Block, inputs: Tensor, valid: Tensor | None = None) -> Tensor:
    """What passes through `attn.weights`."""
    seen = []
    handle = network.attn.weights.register_forward_hook(lambda module, args, output: seen.append(output))
    network(inputs, valid)
    handle.remove()
    return seen[0]


class TestBlock:
    @pytest.mark.parametrize("mlp_ratio", [4.0, 2.5])
    def test_timms_block_has_the_same_names_and_gives_the_same_tokens(self, mlp_ratio: float) -> None:
        theirs = TimmBlock(WIDTH, HEADS, mlp_ratio=mlp_ratio, qkv_bias=True).double()
        with torch.no_grad():
            for parameter in theirs.parameters():  # norms and biases too
                parameter.copy_(torch.randn_like(parameter))
        ours = Block(WIDTH, HEADS, mlp_ratio).double()
        ours.load_state_dict(theirs.state_dict())
        inputs = tokens()
        torch.testing.assert_close(ours(inputs), theirs(inputs), rtol=rounding(torch.float64, 1000), atol=rounding(torch.float64, 1000))

    def test_norms_divide_by_the_deviation_that_timms_vision_transformers_use(self) -> None:
        """Of tokens whose variance is near the epsilon."""
        theirs, ours = TimmBlock(WIDTH, HEADS, qkv_bias=True).double(), block()
        ours.load_state_dict(theirs.state_dict())
        inputs = 1e-3 * tokens()
        torch.testing.assert_close(ours(inputs), theirs(inputs), rtol=0, atol=DOUBLE)

    def test_dropout_is_off_unless_asked_for(self) -> None:
        inputs = tokens()
        network = block().train()
        assert network(inputs).equal(network(inputs))
        dropping = Block(WIDTH, HEADS, dropout=0.5).double().train()
        assert not dropping(inputs).equal(dropping(inputs))
        dropping.eval()
        assert dropping(inputs).equal(dropping(inputs))

    @pytest.mark.parametrize("part", ["attn.attn_drop", "attn.proj_drop", "mlp.drop1", "mlp.drop2"])
    def test_dropout_acts_on_attention_behind_it_and_in_the_mlp(self, part: str) -> None:
        inputs = tokens()
        dropping = Block(WIDTH, HEADS, dropout=0.5).double().eval()
        expected = dropping(inputs)
        dropping.get_submodule(part).train()
        assert not dropping(inputs).equal(expected)

    def test_heads_that_do_not_share_the_width_are_refused(self) -> None:
        with pytest.raises(ValueError, match="3 heads can't share a width of 8"):
            Block(8, 3)

    def test_gradients_are_those_of_finite_differences(self) -> None:
        valid = prefixes((5, 2, 0))
        network = block()
        assert gradcheck(lambda inputs: network(inputs, valid), (tokens().requires_grad_(),))

    def test_a_copy_is_a_network_of_its_own(self) -> None:
        network, inputs = block(), tokens()
        copied = copy.deepcopy(network)
        expected = network(inputs)
        assert copied(inputs).equal(expected)
        nn.init.zeros_(copied.mlp.fc2.weight)
        assert network(inputs).equal(expected)


class TestAttention:
    def test_it_is_the_softmax_of_scaled_products(self) -> None:
        network, inputs = block(), tokens()
        query, key, value = network.attn.qkv(inputs).chunk(3, dim=-1)
        mixed = []
        for head in (slice(0, 4), slice(4, 8)):
            scores = query[..., head] @ key[..., head].transpose(1, 2) / math.sqrt(4)
            mixed.append(scores.softmax(-1) @ value[..., head])
        expected = network.attn.proj(torch.cat(mixed, dim=-1))
        torch.testing.assert_close(network.attn(inputs), expected, rtol=0, atol=DOUBLE)

    def test_its_probabilities_can_be_tapped(self) -> None:
        network, inputs = block(), tokens()
        found = probabilities(network, inputs)
        assert found.shape == (len(LENGTHS), HEADS, TOKENS, TOKENS)
        assert (found > 0).all()
        torch.testing.assert_close(found.sum(-1), torch.ones(len(LENGTHS), HEADS, TOKENS, dtype=torch.float64), rtol=0, atol=DOUBLE)

    def test_its_probabilities_are_tapped_before_dropout(self) -> None:
        network, inputs = Block(WIDTH, HEADS, dropout=0.5).double().train(), tokens()
        assert (probabilities(network, inputs) > 0).all()

    def test_changed_probabilities_change_what_is_mixed(self) -> None:
        attention, inputs = Attention(WIDTH, HEADS).double(), tokens()
        attention.weights.register_forward_hook(lambda module, args, output: torch.eye(TOKENS).double().expand_as(output))
        expected = attention.proj(attention.qkv(inputs)[..., 2 * WIDTH :])
        torch.testing.assert_close(attention(inputs), expected, rtol=0, atol=DOUBLE)

    def test_padding_gets_no_attention(self) -> None:
        valid = prefixes()
        found = probabilities(block(), tokens(), valid)
        assert (found.movedim(-1, 1)[~valid] == 0).all()
        torch.testing.assert_close(found.sum(-1), torch.ones(len(LENGTHS), HEADS, TOKENS, dtype=torch.float64), rtol=0, atol=DOUBLE)

    def test_padding_changes_no_other_token(self) -> None:
        network, inputs = block(), tokens()
        changed = inputs.where(prefixes()[..., None], 1e3 * torch.randn_like(inputs))
        found, again = network(inputs, prefixes()), network(changed, prefixes())
        assert found[prefixes()].equal(again[prefixes()])
        for sample, length in enumerate(LENGTHS):
            alone = network(inputs[sample : sample + 1, :length])
            torch.testing.assert_close(found[sample : sample + 1, :length], alone, rtol=0, atol=DOUBLE)

    def test_a_mask_of_valid_tokens_alone_changes_nothing(self) -> None:
        network, inputs = block(), tokens()
        assert network(inputs, prefixes((TOKENS,) * 3)).equal(network(inputs))

    @pytest.mark.filterwarnings("ignore:Anomaly Detection")
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_a_sample_of_padding_alone_stays_finite(self, dtype: torch.dtype) -> None:
        network, valid = block().to(dtype), prefixes((0, 0, 3))
        inputs = tokens().to(dtype).requires_grad_()
        with torch.autograd.detect_anomaly(check_nan=True):
            output = network(inputs, valid)
            output.square().sum().backward()
        assert output.isfinite().all()
        assert inputs.grad.isfinite().all()
        assert all(parameter.grad.isfinite().all() for parameter in network.parameters())
        assert (probabilities(network, inputs, valid)[:2] == 0).all()


class TestWords:
    WORDS = torch.tensor([[3, 1, 2, 0], [4, 0, 0, 0], [0, 0, 0, 0]])
    VOCABULARY = 5

    def table(self) -> nn.Embedding:
        return nn.Embedding(self.VOCABULARY, 6, padding_idx=0).double()

    def soft(self, dtype: torch.dtype = torch.float64) -> Tensor:
        return nn.functional.one_hot(self.WORDS, self.VOCABULARY).to(dtype)

    def test_one_hot_words_have_the_vectors_of_their_words(self) -> None:
        table = self.table()
        assert soft_embedding(table, self.WORDS).equal(table.weight[self.WORDS])
        for dtype in (torch.float64, torch.float32, torch.float16):
            assert soft_embedding(table, self.soft(dtype)).equal(table.weight[self.WORDS])

    def test_a_soft_word_is_the_mean_of_its_words(self) -> None:
        table = self.table()
        words = torch.randn(2, 3, self.VOCABULARY, dtype=torch.float64).softmax(-1)
        expected = sum(words[..., [word]] * table.weight[word] for word in range(1, self.VOCABULARY))
        torch.testing.assert_close(soft_embedding(table, words), expected, rtol=0, atol=DOUBLE)

    @pytest.mark.parametrize("kind", ["hard", "soft"])
    def test_the_padding_row_gets_no_gradient_and_is_never_read(self, kind: str) -> None:
        table = self.table()
        words = self.WORDS if kind == "hard" else torch.rand(2, 3, self.VOCABULARY, dtype=torch.float64)
        soft_embedding(table, words).sum().backward()
        assert (table.weight.grad[0] == 0).all()
        assert (table.weight.grad[1:] > 0).all()
        with torch.no_grad():
            before = soft_embedding(table, self.soft())
            table.weight[0] = 7.0
            assert soft_embedding(table, self.soft()).equal(before)

    def test_a_table_without_a_padding_row_is_read_in_full(self) -> None:
        table = nn.Embedding(self.VOCABULARY, 6).double()
        assert soft_embedding(table, self.soft()).equal(table.weight[self.WORDS])

    def test_gradients_reach_soft_words(self) -> None:
        table = self.table()
        words = torch.randn(2, 3, self.VOCABULARY, dtype=torch.float64).softmax(-1).requires_grad_()
        assert gradcheck(lambda soft: soft_embedding(table, soft), (words,))

    def test_a_word_is_present_where_it_is_not_nothing(self) -> None:
        expected = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()
        assert words_present(self.WORDS).equal(expected)
        assert words_present(self.soft()).equal(expected)

    def test_a_soft_word_is_present_where_some_word_is_likelier_than_nothing(self) -> None:
        words = torch.tensor([[[0.4, 0.5, 0.1], [0.6, 0.4, 0.0], [0.4, 0.3, 0.3], [0.0, 0.0, 0.0], [0.5, 0.5, 0.0]]])
        assert words_present(words).tolist() == [[True, False, False, False, False]]


def test_the_mean_token_is_of_the_valid_ones() -> None:
    states = tokens()
    found = mean_token(states, prefixes((5, 2, 0)))
    expected = torch.stack([states[0].mean(0), (states[1, 0] + states[1, 1]) / 2, torch.zeros(WIDTH, dtype=torch.float64)])
    torch.testing.assert_close(found, expected, rtol=0, atol=DOUBLE)


def test_starting_weights_are_small_and_the_padding_row_is_zero() -> None:
    model = nn.Sequential(nn.Linear(100, 100), nn.Embedding(100, 100, padding_idx=3), nn.LayerNorm(5), nn.Conv2d(1, 1, 1))
    convolution = model[3].weight.clone()
    small_weights(model)
    for weight in (model[0].weight, model[1].weight[4:]):
        # The standard error of a deviation from n numbers is about 1 / sqrt(2 n) of it; four of these.
        assert weight.std().item() == pytest.approx(0.02, rel=4 / math.sqrt(2 * 9600))
    assert (model[0].bias == 0).all()
    assert (model[1].weight[3] == 0).all()
    assert model[1].weight[:3].any(dim=1).all()
    assert (model[2].weight == 1).all()
    assert model[3].weight.equal(convolution)
