"""Rows that a pack on a GPU computes per real row, because of padding: a simulation of lengths.

    python benchmarks/pack_padding.py --out results/pack_padding.json

Clip lengths are log-normal (median 6 s, 1 to 30 s). Each adapter draws batches of similar length in its own
order, as data/order.py does. Rows are padded to the longest adapter of a forward. A forward has the whole
pack, or a part of it as train/forwards.py cuts it for a full-size base. Costs are by that module's model:
arithmetic, or the host's time where that is longer. The cut assumes that an operation takes the host
forwards.OPERATION_S; the output says how much faster it is on hosts that take HOST_US microseconds.
"""

import json
from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import torch
from options import json_file, new_parser, run
from output import machine, save, settings_of
from random_base import PRESETS, random_base

from higgs_tune.data.order import WINDOW_BATCHES
from higgs_tune.train.forwards import (
    OPERATION_S,
    Costs,
    Rows,
    cost_of,
    num_rows,
    share_forwards,
)

STEPS = 40 * WINDOW_BATCHES
HOST_US = (6, 10, 15, 20)


def steps_of(clips: int, budget: int, adapter: int) -> Iterator[Rows]:
    """Text and audio rows of the forwards of one adapter's steps."""
    rng = np.random.default_rng([clips, adapter])
    seconds = np.clip(rng.lognormal(np.log(6), 0.6, STEPS * clips), 1, 30)
    windows = np.sort(seconds.reshape(-1, WINDOW_BATCHES * clips), axis=1)
    for batch in rng.permutation(windows.reshape(-1, clips)):
        # 14 letters a second, 4 per token, and the turns' tokens; 25 frames a second, and the delay
        text, audio = (batch * 14 / 4 + 12).astype(int), (batch * 25 + 11).astype(int)
        at_once = max(1, budget // int((text + audio).max()))
        yield [
            (int(text[first : first + at_once].sum()), int(audio[first : first + at_once].sum()))
            for first in range(0, clips, at_once)
        ]


def measure(clips: int, budget: int, adapters: int, costs: Costs) -> dict[str, Any]:
    """Rows and speed-up of the cut for packs of one size."""
    free = Costs(forward=0, run=0)  # leaves the rows only
    real = 0
    shares = [us * 1e-6 / OPERATION_S for us in HOST_US]
    hosts = [Costs(share * costs.forward, share * costs.run) for share in shares]
    padded: dict[str, float] = {"one": 0.0, "cut": 0.0}
    forwards: dict[str, int] = {"one": 0, "cut": 0}
    spent = {way: np.zeros(len(hosts)) for way in padded}
    every = [steps_of(clips, budget, adapter) for adapter in range(adapters)]
    for step in zip(*every, strict=True):
        rows = dict(enumerate(step))
        real += sum(map(num_rows, step))
        for way, groups in (("one", [tuple(rows)]), ("cut", share_forwards(rows, costs))):
            for group in groups:
                padded[way] += cost_of(group, rows, free)
                forwards[way] += max(len(rows[slot]) for slot in group)
                spent[way] += [cost_of(group, rows, host) for host in hosts]
    faster = (spent["one"] / spent["cut"]).round(2).tolist()
    return {
        "clips": clips,
        "token_budget": budget,
        "adapters": adapters,
        "rows_a_step": round(real / STEPS),
        **{way: round(padded[way] / real, 2) for way in padded},
        **{f"forwards_{way}": round(forwards[way] / STEPS, 2) for way in padded},
        **{f"faster_{us}us": one for us, one in zip(HOST_US, faster, strict=True)},
    }


def main() -> None:
    """Simulate, print a line for each pack, write JSON."""
    parser = new_parser(__doc__)
    parser.add_argument("--out", type=json_file, help="JSON file")
    args = parser.parse_args()
    base = random_base(PRESETS["full"], torch.device("meta"), torch.bfloat16)
    costs = Costs.of(base.model)
    packs = []
    for clips, budget, adapters in product((1, 4, 8), (1024, 4096), (2, 4, 8)):
        packs.append(measure(clips, budget, adapters, costs))
        print(json.dumps(packs[-1]), flush=True)
    save(args.out, {"machine": machine(), "settings": settings_of(args), "packs": packs})


if __name__ == "__main__":
    run(main)
