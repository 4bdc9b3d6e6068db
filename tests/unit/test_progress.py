"""The line of a step in a log."""

from __future__ import annotations

import random

import pytest

from nemo_tropd.training.progress import RunProgress


@pytest.mark.parametrize("lag", [None, 0, 1, 2])
def test_what_older_weights_explain_is_not_called_a_mismatch(
    capsys: pytest.CaptureFixture[str], lag: int | None
) -> None:
    """With rollouts of older weights the line says what they are worth instead."""
    largest, effective = random.uniform(0.1, 9), random.uniform(0.1, 1)
    values = {"loss": 1.0, "mismatch_max_abs": largest, "effective_fraction": effective, "seconds/step": 2.0}
    values |= {} if lag is None else {"weights_lag": float(lag)}
    RunProgress(enabled=True, first=0, total=3).step_done(0, values)
    line = capsys.readouterr().out
    assert (f"mismatch {largest:.1e}" in line) == (not lag) == ("effective" not in line)
    assert (f"effective {effective:.2f}" in line) == bool(lag)
