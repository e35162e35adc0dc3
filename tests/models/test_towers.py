"""Towers over images and words: their formulas, padding, soft words, the learned temperature, and what a search for parts finds in them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from kdbench.models.towers import LARGEST_LOGIT_SCALE, ImageTower, TextTower, TwoTowers, tiny_text, tiny_towers
from tests.tolerances import rounding

VOCABULARY, LENGTH, SIZE = 11, 6, 16
DOUBLE = rounding(torch.float64, 2000, 10.0)


def towers(**options: int) -> TwoTowers:
    facts = {"in_channels": 3, "image_size": SIZE, "vocabulary": VOCABULARY, "length": LENGTH}
    return tiny_towers(**facts, **{"width": 16, "patch": 4, "stem": 1, "embedding": 12, **options}).double()


def classifier() -> TextTower:
    return tiny_text(num_classes=3, vocabulary=VOCABULARY, length=LENGTH, width=16).double()


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 3, SIZE, SIZE, dtype=torch.float64)


def texts() -> Tensor:
    """Four texts of 6, 4, 1 and no words."""
    words = torch.randint(1, VOCABULARY, (4, LENGTH))
    return words * (torch.arange(LENGTH) < torch.tensor([6, 4, 1, 0])[:, None])


def soft(tokens: Tensor) -> Tensor:
    return F.one_hot(tokens, VOCABULARY).double()


def inputs() -> dict[str, Tensor]:
    return {"image": images(), "tokens": texts()}


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=DOUBLE)


class TestImageTower:
    def test_it_is_patches_positions_blocks_and_a_layer_on_the_mean(self) -> None:
        tower, pictures = towers().image, images()
        kernel = tower.patches[0]
        cut = pictures.unfold(2, 4, 4).unfold(3, 4, 4)  # [B, C, 4, 4, 4, 4], rows and columns of patches, then of pixels
        states = torch.einsum("bchwij,dcij->bhwd", cut, kernel.weight) + kernel.bias + tower.positions.permute(1, 2, 0)
        states = states.reshape(4, 16, 16)
        seen = []
        tower.blocks[0].register_forward_hook(lambda module, args, output: seen.append(args[0]))
        found = tower(pictures)
        same(seen[0], states)  # row by row
        for block in tower.blocks:
            states = block(states)
        same(found, tower.head(tower.norm(states).mean(1)))

    @pytest.mark.parametrize(("stem", "channels"), [(1, [3, 16]), (2, [3, 8, 16]), (3, [3, 4, 8, 16])])
    def test_every_stem_makes_one_token_a_patch(self, stem: int, channels: list[int]) -> None:
        patches = towers(stem=stem).image.patches
        assert patches(images()).shape == (4, 16, 4, 4)
        layers = [layer for layer in patches if isinstance(layer, nn.Conv2d)]
        assert [layers[0].in_channels, *(layer.out_channels for layer in layers)] == channels

    def test_a_smaller_image_has_the_positions_of_its_upper_left_corner(self) -> None:
        tower, small = towers().image, images()[..., :8, :12]
        cut = copy.deepcopy(tower)
        cut.positions = nn.Parameter(tower.positions[:, :2, :3].detach().clone())
        assert tower(small).equal(cut(small))
        with torch.no_grad():
            tower.positions[:, 1, 2] += 1.0
        assert not tower(small).equal(cut(small))

    def test_patches_that_do_not_divide_the_image_are_refused(self) -> None:
        with pytest.raises(ValueError, match="patches of 5 pixels do not divide an image of 16"):
            towers(patch=5)

    def test_a_stem_that_shrinks_more_than_a_patch_is_refused(self) -> None:
        with pytest.raises(ValueError, match="a stem of 4 convolutions halves an image 3 times, which patch 4 does not allow"):
            towers(stem=4)


class TestTextTower:
    def test_it_is_words_positions_blocks_and_a_layer_on_the_mean_of_the_words(self) -> None:
        tower, tokens = classifier(), texts()
        for row, count in enumerate((6, 4, 1)):
            states = (tower.words.weight[tokens[row, :count]] + tower.positions[:count]).unsqueeze(0)
            for block in tower.blocks:
                states = block(states)
            same(tower(tokens)[row], tower.head(tower.norm(states).mean(1))[0])

    def test_padding_changes_nothing(self) -> None:
        tower, tokens = classifier(), texts()[1:]
        same(tower(tokens[:, :4]), tower(tokens))

    def test_one_hot_words_count_as_their_words(self) -> None:
        tower, tokens = classifier(), texts()
        same(tower(soft(tokens)), tower(tokens))

    def test_gradients_reach_soft_words(self) -> None:
        tower, tokens = classifier(), texts()
        words = soft(tokens).requires_grad_()
        tower(words).square().sum().backward()
        assert (words.grad[tokens != 0][:, 1:] != 0).any(dim=1).all()
        assert (words.grad[tokens == 0] == 0).all()

    def test_what_is_nothing_is_never_learned_from_soft_words_either(self) -> None:
        tower = classifier()
        tower(torch.rand(4, LENGTH, VOCABULARY, dtype=torch.float64).softmax(-1)).square().sum().backward()
        assert (tower.words.weight.grad[0] == 0).all()
        assert (tower.words.weight.grad[1:] != 0).any(dim=1).all()
        assert (tower.words.weight[0] == 0).all()

    def test_a_text_without_words_gives_numbers_and_gradients(self) -> None:
        tower = classifier()
        output = tower(torch.zeros(2, LENGTH, dtype=torch.int64))
        output.square().sum().backward()
        same(output, tower.head.bias.expand(2, 3))
        assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in tower.parameters())

    def test_the_order_of_words_counts(self) -> None:
        tower = classifier()
        assert not torch.allclose(tower(torch.tensor([[1, 2]])), tower(torch.tensor([[2, 1]])), atol=1e-6)


class TestTwoTowers:
    def test_embeddings_are_those_of_the_towers_in_one_length(self) -> None:
        model, batch = towers(), inputs()
        found = model(batch)
        assert set(found) == {"image", "text"}
        assert model.logit_scale.exp().item() == pytest.approx(1 / 0.07)
        radius = model.logit_scale.exp().sqrt()
        for name, output in (("image", model.image(batch["image"])), ("text", model.text(batch["tokens"]))):
            assert found[name].shape == (4, 12)
            same(found[name], radius * output / output.square().sum(1, keepdim=True).sqrt())

    def test_inner_products_are_cosines_times_the_learned_scale(self) -> None:
        model, batch = towers(), inputs()
        nn.init.constant_(model.logit_scale, math.log(20.0))
        found = model(batch)
        cosines = F.cosine_similarity(model.image(batch["image"])[:, None], model.text(batch["tokens"])[None], dim=2)
        same(found["image"] @ found["text"].T, 20.0 * cosines)

    @pytest.mark.parametrize(("scale", "largest"), [(math.log(100.0) + 0.5, 100.0), (math.log(100.0) - 0.5, 100.0 / math.exp(0.5))])
    def test_similarities_are_bounded_as_in_clip(self, scale: float, largest: float) -> None:
        model = towers()
        nn.init.constant_(model.logit_scale, scale)
        assert model(inputs())["image"].square().sum(1).tolist() == pytest.approx([largest] * 4)

    @pytest.mark.parametrize(("above", "sign", "moves"), [(0.5, 1, True), (0.5, -1, False), (-0.5, 1, True), (-0.5, -1, True)])
    def test_a_scale_over_its_bound_can_come_back_and_not_go_further(self, above: float, sign: int, moves: bool) -> None:
        model = towers()
        nn.init.constant_(model.logit_scale, LARGEST_LOGIT_SCALE + above)
        found = model(inputs())["image"]
        (sign * found * found.detach()).sum().backward()
        # d(exp(scale / 2) u)/d(scale) = exp(scale / 2) u / 2, of four samples
        expected = sign * 4 * math.exp(LARGEST_LOGIT_SCALE + min(above, 0.0)) / 2 if moves else 0.0
        assert model.logit_scale.grad.item() == pytest.approx(expected)

    def test_a_text_without_words_has_an_embedding_of_the_same_length(self) -> None:
        model = towers()
        found = model(inputs())
        same(found["text"].square().sum(1), model.logit_scale.exp().expand(4))
        sum(embedding.sum() for embedding in found.values()).backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())

    def test_one_hot_words_count_as_their_words(self) -> None:
        model, batch = towers(), inputs()
        same(model(batch | {"tokens": soft(batch["tokens"])})["text"], model(batch)["text"])

    def test_embeddings_are_single_precision_under_autocast(self) -> None:
        model, batch = towers().float(), inputs()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = model({"image": batch["image"].float(), "tokens": batch["tokens"]})
        for embedding in found.values():
            assert embedding.dtype == torch.float32
            assert embedding.square().sum(1).tolist() == pytest.approx([1 / 0.07] * 4, rel=rounding(torch.float32, 30))

    def test_it_learns_to_tell_pairs_apart(self) -> None:
        """Twelve pictures of one colour and their texts of one word: all are found again."""
        model = tiny_towers(in_channels=3, image_size=8, vocabulary=13, length=2, width=16, depth=1, stem=1, embedding=16)
        colours = torch.randn(12, 3)[:, :, None, None].expand(12, 3, 8, 8)
        batch = {"image": colours, "tokens": torch.stack([torch.arange(1, 13), torch.zeros(12, dtype=torch.int64)], dim=1)}
        optimizer, own = torch.optim.Adam(model.parameters(), 1e-2), torch.arange(12)
        for _ in range(60):
            found = model(batch)
            logits = found["image"] @ found["text"].T
            optimizer.zero_grad()
            (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)).backward()
            optimizer.step()
        assert logits.argmax(1).equal(own)
        assert logits.argmax(0).equal(own)

    def test_it_can_be_exported_for_any_batch_size(self) -> None:
        model, batch = towers(width=8, depth=1).float().eval(), {"image": images().float(), "tokens": texts()}
        size = torch.export.Dim("batch")
        exported = torch.export.export(model, (batch,), dynamic_shapes=({"image": {0: size}, "tokens": {0: size}},)).module()
        three = {name: tensor[:3] for name, tensor in batch.items()}
        for name, embedding in exported(three).items():
            torch.testing.assert_close(embedding, model(three)[name], rtol=0, atol=rounding(torch.float32, 200, 4.0))


Build = Callable[[], nn.Module]
BATCHES = {
    "towers": (towers, inputs),
    "stem": (lambda: towers(stem=3), inputs),
    "image": (lambda: towers().image, images),
    "text": (classifier, texts),
}
every_network = pytest.mark.parametrize(("build", "batch"), BATCHES.values(), ids=BATCHES)


def gives(model: nn.Module, batch: Tensor | dict[str, Tensor]) -> dict[str, Tensor]:
    found = model(batch)
    return found if isinstance(found, dict) else {"logits": found}


@every_network
def test_every_parameter_gets_a_gradient(build: Build, batch: Callable[[], Tensor | dict[str, Tensor]]) -> None:
    model = build()
    sum((embedding * torch.randn_like(embedding)).sum() for embedding in gives(model, batch()).values()).backward()
    assert all((parameter.grad != 0).any() for parameter in model.parameters())


@every_network
def test_predictions_do_not_depend_on_the_batch(build: Build, batch: Callable[[], Tensor | dict[str, Tensor]]) -> None:
    model, samples = build().eval(), batch()
    together = gives(model, samples)
    for row in range(4):
        one = {name: column[row : row + 1] for name, column in samples.items()} if isinstance(samples, dict) else samples[row : row + 1]
        for name, alone in gives(model, one).items():
            same(alone, together[name][row : row + 1])


@every_network
def test_a_copy_is_a_network_of_its_own(build: Build, batch: Callable[[], Tensor | dict[str, Tensor]]) -> None:
    model, samples = build(), batch()
    before = gives(model, samples)
    copied = copy.deepcopy(model)
    assert all(found.equal(before[name]) for name, found in gives(copied, samples).items())
    for parameter in copied.parameters():
        nn.init.zeros_(parameter)
    assert all(found.equal(before[name]) for name, found in gives(model, samples).items())


@every_network
def test_what_no_weight_decay_names_is_not_decayed_and_tables_of_weights_are(build: Build, batch: object) -> None:
    model = build()
    groups = param_groups_weight_decay(model, weight_decay=1.0, no_weight_decay_list=model.no_weight_decay())
    spared = {parameter for group in groups if not group["weight_decay"] for parameter in group["params"]}
    undecayed = {name for name, parameter in model.named_parameters() if parameter in spared}
    expected = {name for name, _ in model.named_parameters() if name.rpartition(".")[2] in ("positions", "logit_scale")}
    assert model.no_weight_decay() == expected
    assert expected <= undecayed
    assert not {name for name in undecayed if name.endswith(("qkv.weight", "words.weight", "head.weight"))}


def test_parameters_are_called_by_their_tower() -> None:
    parts = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2", "head", "norm")
    names = set(towers(depth=2).state_dict())
    blocks = {f"{t}.blocks.{i}.{part}" for t in ("image", "text") for i in range(2) for part in parts[:6]}
    layers = blocks | {f"{t}.{part}" for t in ("image", "text") for part in parts[6:]} | {"image.patches.0"}
    expected = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    assert names == expected | {"image.positions", "text.positions", "text.words.weight", "logit_scale"}
    assert {f"text.{name}" for name in classifier().state_dict()} == {name for name in names if name.startswith("text.")}


def test_options_set_the_sizes() -> None:
    model = towers(width=24, depth=3, heads=4, patch=8, embedding=7)
    assert len(model.image.blocks) == len(model.text.blocks) == 3
    assert {block.attn.num_heads for tower in (model.image, model.text) for block in tower.blocks} == {4}
    assert model.image.positions.shape == (24, 2, 2)
    assert model.text.positions.shape == (LENGTH, 24)
    assert model.text.words.weight.shape == (VOCABULARY, 24)
    assert model.image.head.weight.shape == model.text.head.weight.shape == (7, 24)
    assert classifier()(texts()).shape == (4, 3)


def test_tables_and_blocks_start_small() -> None:
    model = towers(width=64)
    blocks = [weight for name, weight in model.named_parameters() if "blocks" in name and weight.ndim == 2]
    for weight in (model.text.words.weight[1:], model.text.positions, model.image.positions, *blocks):
        # The standard error of a deviation from n numbers is about 1 / sqrt(2 n) of it; four of these.
        assert weight.std().item() == pytest.approx(0.02, rel=4 / math.sqrt(2 * weight.numel()))


def test_networks_are_built_without_memory_too() -> None:
    with torch.device("meta"):
        models = [tiny_towers(in_channels=1, image_size=32, vocabulary=9, length=3), tiny_text(num_classes=2, vocabulary=9, length=3)]
        models.append(ImageTower(8, 1, 2, outputs=3, in_channels=1, image_size=8, patch=4))
    assert all(parameter.is_meta for model in models for parameter in model.parameters())
