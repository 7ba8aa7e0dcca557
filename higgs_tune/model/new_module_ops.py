"""Products with the new cross-attention modules: each adapter's rows with its own weights.

As in model.packed_ops, gradients are added straight into the bank's buffers.

Shape letters: J adapters of a cross_attention mode, N rows, D inputs, O outputs.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from higgs_tune.model.graph_weights import Adapters, GraphWeights


def new_linear(
    x_JND: Tensor, weights: Adapters, names: tuple[str, ...], adapters: Sequence[int]
) -> Tensor:
    """Multiply each adapter's rows by its own (O, D) matrices; outputs side by side, (J, N, ΣO)."""
    if isinstance(weights, GraphWeights):
        return weights.new_linear(x_JND, names, adapters)
    matrices = weights.new_tensors(names, adapters)
    return _NewLinear.apply(x_JND, weights.bank.anchor, matrices)


def new_scale(x_JND: Tensor, weights: Adapters, name: str, adapters: Sequence[int]) -> Tensor:
    """Multiply each adapter's rows elementwise by its own (D,) vector."""
    if isinstance(weights, GraphWeights):
        return weights.new_scale(x_JND, name, adapters)
    vectors = weights.new_tensors((name,), adapters)
    return _NewScale.apply(x_JND, weights.bank.anchor, vectors)


class _NewLinear(Function):
    @staticmethod
    def forward(
        ctx: Any, x_JND: Tensor, anchor: Tensor, matrices: Sequence[tuple[Tensor, Tensor]]
    ) -> Tensor:
        x_JND = x_JND.contiguous()
        y_JNO = x_JND.new_empty(*x_JND.shape[:2], len(matrices[0][0]))
        for x, (weight, _), y in zip(x_JND, matrices, y_JNO, strict=True):
            torch.mm(x, weight.t(), out=y)
        ctx.save_for_backward(x_JND)
        ctx.matrices = matrices
        return y_JNO

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        (x_JND,) = ctx.saved_tensors
        dx_JND = torch.empty_like(x_JND) if ctx.needs_input_grad[0] else None
        for j, (weight, gradient) in enumerate(ctx.matrices):
            dy = grads[0][j]
            gradient.addmm_(dy.t(), x_JND[j])
            if dx_JND is not None:
                torch.mm(dy, weight, out=dx_JND[j])
        return dx_JND, None, None


class _NewScale(Function):
    @staticmethod
    def forward(
        ctx: Any, x_JND: Tensor, anchor: Tensor, vectors: Sequence[tuple[Tensor, Tensor]]
    ) -> Tensor:
        ctx.save_for_backward(x_JND)
        ctx.vectors = vectors
        return x_JND * torch.stack([weight for weight, _ in vectors])[:, None]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        (x_JND,) = ctx.saved_tensors
        total_JD = (grads[0] * x_JND).sum(1)
        for (_, gradient), total in zip(ctx.vectors, total_JD, strict=True):
            gradient.add_(total)
        weight_JD = torch.stack([weight for weight, _ in ctx.vectors])
        return grads[0] * weight_JD[:, None], None, None
