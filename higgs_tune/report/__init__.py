"""Turn a sweep's files into its report: findings, how certain they are, and best_config.yaml."""
