"""Owns a small top-k sparse autoencoder and its training loop over any iterable of activations.

The model and its loss are those of Gao et al. 2024, "Scaling and evaluating sparse autoencoders" (arXiv
2406.04093), section 2.3: `z = TopK(W_enc (x - b_dec) + b_enc)`, `x' = W_dec z + b_dec`, and the squared error
over the variance. Their auxiliary loss for dead latents is left out: in short runs it revived none.
"""

import itertools
import math
import time
from collections.abc import Generator, Iterable
from dataclasses import dataclass

import torch
from torch.nn import functional

from strapfmt.arguments import as_integer, as_seconds
from strapfmt.errors import ArgumentError

__all__ = ["SAETraining", "TopKSAE", "train_sae"]


class TopKSAE(torch.nn.Module):
    """A sparse autoencoder that keeps the `k` largest latents of each activation.

    It takes and returns activations in their own scale; inside, they are divided by `scale`.

    Parameters
    ----------
    d_model, d_sae, k : int
        Width of an activation, number of latents, latents kept for each activation. The parameters `encoder`
        and `decoder` are `[d_sae, d_model]`, one row for each latent; training keeps decoder rows at norm 1.
    """

    scale: torch.Tensor

    def __init__(self, d_model: int, d_sae: int, k: int) -> None:
        super().__init__()
        if not 1 <= k <= d_sae:
            raise ArgumentError(f"k: expected 1 <= k <= d_sae = {d_sae}, got {k}")
        self.d_model, self.d_sae, self.k = d_model, d_sae, k
        directions = functional.normalize(torch.randn(d_sae, d_model), dim=1)
        self.decoder = torch.nn.Parameter(directions)
        self.encoder = torch.nn.Parameter(directions.clone())
        self.encoder_bias = torch.nn.Parameter(torch.zeros(d_sae))
        self.decoder_bias = torch.nn.Parameter(torch.zeros(d_model))
        self.register_buffer("scale", torch.ones(()))

    def preactivations(self, x: torch.Tensor) -> torch.Tensor:
        """Return every latent before selection, `[n, d_sae]`, for activations `[n, d_model]` of any dtype."""
        centred = x.to(self.encoder.dtype) / self.scale - self.decoder_bias
        return functional.relu(functional.linear(centred, self.encoder, self.encoder_bias))

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the values and the numbers of the `k` largest latents, both `[n, k]`, largest first."""
        values, latents = self.preactivations(x).topk(self.k, dim=1)
        return values, latents

    def decode(self, values: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """Return the reconstruction `[n, d_model]` of activations encoded as `values` and `latents`."""
        return (self._combine(values, latents) + self.decoder_bias) * self.scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the reconstruction of `x`, `[n, d_model]`."""
        return self.decode(*self.encode(x))

    def _combine(self, values: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        return functional.embedding_bag(latents, self.decoder, per_sample_weights=values, mode="sum")

    @torch.no_grad()
    def _start_at(self, x: torch.Tensor) -> None:
        mean = x.mean(dim=0)
        self.scale.copy_((x - mean).square().mean().sqrt().clamp_min(1e-8))
        self.decoder_bias.copy_(mean / self.scale)

    @torch.no_grad()
    def _normalise_decoder(self) -> None:
        self.decoder.div_(self.decoder.norm(dim=1, keepdim=True).clamp_min(1e-8))

    def _loss(self, x: torch.Tensor) -> torch.Tensor:
        target = x / self.scale - self.decoder_bias
        error = target - self._combine(*self.encode(x))
        return error.square().sum() / (target - target.mean(dim=0)).square().sum().clamp_min(1e-8)


@dataclass(frozen=True, slots=True, kw_only=True)
class SAETraining:
    """What a training run gave.

    Attributes
    ----------
    sae : TopKSAE
        The trained model, in evaluation mode.
    fraction_explained : float
        Share of the variance of the loader's activations that the reconstruction explains: 1 is perfect,
        0 is what their mean alone would do.
    n_dead : int
        Latents that fired for none of these activations.
    n_steps, n_activations : int
        Optimiser steps taken, activations seen in them.
    duration_s : float
        Time of training and of the final evaluation.
    """

    sae: TopKSAE
    fraction_explained: float
    n_dead: int
    n_steps: int
    n_activations: int
    duration_s: float


def train_sae(
    loader: Iterable[torch.Tensor],
    *,
    d_sae: int,
    k: int,
    n_steps: int = 500,
    max_duration_s: float = math.inf,
    learning_rate: float = 2e-3,
    seed: int = 0,
) -> SAETraining:
    """Train a top-k sparse autoencoder on the batches of `loader`, iterated anew until `n_steps` are done.

    Parameters
    ----------
    loader : iterable of torch.Tensor
        Batches `[n, d_model]` of any floating dtype, such as `ds.loader(site)`; it is iterated several times
        and its batches are only read. Training runs on the device of the first one.
    d_sae, k : int
        Latents in all, and latents kept for each activation.
    n_steps : int
        Optimiser steps, one batch each.
    max_duration_s : float
        Stop after this time if that comes first; the learning rate then falls in time too.
    learning_rate : float
        Peak rate of Adam; it rises over the first tenth and falls to zero over the last half.
    seed : int
        Seeds the initial weights; the caller's random state is left as it was.

    Raises
    ------
    ArgumentError
        If the loader gives no batch, or one that is not two-dimensional or holds NaN or infinities.
    """
    as_integer("n_steps", n_steps, least=1)
    as_seconds("max_duration_s", max_duration_s)
    started = time.monotonic()
    batches = _repeat(loader)
    first = next(batches)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sae = TopKSAE(first.shape[1], d_sae, k)
    sae.to(first.device)._start_at(first)
    optimiser = torch.optim.Adam(sae.parameters(), lr=learning_rate)
    n_activations = step = 0
    for x in itertools.chain([first], batches):
        progress = max(step / n_steps, (time.monotonic() - started) / max_duration_s)
        if progress >= 1:
            break
        optimiser.param_groups[0]["lr"] = learning_rate * min(10 * progress + 0.01, 2 - 2 * progress, 1)
        loss = sae._loss(x)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        sae._normalise_decoder()
        n_activations += len(x)
        step += 1
    batches.close()
    fraction_explained, n_dead = _evaluate(sae.eval(), loader)
    return SAETraining(
        sae=sae,
        fraction_explained=fraction_explained,
        n_dead=n_dead,
        n_steps=step,
        n_activations=n_activations,
        duration_s=time.monotonic() - started,
    )


def _repeat(loader: Iterable[torch.Tensor]) -> Generator[torch.Tensor, None, None]:
    while True:
        is_empty = True
        for batch in loader:
            if not isinstance(batch, torch.Tensor):
                raise ArgumentError(
                    f"loader: expected one tensor a batch, got a {type(batch).__name__}; leave out with_rows=, and "
                    "name one site"
                )
            if batch.ndim != 2:
                raise ArgumentError(f"loader: expected batches [n, d_model], got shape {tuple(batch.shape)}")
            if not torch.isfinite(batch).all():
                raise ArgumentError("loader: a batch holds NaN or infinities; leave those rows out")
            is_empty = False
            yield batch.float()
        if is_empty:
            raise ArgumentError("loader: expected an iterable that gives batches each time, got none")


@torch.no_grad()
def _evaluate(sae: TopKSAE, loader: Iterable[torch.Tensor]) -> tuple[float, int]:
    has_fired = torch.zeros(sae.d_sae, dtype=torch.bool, device=sae.scale.device)
    n, error = 0, 0.0
    total = squares = torch.zeros(sae.d_model, dtype=torch.float64, device=sae.scale.device)
    # One epoch, also of a loader that gives epochs without end.
    for batch in itertools.islice(loader, getattr(loader, "n_batches", None)):
        x = batch.float()
        values, latents = sae.encode(x)
        has_fired[latents[values > 0]] = True
        error += float((x - sae.decode(values, latents)).double().square().sum())
        n += len(x)
        total = total + x.double().sum(dim=0)
        squares = squares + x.double().square().sum(dim=0)
    variance = float((squares - total.square() / max(n, 1)).sum())
    return 1 - error / max(variance, 1e-12), int((~has_fired).sum())
