"""Where the workers' time went, in one sentence."""

from higgs_tune.report.results import Results

_LABELS = {
    "train_s": "in forward, backward and optimizer",
    "prepare_s": "reading and tokenising",
    "validate_s": "in validation",
    "join_s": "seating trials",
    "save_s": "taking snapshots",
    "wait_s": "waiting for decisions or processes",
    "idle_s": "without a trial",
    "other_s": "elsewhere",
}


def workers_sentence(results: Results) -> str | None:
    """All workers together; None for a sweep that did not note it, or did no step."""
    figures = results.workers.values()
    wall_s = sum(each["wall_s"] for each in figures)
    if not wall_s:
        return None
    shares = {kind: sum(each[kind] for each in figures) / wall_s for kind in _LABELS}
    train, *rest = (
        f"{share:.1%} {_LABELS[kind]}"
        for kind, share in shares.items()
        if share >= 0.0005 or kind == "train_s"
    )
    sentence = f"{train} of {wall_s:.0f} s from first step to last"
    if rest:
        sentence += f" ({', '.join(rest)})"
    slot_s = sum(each["wanted_slot_s"] for each in figures)
    if slot_s:
        busy = sum(each["busy_slot_s"] for each in figures) / slot_s
        sentence += f"; {busy:.1%} of the slots that trials could fill were filled"
    return sentence + "."
