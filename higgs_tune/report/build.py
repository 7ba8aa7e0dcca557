"""Turn a sweep's results folder into its report."""

from collections.abc import Mapping
from pathlib import Path

from higgs_tune.files import write_bytes, write_text
from higgs_tune.report.draw import draw_curves, draw_gain, draw_importance
from higgs_tune.report.draw_planes import draw_scatter, draw_space
from higgs_tune.report.export import export_best
from higgs_tune.report.findings import Findings, find
from higgs_tune.report.html import render_html
from higgs_tune.report.ink import Picture
from higgs_tune.report.listening import read_listening
from higgs_tune.report.plots import curves_info, gain_info, scatter_info, space_info
from higgs_tune.report.results import Results, read_results, write_table
from higgs_tune.report.summary import (
    Summary,
    summary_facts,
    summary_text,
    terminal_width,
    write_summary,
)


def build_report(results_dir: Path) -> Summary:
    """Read a sweep's folder, finished or not, and write its report into it.

    Writes trials.parquet, summary.json, summary.txt, report.html, plots/*.png, and, if a
    configuration could be chosen, best_config.yaml and best_adapter/.

    Raises:
        SweepError: the folder is not a sweep's, or one of its files is damaged.
    """
    results = read_results(results_dir)
    findings = find(results)
    best_config = export_best(results, findings)
    write_table(results, results_dir / "trials.parquet")
    pictures = draw(results, findings)
    for name, picture in pictures.items():
        write_bytes(results_dir / "plots" / f"{name}.png", picture.png)
    report_path = results_dir / "report.html"
    listening = read_listening(results_dir)
    write_text(report_path, render_html(results, findings, pictures, best_config, listening))
    facts = summary_facts(results, findings)
    write_summary(results, findings, facts)
    return Summary(
        best_id=findings.choice.trial.id if findings.choice else None,
        text=summary_text(results, findings, terminal_width()),
        facts=facts,
        report_path=report_path,
    )


def draw(results: Results, findings: Findings) -> Mapping[str, Picture]:
    """Every figure that the results have data for, by name."""
    choice = findings.choice
    pictures: dict[str, Picture] = {}
    curves = curves_info(results, choice)
    if any(panel.lines for panel in curves):
        pictures["curves"] = draw_curves(curves)
    scatter = scatter_info(results, choice)
    if scatter.points:
        pictures["scatter"] = draw_scatter(scatter)
    gains = gain_info(results, choice)
    if gains:
        pictures["gain"] = draw_gain(gains)
    if findings.importance is not None:
        pictures["importance"] = draw_importance(findings.importance)
    space = space_info(results, choice)
    if space is not None:
        pictures["space"] = draw_space(space)
    return pictures
