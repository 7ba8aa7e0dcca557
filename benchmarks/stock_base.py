"""The stock model with its data, as people train it with transformers + PEFT, on our labels."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from sides import stock_inputs, under_autocast
from torch import Tensor, nn

from higgs_tune.config import BaseSettings, DataSettings, TrialConfig
from higgs_tune.data.collate import count_targets, split_micro_batches
from higgs_tune.data.dataset import Dataset
from higgs_tune.data.held_out import validation_sets
from higgs_tune.data.order import TrainOrder
from higgs_tune.data.tokens import Encoded
from higgs_tune.metrics import VAL_AUDIO_NLL, VAL_TEXT_NLL
from higgs_tune.model.load import load_base
from higgs_tune.model.targets import lora_regex
from higgs_tune.train.examples import Examples
from higgs_tune.train.optim import learning_rate_factor

STARTED, REPORTED, PROCESS = "first_step_at", "reported_at", "process"
VALIDATION_ROWS = 1024  # per forward, as in our sweep's validation


def labelled_inputs(examples: Sequence[Encoded], num_codebooks: int) -> dict[str, Tensor]:
    """Arguments of the stock forward, without labels that are all ignored: its loss would be NaN."""
    counts = count_targets(list(examples), num_codebooks)
    inputs = stock_inputs(examples, num_codebooks)
    if not counts.text:
        del inputs["labels"]
    if not counts.audio_C.any():
        del inputs["audio_labels"]
    return inputs


class StockBase:
    """A base and its data: what one process keeps between trials."""

    def __init__(self, base: BaseSettings, data: DataSettings) -> None:
        self.base = load_base(base)
        self.model: Any = under_autocast(self.base.model)
        self.device = next(self.base.model.parameters()).device
        self.half = next(self.base.model.parameters()).dtype == torch.bfloat16
        self.num_codebooks: int = self.base.model.config.num_codebooks
        dataset = Dataset.open(data.path)
        self.examples = Examples(self.base, dataset, data)
        sets = validation_sets(dataset, data.num_val_clips, **self.examples.making)
        self.validation = [
            [
                (count_targets(part, self.num_codebooks), self.inputs(part))
                for part in split_micro_batches(
                    sorted(map(self.examples.encode, clips), key=lambda e: e.num_rows),
                    VALIDATION_ROWS,
                )
            ]
            for clips in (sets.transcribe, sets.speak)
        ]

    def inputs(self, examples: Sequence[Encoded]) -> dict[str, Tensor]:
        """Arguments of the stock forward on the device."""
        found = labelled_inputs(examples, self.num_codebooks)
        return {name: tensor.to(self.device) for name, tensor in found.items()}

    def order(self, trial: TrialConfig) -> TrainOrder:
        """The clips of each step, as our sweep draws them."""
        return self.examples.order(trial.batch_clips, trial.seed)

    def batch(self, order: TrainOrder, step: int) -> list[Encoded]:
        """The encoded clips of a step."""
        return [self.examples.encode(clip) for clip in order.batch(step)]

    def adapted(self, trial: TrialConfig) -> PeftModel:
        """Add a new adapter to the base in place; `unload` removes it again."""
        torch.manual_seed(trial.seed)
        config = LoraConfig(
            r=trial.rank,
            lora_alpha=trial.lora_alpha,  # type: ignore[arg-type]  # PEFT accepts any number
            target_modules=lora_regex(trial.targets),
        )
        model = get_peft_model(self.model, config)
        assert isinstance(model, PeftModel)
        return model.train()

    def forward(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """The stock loss: the text mean plus the sum of the codebooks' means."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            return model(**inputs, use_cache=False).loss

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Nats per text token and per code on the held-out clips."""
        model.eval()
        transcribe, speak = self.validation
        with torch.no_grad():
            text = [(c.text, float(self.forward(model, inputs))) for c, inputs in transcribe]
            audio = [(c.audio_C, float(self.forward(model, inputs))) for c, inputs in speak]
        model.train()
        codes = [int(count_C[0]) for count_C, _ in audio]
        # all codebooks have equally many targets, so the mean of their means is the mean
        assert all((count_C == count_C[0]).all() for count_C, _ in audio)
        return {
            VAL_TEXT_NLL: sum(n * loss for n, loss in text) / sum(n for n, _ in text),
            VAL_AUDIO_NLL: float(np.average([loss for _, loss in audio], weights=codes))
            / self.num_codebooks,
        }


def optimizer_of(
    model: nn.Module, trial: TrialConfig
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW over the adapter, and our sweep's learning-rate schedule."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=trial.learning_rate, weight_decay=trial.weight_decay, fused=True
    )

    def factor(step: int) -> float:
        return learning_rate_factor(
            step, trial.num_steps, trial.warmup_fraction, trial.min_lr_fraction
        )

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
