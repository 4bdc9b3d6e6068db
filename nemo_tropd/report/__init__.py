"""What a run looked like, from the files of its directory: a page for people, and one picture."""

from nemo_tropd.report.figure import write_figure
from nemo_tropd.report.page import write_report
from nemo_tropd.report.records import ReportError

__all__ = ["ReportError", "write_figure", "write_report"]
