"""What is done with a stored dataset. It needs torch, so `import strapfmt` does not load it."""

from strapfmt.analysis.sae import SAETraining, TopKSAE, train_sae

__all__ = ["SAETraining", "TopKSAE", "train_sae"]
