"""The additive tokenizer: only the sum is seen, masks hide what they cover and nothing else, losses by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ctd_scale.tokenizer.kway import KWayTokenizer, draw_mask
from ctd_scale.tokenizer.losses import decorrelation_loss, reconstruction_loss, variance_loss
from ctd_scale.tokenizer.train import _Losses, tokenize

EMBED, TOKEN, WAYS = 6, 10, 3


@pytest.fixture
def model() -> KWayTokenizer:
    torch.manual_seed(0)
    made = KWayTokenizer(EMBED, TOKEN, WAYS, hidden_dim=8)
    made.mask_vector.data.normal_()
    made.fit_scale(embeddings(100))
    return made


def embeddings(rows: int, seed: int = 1) -> torch.Tensor:
    return 2 + 3 * torch.randn(rows, EMBED, generator=torch.Generator().manual_seed(seed))


# -- the sum -------------------------------------------------------------------------------------------------


def test_the_decoder_sees_only_the_sum(model: KWayTokenizer) -> None:
    tokens = model.encode(embeddings(5))
    reconstruction = model.decode(tokens)
    assert torch.allclose(model.decode(tokens[:, [2, 0, 1]]), reconstruction, atol=1e-5)
    moved = tokens.clone()
    mass = torch.randn(5, TOKEN)
    moved[:, 0] += mass
    moved[:, 2] -= mass
    assert torch.allclose(model.decode(moved), reconstruction, atol=1e-5)
    moved[:, 1] += mass
    assert not torch.allclose(model.decode(moved), reconstruction, atol=1e-2)


def test_ways_differ_and_have_the_shape_of_the_language_model(model: KWayTokenizer) -> None:
    tokens = model.encode(embeddings(5))
    assert tokens.shape == (5, WAYS, TOKEN)
    assert not torch.allclose(tokens[:, 0], tokens[:, 1], atol=1e-2)


def test_scaling_keeps_the_angles_between_centred_embeddings(model: KWayTokenizer) -> None:
    raw = embeddings(100)
    scaled = model.scale(raw)
    assert torch.allclose(scaled.mean(dim=0), torch.zeros(EMBED), atol=1e-5)
    assert scaled.square().mean().item() == pytest.approx(1, abs=1e-4)
    centred = raw - raw.mean(dim=0)
    assert torch.allclose(
        torch.cosine_similarity(scaled[:50], scaled[50:]),
        torch.cosine_similarity(centred[:50], centred[50:]),
        atol=1e-5,
    )


# -- masks ---------------------------------------------------------------------------------------------------


def test_a_mask_is_drawn_per_sample_and_per_element() -> None:
    masked = draw_mask((400, 50), 0.1, torch.Generator().manual_seed(0), torch.device("cpu"))
    assert masked.dtype == torch.bool
    # Binomial: the share of 20,000 elements has a standard error of .0021, of a row .042, of a column .015.
    assert masked.float().mean().item() == pytest.approx(0.1, abs=0.01)
    rows, columns = masked.float().mean(dim=1), masked.float().mean(dim=0)
    assert rows.std().item() == pytest.approx(0.042, rel=0.25)
    assert columns.std().item() == pytest.approx(0.015, rel=0.4)
    assert len({tuple(row) for row in masked.tolist()}) > 390
    none = draw_mask((4, 5), 0.0, torch.Generator(), torch.device("cpu"))
    every = draw_mask((4, 5), 1.0, torch.Generator(), torch.device("cpu"))
    assert not none.any()
    assert every.all()


def test_a_mask_hides_what_it_covers_of_its_own_sample_alone(model: KWayTokenizer) -> None:
    raw = embeddings(2)
    masked = torch.zeros(2, EMBED, dtype=torch.bool)
    masked[0, [1, 4]] = True
    tokens = model.encode(raw, masked)
    assert torch.equal(tokens[1], model.encode(raw)[1])
    assert not torch.allclose(tokens[0], model.encode(raw)[0], atol=1e-3)
    hidden = raw.clone()
    hidden[0, [1, 4]] += 7
    assert torch.equal(model.encode(hidden, masked), tokens)
    hidden[0, 0] += 7
    assert not torch.allclose(model.encode(hidden, masked)[0], tokens[0], atol=1e-3)


def test_masking_never_writes_into_the_data(model: KWayTokenizer) -> None:
    raw = embeddings(8)
    before = raw.clone()
    model.train()
    _Losses(model)(raw, torch.ones(8, EMBED, dtype=torch.bool))
    assert torch.equal(raw, before)


def test_the_mask_vector_is_learned(model: KWayTokenizer) -> None:
    masked = torch.zeros(8, EMBED, dtype=torch.bool)
    masked[:, 2] = True
    _Losses(model)(embeddings(8), masked)[0].backward()
    gradient = model.mask_vector.grad
    assert gradient is not None
    assert gradient[2] != 0
    assert torch.equal(gradient[[0, 1, 3, 4, 5]], torch.zeros(5))


def test_nothing_is_masked_when_tokens_are_published(model: KWayTokenizer) -> None:
    raw = embeddings(20)
    model.train()  # even then
    once, again = tokenize(model, raw.numpy()), tokenize(model, raw.numpy(), chunk=7)
    assert once.dtype == np.float32
    assert np.allclose(once, again, atol=1e-6)
    assert np.allclose(once, model.encode(raw).detach().numpy(), atol=1e-6)
    model.mask_vector.data += 100
    assert np.array_equal(tokenize(model, raw.numpy()), once)


# -- losses --------------------------------------------------------------------------------------------------


def test_the_loss_is_against_the_unmasked_input(model: KWayTokenizer) -> None:
    raw = embeddings(8)
    everything = torch.ones(8, EMBED, dtype=torch.bool)
    got, _, _ = _Losses(model)(raw, everything)
    blind = model.decode(model.encode(raw, everything))  # the same row for every sample
    assert torch.allclose(blind, blind[:1].expand(8, -1), atol=1e-6)
    assert torch.allclose(got, (blind - model.scale(raw)).square().mean(), atol=1e-6)
    assert got > 0.1


def test_reconstruction_by_hand() -> None:
    got = reconstruction_loss(torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 4.0]]))
    assert got.item() == pytest.approx((1 + 4 + 16) / 4)


def test_decorrelation_by_hand() -> None:
    east, north = torch.tensor([5.0, 0.0]), torch.tensor([0.0, 0.1])
    slanted = torch.tensor([1.0, 3.0**0.5])  # 60 degrees from east, 30 from north

    def loss(*ways: torch.Tensor) -> float:
        return decorrelation_loss(torch.stack(ways)[None]).item()

    assert loss(east, north) == pytest.approx(0)
    assert loss(east, 2 * east) == pytest.approx(1)
    assert loss(east, -east) == pytest.approx(1)
    assert loss(east, slanted) == pytest.approx(0.25)
    assert loss(east, north, slanted) == pytest.approx((0 + 0.25 + 0.75) / 3)
    assert loss(east) == 0
    both = torch.stack([torch.stack([east, north]), torch.stack([east, east])])
    assert decorrelation_loss(both).item() == pytest.approx(0.5), "a mean over samples"


def test_variance_by_hand() -> None:
    values = torch.tensor([-1.0, 1.0, -1.0, 1.0])  # variance 4 / 3

    def loss(scale: float) -> float:
        return variance_loss(scale * values[:, None, None]).item()

    assert loss(0) == pytest.approx(1 - 0.01, abs=1e-6), "collapsed"
    assert loss(0.25) == pytest.approx(1 - (0.0625 * 4 / 3 + 1e-4) ** 0.5, abs=1e-5)
    assert loss(1) == 0
    assert loss(50) == 0
    halves = torch.cat([0 * values[:, None], 50 * values[:, None]], dim=1)[:, None]
    assert variance_loss(halves).item() == pytest.approx(0.99 / 2, abs=1e-6), "a spread dimension hides no dead one"
