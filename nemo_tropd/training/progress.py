"""Progress of a run: a bar with the step's phase and the time left on a terminal, one line a step in a log."""

import math
import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from nemo_tropd.command_line import printable

SHOWN = (
    ("loss", "loss", "{:.3f}"),
    ("trust_fraction", "trust", "{:.2f}"),
    ("grad_norm", "grad norm", "{:.2f}"),
    ("mismatch_max_abs", "mismatch", "{:.1e}"),
    ("effective_fraction", "effective", "{:.2f}"),
    ("seconds/step", "s", "{:.1f}"),
)


class RunProgress:
    """Silent on every rank except 0."""

    def __init__(self, *, enabled: bool, first: int, total: int) -> None:
        self.enabled, self.total = enabled, total
        self.console = Console(stderr=True, markup=False, emoji=False)
        self.live = enabled and self.console.is_terminal
        self._began, self._first = time.monotonic(), first
        if self.live:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[phase]:<18}"),
                TextColumn("{task.fields[figures]}"),
                console=self.console,
            )
            self._task = self._bar.add_task("distill", total=total, completed=first, phase="", figures="")
            self._bar.start()

    def phase(self, name: str) -> None:
        """Show what the run is doing now."""
        if self.live:
            self._bar.update(self._task, phase=name)

    def say(self, text: str) -> None:
        """A line above the bar."""
        if self.live:
            self._bar.console.print(printable(text), highlight=False)
        elif self.enabled:
            print(printable(text), flush=True)

    def step_done(self, step: int, values: Mapping[str, float]) -> None:
        """Advance past step number ``step`` (from 0) and show its figures."""
        # Against older weights the log-probabilities differ by what was learned since, not by a fault of the engine's.
        left_out = "mismatch_max_abs" if values.get("weights_lag", 0) > 0 else "effective_fraction"
        shown = [row for row in SHOWN if row[0] != left_out and math.isfinite(values.get(row[0], math.nan))]
        figures = "  ".join(f"{label} {form.format(values[name])}" for name, label, form in shown)
        if self.live:
            self._bar.update(self._task, completed=step + 1, figures=figures)
        elif self.enabled:
            each = (time.monotonic() - self._began) / (step + 1 - self._first)
            left = each * (self.total - step - 1)
            print(f"step {step + 1}/{self.total}  {figures}  {left / 60:.1f} min left", flush=True)

    def close(self) -> None:
        """Leave the last figures on the screen."""
        if self.live:
            self._bar.stop()
