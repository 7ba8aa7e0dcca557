"""Negative log-likelihoods as sums per adapter; the caller divides by the step's target counts.

Shape letters: K adapters, M labelled rows, V classes of a codebook or of the vocabulary, C codebooks.
"""

from torch import Tensor
from torch.nn import functional as F

from higgs_tune.data.tokens import IGNORE


def nll_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Each adapter's NLL in nats summed over its labelled rows: for text, or for each codebook.

    A sum, not a mean: the caller divides by the target count of the whole step, so a short
    micro-batch weighs no more per frame than a long one.

    Args:
        logits: a head's logits, any float dtype: (K, M, V), or (K, M, C, V).
        labels: ids already shifted, so row m holds the target of logits m; IGNORE adds 0.

    Returns:
        float32 sums, shape (K,) or (K, C); 0 where there is no target.

    Source: HiggsAudioV2ForConditionalGeneration.forward, transformers 5.24.
    """
    nll = F.cross_entropy(
        logits.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORE, reduction="none"
    )
    return nll.unflatten(0, labels.shape).sum(1)
