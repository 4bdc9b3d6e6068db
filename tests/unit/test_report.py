"""The report: what killed and resumed runs leave, what is missing, what must be escaped, and what is shown."""

import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from nemo_tropd.report import ReportError, write_figure, write_report
from nemo_tropd.report.charts import Line, line_chart, number, stacked_chart
from nemo_tropd.report.records import read_run, smooth, thin

pytestmark = pytest.mark.random

VOID = {"meta", "br", "hr", "img", "line", "path", "circle"}


class Page(HTMLParser):
    """Checks that tags nest, and collects tags with their attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


def lines(path: Path, entries) -> None:
    path.write_text("".join(json.dumps(e) + "\n" for e in entries), encoding="utf-8")


def train(step: int, **values) -> dict:
    return {"step": step, "kind": "train", **values}


def validation(step: int, **values) -> dict:
    return {"step": step, "kind": "validation", **values}


def rollout(step: int, tokens=("a",), **columns) -> dict:
    n = len(tokens)
    base = {"log_ratio": [0.5] * n, "gate": [1.0] * n, "guided": [False] * n}
    return {"step": step, "prompt": f"p{step}", "tokens": list(tokens), **base, **columns}


@pytest.fixture
def run(tmp_path):
    """A whole run of 30 random steps."""
    phases = ("rollout", "teacher", "student", "optimizer", "refresh")
    entries = [validation(0, reverse_kl=1.5, forward_kl=2.5, one_minus_tv=0.4, exact_match=0.125, exact_match_of=8)]
    for step in range(1, 31):
        seconds = {f"seconds/{p}": random.random() for p in phases}
        entries.append(
            train(
                step,
                loss=random.gauss(0, 1),
                trust_fraction=random.random(),
                guided_fraction=random.random(),
                grad_norm=random.random(),
                student_entropy=random.random(),
                mismatch_mean_abs=random.random() * 1e-3,
                mismatch_max_abs=random.random(),
                **seconds,
                **{"seconds/step": sum(seconds.values()) + 1},
            )
        )
    entries.append(validation(30, reverse_kl=1.2, forward_kl=1.0, one_minus_tv=0.3, exact_match=0.25, exact_match_of=8))
    lines(tmp_path / "metrics.jsonl", entries)
    lines(tmp_path / "rollouts.jsonl", [rollout(1), rollout(30, ("x", " y"))])
    summary = {
        "name": "a <run>",
        "steps": 30,
        "before": {k: v for k, v in entries[0].items() if k not in ("kind", "step")},
        "after": {k: v for k, v in entries[-1].items() if k not in ("kind", "step")},
        "answers": [{"prompt": "q&a <1>", "before": "<script>alert(1)</script>", "after": "fine"}],
        "config": "a: <b>\n",
        "versions": {"torch": "9.9"},
    }
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    return tmp_path


def test_the_page_shows_before_and_after_and_stands_alone(run):
    path = write_report(run)
    assert path == run / "report.html"
    assert [p.name for p in run.iterdir() if "part" in p.name] == []
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert "Reverse KL fell from 1.50 to 1.20 (−20%). Forward KL fell from 2.50 to 1.00 (−60%)." in page.text
    assert "1.500 1.200 −20% better" in " ".join(page.words)
    rows = re.findall(r"<tr><td>.*?</tr>", text)
    cells = {re.findall(r"<td[^>]*>(.*?)</td>", r)[0].split("<")[0]: re.sub(r"<[^>]+>", " ", r) for r in rows}
    assert "1.500" in cells["Reverse KL"] and "1.200" in cells["Reverse KL"] and "better" in cells["Reverse KL"]
    assert "−25%" in cells["1 − TV"] and "worse" in cells["1 − TV"]
    assert (
        "+12 points" in cells["Exact match"] and "8 questions" in cells["Exact match"] and "25%" in cells["Exact match"]
    )
    assert "Student entropy" not in cells
    assert not re.search(r"(src|href|url\(|@import)", text)
    assert "q&a <1>" in page.text and "<script>alert(1)</script>" in page.text
    assert text.count("<script>") == 1 and "<b>" not in text
    assert "a: <b>" in page.text and "9.9" in page.text and "<title>a &lt;run&gt;: 30 steps</title>" in text
    for title in ("Trust fraction", "Gradient norm", "Guided fraction", "Engine against trainer", "Time of a step"):
        assert f"<h3>{title}</h3>" in text
    assert not re.search(r"\b(nan|inf)\b", text)


def test_missing_metrics_and_files_leave_a_note(tmp_path):
    lines(tmp_path / "metrics.jsonl", [train(1, loss=0.5)])
    text = write_report(tmp_path).read_text(encoding="utf-8")
    page = Page(text)
    assert "This run made no validation" in page.text
    assert "This run kept no rollouts" in page.text
    assert "summary.json is missing" in page.text
    titles = re.findall(r'<figure class="empty"><figcaption><h3>(.*?)</h3>', text)
    assert {"Reverse KL", "Entropy", "Time of a step", "Gradient norm"} <= set(titles) and "Loss" not in titles
    assert tmp_path.name in page.text
    write_figure(tmp_path, tmp_path / "figure.png")


def test_a_run_without_summary_compares_first_and_last_validation(tmp_path):
    lines(
        tmp_path / "metrics.jsonl", [validation(0, reverse_kl=2.0), train(1, loss=1.0), validation(1, reverse_kl=1.0)]
    )
    record = read_run(tmp_path)
    assert (record.before, record.after) == ({"reverse_kl": 2.0}, {"reverse_kl": 1.0})
    lines(tmp_path / "metrics.jsonl", [validation(0, reverse_kl=2.0)])
    record = read_run(tmp_path)
    assert (record.before, record.after) == ({"reverse_kl": 2.0}, {})
    assert "rose" not in write_report(tmp_path).read_text()


def test_steps_done_again_replace_what_the_killed_run_had_logged(tmp_path):
    entries = [validation(0, reverse_kl=9.0)]
    entries += [train(s, loss=float(s)) for s in range(1, 6)] + [validation(4, reverse_kl=4.0)]
    entries += [train(3, loss=30.0), train(4, loss=40.0)]  # back to the checkpoint of step 2
    lines(tmp_path / "metrics.jsonl", entries)
    record = read_run(tmp_path)
    assert record.series("train", "loss") == [(1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0)]
    assert record.series("validation", "reverse_kl") == [(0, 9.0)]
    assert record.steps == 4
    lines(tmp_path / "metrics.jsonl", [*entries, validation(4, reverse_kl=1.0), validation(4, reverse_kl=2.0)])
    assert read_run(tmp_path).series("validation", "reverse_kl") == [(0, 9.0), (4, 2.0)]


def test_rollouts_of_steps_done_again_are_shown_once(tmp_path):
    lines(tmp_path / "metrics.jsonl", [train(1, loss=1.0)])
    same = rollout(2)
    lines(tmp_path / "rollouts.jsonl", [rollout(1), same, rollout(4, ("old",)), same, rollout(4, ("new",))])
    assert [(r.step, r.tokens) for r in read_run(tmp_path).rollouts] == [(1, ["a"]), (2, ["a"]), (4, ["new"])]
    lines(tmp_path / "rollouts.jsonl", [rollout(1), same, same])
    assert [r.step for r in read_run(tmp_path).rollouts] == [1, 2]


def test_a_cut_last_line_is_left_out_and_a_broken_line_is_noted(tmp_path):
    path = tmp_path / "metrics.jsonl"
    whole = json.dumps(train(1, loss=1.0)) + "\n"
    path.write_text(whole + json.dumps(train(2, loss=2.0))[:-4])
    record = read_run(tmp_path)
    assert record.series("train", "loss") == [(1, 1.0)] and not [n for n in record.notes if "metrics" in n]
    path.write_text(whole + "{oops\n" + json.dumps(train(2, loss=2.0)) + "\n")
    record = read_run(tmp_path)
    assert record.series("train", "loss") == [(1, 1.0), (2, 2.0)]
    assert "metrics.jsonl: 1 unreadable line(s) left out, the first is line 2" in record.notes


def test_values_that_are_not_finite_are_gaps(tmp_path):
    text = '{"step": 1, "kind": "train", "loss": NaN, "grad_norm": null, "applied": true}\n'
    (tmp_path / "metrics.jsonl").write_text(text + json.dumps(train(2, loss=2.0)) + "\n")
    record = read_run(tmp_path)
    assert record.train == {1: {}, 2: {"loss": 2.0}}
    lines(tmp_path / "rollouts.jsonl", [rollout(1, ("a", "b"), log_ratio=[None, math.nan], gate=[None, 0.0])])
    assert read_run(tmp_path).rollouts[0].log_ratio == [None, None]
    write_report(tmp_path)


def test_a_directory_without_metrics_is_refused(tmp_path):
    with pytest.raises(ReportError, match=r"holds no metrics\.jsonl"):
        write_report(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ReportError, match="holds no metrics yet"):
        write_figure(tmp_path, tmp_path / "f.png")


def test_tokens_carry_colour_gate_and_values(tmp_path):
    lines(tmp_path / "metrics.jsonl", [train(1, loss=1.0)])
    tokens = ["<b>", ' "q"', "\n", "far", "half", "end"]
    columns = {
        "log_ratio": [None, -2.0, 1.0, -40.0, -0.5, 0.0],
        "gate": [1.0, 0.0, 1.0, 0.0, 0.25, 1.0],
        "guided": [True, False, False, False, False, False],
    }
    lines(tmp_path / "rollouts.jsonl", [rollout(1, tokens, **columns)])
    text = write_report(tmp_path).read_text(encoding="utf-8")
    Page(text)
    spans = re.findall(r'<span class="(t[^"]*)"(?: style="--a:([\d.]+)")? title="([^"]*)">', text)
    assert [s[0] for s in spans] == ["t guided", "t neg out", "t pos", "t neg out", "t neg soft", "t pos"]
    assert [s[1] for s in spans] == ["", "0.50", "0.25", "1.00", "0.12", "0.00"]
    assert "written by the teacher" in spans[0][2] and "log-ratio" not in spans[0][2]
    assert spans[1][2].endswith("log-ratio −2.00, outlier")
    assert spans[4][2].endswith("log-ratio −0.50, trusted by 0.25")
    assert "&lt;b&gt;" in text and "<b>" not in text and "↵\n" in text
    assert "1 by the teacher, 5 tokens, 2 outliers" in text
    scale = re.findall(r'style="--a:([\d.]+)">([^<]+)<', text)
    assert ("1.00", "≤ −4") in scale and ("0.25", "+1") in scale


def test_long_runs_give_small_pages(tmp_path):
    steps = 20_000
    lines(tmp_path / "metrics.jsonl", [train(s, loss=random.random(), **{"seconds/a": 1.0}) for s in range(1, steps)])
    lines(tmp_path / "rollouts.jsonl", [rollout(s, ["word "] * 5000) for s in range(40)])
    path = write_report(tmp_path)
    assert path.stat().st_size < 2_000_000
    text = path.read_text()
    assert text.count("<details") == 12 and "The first 600 of 5000 tokens" in text
    assert ">Step 0 <" in text and ">Step 39 <" in text


def test_uneven_rollouts_are_noted(tmp_path):
    lines(tmp_path / "metrics.jsonl", [train(1, loss=1.0)])
    lines(tmp_path / "rollouts.jsonl", [rollout(1, ("a", "b"), gate=[1.0]), {"step": 1}, rollout(1)])
    record = read_run(tmp_path)
    assert len(record.rollouts) == 1
    assert "rollouts.jsonl: 2 rollout(s) left out, since their columns differ in length" in record.notes


def test_the_figure_is_a_png_of_the_run(run):
    from matplotlib.image import imread

    path = write_figure(run, run / "pictures" / "run.png")
    image = imread(path)
    assert image.shape[0] > 600 and image.shape[1] > 1200
    colored = abs(image[..., :3] - image[..., :3].mean(axis=-1, keepdims=True)).max(axis=-1) > 0.2
    rows, columns = colored.shape[0] // 2, colored.shape[1] // 3
    for r in range(2):
        for c in range(3):  # each panel has drawn something
            assert colored[r * rows : (r + 1) * rows, c * columns : (c + 1) * columns].sum() > 200


def test_charts_put_values_where_they_belong():
    text = line_chart("T", "n", [Line("l", [(0, 0.0), (10, 1.0)], 0, marked=True)])
    dots = [(float(x), float(y)) for x, y in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', text)]
    (x0, y0), (x1, y1) = dots
    assert x0 < x1 and y0 > y1
    logs = line_chart("T", "n", [Line("l", [(0, 1e-3), (1, 1e-2), (2, 1e-1), (3, 0.0)], 0, marked=True)], log=True)
    ys = [float(y) for y in re.findall(r'cy="([\d.]+)"', logs)]
    assert len(ys) == 3 and ys[0] - ys[1] == pytest.approx(ys[1] - ys[2], abs=0.2)
    assert "did not log" in line_chart("T", "n", [Line("l", [(0, 0.0)], 0)], log=True)
    for flat in ([(1, 0.0)], [(1, 2.0), (2, 2.0)], [(1, -3.0)], [(1, 1e-12)], [(1, -1e9), (2, 1e9)]):
        Page(line_chart("T", "n", [Line("l", flat, 0)]))


def test_a_stack_adds_up_and_one_slow_step_does_not_flatten_it():
    layers = [("a", [(s, 1.0) for s in range(100)]), ("b", [(s, 2.0 if s else 200.0) for s in range(100)])]
    text = stacked_chart("T", "n", layers)
    assert "Cut off above" in text and "the slowest step took 201" in text
    bands = re.findall(r'class="band"[^>]*d="M([^Z]*)Z', text)
    tops = [[float(p.split(",")[1]) for p in band.split("L")][50] for band in bands]
    base = 168.0  # the axis
    assert (base - tops[1]) / (base - tops[0]) == pytest.approx(3.0, rel=0.01)


def test_the_trend_follows_a_line_to_its_ends_and_stays_positive_on_a_log_scale():
    slope = random.uniform(-2, 2)
    points = [(x, 5 + slope * x) for x in range(1, 101)]
    assert smooth(points) == [(x, pytest.approx(y)) for x, y in points]
    noisy = [(x, y + random.gauss(0, 1)) for x, y in points]
    error = sum((s - y) ** 2 for (_, s), (_, y) in zip(smooth(noisy), points, strict=True)) / 100
    assert 0 < error < 0.6
    falling = [(x, math.exp(-x / 3)) for x in range(1, 61)]
    assert smooth(falling, log=True) == [(x, pytest.approx(y)) for x, y in falling]
    assert smooth(points[:19]) == points[:19]


def test_thinning_keeps_means_and_short_series():
    points = [(x, random.random()) for x in range(1000)]
    few = thin(points, 100)
    assert len(few) == 100
    assert sum(y for _, y in few) / 100 == pytest.approx(sum(y for _, y in points) / 1000)
    assert thin(points[:50], 100) == points[:50]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1.0, "1"), (1.234, "1.23"), (12.34, "12.3"), (1234.5, "1,234"), (0.00123, "0.00123"), (1e-5, "1e-5"),
     (-0.5, "-0.5"), (2.5e7, "2.5e7"), (100, "100"), (20, "20")],
)  # fmt: skip
def test_numbers_for_people(value, text):
    assert number(value) == text
