"""How many slots of a worker hold a trial, and how many could."""

from higgs_tune.sweep.worker.table import Table


def num_unfinished(table: Table) -> int:
    """Trials that train or will train: seated, or named by the driver and on their way."""
    return sum(not seat.ended for seat in table.line.seats.values()) + len(table.missing())


def num_busy(table: Table) -> int:
    """Slots that hold a trial; one that was stopped does not count, even if it still trains."""
    return sum(
        table.line.seats.get(trial_id) is seat for trial_id, seat in table.line.residents.items()
    )


def num_wanted(table: Table) -> int:
    """Slots that could hold a trial now: one present or, unless memory is short, one to come."""
    num_lacking = sum(table.line.lacks_memory(seat) for seat in table.line.seats.values())
    to_come = 0 if num_lacking else table.roster.to_come
    return min(table.line.num_slots, num_unfinished(table) - num_lacking + to_come)
