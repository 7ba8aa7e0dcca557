"""The table of an evaluation's figures on a terminal."""

from higgs_tune.listen.table import figures_table

LOSSES = {
    "val/text/nll": 8.25,
    "val/text/nll_swapped": 8.5,
    "val/text/audio_gain": 0.25,
    "val/audio/nll_per_code": 5.0,
}


def spoken(num_clips: int = 2, **figures: float) -> dict[str, dict[str, float]]:
    return {
        f"speech/{name}": {"mean": mean, "num_clips": num_clips} for name, mean in figures.items()
    }


def test_figures_are_in_columns_and_those_without_a_value_are_left_out():
    table = figures_table(
        {
            "data": {"num_clips": 8},
            "notes": ["Left out: one."],
            "recording": spoken(cer=0.125),
            "systems": [
                {"name": "base", "losses": LOSSES, "speech": spoken(eos_rate=1.0, cer=0.5)},
                {"name": "my-adapter", "losses": LOSSES, "speech": spoken(eos_rate=0.5)},
            ],
        }
    )
    assert table.splitlines() == [
        "                                      recording   base  my-adapter",
        "text loss, nats per token                     –  8.250       8.250",
        "text loss after another clip's audio          –  8.500       8.500",
        "audio gain                                    –  0.250       0.250",
        "audio loss, nats per code                     –  5.000       5.000",
        "ended by itself                               –   1.00        0.50",
        "character errors, recogniser               0.12   0.50           –",
        "losses on 8 held-out clips, speech and text on 2",
        "Left out: one.",
    ]


def test_a_mean_over_fewer_clips_shows_their_number():
    """A system that spoke only once may have the highest speaker similarity."""
    silent = spoken(4, eos_rate=1.0) | spoken(1, speaker_similarity=0.75)
    loud = spoken(4, eos_rate=1.0, speaker_similarity=0.5)
    table = figures_table(
        {
            "data": {"num_clips": 8},
            "notes": [],
            "recording": spoken(3, speaker_similarity=0.875),
            "systems": [
                {"name": "base", "losses": LOSSES, "speech": silent},
                {"name": "a", "losses": LOSSES, "speech": loud},
            ],
        }
    )
    assert table.splitlines()[-3:] == [
        "ended by itself                               –      1.00   1.00",
        "speaker similarity                     0.88 (3)  0.75 (1)   0.50",
        "losses on 8 held-out clips, speech and text on 4 or the number in brackets",
    ]
