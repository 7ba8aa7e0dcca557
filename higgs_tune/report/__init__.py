"""From the files of a sweep to its report: what was found, how sure that is, and best_config.yaml."""

from higgs_tune.report.build import build_report
from higgs_tune.report.summary import Summary

__all__ = ["Summary", "build_report"]
