"""Write a results folder as a sweep would, with made-up but plausible numbers."""

import json
import math
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from higgs_tune import metrics as m
from higgs_tune.config import SweepConfig, TrialConfig
from higgs_tune.config_file import to_yaml

TARGETS = {
    "all_linear": ("attention", "text_mlp", "audio_mlp"),
    "attention": ("attention",),
    "text_path": ("attention", "text_mlp"),
    "all_linear_text_head": ("attention", "text_mlp", "audio_mlp", "text_head"),
}
BASE = {
    m.VAL_TEXT_NLL: 7.72,
    m.VAL_TEXT_NLL_SWAPPED: 7.73,
    m.VAL_AUDIO_GAIN: 0.01,
    m.VAL_AUDIO_NLL: 3.93,
}


def sweep_config(**changes: Any) -> SweepConfig:
    """Settings of a sweep of 150 steps with reports every 25."""
    raw = {
        "name": "quick",
        "target_sets": {name: list(paths) for name, paths in TARGETS.items()},
        "space": {
            "rank": [4, 8, 16, 32],
            "target_set": list(TARGETS),
            "cross_attention": ["off", "audio_self", "text_to_audio"],
            "new_module_lr_factor": {"low": 0.03, "high": 1.0, "log": True},
        },
    }
    return SweepConfig.model_validate(raw | changes)


def trial_config(**changes: Any) -> TrialConfig:
    """A trial's settings; unless `cross_attention` is off, `audio_attention` is a target."""
    raw: dict[str, Any] = {
        "rank": 16,
        "alpha": 32.0,
        "target_set": "all_linear",
        "cross_attention": "off",
        "learning_rate": 1e-4,
        "num_steps": 150,
        "report_every_steps": 25,
    } | changes
    targets = [*TARGETS[raw["target_set"]]]
    if raw["cross_attention"] != "off":
        targets.append("audio_attention")
    return TrialConfig.model_validate({"targets": targets} | raw)


def report_row(step: int, text: float, gain: float, audio: float) -> dict[str, float]:
    """One line of metrics.jsonl."""
    return {
        m.STEP: step,
        m.VAL_TEXT_NLL: text,
        m.VAL_TEXT_NLL_SWAPPED: text + gain,
        m.VAL_AUDIO_GAIN: gain,
        m.VAL_AUDIO_NLL: audio,
        m.TRAIN_TEXT_NLL: text - 0.1,
        m.TRAIN_AUDIO_NLL: audio - 0.02,
        m.TOKENS_PER_S: 5200.0,
        m.TRAIN_TIME_S: 9.5,
        m.GRAD_NORM: 0.8,
    }


def curve(
    config: TrialConfig, text: float, gain: float, audio: float, num_steps: int
) -> list[dict[str, float]]:
    """Reports whose losses go from the base's to these values at the end of a full run."""
    rows = []
    for step in range(config.report_every_steps, num_steps + 1, config.report_every_steps):
        done = 1 - math.exp(-3.2 * step / config.num_steps)
        share = done / (1 - math.exp(-3.2))
        rows.append(
            report_row(
                step,
                BASE[m.VAL_TEXT_NLL] + (text - BASE[m.VAL_TEXT_NLL]) * share,
                0.01 + (gain - 0.01) * share**3,
                BASE[m.VAL_AUDIO_NLL] + (audio - BASE[m.VAL_AUDIO_NLL]) * share,
            )
        )
    return rows


@dataclass
class Builder:
    """Writes a results folder, file by file."""

    directory: Path
    sweep: SweepConfig = field(default_factory=sweep_config)
    base: dict[str, float] | None = field(default_factory=lambda: dict(BASE))

    def start(self) -> "Builder":
        """Write the files that exist before the first trial."""
        self.directory.mkdir(parents=True, exist_ok=True)
        (self.directory / "sweep.yaml").write_text(to_yaml(self.sweep), encoding="utf-8")
        env = {
            "versions": {"higgs-tune": "0.1.0", "torch": "2.14.1", "ray": "2.60.0"},
            "git_sha": "0f5c439d2c0f5c439d2c0f5c439d2c0f5c439d2c",
            "python": "3.11.7",
            "platform": "Linux-6.1-x86_64",
            "num_cpus": 2,
            "gpus": [],
            "command": ["sweeps/run.py", "--set", "tune.num_trials=20"],
            "started_at": "2026-01-05T10:00:00+00:00",
        }
        (self.directory / "env.json").write_text(json.dumps(env))
        if self.base is not None:
            content = {
                "metrics": self.base,
                "preflight": {},
                "content_hash": "c0ffee",
                "num_val_clips": 48,
            }
            (self.directory / "base.json").write_text(json.dumps(content))
        return self

    def trial(
        self,
        trial_id: str,
        config: TrialConfig,
        rows: list[dict[str, float]],
        *,
        status: str | None = "completed",
        origin: str = "search",
        confirms: str | None = None,
        reason: str = "",
        adapter: bool = True,
    ) -> Path:
        """Write one trial; `status` None leaves it unfinished."""
        folder = self.directory / "trials" / trial_id
        folder.mkdir(parents=True)
        content = {
            "trial_id": trial_id,
            "number": int(trial_id[1:]),
            "name": f"{trial_id} r{config.rank} lr{config.learning_rate:.1e} "
            f"{config.cross_attention} {config.target_set}",
            "origin": origin,
            "confirms": confirms,
            "config": config.model_dump(mode="json"),
            "account": {
                "parameters": 12_000 * config.rank,
                "modules": {"attention": 16},
                "step": 0,
            },
        }
        (folder / "config.json").write_text(json.dumps(content))
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if status is not None:
            step = rows[-1][m.STEP] if rows else 0
            ended = {"status": status, "reason": reason, "step": step, "feasible": None}
            (folder / "status.json").write_text(json.dumps(ended | {"wall_s": 31.0}))
        if adapter and status == "completed":
            (folder / "adapter").mkdir()
            lora = {"peft_type": "LORA", "r": config.rank, "lora_alpha": config.lora_alpha}
            (folder / "adapter" / "adapter_config.json").write_text(json.dumps(lora))
            (folder / "adapter" / "training_state.json").write_text("{}")
            (folder / "adapter" / "adapter_model.safetensors").write_bytes(trial_id.encode())
        return folder


def effect(config: TrialConfig, noise: random.Random) -> tuple[float, float, float]:
    """Made-up text loss, audio gain and audio loss at the end of a full run."""
    distance = math.log10(config.learning_rate / 1e-3)
    text = 2.35 + 1.1 * distance**2 - 0.05 * math.log2(config.rank / 4)
    text += {"attention": 0.35, "text_path": 0.12}.get(config.target_set, 0.0)
    text += {"text_to_audio": -0.3, "audio_self": 0.05}.get(config.cross_attention, 0.0)
    gain = max(0.0, 0.18 - 0.3 * distance**2)
    gain += 0.35 if config.cross_attention == "text_to_audio" else 0.0
    audio = 3.62 + 0.9 * max(0.0, distance) ** 2 - 0.03 * math.log2(config.rank / 4)
    audio += 0.22 if config.target_set in ("attention", "text_path") else 0.0
    return text + noise.gauss(0, 0.03), gain + noise.gauss(0, 0.02), audio + noise.gauss(0, 0.02)


def realistic(directory: Path, num_search: int = 20, seed: int = 1) -> Builder:
    """A finished sweep: two fixed trials, a search with early stops and a divergence, a confirm stage."""
    noise = random.Random(seed)
    builder = Builder(directory).start()
    fixed = [trial_config(), trial_config(cross_attention="audio_self")]
    for number, config in enumerate(fixed):
        origin = "baseline" if number == 0 else "baseline_fixed"
        rows = curve(config, *effect(config, noise), config.num_steps)
        builder.trial(f"t{number:03d}", config, rows, origin=origin)
    ends: list[tuple[float, str, TrialConfig]] = []
    for number in range(2, num_search):
        config = trial_config(
            rank=noise.choice([4, 8, 16, 32]),
            learning_rate=10 ** noise.uniform(-4, -2.4),
            target_set=noise.choice(list(TARGETS)),
            cross_attention=noise.choice(["off", "audio_self", "text_to_audio"]),
            new_module_lr_factor=10 ** noise.uniform(-1.5, 0),
        )
        trial_id = f"t{number:03d}"
        text, gain, audio = effect(config, noise)
        if number == 7:
            rows = curve(config, text, gain, audio, 50)
            rows.append(report_row(75, math.nan, math.nan, math.nan))
            builder.trial(trial_id, config, rows, status="diverged", reason="loss is nan")
        elif text > 2.75:
            steps = 50 if text > 2.9 else 100
            builder.trial(
                trial_id, config, curve(config, text, gain, audio, steps), status="pruned"
            )
        else:
            builder.trial(trial_id, config, curve(config, text, gain, audio, 150))
            if audio <= 1.05 * BASE[m.VAL_AUDIO_NLL]:
                ends.append((text, trial_id, config))
    chosen = [("t000", fixed[0]), *((key, config) for _, key, config in sorted(ends)[:2])]
    for index, (confirms, config) in enumerate(chosen):
        for repeat in range(2):
            again = config.model_copy(update={"seed": 1000 + repeat})
            rows = curve(again, *effect(again, noise), again.num_steps)
            trial_id = f"c{2 * index + repeat:03d}"
            builder.trial(trial_id, again, rows, origin="confirm", confirms=confirms)
    return builder
