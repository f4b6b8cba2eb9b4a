"""Results as tables, plots and one HTML page."""

from matryoshka.report.plots import plot_accuracy, plot_run
from matryoshka.report.run import Run, RunError, read_run, short_dims
from matryoshka.report.tables import accuracy_table, wilson_interval

__all__ = [
    "Run",
    "RunError",
    "accuracy_table",
    "plot_accuracy",
    "plot_run",
    "read_run",
    "short_dims",
    "wilson_interval",
]
