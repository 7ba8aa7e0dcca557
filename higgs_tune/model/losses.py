"""Negative log-likelihoods as sums per adapter; whoever steps divides them once.

Shape letters: K adapters, M labelled rows, V classes of a codebook or of the vocabulary, C codebooks.
"""

from torch import Tensor
from torch.nn import functional as F

from higgs_tune.data.tokens import IGNORE


def text_nll_sum(logits_KMV: Tensor, labels_KM: Tensor) -> Tensor:
    """Sum each adapter's nats over its labelled text rows.

    Args:
        logits_KMV: text-head logits, any float dtype.
        labels_KM: ids already shifted, so row m holds the target of logits m; IGNORE adds 0.

    Returns:
        float32 sums, shape (K,); 0 for an adapter without targets.
    """
    nll_KM = F.cross_entropy(
        logits_KMV.flatten(0, 1).float(), labels_KM.flatten(), ignore_index=IGNORE, reduction="none"
    )
    return nll_KM.unflatten(0, labels_KM.shape).sum(1)


def codebook_nll_sum(logits_KMCV: Tensor, labels_KMC: Tensor) -> Tensor:
    """Sum each adapter's nats of each codebook, with one cross-entropy over all codebooks.

    A sum, not a mean: the caller divides by the target count of the whole step, so a short
    micro-batch weighs no more per frame than a long one.

    Args:
        logits_KMCV: audio-head logits, any float dtype.
        labels_KMC: code ids already shifted; IGNORE adds 0.

    Returns:
        float32 sums, shape (K, C). A codebook with no target gives 0.

    Source: HiggsAudioV2ForConditionalGeneration.forward, transformers 5.23.
    """
    nll = F.cross_entropy(
        logits_KMCV.flatten(0, 2).float(),
        labels_KMC.flatten(),
        ignore_index=IGNORE,
        reduction="none",
    )
    return nll.unflatten(0, labels_KMC.shape).sum(1)
