"""A top-k sparse autoencoder recovers sparse structure, and refuses what it cannot learn from."""

from pathlib import Path

import pytest
import torch

import strapfmt
from strapfmt.analysis.sae import TopKSAE, train_sae
from strapfmt.errors import ArgumentError

N_FEATURES, D_MODEL, N_ACTIVE = 48, 24, 3


def sparse_batches(n_batches: int = 20, seed: int = 1) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Make batches of sums of a few of `N_FEATURES` fixed directions, off centre and in an odd scale."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.nn.functional.normalize(torch.randn(N_FEATURES, D_MODEL, generator=generator), dim=1)
    batches = []
    for _ in range(n_batches):
        active = torch.rand(256, N_FEATURES, generator=generator).topk(N_ACTIVE, dim=1).indices
        strengths = torch.zeros(256, N_FEATURES).scatter(
            1, active, 1 + torch.rand(256, N_ACTIVE, generator=generator)
        )
        batches.append(40 * (strengths @ features) + 7)
    return batches, features


def test_training_explains_sparse_data_and_finds_its_directions() -> None:
    batches, features = sparse_batches()
    training = train_sae(batches, d_sae=128, k=N_ACTIVE + 1, n_steps=400, learning_rate=1e-2)
    assert training.fraction_explained > 0.9
    best = (features @ training.sae.decoder.detach().T).max(dim=1).values
    assert (best > 0.9).float().mean() > 0.8
    assert training.n_steps == 400
    assert training.n_activations == 400 * 256


def test_training_stops_when_its_time_is_up() -> None:
    batches, _ = sparse_batches(4)
    training = train_sae(batches, d_sae=64, k=2, n_steps=10**9, max_duration_s=0.3)
    assert 1 <= training.n_steps < 10**6
    assert training.duration_s < 10
    assert training.fraction_explained > 0


def test_reported_fraction_is_one_minus_error_over_variance() -> None:
    batches, _ = sparse_batches(4)
    training = train_sae(batches, d_sae=32, k=2, n_steps=20)
    x = torch.cat(batches).double()
    with torch.no_grad():
        error = (x - training.sae(x.float()).double()).square().sum()
    expected = 1 - error / (x - x.mean(dim=0)).square().sum()
    assert training.fraction_explained == pytest.approx(float(expected), abs=1e-6)


def test_dead_latents_are_those_that_never_fire() -> None:
    batches, _ = sparse_batches(4)
    training = train_sae(batches, d_sae=512, k=2, n_steps=5)
    values, latents = training.sae.encode(torch.cat(batches))
    assert training.n_dead == 512 - len(latents[values > 0].unique())
    assert training.n_dead > 0


def test_decoder_rows_keep_norm_one() -> None:
    batches, _ = sparse_batches(2)
    sae = train_sae(batches, d_sae=32, k=2, n_steps=10).sae
    torch.testing.assert_close(sae.decoder.norm(dim=1), torch.ones(32))


def test_encode_keeps_the_k_largest_latents_in_order() -> None:
    sae = TopKSAE(8, 16, 4)
    x = torch.randn(5, 8)
    values, latents = sae.encode(x)
    pre = sae.preactivations(x)
    torch.testing.assert_close(values, pre.sort(dim=1, descending=True).values[:, :4])
    torch.testing.assert_close(pre.gather(1, latents), values)


def test_same_seed_gives_the_same_weights_and_leaves_the_random_state_alone() -> None:
    batches, _ = sparse_batches(2)
    before = torch.get_rng_state()
    runs = [train_sae(batches, d_sae=16, k=2, n_steps=5, seed=3).sae.state_dict() for _ in range(2)]
    torch.testing.assert_close(runs[0], runs[1], rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_half_precision_batches_are_accepted_and_not_changed() -> None:
    batches = [batch.bfloat16() for batch in sparse_batches(2)[0]]
    copies = [batch.clone() for batch in batches]
    train_sae(batches, d_sae=16, k=2, n_steps=4)
    assert all(torch.equal(a, b) for a, b in zip(batches, copies, strict=True))


@pytest.mark.parametrize(
    ("batches", "said"),
    [
        ([], "got none"),
        ([torch.zeros(3)], "shape \\(3,\\)"),
        ([torch.full((4, 4), float("nan"))], "NaN or infinities"),
    ],
)
def test_unusable_batches_are_refused(batches: list[torch.Tensor], said: str) -> None:
    with pytest.raises(ArgumentError, match=said):
        train_sae(batches, d_sae=8, k=2, n_steps=2)


def test_k_above_the_number_of_latents_is_refused() -> None:
    with pytest.raises(ArgumentError, match="1 <= k <= d_sae = 4, got 5"):
        TopKSAE(8, 4, 5)


def test_an_endless_loader_ends(tmp_path: Path) -> None:
    with strapfmt.create(tmp_path / "a.strap") as rec:
        rec.write("x", torch.randn(200, 8))
    loader = strapfmt.open(tmp_path / "a.strap").loader("x", batch_size=64, shuffle=True, epochs=None)
    training = train_sae(loader, d_sae=16, k=2, n_steps=3)
    assert training.n_steps == 3


def test_wrong_arguments_and_batches_are_errors_of_ours(tmp_path: Path) -> None:
    with strapfmt.create(tmp_path / "a.strap") as rec:
        rec.write("x", torch.randn(200, 8))
    ds = strapfmt.open(tmp_path / "a.strap")
    with pytest.raises(ArgumentError, match="n_steps: expected a whole number of at least 1, got 0"):
        train_sae(ds.loader("x", batch_size=64), d_sae=16, k=2, n_steps=0)
    with pytest.raises(ArgumentError, match="max_duration_s: expected a number of seconds above 0"):
        train_sae(ds.loader("x", batch_size=64), d_sae=16, k=2, n_steps=3, max_duration_s=0)
    with pytest.raises(ArgumentError, match="expected one tensor a batch, got a tuple"):
        train_sae(ds.loader("x", batch_size=64, with_rows=True), d_sae=16, k=2, n_steps=3)
