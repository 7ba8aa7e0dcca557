"""Predicts the peak memory of training before anything is loaded.

There is no separate formula: the engine itself runs one optimizer step on fake tensors (shapes and dtypes
without data, at any model size), and every storage that the step allocates and frees is counted. So the
prediction always follows the code's bank layout, forward and optimizer.

At full size in bfloat16 (rank 16 on all linears) that is 106 kB of activations per row and layer, and per
labelled row the logits in the base's dtype and in float32, and what the loss keeps of them.
"""

import weakref
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import HiggsAudioV2Config, HiggsAudioV2ForConditionalGeneration
from transformers.initialization import no_init_weights

from higgs_tune.config import CrossAttention, TargetPath, TrialConfig
from higgs_tune.data.collate import PackBatch, collate, count_targets
from higgs_tune.data.tokens import IGNORE, Encoded
from higgs_tune.model.load import Base
from higgs_tune.train.engine import Engine
from higgs_tune.train.residents import PackLimits

GIB = 1 << 30
# Share of memory kept free: CUDA context, cuBLAS workspaces, blocks that the caching allocator cannot reuse.
RESERVE = 0.05


@dataclass(frozen=True)
class StepShape:
    """The rows of one adapter in one forward."""

    num_clips: int
    text_rows: int  # per clip, as the next two
    audio_rows: int
    text_targets: int
    num_micro_batches: int = 1  # forwards of one optimizer step

    @property
    def num_rows(self) -> int:
        """Rows of one forward."""
        return self.num_clips * (self.text_rows + self.audio_rows)

    @classmethod
    def of(cls, clips: int, clip_rows: int, token_budget: int) -> "StepShape":
        """Split equally long clips by a token budget; a fifth of a clip is text, half of that targets."""
        per_forward = max(1, min(clips, token_budget // clip_rows))
        text_rows = max(2, round(0.2 * clip_rows))
        return cls(
            num_clips=per_forward,
            text_rows=text_rows,
            audio_rows=max(1, clip_rows - text_rows),
            text_targets=max(1, text_rows // 2),
            num_micro_batches=-(-clips // per_forward),
        )


@dataclass(frozen=True)
class Memory:
    """Bytes of each part at the peak of a step."""

    base: int  # frozen weights
    adapters: int  # bank: master, moments, gradients, compute copy
    activations: int  # what the layers keep for backward
    heads: int  # logits at labelled rows and what the losses keep
    transient: int  # short-lived, on top: gradients of activations, or the optimizer's temporaries

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return sum(asdict(self).values())


class _Live(TorchDispatchMode):
    """Counts the bytes of all live storages that ops have allocated."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.at_heads: int | None = None  # bytes alive when the first head runs
        self.at_backward: int | None = None
        self.heads: set[int] = set()
        self._sizes: dict[int, int] = {}

    def watch_heads(self, weights: Sequence[Tensor]) -> None:
        """Note the bytes alive when one of these weights is first used, and when backward starts."""
        self.heads = {_key(weight) for weight in weights}
        self.at_heads = self.at_backward = None
        self.peak = self.now

    def _free(self, key: int) -> None:
        self.now -= self._sizes.pop(key)

    def _count(self, tensor: Tensor) -> None:
        storage, key = tensor.untyped_storage(), _key(tensor)
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Run an op, counting what it allocates."""
        if func is torch.ops.aten._fused_adamw_.default:  # in place, and has no fake kernel
            return None
        if self.heads and self.at_heads is None:
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
            if any(_key(tensor) in self.heads for tensor in tensors):
                self.at_heads = self.now
        if self.at_heads is not None and self.at_backward is None and "backward" in func.name():
            self.at_backward = self.now
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        return out


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def predict(
    config: HiggsAudioV2Config,
    dtype: str,
    limits: PackLimits,
    modes: Sequence[CrossAttention],
    step: StepShape,
    dropout: float = 0.0,
) -> Memory:
    """Memory of an engine with all its slots taken, at the peak of one optimizer step.

    Every layer adds the same bytes, so a deep model is extrapolated linearly from one, two and three
    layers. That is valid if these lie on a line and each layer raises the peak by at least its base,
    adapters, activations and heads: then no other moment of the step can become the peak. Otherwise all
    layers are run.

    Args:
        config: the base's configuration; nothing else of the base is read.
        dtype: "bfloat16" or "float32".
        limits: the sweep's limits; every adapter has the largest rank and all paths.
        modes: cross_attention of each slot.
        dropout: dropout of every adapter, whose masks are kept for the backward.
    """
    num_layers = config.num_hidden_layers
    if num_layers > 1 + 2 + 3:
        plain = config.to_dict()
        few = [HiggsAudioV2Config.from_dict({**plain, "num_hidden_layers": n}) for n in (1, 2, 3)]
        one, two, three = (
            astuple(run_fake(each, dtype, limits, modes, step, dropout)) for each in few
        )
        slope = [b - a for a, b in zip(one, two, strict=True)]
        is_line = slope == [c - b for b, c in zip(two, three, strict=True)]
        if is_line and Memory(*slope).transient >= 0:
            return Memory(*(a + (num_layers - 1) * s for a, s in zip(one, slope, strict=True)))
    return run_fake(config, dtype, limits, modes, step, dropout)


def run_fake(
    config: HiggsAudioV2Config,
    dtype: str,
    limits: PackLimits,
    modes: Sequence[CrossAttention],
    step: StepShape,
    dropout: float = 0.0,
) -> Memory:
    """Like `predict`, but always run a step of the whole model."""
    live = _Live()
    with FakeTensorMode(allow_non_fake_inputs=True), live:
        model = empty_model(config, getattr(torch, dtype))
        in_base = live.now
        # the engine uses nothing of its base but the model
        base = Base(model, None, None, "fake")  # type: ignore[arg-type]
        engine = Engine(base, limits, share_matmuls=limits.num_slots > 1)  # as on a GPU
        trial_ids = fill_slots(engine, modes, dropout)
        in_adapters = before = live.now
        assert model.text_lm_head is not None
        live.watch_heads([model.text_lm_head.weight, model.audio_lm_head.weight])
        run_step(engine, trial_ids, step)
        assert live.at_heads is not None and live.at_backward is not None
        # gradient sums over micro-batches belong to the bank and stay
        sums = [storage.grad_sum for storage in engine.bank.storages()]
        before += sum(part.untyped_storage().nbytes() for part in sums if part is not None)
        # taken in the first forward, before there are such sums
        heads = max(0, live.at_backward - live.at_heads)
        activations = live.at_heads - in_adapters
        return Memory(
            base=in_base,
            adapters=before - in_base,
            activations=activations,
            heads=heads,
            transient=live.peak - before - activations - heads,
        )


def empty_model(
    config: HiggsAudioV2Config, dtype: torch.dtype
) -> HiggsAudioV2ForConditionalGeneration:
    """A frozen base with its text head; on fake or meta tensors it has shapes only."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with no_init_weights():
            model = HiggsAudioV2ForConditionalGeneration(config, use_text_head=True)
    finally:
        torch.set_default_dtype(before)
    return model.requires_grad_(False).eval()


def largest_trial(limits: PackLimits, mode: CrossAttention, dropout: float = 0.0) -> TrialConfig:
    """The largest adapter that the limits allow, with a cross_attention mode."""
    new: set[TargetPath] = set() if mode == "off" else {"audio_attention"}
    return TrialConfig(
        rank=limits.max_rank,
        alpha=32.0,
        targets=tuple(sorted((limits.paths - {"audio_attention"}) | new)),
        cross_attention=mode,
        dropout=dropout,
        learning_rate=1e-4,
        num_steps=2,
        report_every_steps=1,
    )


def fill_slots(engine: Engine, modes: Sequence[CrossAttention], dropout: float = 0.0) -> list[str]:
    """Put the largest adapter of its cross_attention mode into every slot; returns their ids."""
    limits, names = engine.limits, []
    for slot, mode in enumerate(modes):
        names.append(f"fit-{slot}")
        engine.add(names[-1], largest_trial(limits, mode, dropout))
    assert len(names) == limits.num_slots
    return names


def run_step(engine: Engine, trial_ids: Sequence[str], step: StepShape) -> None:
    """Run one optimizer step of these adapters on rows of the given shape."""
    examples = [_example(step, engine.num_codebooks)] * step.num_clips
    slots = [engine.residents[name].slot for name in trial_ids]
    counts = dict.fromkeys(slots, count_targets(examples, engine.num_codebooks))
    # not Engine.batch: the fakes lie on a CPU, for which it pads more than for the GPU in question
    batch: PackBatch = collate(dict.fromkeys(slots, examples), engine.modes())
    for index in range(min(2, step.num_micro_batches)):  # a third one needs no more than the second
        if index:
            engine.bank.accumulate_gradients(slots)
        engine.forward_backward(batch.to(engine.device), counts)
    engine.optim_step(trial_ids)


def _example(step: StepShape, num_codebooks: int) -> Encoded:
    """A clip with its text before its audio; the ids mean nothing."""
    num_rows = step.text_rows + step.audio_rows
    text_labels = np.full(num_rows, IGNORE)
    text_labels[: step.text_targets] = 1
    codes = np.zeros((step.audio_rows, num_codebooks), dtype=np.int64)
    return Encoded(
        key="fit",
        ids_L=np.ones(num_rows, dtype=np.int64),
        audio_rows_A=np.arange(step.text_rows, num_rows),
        codes_AC=codes,
        text_labels_L=text_labels,
        audio_labels_AC=codes,
    )


def memory_of_slots(one: Memory, two: Memory, num_slots: int) -> Memory:
    """Extrapolate to any number of slots from the predictions for one and for two.

    Every part but the base grows by the same bytes with each slot.
    """
    parts = zip(astuple(one), astuple(two), strict=True)
    return Memory(*(first + (num_slots - 1) * (second - first) for first, second in parts))


def slots_that_fit(ones: Sequence[Memory], twos: Sequence[Memory], gpu_bytes: int) -> int:
    """How many adapters a device holds, whichever of the given kinds they are.

    Args:
        ones: predictions for one slot, one per kind.
        twos: predictions for two slots.
    """
    fitting = []
    for one, two in zip(ones, twos, strict=True):
        room = gpu_bytes * (1 - RESERVE) - one.total
        fitting.append(0 if room < 0 else 1 + int(room // (two.total - one.total)))
    return min(fitting)
