"""Owns the demo's sparse autoencoder: training it on a site, and finding the tokens its latents answer to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from strapfmt.analysis.sae import TopKSAE

__all__ = ["learn"]

_N_LATENTS, _K, _BATCH_SIZE = 512, 16, 1024
_N_STEPS, _MAX_DURATION_S, _LEARNING_RATE = 400, 10.0, 5e-3
_N_SHOWN, _N_TOKENS, _CONTEXT_CHARS = 5, 4, 16
_SHARES = (0.001, 0.02)

# In most models the first token of a sequence is an outlier that would drown the rest of the variance.
_WHERE = "position > 0"
_WORDS = f"""
SELECT row, token, string_agg(token, '') OVER (
    PARTITION BY sequence_id ORDER BY position ROWS BETWEEN 5 PRECEDING AND 1 PRECEDING) AS before
FROM tokens QUALIFY {_WHERE} ORDER BY row
"""


def learn(ds: Any, site: str, *, seed: int) -> dict[str, Any]:
    """Train a small autoencoder on a site's rows but the first of each sequence; return what came of it as JSON.

    Parameters
    ----------
    ds : strapfmt.Dataset
    site : str
        A site of one activation for each token.
    seed : int
        Of the initial weights and of the order of the rows.
    """
    from strapfmt.analysis.sae import train_sae

    loader = ds.loader(site, batch_size=_BATCH_SIZE, shuffle=True, seed=seed, where=_WHERE)
    training = train_sae(
        loader,
        d_sae=_N_LATENTS,
        k=_K,
        n_steps=_N_STEPS,
        max_duration_s=_MAX_DURATION_S,
        learning_rate=_LEARNING_RATE,
        seed=seed,
    )
    return {
        "site": site,
        "n_latents": _N_LATENTS,
        "k": _K,
        "n_steps": training.n_steps,
        "n_activations": training.n_activations,
        "fraction_explained": training.fraction_explained,
        "n_dead": training.n_dead,
        "duration_s": training.duration_s,
        "latents": _examples(ds, site, training.sae),
    }


def _examples(ds: Any, site: str, sae: TopKSAE) -> list[dict[str, Any]]:
    """Return the strongest tokens of a few latents that fire rarely, but not by accident."""
    words = ds.sql(_WORDS).fetchall()
    strengths = _strengths(ds[site].take([row for row, _, _ in words]), sae)
    fires = strengths > 0
    share = fires.float().mean(dim=0)
    mean = strengths.sum(dim=0) / fires.sum(dim=0).clamp_min(1)
    is_rare = (share > _SHARES[0]) & (share < _SHARES[1])
    chosen = mean.where(is_rare, mean.new_tensor(-1.0)).topk(_N_SHOWN).indices.tolist()
    examples = []
    for latent in chosen:
        top: dict[tuple[str, str], float] = {}
        for ordinal in strengths[:, latent].argsort(descending=True).tolist():
            top.setdefault(words[ordinal][1:], float(strengths[ordinal, latent]))
            if len(top) == _N_TOKENS:
                break
        examples.append(
            {
                "latent": latent,
                "share": float(share[latent]),
                "top": [
                    {"token": token, "before": before[-_CONTEXT_CHARS:], "strength": strength}
                    for (token, before), strength in top.items()
                ],
            }
        )
    return examples


def _strengths(activations: torch.Tensor, sae: TopKSAE) -> torch.Tensor:
    """Return every latent at every token, `[n, d_sae]`, zero where it is not among the k largest."""
    import torch

    strengths = torch.zeros(len(activations), sae.d_sae)
    with torch.no_grad():
        for part, out in zip(torch.split(activations, 4096), torch.split(strengths, 4096), strict=True):
            values, latents = sae.encode(part)
            out.scatter_(1, latents, values)
    return strengths
