"""One process that trains a pack: the actor, whom it seats at which step, and what it tells the driver."""
