"""The timeline in the report: which steps, which bars, which advice, and what a damaged file leaves."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from nemo_tropd.report import write_report
from nemo_tropd.report.drawing import timeline_svg
from nemo_tropd.report.records import read_run
from nemo_tropd.report.timeline import Picture, picture_of
from nemo_tropd.timeline import LANES, Lane, StepTimes, length
from tests.unit.test_report import HOSTILE, Page, lines, train

NONE = "This run has no timeline of its steps."
Spans = Sequence[tuple[float, float, str]]


def lane(spans: Spans) -> Lane:
    return Lane(length((begin, end) for begin, end, _ in spans), list(spans))


def step(number: int, seconds: float, pause: float | None = 0.0, *, ahead: int = 0, **spans: Spans) -> StepTimes:
    lanes = {name: lane(spans.get(name, ())) for name in LANES if f"{name}_0" not in spans}
    lanes |= {name.replace("_", "/"): lane(found) for name, found in spans.items() if "_" in name}
    return StepTimes(number, seconds, pause, lanes, "dedicated", ahead)


def in_turns(number: int = 1, generating: float = 6.0, training: float = 4.0, **changes: Any) -> StepTimes:
    """Generating, then scoring for a quarter of the rest, passes and optimizer, weights."""
    end, at = generating + training, [generating + training * part for part in (0, 0.25, 0.75, 0.9, 1)]
    return step(
        number,
        end,
        engines=[(0.0, generating, f"weights {number - 1}")],
        teacher=[(at[0], at[1], "scoring")],
        student=[(at[1], at[2], "forward and backward"), (at[2], at[3], "optimizer")],
        weights=[(at[3], at[4], "copy"), (at[3], at[4], "send")],
        **changes,
    )


def written(run: Path, entries: Sequence[StepTimes | dict[str, Any]], steps: int = 9) -> Path:
    lines(run / "metrics.jsonl", [train(s, loss=1.0) for s in range(1, steps + 1)])
    lines(run / "timeline.jsonl", [e.entry() if isinstance(e, StepTimes) else e for e in entries])
    return run


def shown(picture: Picture | None) -> Picture:
    assert picture is not None
    return picture


@pytest.mark.random
def test_the_step_of_median_duration_is_shown() -> None:
    seconds = random.sample(range(1, 100), random.choice([1, 2, 5, 8]))
    steps = [step(i, float(s), None if i == 1 else 0.0) for i, s in enumerate(seconds, 1)]
    wanted = seconds.index(sorted(seconds)[(len(seconds) - 1) // 2]) + 1
    assert shown(picture_of(steps)).title == f"Step {wanted}"
    assert picture_of([]) is None


def test_steps_ahead_are_shown_in_a_row() -> None:
    def titles(*given: tuple[int, float, float | None], k: int = 1) -> str:
        return shown(picture_of([step(n, s, p, ahead=k) for n, s, p in given])).title

    usual = [(1, 99.0, None), (2, 10.0, 0.0), (3, 11.0, 0.0), (4, 13.0, 0.0), (5, 16.0, 0.0), (6, 20.0, 0.0)]
    assert titles(*usual, k=0) == "Step 4"
    assert titles(*usual) == "Steps 3 to 5" and titles(*usual, k=2) == "Steps 3 to 6"
    # Not over a resume, nor over steps whose lines are lost, nor over a long pause if there are others.
    assert titles((1, 1.0, None), (2, 1.0, 0.0), (3, 1.0, None), (4, 9.0, 0.0), (5, 1.0, 0.0)) == "Steps 3 to 5"
    assert titles((1, 1.0, None), (2, 1.0, 0.0), (4, 1.0, 0.0), (5, 9.0, 0.0), (6, 9.0, 0.0)) == "Steps 4 to 6"
    pauses = [(1, 1.0, None), (2, 1.0, 0.0), (3, 1.0, 7.0), (4, 5.0, 0.0), (5, 5.0, 0.01)]
    assert titles(*pauses) == "Steps 3 to 5"
    assert titles(*pauses[:4]) == "Steps 1 to 3"  # there is no other
    assert titles((1, 1.0, None), (2, 3.0, None), (3, 9.0, None)) == "Step 2"  # not even two in a row
    assert titles((1, 1.0, None), k=10**9) == "Step 1"
    # Of a run that was resumed in another way: as it was at last.
    resumed = [step(n, 1.0, None if n in (1, 7) else 0.0, ahead=n > 6) for n in range(1, 10)]
    assert shown(picture_of(resumed)).title == "Steps 7 to 9"


def test_bars_go_on_over_steps_and_pauses_are_left_free() -> None:
    first = step(4, 10.0, 3.0, ahead=1, engines=[(0.0, 3.0, "weights 2"), (3.0, 10.0, "weights 3")])
    second = step(5, 10.0, 0.0, ahead=1, engines=[(0.0, 2.0, "weights 3"), (4.0, 6.0, "weights 4")])
    third = step(6, 10.0, 0.5, ahead=1, engines=[(0.0, 10.0, "weights 4")], student=[(5.0, 10.0, "optimizer")])
    picture = shown(picture_of([first, second, third]))
    engines, _, student, _ = picture.rows
    assert [(b.begin, b.end, b.number) for b in engines.bars] == [
        (0.0, 3.0, "2"), (3.0, 12.0, "3"), (14.0, 16.0, "4"), (20.5, 30.5, "4"),
    ]  # fmt: skip
    assert [(b.begin, b.end, b.kind.label) for b in student.bars] == [(25.5, 30.5, "optimizer")]
    assert picture.steps == [(0.0, 10.0, "step 4"), (10.0, 20.0, "step 5"), (20.5, 30.5, "step 6")]
    idle = {"engines": 1 - 24 / 30, "teacher": 1.0, "student": 1 - 5 / 30, "weights": 1.0}
    assert picture.lanes == pytest.approx(idle)
    assert "after how many steps" in picture.note and "30 s" in picture.note


def test_members_share_the_height_of_their_lane() -> None:
    two = step(1, 10.0, None, engines_0=[(0.0, 8.0, "weights 0")], engines_1=[(0.0, 4.0, "weights 0")])
    picture = shown(picture_of([two]))
    assert picture.lanes["engines"] == pytest.approx(0.4)
    first, second = picture.rows[:2]
    assert 0 < first.top < second.top == pytest.approx(first.top + first.height) and second.top + second.height < 1
    assert len(picture.rows) == 5 and 1 < picture.rows[2].top < 2
    many = step(1, 10.0, None, **{f"engines_{i}": [(0.0, float(i % 7), "weights 0")] for i in range(100)})
    assert 8 <= len([row for row in shown(picture_of([many])).rows if row.top < 1]) <= 16


def advice(*steps: StepTimes) -> str:
    return shown(picture_of(steps)).advice


def test_advice_for_turns() -> None:
    assert "steps_ahead=1" in advice(in_turns()) and "about 6.4 s" in advice(in_turns())  # generating and sending
    assert "about 7 s" in advice(in_turns(generating=3.0, training=7.0))
    assert "model.rollout.dedicated.engines" in advice(in_turns(generating=19.0, training=1.0))
    assert "trainer.num_nodes" in advice(in_turns(generating=0.5, training=9.5))
    colocated = advice(replace(in_turns(), placement="colocated"))
    assert "take turns" in colocated and "=1" not in colocated
    assert advice(replace(in_turns(), placement="process")) == ""


def at_once(engines: float, trainer: float, **more: Spans) -> list[StepTimes]:
    """Three steps of ten seconds, in which both work from the beginning."""
    spans: dict[str, Spans] = {"engines": [(0.0, engines, "weights 0")], "student": [(0.0, trainer, "optimizer")]}
    return [step(i, 10.0, 0.0 if i > 1 else None, ahead=1, **{**spans, **more}) for i in (1, 2, 3)]


def test_advice_for_steps_ahead() -> None:
    assert "trainer.num_nodes" in advice(*at_once(5.0, 10.0))
    assert "model.rollout.dedicated.engines" in advice(*at_once(10.0, 5.0))
    assert advice(*at_once(10.0, 9.0)) == advice(*at_once(9.0, 10.0)) == advice(*at_once(5.0, 5.0)) == ""
    # What is sent on the engines' side is not the trainer's work.
    assert "dedicated.engines" in advice(*at_once(7.5, 5.0, weights=[(7.5, 10.0, "send")]))
    even: dict[str, Spans] = {f"engines_{i}": [(0.0, 9.0, "weights 0")] for i in range(4)}
    assert "dedicated.engines" in advice(*at_once(10.0, 5.0, **even))
    uneven = {**even, **{f"engines_{i}": [(0.0, 3.0, "weights 0")] for i in range(3)}}
    assert "max_new_tokens" in advice(*at_once(10.0, 3.0, **uneven))
    assert "dedicated.engines" not in advice(*at_once(10.0, 3.0, **uneven))


def test_the_page_has_the_picture_its_legend_and_its_advice(tmp_path: Path) -> None:
    written(tmp_path, [in_turns(i, pause=None if i == 1 else 0.0) for i in range(1, 4)])
    text = write_report(tmp_path).read_text()
    page = Page(text)
    assert NONE not in page.text and "Step 2" in page.text and "10 s, the median of this run" in page.text
    (svg,) = (s for s in re.findall(r"<svg.*?</svg>", text, re.DOTALL) if "Timeline" in s)
    label = "Timeline, Step 2. 10 seconds. engines: idle 40%; teacher: idle 90%; student: idle 74%; weights: idle 96%"
    assert f'role="img" aria-label="{label}"' in svg
    for share in ("40%", "90%", "74%", "96%"):
        assert f">idle {share}</text>" in svg
    assert all(f">{word}</text>" in svg for word in (*LANES, "seconds"))
    assert not re.search(r"#[0-9a-fA-F]{6}\b", re.sub(r'(href="|url\(|id=")#?\w+', "", svg))
    assert "font-family" not in svg
    for kind in ("generating", "scoring", "forward and backward", "optimizer", "copying", "sending to the engines"):
        assert f"</i>{kind}</li>" in text
    assert "scoring while others" not in text and "model.rollout.steps_ahead=1" in page.text
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert write_report(tmp_path).read_text() == text


def extent(svg: str, color: str) -> list[tuple[float, float]]:
    """From where to where the shapes of a colour are, in the SVG's units."""
    root, found = ElementTree.fromstring(svg), []
    for e in root.iter("path"):
        if f"fill: var(--{color})" in e.get("style", ""):
            xs = [float(x) for x in re.findall(r"[ML] ([-\d.]+) ", e.get("d", ""))]
            found.append((min(xs), max(xs)))
    return found


def test_bars_are_where_the_work_was() -> None:
    svg = timeline_svg(shown(picture_of([in_turns()])))
    ((g0, g1),), ((t0, t1),), ((s0, s1),) = (extent(svg, color) for color in ("c0", "c1", "c2"))
    unit = (g1 - g0) / 6
    assert unit > 50 and g1 == pytest.approx(t0, abs=0.1) and t1 == pytest.approx(s0, abs=0.1)
    assert t1 - t0 == pytest.approx(unit, abs=0.1) and s1 - s0 == pytest.approx(2 * unit, abs=0.1)


def test_the_numbers_of_the_weights_are_in_bars_that_have_room() -> None:
    def numbers(**spans: Spans) -> list[str]:
        steps = [step(i, 50.0, 0.0, ahead=1, **spans) for i in (1, 2)]
        return re.findall(r">(7\d\d)</text>", timeline_svg(shown(picture_of(steps))))

    assert numbers(engines=[(0.0, 30.0, "weights 701"), (30.0, 30.5, "weights 702")]) == ["701", "701"]
    one, other = [(0.0, 30.0, "weights 701")], [(29.0, 50.0, "weights 701")]
    assert numbers(engines_0=one, engines_1=one) == ["701", "701"] and numbers(engines_0=one, engines_1=other) == []


def test_a_run_without_a_timeline_has_a_report(tmp_path: Path) -> None:
    lines(tmp_path / "metrics.jsonl", [train(1, loss=1.0)])
    page = Page(write_report(tmp_path).read_text())
    assert NONE in page.text and "timeline.jsonl" not in page.text


def test_what_is_damaged_is_left_out_and_said(tmp_path: Path) -> None:
    broken = {**in_turns(2).entry(), "seconds": -1}
    written(tmp_path, [in_turns(1, pause=None), broken, {"step": 3}])
    with (tmp_path / "timeline.jsonl").open("a") as file:
        file.write("{oops\n" + json.dumps(in_turns(4).entry()) + "\n" + json.dumps(in_turns(5).entry())[:-7])
    record = read_run(tmp_path)
    assert [one.step for one in record.timeline] == [1, 4]
    assert "timeline.jsonl: 2 line(s) left out, since they are not the times of a step" in record.notes
    assert "timeline.jsonl: 1 unreadable line(s) left out, the first is line 4" in record.notes
    assert NONE not in Page(write_report(tmp_path).read_text()).text
    for content in (b"", b"\0\xff" * 500, b"{}\n[]\n3\nnull\n", b'{"step": 1}\n'):
        (tmp_path / "timeline.jsonl").write_bytes(content)
        assert NONE in Page(write_report(tmp_path).read_text()).text


def test_steps_done_again_replace_what_the_killed_run_had_written(tmp_path: Path) -> None:
    first = [in_turns(i, pause=None if i == 1 else 0.0) for i in range(1, 6)]
    again = [in_turns(i, 60.0, pause=None if i == 3 else 0.0) for i in (3, 4)]
    record = read_run(written(tmp_path, [*first, *again]))
    assert record.timeline == [*first[:2], *again]


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    hostile = step(1, 10.0, None, **{name: [(0.0, 5.0, HOSTILE + "\0")] for name in LANES})
    entry = hostile.entry()
    entry["lanes"][HOSTILE] = entry["lanes"]["teacher"]
    text = write_report(written(tmp_path, [{**entry, "placement": HOSTILE}])).read_text()
    page = Page(text)
    assert NONE not in page.text and text.count("<script>") == 1
    assert not [a for _, a in page.tags if any(name.startswith("on") for name in a)]
