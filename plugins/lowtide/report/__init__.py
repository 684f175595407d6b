"""The report of a run: one self-contained HTML page made from its telemetry files."""

from lowtide.report.figures import KeyFigures, key_figures
from lowtide.report.page import REPORT_NAME, render, write_page, write_report
from lowtide.report.records import Run, read_run

__all__ = [
    "REPORT_NAME",
    "KeyFigures",
    "Run",
    "key_figures",
    "read_run",
    "render",
    "write_page",
    "write_report",
]
