"""One picture of a run, from its directory.

python examples/figure.py RUN FILE.png
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

from matplotlib.figure import Figure

from nemo_tropd.files import complete_file
from nemo_tropd.report import ReportError
from nemo_tropd.report.charts import charts_of
from nemo_tropd.report.drawing import draw, style
from nemo_tropd.report.records import read_run

SHOWN = ("Reverse KL", "Forward KL", "Trust fraction", "Gradient norm", "Engine against trainer", "Time of a step")


def write_figure(run_dir: str | os.PathLike[str], path: str | os.PathLike[str]) -> Path:
    """Draw a run as one PNG of 2 x 3 charts at ``path``: KLs, trust, gradient norm (or the run's benchmarks), mismatch
    and seconds by phase.

    A chart whose metrics were not logged says so. Raises ReportError if the directory has no metrics.
    """
    record, target = read_run(Path(run_dir)), Path(path)
    charts = charts_of(record)
    trust, guided = charts["Trust fraction"], charts["Guided fraction"]
    charts["Trust fraction"] = replace(trust, title="Trust and guided fraction", lines=[*trust.lines, *guided.lines])
    shown = ["Benchmarks" if t == "Gradient norm" and "Benchmarks" in charts else t for t in SHOWN]
    with style(10):
        figure = Figure(figsize=(12, 6.4), dpi=130, facecolor="white", layout="constrained")
        figure.suptitle(f"{record.name}: {record.length}", x=0.01, ha="left", fontsize=13)
        for title, axis in zip(shown, figure.subplots(2, 3).flat, strict=True):
            draw(charts[title], axis)
            axis.set_title(charts[title].title)
            axis.set_ylabel(charts[title].unit)
            if charts[title].stacked and charts[title].drawn:
                axis.set_ylim(top=1.35 * axis.get_ylim()[1])  # room for the legend
                axis.legend(ncols=4, loc="upper right", fontsize=8).set_in_layout(False)
            elif len(charts[title].drawn) > 1:
                axis.legend().set_in_layout(False)
        target.parent.mkdir(parents=True, exist_ok=True)
        with complete_file(target) as temporary:
            figure.savefig(temporary, format="png", metadata={"Software": None})
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="the directory of a run")
    parser.add_argument("file", help="the PNG to write")
    options = parser.parse_args()
    try:
        print(write_figure(options.run, options.file))
    except ReportError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
