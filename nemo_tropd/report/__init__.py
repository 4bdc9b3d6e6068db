"""What a run looked like, from the files of its directory: a page.

records.py reads the files, charts.py says what each chart shows, drawing.py draws it, tokens.py prepares the rollouts,
page.py fills the template page.html.
"""

from nemo_tropd.report.page import write_report
from nemo_tropd.report.records import ReportError

__all__ = ["ReportError", "write_report"]
