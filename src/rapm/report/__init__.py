"""A run's page: one self-contained HTML file, see :func:`write_report`."""

from rapm.report.page import write_report

__all__ = ["write_report"]
