import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from kdbench.data.batch import Batch, Part
from kdbench.data.draws import Draws
from kdbench.data.loader import Loader, view_batches
from kdbench.data.mixing import mixed, mixed_labels, partners
from kdbench.data.views import Augment
from kdbench.errors import UserError

CLASSES = 5
ALPHAS = st.sampled_from([0.0, 0.1, 0.2, 1.0, 4.0])
MIXES = st.tuples(ALPHAS, ALPHAS).filter(any)


def part(count: int = 40, side: int = 6) -> Part:
    """Each image has one even value of its own."""
    images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 2, side, side) * 6
    return Part(images.contiguous(), torch.arange(count) % CLASSES, torch.arange(count) * 3 + 50, classes=CLASSES)


def loader(spec: Augment, **changed) -> Loader:
    return Loader(part(), 12, **{"augment": spec, "views": 3, "data_seed": 5, "order_seed": 7, **changed})


def mixtures(mixup: float, cutmix: float, count: int = 4000, side: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """White images with black partners, so that a pixel is the own image's share of it; and the share of the label."""
    white = torch.full((count, 1, side, side), 255, dtype=torch.uint8)
    return mixed(white, torch.zeros_like(white), Draws(3, torch.arange(count), 0), mixup, cutmix)


@settings(deadline=None, max_examples=20)
@given(MIXES, st.integers(0, 3), st.integers(0, 2**40), st.permutations(range(10)), st.integers(1, 10))
def test_a_mixture_depends_neither_on_order_nor_on_the_rest_of_the_batch(alphas, view, data_seed, order, kept):
    data = part()
    spec = Augment(crop=1, flip=True, erase=0.5, mixup=alphas[0], cutmix=alphas[1])
    (whole,) = view_batches(data, view, spec, data_seed, len(data))
    some = torch.tensor(order[:kept])
    small = Loader(data, 1, augment=spec, views=None, data_seed=data_seed, order_seed=0)
    small._order = lambda epoch: some  # these rows, one a batch
    for row, batch in zip(some, small.batches(view), strict=False):
        assert torch.equal(batch.inputs[0], whole.inputs[row])
        assert torch.equal(batch.target[0], whole.target[row])


@settings(deadline=None, max_examples=20)
@given(MIXES, st.sampled_from([2, 3, 4]), st.integers(0, 4))
def test_workers_mixtures_joined_in_rank_order_are_the_single_workers_and_the_caches(alphas, world_size, epoch):
    spec = Augment(crop=1, mixup=alphas[0], cutmix=alphas[1])
    alone = list(loader(spec).batches(epoch))
    workers = [list(loader(spec, rank=rank, world_size=world_size).batches(epoch)) for rank in range(world_size)]
    shards = [next(view_batches(part(), epoch % 3, spec, 5, 40, rows=rows)) for rows in (range(25), range(25, 40))]
    cached = Batch(*(torch.cat([getattr(shard, name) for shard in shards]) for name in ("inputs", "target", "index")))
    for whole, *shares in zip(alone, *workers, strict=True):
        joined = Batch(*(torch.cat([getattr(s, name) for s in shares]) for name in ("inputs", "target", "index")), shares[0].view)
        rows = (whole.index - 50) // 3
        for name in ("inputs", "target", "index"):
            assert torch.equal(getattr(whole, name), getattr(joined, name))
            assert torch.equal(getattr(whole, name), getattr(cached, name)[rows])


@settings(deadline=None, max_examples=20)
@given(MIXES, st.integers(0, 3), st.integers(0, 2**40))
def test_targets_are_distributions_over_two_labels_in_the_proportion_of_the_pixels(alphas, view, data_seed):
    data = part()
    (batch,) = view_batches(data, view, Augment(mixup=alphas[0], cutmix=alphas[1]), data_seed, 40)
    assert batch.inputs.min() >= 0
    assert batch.inputs.max() <= 1
    assert batch.target.dtype == torch.float32
    assert batch.target.min() >= 0
    torch.testing.assert_close(batch.target.sum(1), torch.ones(40))
    rows = torch.arange(40)
    other = partners(rows, 40, Draws(data_seed, data.index, view))
    values = rows.float() * 6 / 255
    mean = batch.inputs.mean((1, 2, 3))
    own_share = (mean - values[other]) / (values - values[other])
    expected = torch.zeros(40, CLASSES)
    expected[rows, data.target] += own_share
    expected[rows, data.target[other]] += 1 - own_share
    torch.testing.assert_close(batch.target, expected, atol=1e-4, rtol=0)


@settings(deadline=None, max_examples=20)
@given(st.integers(2, 60), st.integers(0, 5), st.integers(0, 2**40))
def test_a_partner_is_another_sample_of_the_part(total, view, data_seed):
    rows = torch.arange(total)
    other = partners(rows, total, Draws(data_seed, rows + 9, view))
    assert (other != rows).all()
    assert other.min() >= 0
    assert other.max() < total


def test_every_other_sample_becomes_the_partner_about_equally_often():
    counts = torch.bincount(partners(torch.full((6000,), 3), 7, Draws(0, torch.arange(6000), 0)), minlength=7)
    assert counts[3] == 0
    assert (counts[[0, 1, 2, 4, 5, 6]] - 1000).abs().max() < 120


def test_a_sample_that_is_alone_is_mixed_with_itself():
    (batch,) = view_batches(part(1), 0, Augment(mixup=1.0), 0, 1)
    assert batch.target.tolist() == [[1, 0, 0, 0, 0]]


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_mixup_blends_by_shares_of_the_beta_distribution(alpha):
    pixels, share = mixtures(alpha, 0)
    torch.testing.assert_close(pixels, share.view(-1, 1, 1, 1).expand_as(pixels))
    for value in (0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99):
        assert (share < value).double().mean().item() == pytest.approx(stats.beta(alpha, alpha).cdf(value), abs=0.03)


def test_mixup_of_a_sample_with_itself_is_the_sample_bit_by_bit():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(500, -1, -1, -1)
    pixels, _ = mixed(images, images, Draws(0, torch.arange(500), 0), 0.7, 0)
    assert torch.equal(pixels, (images.float() * (1 / 255)))


def test_cutmix_shows_one_rectangle_whose_area_is_the_partners_share_of_the_label():
    pixels, share = mixtures(0, 1.0)
    assert set(pixels.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(share, pixels.mean((1, 2, 3)))
    foreign = pixels[:, 0] == 0
    assert torch.equal(foreign, foreign.any(2)[:, :, None] & foreign.any(1)[:, None, :])
    for line in (*foreign.any(2)[:200], *foreign.any(1)[:200]):
        places = line.nonzero().flatten()
        assert not len(places) or places[-1] - places[0] + 1 == len(places)


def test_the_rectangle_has_the_proportions_of_the_image():
    images = torch.full((2000, 1, 60, 20), 255, dtype=torch.uint8)
    pixels, _ = mixed(images, torch.zeros_like(images), Draws(3, torch.arange(2000), 0), 0, 1.0)
    foreign = pixels[:, 0] == 0
    down, across = foreign.any(2).sum(1), foreign.any(1).sum(1)
    assert down.max() > 50
    assert (down / across.clamp(min=1)).median().item() == pytest.approx(3, abs=0.3)


def test_cutmix_cuts_what_lambda_leaves_and_less_at_the_edge():
    _, share = mixtures(0, 1.0)
    # Without the edge, a uniform lambda would give 1/2 on average. With centre c and side s, uniform c, the part of s that is inside is
    # s - s^2 / 4 of the side on average, so the area is E[(s - s^2 / 4)^2] with s^2 = 1 - lambda uniform: 1/2 - 1/5 + 1/48.
    assert share.mean().item() == pytest.approx(1 - (1 / 2 - 1 / 5 + 1 / 48), abs=0.02)


def test_with_both_on_half_of_the_samples_are_cut_and_half_are_blended():
    pixels, share = mixtures(1.0, 1.0)
    cut = ((pixels == 0) | (pixels == 1)).flatten(1).all(1)
    assert 1900 < cut.sum() < 2100
    torch.testing.assert_close(share, pixels.mean((1, 2, 3)))


def test_labels_of_one_class_stay_certain():
    soft = mixed_labels(torch.tensor([2, 2]), torch.tensor([2, 4]), torch.tensor([0.3, 0.25]), CLASSES)
    assert soft.tolist() == [[0, 0, 1, 0, 0], [0, 0, 0.25, 0, 0.75]]


def test_another_view_has_another_partner_and_share():
    one, other = (next(view_batches(part(), view, Augment(mixup=1.0), 0, 40)) for view in (0, 1))
    assert (one.target != other.target).any(1).sum() > 35


@pytest.mark.parametrize("keys", [{"mixup": 0.2}, {"cutmix": 1.0}])
def test_labels_per_pixel_are_refused_in_one_line(keys):
    images = torch.zeros(8, 3, 4, 4, dtype=torch.uint8)
    masks = Part(images, torch.zeros(8, 4, 4, dtype=torch.long), torch.arange(8))
    with pytest.raises(UserError, match=rf"recipe\.augment\.{next(iter(keys))} .* needs one label per image"):
        view_batches(masks, 0, Augment(**keys), 0, 4)
    with pytest.raises(UserError, match="needs one label per image"):
        Loader(masks, 4, augment=Augment(**keys), views=1, data_seed=0, order_seed=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("alphas", [(0.2, 0), (0, 1.0), (0.2, 1.0)])
def test_a_gpu_gives_the_same_bits(alphas):
    spec = Augment(crop=2, flip=True, mixup=alphas[0], cutmix=alphas[1])
    (here,), (there,) = (view_batches(part(), 1, spec, 0, 40, torch.device(name)) for name in ("cpu", "cuda"))
    assert torch.equal(here.inputs, there.inputs.cpu())
    assert torch.equal(here.target, there.target.cpu())
