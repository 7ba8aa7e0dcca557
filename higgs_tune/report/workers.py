"""Where the workers' time went, in one sentence."""

from higgs_tune.report.results import Results

_COMPUTING = {
    "train_s": "forward, backward and optimizer of training",
    "validate_s": "forwards of validation",
}
_ELSE = {
    "prepare_s": "reading and tokenising",
    "join_s": "adding trials",
    "save_s": "taking snapshots",
    "wait_s": "waiting for decisions or processes",
    "idle_s": "without a trial",
    "other_s": "other",
}
_SHOWN = 0.0005  # of all time; smaller shares would be printed as 0.0%


def workers_sentence(results: Results) -> str | None:
    """How all workers together spent their time; None if it was not recorded or no step was done."""
    figures = results.workers.values()
    wall_s = sum(each["wall_s"] for each in figures)
    if not wall_s:
        return None

    def share(kind: str) -> float:
        return sum(each[kind] for each in figures) / wall_s

    def listed(labels: dict[str, str]) -> str:
        return ", ".join(
            f"{share(k):.1%} {label}" for k, label in labels.items() if share(k) >= _SHOWN
        )

    sentence = (
        f"Computing for {sum(map(share, _COMPUTING)):.1%} of the {wall_s:.0f} s from first step to last "
        f"({listed(_COMPUTING)})"
    )
    if rest := listed(_ELSE):
        sentence += f", {rest}"
    slot_s = sum(each["wanted_slot_s"] for each in figures)
    if slot_s:
        busy = sum(each["busy_slot_s"] for each in figures) / slot_s
        sentence += f"; {busy:.1%} of the slots that trials could fill were filled"
    return sentence + "."
