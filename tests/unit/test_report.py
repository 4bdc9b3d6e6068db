"""The report: what killed and resumed runs leave, what is missing, what must be escaped, and what is shown."""

import json
import math
import random
import re
from collections import Counter
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from xml.etree import ElementTree

import pytest

from examples.figure import write_figure
from nemo_tropd.report import ReportError, write_report
from nemo_tropd.report.charts import COLORS, Chart, Line, charts_of, step_time
from nemo_tropd.report.drawing import svg
from nemo_tropd.report.records import read_run, smooth, thin
from nemo_tropd.report.text import number

pytestmark = pytest.mark.random

VOID = {"meta", "br", "hr", "img"}
HOSTILE = """</script></style><img src=x onerror=alert(1)><b>"'&amp; {{ 7*7 }} {% raw %} $x^2$ {# \ud800"""


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
    """A complete run of 30 random steps."""
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
    assert "1.500 1.200 −20% better" in " ".join(" ".join(page.words).split())
    rows = re.findall(r"<tr><td>.*?</tr>", text, re.DOTALL)
    cells = {re.findall(r"<td[^>]*>(.*?)</td>", r)[0].split("<")[0]: re.sub(r"<[^>]+>", " ", r) for r in rows}
    assert "1.500" in cells["Reverse KL"] and "1.200" in cells["Reverse KL"] and "better" in cells["Reverse KL"]
    assert "−25%" in cells["1 − TV"] and "worse" in cells["1 − TV"]
    assert (
        "+12 points" in cells["Exact match"] and "(8 answers)" in cells["Exact match"] and "25%" in cells["Exact match"]
    )
    assert "Student entropy" not in cells
    assert "q&a <1>" in page.text and "<script>alert(1)</script>" in page.text
    assert text.count("<script>") == 1 and "<b>" not in text
    assert "a: <b>" in page.text and "9.9" in page.text and "<title>a &lt;run&gt;: 30 steps</title>" in text
    for title in ("Trust fraction", "Gradient norm", "Guided fraction", "Engine against trainer", "Time of a step"):
        assert f"<h3>{title}</h3>" in text
    assert not re.search(r"\b(nan|inf)\b", text)


def test_the_page_refers_to_nothing_outside(run):
    text = write_report(run).read_text(encoding="utf-8")
    page = Page(text)
    for tag, attributes in page.tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "image", "a", "base", "form"), tag
        assert not {"src", "srcset", "action", "data"} & set(attributes), attributes
        assert attributes.get("href", "#").startswith("#"), attributes
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))
    assert not re.search(r"https?:|//\w+\.|@import|@font-face", text)


def test_the_charts_of_a_page_share_no_id_and_every_reference_has_its_target(run):
    page = Page(write_report(run).read_text(encoding="utf-8"))
    ids = Counter(a["id"] for _, a in page.tags if "id" in a)
    used = {m for _, a in page.tags for v in a.values() for m in re.findall(r"^#(.*)|url\(#(.*?)\)", v or "")}
    used = {one or other for one, other in used}
    assert len(ids) >= 4  # dots of three charts, the bands' clip path
    assert set(ids.values()) == {1} and set(ids) == used


def test_every_chart_has_a_text_alternative_and_colours_of_the_theme(run):
    text = write_report(run).read_text(encoding="utf-8")
    charts = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    drawn = [c for c in charts_of(read_run(run)).values() if c.drawn]
    assert len(charts) == len(drawn) == text.count('role="img"') >= 8
    for chart, definition in zip(charts, drawn, strict=True):
        assert f'role="img" aria-label="{definition.title}. {definition.lines[0].label}: ' in chart
        assert ">step</text>" in chart and "var(--quiet)" in chart and "font-family" not in chart
        assert not re.search(r"#[0-9a-fA-F]{6}\b", re.sub(r'(href="|url\(|id=")#?\w+', "", chart))
        assert "<style" not in chart and "<metadata" not in chart and "<!--" not in chart
    light, dark = re.findall(r":root\{(.*?)\}", text, re.DOTALL)
    assert all(f"--{name}:{color}" in light and f"--{name}:#" in dark for name, color in COLORS.items())


def test_the_same_run_gives_the_same_page(run):
    assert write_report(run).read_bytes() == write_report(run).read_bytes()


def test_hostile_text_stays_text(run):
    summary = json.loads((run / "summary.json").read_text())
    summary.update(name=HOSTILE, config=HOSTILE, versions={HOSTILE: HOSTILE})
    summary["answers"] = [{"prompt": HOSTILE, "before": HOSTILE, "after": HOSTILE}] * 2
    (run / "summary.json").write_text(json.dumps(summary))
    lines(run / "rollouts.jsonl", [rollout(1, (HOSTILE, '" onmouseover="alert(1)', "\0"), prompt=HOSTILE)])
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines(run / "metrics.jsonl", [e | ({f"seconds/{HOSTILE}": 0.5} if e["kind"] == "train" else {}) for e in entries])
    page = Page(write_report(run).read_text(encoding="utf-8"))
    shown = " ".join(HOSTILE.replace("\ud800", "?").split())
    # title, heading, two answers of three texts, a phase's legend, prompt, token, configuration, version
    assert page.text.count(shown) == 2 + 6 + 1 + 2 + 1 + 2
    tags = Counter(tag for tag, _ in page.tags)
    assert tags["script"] == tags["style"] == 1 and not {"img", "b"} & set(tags)
    assert not [a for _, a in page.tags if any(name.startswith("on") for name in a)]
    write_figure(run, run / "figure.png")


def test_an_installed_package_has_the_template():
    names = {file.name for file in resources.files("nemo_tropd.report").iterdir()}
    assert {"page.html", "page.css"} <= names


def test_missing_metrics_and_files_leave_a_note(tmp_path):
    lines(tmp_path / "metrics.jsonl", [train(1, loss=0.5)])
    text = write_report(tmp_path).read_text(encoding="utf-8")
    page = Page(text)
    assert "This run made no validation" in page.text
    assert "This run kept no rollouts" in page.text
    assert "summary.json is missing" in page.text
    titles = re.findall(r'<figure class="empty"><figcaption><h3>(.*?)</h3>', text)
    assert {"Reverse KL", "Entropy", "Time of a step", "Gradient norm"} <= set(titles) and "Loss" not in titles
    assert tmp_path.name in page.text and "1 step." in page.text
    assert page.text.count("This run did not log it.") == len(titles) == 12
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


def test_rollouts_of_an_abandoned_part_are_not_shown_beside_those_of_the_next(tmp_path):
    def by(part: str, began_after: int, *steps: int) -> list[dict]:
        return [rollout(step, (part, f"{i}"), part=part, began_after=began_after) for step in steps for i in (0, 1)]

    def shown(*entries: dict) -> list[tuple[int, str]]:
        lines(tmp_path / "rollouts.jsonl", entries)
        return [(r.step, r.tokens[0]) for r in read_run(tmp_path).rollouts if r.tokens[1:] != ["1"]]

    lines(tmp_path / "metrics.jsonl", [train(1, loss=1.0)])
    # killed before its first checkpoint, begun anew; then back to the checkpoint of step 4, with another interval
    parts = [*by("a", 0, 1), *by("b", 0, 1, 5), *by("c", 4, 8)]
    assert shown(*parts) == [(1, "b"), (8, "c")]
    assert shown(*parts[:4]) == [(1, "b")] and shown(*parts[:6]) == [(1, "b"), (5, "b")]
    assert len(read_run(tmp_path).rollouts) == 4, "both rollouts of a step"
    old = [rollout(1, ("old", "0")), rollout(5, ("old", "0"))]  # of an earlier version, which marks nothing
    assert shown(*old, *by("c", 4, 8)) == [(1, "old"), (8, "c")]
    assert shown(*old, *by("c", 4, 5)) == [(1, "old"), (5, "c")]


def test_shares_are_of_their_own_number_of_answers(tmp_path):
    lines(tmp_path / "metrics.jsonl", [train(1, loss=1.0)])
    shares = dict.fromkeys(("exact_match", "top1_agreement", "benchmark/sums", "benchmark/old"), 0.5)
    before = {**shares, "exact_match_of": 4.0, "benchmark/sums/of": 24.0}
    after = {**shares, "exact_match_of": 8.0, "benchmark/sums/of": 24.0}
    write_report(tmp_path, {"before": before, "after": after})
    text = Page((tmp_path / "report.html").read_text(encoding="utf-8")).text
    assert "right answers, where one is known (4 answers before, 8 after) 50%" in text
    assert "sumsbenchmark, right answers (24 answers) 50%" in text
    assert "oldbenchmark, right answers 50%" in text and "on the teacher's answers 50%" in text
    assert "questions" not in text


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
    with pytest.raises(ReportError, match=r"has no metrics\.jsonl"):
        write_report(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ReportError, match="has no metrics yet"):
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


def dots(text: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r'<use href="#\w+" x="([\d.]+)" y="([\d.]+)"', text)]


def test_charts_put_values_where_they_belong():
    (x0, y0), (x1, y1) = dots(svg(Chart("T", "n", "u", [Line("l", [(0, 0.0), (10, 1.0)], 0, marked=True)])))
    assert x0 < x1 and y0 > y1
    points = [(0, 1e-3), (1, 1e-2), (2, 1e-1), (3, 0.0)]
    ys = [y for _, y in dots(svg(Chart("T", "n", "u", [Line("l", points, 0, marked=True)], "log")))]
    assert len(ys) == 3 and ys[0] - ys[1] == pytest.approx(ys[1] - ys[2], abs=0.2)
    assert not Chart("T", "n", "u", [Line("l", [(0, 0.0)], 0)], "log").drawn
    for flat in ([(1, 0.0)], [(1, 2.0), (2, 2.0)], [(1, -3.0)], [(1, 1e-12)], [(1, -1e9), (2, 1e9)]):
        text = svg(Chart("T", "n", "u", [Line("l", flat, 0)]))
        Page(text)
        assert len(dots(text)) == len(flat) and all(0 < y < 206 for _, y in dots(text))


def test_the_first_and_the_last_validation_have_their_values():
    text = svg(Chart("T", "n", "u", [Line("l", [(0, 1.234), (5, 9.0), (10, 0.567)], 0, marked=True)]))
    assert ">1.23</text>" in text and ">0.567</text>" in text


def bands(chart: Chart) -> list[list[tuple[float, float]]]:
    """The corners of the coloured shapes, which are paths or uses of a path defined elsewhere."""
    root = ElementTree.fromstring(svg(chart))
    defined = {"#" + e.attrib["id"]: e.get("d", "") for e in root.iter() if "id" in e.attrib}
    found = []
    for e in root.iter():
        if re.search(r"fill: var\(--c\d\)", e.get("style", "")):
            path, down = e.get("d") or defined[e.attrib["href"]], float(e.get("y", 0))
            corners = re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", path)
            found.append([(float(x), float(y) + down) for x, y in corners])
    return found


def test_a_stack_adds_up_and_one_slow_step_does_not_flatten_it():
    layers = [("a", [(s, 1.0) for s in range(100)]), ("b", [(s, 2.0 if s else 200.0) for s in range(100)])]
    chart = step_time(layers)
    assert "Cut off above" in chart.note and "the slowest step took 201" in chart.note
    assert chart.y_ticks()[-1] < 10
    base = 174.0  # the axis
    tops = [min(y for x, y in band if x > 43) for band in bands(chart)]  # after the first step
    assert (base - tops[1]) / (base - tops[0]) == pytest.approx(3.0, rel=0.01)


def test_the_stack_of_a_single_step_is_visible():
    (band,) = bands(step_time([("a", [(1, 2.0)])]))
    xs, ys = zip(*band, strict=True)
    assert max(xs) - min(xs) > 50 and max(ys) - min(ys) > 50


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
