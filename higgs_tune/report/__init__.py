"""From the files of a sweep to its report: what was found, how sure that is, and best_config.yaml."""
