"""Floor 7: pictures and pages from a run folder."""

from modelglue.report.page import REPORT, write_report

__all__ = ["REPORT", "write_report"]
