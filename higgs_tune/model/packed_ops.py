"""The differentiable operations of the packed forward, with handwritten derivatives.

Autograd's derivatives of strided slices, gathers and decomposed norms fill and add whole tensors, which on
small steps costs more than the matmuls. Adapters' gradients are added straight into the bank's gradient
buffers, so there are no second derivatives.

Shape letters: as in model.packed_lora; S sequences, L length, H heads, E head size.
"""

from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

from higgs_tune.model.adapter_layout import Linears
from higgs_tune.model.dropout import Section
from higgs_tune.model.graph_weights import Adapters, GraphWeights
from higgs_tune.model.pack_weights import Run


def adapted_linear(
    x_KND: Tensor, group: Linears, weights: Adapters | None, sections: Sequence[Section]
) -> Tensor:
    """Apply the linears of one input group, each adapter's rows with its own LoRA.

    Args:
        sections: the sections of the N rows, in order.

    Returns:
        (K, N, ΣO): the outputs side by side in the group's order. A NaN stays within its adapter, because
        each output row depends on its own input row only.
    """
    if weights is None:
        outputs = [F.linear(x_KND, linear.weight, linear.bias) for linear in group.values()]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
    if isinstance(weights, GraphWeights):
        return weights.adapted_linear(x_KND, group)
    runs = weights.runs(group)
    masks: list[list[Tensor]] = [[] for _ in runs]
    if weights.masks is not None:
        for own, run in zip(masks, runs, strict=True):
            if min(run.keeps) < 1:  # each linear has its own mask
                own += weights.masks.draw(run.rows, run.keeps, len(group), x_KND.shape[2], sections)
    # no anchor without runs: before the first adapted linear nothing is differentiated or saved
    anchor = weights.bank.anchor if runs else None
    return _AdaptedLinear.apply(x_KND, anchor, list(group.values()), runs, masks)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The stock RMSNorm; on a CPU with a frozen weight, with a derivative that takes few passes."""
    if x.device.type == "cpu" and not weight.requires_grad:
        return _RmsNorm.apply(x, weight, eps)
    return F.rms_norm(x, weight.shape, weight, eps)


def rotate(x_SLHE: Tensor, cos_SLE: Tensor, sin_SLE: Tensor) -> Tensor:
    """Rotary embedding as in transformers' apply_rotary_pos_emb, with the heads second to last."""
    return _Rotate.apply(x_SLHE, cos_SLE[:, :, None], sin_SLE[:, :, None])


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) · up, where gate and up are the halves of the last axis."""
    if torch.compiler.is_compiling():
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up
    return _SwiGlu.apply(gate_up)


def rearrange(rows_ND: Tensor, to: Tensor, back: Tensor, pads: Tensor) -> Tensor:
    """Copy rows to another layout; the derivative copies them back by the inverse index.

    Args:
        to: source row of each new row.
        back: new row of each source row.
        pads: bool per source row: padding without a new row, which gets no gradient.
    """
    return _Rearrange.apply(rows_ND, to, back, pads)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b, of matrices or of batches of them; `@` costs the host of a GPU more time."""
    return torch.mm(a, b) if a.dim() == 2 else torch.bmm(a, b)


def _add_product(out: Tensor, a: Tensor, b: Tensor, factor: float = 1.0) -> None:
    """out += factor · a b, of matrices or of batches of them."""
    if out.dim() == 2:
        out.addmm_(a, b, alpha=factor)
    else:
        out.baddbmm_(a, b, alpha=factor)


class _AdaptedLinear(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_KND: Tensor,
        anchor: Tensor | None,
        linears: list[nn.Linear],
        runs: list[Run],
        masks: list[list[Tensor]],
    ) -> Tensor:
        x_KND = x_KND.contiguous()
        widths = [linear.out_features for linear in linears]
        y_KNO = x_KND.new_empty(*x_KND.shape[:2], sum(widths))
        for linear, out in zip(linears, y_KNO.flatten(0, 1).split(widths, 1), strict=True):
            if linear.bias is None:
                torch.mm(x_KND.flatten(0, 1), linear.weight.t(), out=out)
            else:
                torch.addmm(linear.bias, x_KND.flatten(0, 1), linear.weight.t(), out=out)
        hidden = []
        for run, own in zip(runs, masks, strict=True):
            z_kNr = _reduced(x_KND[run.rows], run, own)
            if run.scales_k11 is not None:
                z_kNr.mul_(run.scales_k11)
            outputs = y_KNO[run.rows].split(widths, -1)
            for y, z, b in zip(
                outputs, z_kNr.chunk(len(widths), -1), run.factors.b_kOr, strict=True
            ):
                _add_product(y, z, b.mT, run.scale)
            hidden.append(z_kNr)
        if runs:
            ctx.save_for_backward(x_KND, *hidden, *(mask for own in masks for mask in own))
        ctx.linears, ctx.runs, ctx.widths = linears, runs, widths
        ctx.num_masks = [len(own) for own in masks]
        return y_KNO

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        dy_KNO = grads[0].contiguous()
        linears, widths = ctx.linears, ctx.widths
        dx_KND = None
        if ctx.needs_input_grad[0]:
            dx_KND = dy_KNO.new_empty(*dy_KNO.shape[:2], linears[0].in_features)
            rows = dx_KND.flatten(0, 1)
            for n, dy in enumerate(dy_KNO.flatten(0, 1).split(widths, 1)):
                rows.addmm_(dy, linears[n].weight, beta=1 if n else 0)
        x_KND, *saved = ctx.saved_tensors or (None,)
        hidden, masks = saved[: len(ctx.runs)], iter(saved[len(ctx.runs) :])
        for run, z_kNr, num_masks in zip(ctx.runs, hidden, ctx.num_masks, strict=True):
            assert x_KND is not None
            own = list(islice(masks, num_masks))
            dys, num = dy_KNO[run.rows].split(widths, -1), len(widths)
            for dy, z, gradient in zip(
                dys, z_kNr.chunk(num, -1), run.factors.b_grad_kOr, strict=True
            ):
                _add_product(gradient, dy.mT, z, run.scale)
            parts = [_product(dy, b) for dy, b in zip(dys, run.factors.b_kOr, strict=True)]
            dz_kNr = parts[0] if num == 1 else torch.cat(parts, -1)
            if run.scales_k11 is not None:
                dz_kNr.mul_(run.scales_k11)
            dx_kND = None if dx_KND is None else dx_KND[run.rows]
            if own:
                _add_masked(run, own, dz_kNr, x_KND[run.rows], dx_kND)
                continue
            _add_product(run.factors.a_grad_krD, dz_kNr.mT, x_KND[run.rows], run.scale)
            if dx_kND is not None:
                _add_product(dx_kND, dz_kNr, run.factors.a_krD, run.scale)
        return dx_KND, None, None, None, None


def _reduced(x_kND: Tensor, run: Run, masks: Sequence[Tensor]) -> Tensor:
    """x Aᵀ of the group's linears side by side, each with its own mask of x if there are any."""
    if not masks:
        return _product(x_kND, run.factors.a_krD.mT)
    factors = run.factors.a_krD.chunk(len(masks), -2)
    kept = zip(masks, factors, strict=True)
    return torch.cat([_product(x_kND * mask, a.mT) for mask, a in kept], -1)


def _add_masked(
    run: Run,
    masks: Sequence[Tensor],
    dz_kNr: Tensor,
    x_kND: Tensor,
    dx_kND: Tensor | None,
) -> None:
    """Add the derivatives of `_reduced` with masks to those of A and of x."""
    num = len(masks)
    factors, gradients = run.factors.a_krD.chunk(num, -2), run.factors.a_grad_krD.chunk(num, -2)
    for mask, dz, a, gradient in zip(masks, dz_kNr.chunk(num, -1), factors, gradients, strict=True):
        _add_product(gradient, dz.mT, x_kND * mask, run.scale)
        if dx_kND is not None:
            dx_kND.addcmul_(_product(dz, a), mask, value=run.scale)


class _RmsNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        inverse = x.float().square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (x.float() * inverse).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        # y = w x i with i = (mean x² + eps)^-½: dx = i (w dy - x i² mean(w dy x))
        x, weight, inverse = ctx.saved_tensors
        x = x.float()
        scaled = grads[0].float() * weight
        shared = (scaled * x).mean(-1, keepdim=True).mul_(inverse.square()).neg_()
        return scaled.addcmul_(x, shared).mul_(inverse).to(grads[0].dtype), None, None


class _Rotate(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        cos, sin = ctx.saved_tensors  # equal halves, so the transpose rotates back
        return _rotated(grads[0], cos, sin, -1), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, way: int) -> Tensor:
    half = x.shape[-1] // 2
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-way)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:], value=way)
    return out


class _SwiGlu(Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, -1)
        out = torch.empty_like(gate_up)
        d_gate, d_up = out.chunk(2, -1)
        torch.mul(F.silu(gate), grads[0], out=d_up)
        torch.ops.aten.silu_backward(grads[0] * up, gate, grad_input=d_gate)
        return (out,)


class _Rearrange(Function):
    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, to: Tensor, back: Tensor, pads: Tensor) -> Tensor:
        ctx.save_for_backward(back, pads)
        return rows_ND.index_select(0, to)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        back, pads = ctx.saved_tensors
        grad = grads[0].index_select(0, back)
        return grad.masked_fill_(pads[:, None], 0), None, None, None
