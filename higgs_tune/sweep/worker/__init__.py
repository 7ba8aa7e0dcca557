"""The process that trains a pack: the actor, which trials it seats at which step, and its reports."""
