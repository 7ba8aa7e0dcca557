"""A pack of adapters around one frozen base: forward_backward, optim_step, evaluate.

A single run is a pack of one. What an adapter computes depends only on its own examples and settings;
neighbours may join, leave or diverge. Shape letters: K slots or adapters of a batch, C codebooks.
"""

import mmap
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from higgs_tune.config import CrossAttention, TrialConfig
from higgs_tune.data.collate import PackBatch, TargetCounts, collate, to_device
from higgs_tune.data.tokens import Encoded
from higgs_tune.model.adapter_layout import Kind, Layout, Named
from higgs_tune.model.compiled import CompiledForward
from higgs_tune.model.dropout import Masks
from higgs_tune.model.groups import lora_groups
from higgs_tune.model.initial import initial_weights
from higgs_tune.model.load import Base
from higgs_tune.model.new_modules import MODULE_NAMES, new_module_shapes
from higgs_tune.model.packed_forward import packed_nll
from higgs_tune.model.packed_lora import AdapterBank
from higgs_tune.model.targets import account
from higgs_tune.train.forwards import Costs
from higgs_tune.train.lanes import Lanes
from higgs_tune.train.optim import RowStep, adamw_step, learning_rate
from higgs_tune.train.residents import AdapterState, PackLimits, Resident

T = TypeVar("T")


class Engine:
    """K slots of adapters that train and evaluate together."""

    def __init__(
        self,
        base: Base,
        limits: PackLimits,
        process: int = 0,
        *,
        share_matmuls: bool | None = None,
    ) -> None:
        """Allocate the slots.

        Args:
            process: rank of this process among those that train the same adapters.
            share_matmuls: whether neighbours share matmuls; default: with several slots, except on a CPU.
        """
        self._process = process
        self.base = base
        self.limits = limits
        self.device = next(base.model.parameters()).device
        self.num_codebooks: int = base.model.config.num_codebooks
        self.nll = CompiledForward(base.model) if base.compile else partial(packed_nll, base.model)
        self.lora_groups = lora_groups(base.model, limits.paths)
        dtype = next(base.model.parameters()).dtype
        if share_matmuls is None:
            share_matmuls = self.device.type != "cpu" and limits.num_slots > 1
        # not if compiled: each combination of adapters would need its own graph
        cuts = share_matmuls and not base.compile
        self.lanes = Lanes(self.device, Costs.of(base.model) if cuts else None)
        forks = sys.platform == "linux" and not (share_matmuls or base.compile)
        forks &= self.lanes.count > 1 and limits.num_slots > 1
        self.bank = AdapterBank(
            self.lora_groups,
            limits.num_slots,
            limits.max_rank,
            dtype,
            self.device,
            share_matmuls=share_matmuls,
            share_memory=forks,
            max_new_columns=_max_new_columns(base, limits) if forks else 0,
        )
        # oneDNN compiles its bfloat16 matmuls for each shape: padding keeps the shapes few
        compiles = self.device.type == "cpu" and dtype == torch.bfloat16
        self._slot_multiple = 32 if compiles else 1
        self.alive_K = torch.ones(limits.num_slots, dtype=torch.bool, device=self.device)
        self.residents: dict[str, Resident] = {}
        # by lane, over all adapters; in shared memory, because lanes may be processes
        self._forwards = memoryview(mmap.mmap(-1, 8 * self.lanes.count)).cast("q")
        self._lane = 0
        if forks:
            self.lanes.fork(self._run_job, limits.num_slots)

    @property
    def num_forwards(self) -> int:
        """Forwards so far, over all lanes."""
        return sum(self._forwards)

    def add(
        self, trial_id: str, config: TrialConfig, state: AdapterState | None = None
    ) -> Resident:
        """Put an adapter into a free slot, fresh from its seed or from a saved state.

        Raises:
            ValueError: no slot is free, the adapter is already resident or exceeds the engine's limits, or
                the state does not fit it.
        """
        taken = {resident.slot for resident in self.residents.values()}
        free = sorted(set(range(self.limits.num_slots)) - taken)
        if not free or trial_id in self.residents:
            raise ValueError(f"{trial_id}: no free slot, or already resident")
        limits = self.limits
        if config.rank > limits.max_rank or not set(config.targets) <= limits.paths:
            raise ValueError(f"{trial_id}: rank {config.rank}, {config.targets} exceed {limits}")
        own, lowest = (self.bank.layout_rank(rank) for rank in (config.rank, 1))
        # lowest rank class from the front, others from the end: neighbours of one class share matmuls
        slot = free[-1] if self.bank.share_matmuls and own > lowest else free[0]
        resident = Resident(trial_id, slot, config, account(self.base.model, config))
        model = self.base.model
        weights = state.weights if state else initial_weights(model, self.lora_groups, config)
        self._seat(slot, config)
        try:
            self._write(resident, "master", weights)
            if state:
                resident.step = state.step
                if state.exp_avg or state.step < config.num_steps:
                    self._write(resident, "exp_avg", state.exp_avg)
                    self._write(resident, "exp_avg_sq", state.exp_avg_sq)
            self.alive_K[resident.slot] = True
            self.bank.refresh_compute()
        except BaseException:  # re-raised; whatever it is, the next trial needs the slot
            self.bank.clear(resident.slot)
            raise
        self.residents[trial_id] = resident
        return resident

    def remove(self, trial_id: str) -> None:
        """Free the adapter's slot; the others keep theirs."""
        resident = self.residents.pop(trial_id)
        self.bank.clear(resident.slot)

    def batch(self, examples: Mapping[int, Sequence[Encoded]], *, bare: bool = False) -> PackBatch:
        """Collate slot → examples on the device for one forward; `bare`: for the base alone."""
        modes = {} if bare else self.modes()
        return collate(examples, modes, self._slot_multiple).to(self.device)

    def modes(self) -> dict[int, str]:
        """Slot → cross_attention of the residents."""
        return {r.slot: r.config.cross_attention for r in self.residents.values()}

    def forward_backward(
        self, batch: PackBatch, counts: Mapping[int, TargetCounts]
    ) -> tuple[Tensor, Tensor]:
        """Add the gradients of one micro-batch to the bank.

        Args:
            batch: rows of the adapters at `batch.slots`.
            counts: slot → targets of the adapter's whole optimizer step, over all its micro-batches.

        Returns:
            Summed nats, detached: text (K,), audio (K, C). Reading them waits for the device.
        """
        self._forwards[self._lane] += 1
        by_slot = {r.slot: r.config.rates_at(r.step) for r in self.residents.values()}
        share_KC = torch.zeros(len(batch.slots), 1 + self.num_codebooks)  # text, then codebooks
        for k, slot in enumerate(batch.slots):
            rates, count = by_slot[slot], counts[slot]
            if count.text:
                share_KC[k, 0] = rates["text_loss_weight"] / count.text
            share = rates["audio_loss_weight"] / self.num_codebooks
            for codebook, number in enumerate(count.audio_C):
                if number:
                    share_KC[k, 1 + codebook] = share / int(number)
        share_KC = to_device(share_KC, self.device)
        weights = self.bank.pack(batch.slots).training(self._masks(batch.slots))
        text_sum_K, audio_sum_KC = self.nll(batch, weights)
        loss = (text_sum_K * share_KC[:, 0]).sum() + (audio_sum_KC * share_KC[:, 1:]).sum()
        loss.backward()
        return text_sum_K.detach(), audio_sum_KC.detach()

    def discard(self, slots: Sequence[int]) -> None:
        """Reset these adapters' unfinished step, so that it can be redone from its start."""
        self.bank.clear_gradients(slots)
        for resident in self.residents.values():
            if resident.slot in slots:
                resident.num_forwards = 0

    def optim_step(self, trial_ids: Sequence[str]) -> Tensor:
        """Step these adapters once; returns gradient norms before clipping, (K,), 0 for other slots."""
        rows = {}
        for trial_id in trial_ids:
            resident = self.residents[trial_id]
            config = resident.config
            factor = config.rates_at(resident.step)["new_module_lr_factor"]
            rate = learning_rate(config, resident.step)
            resident.step += 1
            resident.num_forwards = 0
            rows[resident.slot] = RowStep(
                learning_rate=rate,
                new_module_learning_rate=rate * factor,
                weight_decay=config.weight_decay,
                clip_norm=config.clip_norm,
                step=resident.step,
            )
        return adamw_step(self.bank, rows, self.alive_K)

    @torch.no_grad()
    def evaluate(self, batch: PackBatch, *, bare: bool = False) -> tuple[Tensor, Tensor]:
        """Summed nats of a batch, text (K,) and audio (K, C); `bare` leaves the adapters out."""
        self._forwards[self._lane] += 1
        weights = None if bare else self.bank.pack(batch.slots)
        return self.nll(batch, weights)

    def state(self, trial_id: str, *, moments: bool = True) -> AdapterState:
        """Copy what `add` needs to resume exactly; moments are needed only for further steps."""
        resident = self.residents[trial_id]
        weights = self.bank.copies(resident.slot, "master")
        if not moments:
            return AdapterState(resident.step, weights, {}, {})
        kinds: tuple[Kind, ...] = ("exp_avg", "exp_avg_sq")
        both = (self.bank.copies(resident.slot, kind) for kind in kinds)
        return AdapterState(resident.step, weights, *both)

    def gradient_shares(self, trial_id: str) -> dict[str, float]:
        """Target path → share of the squared norm of Adam's exp_avg; waits for the device."""
        resident = self.residents[trial_id]
        squares = dict.fromkeys(resident.config.targets, 0.0)
        for part in self.bank.seats[resident.slot].parts:
            squares[part.path] += float(part.storage.exp_avg[part.where].square().sum())
        total = sum(squares.values())
        return {path: square / total for path, square in squares.items()} if total > 0 else {}

    def compute(self, job: Callable[["Engine"], T], slots: Sequence[int]) -> T:
        """Run a job on this engine in the calling lane, and return its result.

        Args:
            job: may change nothing of the engine but its bank's gradients. The lane may be a process of
                its own, so the job and its result must pickle.
            slots: slots of the adapters that the job uses.
        """
        process = self.lanes.process
        if process is None:
            return job(self)
        return process.call([r for r in self.residents.values() if r.slot in slots], job)

    def _run_job(self, lane: int, residents: Sequence[Resident], job: Callable[["Engine"], T]) -> T:
        """Run `compute`'s job in a lane's process, on its copy of the parent's engine."""
        self._lane = lane
        for resident in residents:
            place = f"slot {resident.slot}"  # not the trial's id: a trial may move to another slot
            known = self.residents.pop(place, None)
            if known is None or known.config != resident.config:
                self.bank.vacate(resident.slot)
                self._seat(resident.slot, resident.config)
            self.residents[place] = resident
        return job(self)

    def _seat(self, slot: int, config: TrialConfig) -> None:
        scale = config.lora_alpha / config.rank
        new = _new_modules(self.base, config.cross_attention)
        self.bank.seat(slot, config.rank, scale, config.targets, new, config.dropout)

    def _masks(self, slots: Sequence[int]) -> Masks | None:
        """Dropout masks for these adapters' next forward; None if none of them has dropout."""
        by_slot = {resident.slot: resident for resident in self.residents.values()}
        seeds: dict[int, tuple[int, ...]] = {}
        for k, slot in enumerate(slots):
            resident = by_slot[slot]
            if resident.config.dropout:
                of_step = (resident.config.seed, resident.step, self._process)
                seeds[k] = (*of_step, resident.num_forwards)
            resident.num_forwards += 1
        return Masks(self.device, seeds) if seeds else None

    def _write(self, resident: Resident, kind: Kind, tensors: Mapping[str, Tensor]) -> None:
        views = self.bank.views(resident.slot, kind)
        if views.keys() != tensors.keys():
            odd = sorted(views.keys() ^ tensors.keys())
            raise ValueError(f"{resident.trial_id}: state does not fit its targets at {odd[:3]}")
        for name, view in views.items():
            if view.shape != tensors[name].shape:  # copy_ would broadcast
                raise ValueError(
                    f"{resident.trial_id}: state does not fit at {name}: shape "
                    f"{tuple(tensors[name].shape)}, needed {tuple(view.shape)}"
                )
        for name, view in views.items():
            view.copy_(tensors[name])


def _new_modules(base: Base, mode: CrossAttention) -> list[Named]:
    shapes = new_module_shapes(base.model, mode)
    return [(name, tuple(shape), "audio_attention") for name, shape in shapes.items()]


def _max_new_columns(base: Base, limits: PackLimits) -> int:
    if "audio_attention" not in limits.paths:
        return 0
    return max(Layout([_new_modules(base, mode)]).num_columns for mode in MODULE_NAMES)
