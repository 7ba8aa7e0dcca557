"""How many slots of a worker have a trial in them, and how many could."""

from higgs_tune.sweep.worker.table import Table


def num_unfinished(table: Table) -> int:
    """Trials that train, or will: there, or named and on their way."""
    return sum(not seat.ended for seat in table.line.seats.values()) + len(table.missing())


def num_busy(table: Table) -> int:
    """Slots with a trial in them; one that was stopped is busy no more, even if it trains on."""
    return sum(
        table.line.seats.get(trial_id) is seat for trial_id, seat in table.line.residents.items()
    )


def num_wanted(table: Table) -> int:
    """How many slots could be busy now, by the trials there or, if memory is not short, to come."""
    num_lacking = sum(table.line.lacks_memory(seat) for seat in table.line.seats.values())
    to_come = 0 if num_lacking else table.roster.to_come
    return min(table.line.num_slots, num_unfinished(table) - num_lacking + to_come)
