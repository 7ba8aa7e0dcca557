"""The packed forward under torch.compile, one graph for each kind of pack."""

from collections.abc import Callable, Hashable
from dataclasses import fields, replace
from threading import Lock
from types import FunctionType

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import HiggsAudioV2ForConditionalGeneration

from higgs_tune.data.collate import CrossIndex, PackBatch
from higgs_tune.data.tokens import IGNORE
from higgs_tune.model.graph_weights import (
    GraphInputs,
    GraphPlan,
    GraphWeights,
    draw_masks,
    graph_inputs,
    graph_kind,
    graph_plan,
)
from higgs_tune.model.pack_weights import PackWeights
from higgs_tune.model.packed_forward import packed_nll

Nll = tuple[Tensor, Tensor]


class CompiledForward:
    """A compiled replacement for `packed_nll` with one base."""

    def __init__(
        self, base: HiggsAudioV2ForConditionalGeneration, backend: str = "inductor"
    ) -> None:
        self._base, self._backend = base, backend
        self._graphs: dict[Hashable, Callable[..., Nll]] = {}
        self._lock = Lock()  # lanes may call at the same time

    def __call__(self, batch: PackBatch, weights: PackWeights | None) -> Nll:
        """Compute `packed_nll`; the first call of a kind compiles, which takes seconds to minutes."""
        batch = _pad_to_two(batch)
        _mark(batch)
        if weights is None:
            with self._lock:
                graph = self._graph(len(batch.slots), None)
            return graph(batch, None)
        masks = draw_masks(weights, batch, len(self._base.model.layers))
        for own in masks.values():
            for mask in own:
                torch._dynamo.maybe_mark_dynamic(mask, 0)
        kind = graph_kind(weights), tuple(masks)
        with self._lock:
            graph = self._graph(kind, None if kind in self._graphs else graph_plan(weights))
        return graph(batch, graph_inputs(weights, masks))

    def _graph(self, kind: Hashable, plan: GraphPlan | None) -> Callable[..., Nll]:
        if kind not in self._graphs:
            base = self._base

            def forward(batch: PackBatch, inputs: GraphInputs | None) -> Nll:
                weights = None if inputs is None or plan is None else GraphWeights.of(plan, inputs)
                return packed_nll(base, batch, weights)

            # a name per kind: Dynamo counts recompiles and infers dynamic sizes by code object and name
            code = forward.__code__.replace(co_name=f"packed_nll_{len(self._graphs)}")
            own = FunctionType(code, globals(), code.co_name, None, forward.__closure__)
            self._graphs[kind] = torch.compile(own, fullgraph=True, backend=self._backend)
        return self._graphs[kind]


def _pad_to_two(batch: PackBatch) -> PackBatch:
    """Pad to at least two labelled rows of text and of audio: widths 0 and 1 would each compile a graph."""
    text, audio = batch.text_rows_KM.shape[1], batch.audio_rows_KM.shape[1]
    if min(text, audio) > 1:
        return batch
    text, audio = max(2 - text, 0), max(2 - audio, 0)
    return replace(
        batch,
        text_rows_KM=F.pad(batch.text_rows_KM, (0, text)),
        text_labels_KM=F.pad(batch.text_labels_KM, (0, text), value=IGNORE),
        audio_rows_KM=F.pad(batch.audio_rows_KM, (0, audio)),
        audio_labels_KMC=F.pad(batch.audio_labels_KMC, (0, 0, 0, audio), value=IGNORE),
    )


def _mark(batch: PackBatch | CrossIndex) -> None:
    """Mark the axes that vary from batch to batch as dynamic: all but adapters and codebooks."""
    for field in fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, Tensor):
            letters = field.name.rsplit("_", 1)[1]
            for axis in range(value.dim()):
                if not (axis == 0 and letters[0] in "KJ") and letters[axis] != "C":
                    torch._dynamo.maybe_mark_dynamic(value, axis)
        elif isinstance(value, dict):
            for cross in value.values():
                _mark(cross)
