"""What a run looked like, from the files of its directory: a page and one picture.

records.py reads the files, charts.py says what each chart shows, drawing.py draws it as SVG or PNG, tokens.py prepares
the rollouts, page.py fills the template page.html.
"""

from nemo_tropd.report.drawing import write_figure
from nemo_tropd.report.page import write_report
from nemo_tropd.report.records import ReportError

__all__ = ["ReportError", "write_figure", "write_report"]
