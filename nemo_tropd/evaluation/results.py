"""Verdicts as results: lines that state how they came about, JSON, Markdown and a page."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nemo_tropd.batch import Sampling
from nemo_tropd.evaluation import statistics
from nemo_tropd.evaluation.generation import Asked, engine_version
from nemo_tropd.evaluation.graders import Verdict
from nemo_tropd.evaluation.models import Model
from nemo_tropd.evaluation.problems import Task
from nemo_tropd.evaluation.store import Answer
from nemo_tropd.files import write_json, write_text
from nemo_tropd.report.evaluation import render

_LONGEST = 200  # characters of a parsed answer in results.json: it may be all of a response
_SHOWN = 100  # problems of a benchmark on the page
_HEAD, _TAIL = 1500, 3000  # characters of a longer answer on the page; all of it is in its file


@dataclass(frozen=True)
class Graded:
    """A model's answers to a benchmark and the verdicts on them, both by question."""

    asked: Asked
    answers: list[Answer]
    verdicts: list[Verdict]
    score: statistics.Score

    def of(self, problem: int) -> list[Verdict]:
        """By sample."""
        return self.verdicts[problem :: self.asked.task.problems]

    @property
    def stated(self) -> str:
        """All that moves a score, in words."""
        return _stated(self.asked.task, self.asked.model, self.answers, self.asked.engine.dtype)

    @property
    def line(self) -> str:
        """The result, never without how it came about."""
        return result_line(self.asked.task, self.asked.model, self.answers, self.score, self.asked.engine.dtype)

    @property
    def right(self) -> str:
        """The mean, with what :func:`_right` adds."""
        return _right(self.score)

    def numbers(self) -> dict[str, str]:
        """The other statistics, by label."""
        return _numbers(self.score)


def result_line(task: Task, model: Model, answers: Sequence[Answer], score: statistics.Score, dtype: str) -> str:
    """A result, never without how it came about."""
    numbers = ", ".join(f"{label} {value}" for label, value in _numbers(score).items())
    return f"{task.name}, {model.label}: {_right(score)} right ({numbers}) | {_stated(task, model, answers, dtype)}"


def _stated(task: Task, model: Model, answers: Sequence[Answer], dtype: str) -> str:
    b = task.settings
    closed = sum("</think>" in a.text for a in answers) / len(answers)
    think = f"think marker {'<think> opened by the template' if model.thinks_at_once else 'not in the template'}"
    words = (
        f"at most {b.max_new_tokens:,} new tokens",
        str(Sampling(b.temperature, b.top_p, b.top_k)) if b.temperature else "greedy",
        f"n = {len(answers) // task.problems}",
        model.template_in_words,
        f"{think}, </think> in {closed:.0%} of answers",
        f"{engine_version()}, {dtype}",
    )
    return "; ".join(words)


def _right(s: statistics.Score) -> str:
    """The mean with its standard error, which one problem has not, and interval."""
    error = f" ± {s.error:.1%}" if math.isfinite(s.error) else ""
    return f"{s.mean:.1%}{error} [{100 * s.low:.1f} to {100 * s.high:.1f}]"


def _numbers(s: statistics.Score) -> dict[str, str]:
    n = max(s.pass_at)
    several = {f"pass@{k}": f"{v:.1%}" for k, v in s.pass_at.items() if k > 1} | {f"majority@{n}": f"{s.majority:.1%}"}
    return (several if n > 1 else {}) | {"truncated": f"{s.truncated:.1%}", "unparsed": f"{s.unparsed:.1%}"}


def graded(asked: Asked) -> Graded:
    """The verdicts on all answers, which must be there."""
    answers = [answer for i in range(len(asked.task.questions)) if (answer := asked.answer(i)) is not None]
    return Graded(asked, answers, *scored(asked.task, asked.model, answers))


def scored(task: Task, model: Model, answers: Sequence[Answer]) -> tuple[list[Verdict], statistics.Score]:
    """Verdicts on the answers to a benchmark's first questions, a sample or more of every problem. Where the template
    opens a thought, an answer begins in it."""
    opened, questions = "<think>" if model.thinks_at_once else "", task.questions[: len(answers)]
    verdicts = task.grader.grade([(q.reference, opened + a.text) for q, a in zip(questions, answers, strict=True)])
    by_problem = [range(i, len(answers), task.problems) for i in range(task.problems)]
    score = statistics.score(
        [[verdicts[i].correct for i in own] for own in by_problem],
        [[verdicts[i].answer for i in own] for own in by_problem],
        [[answers[i].finished for i in own] for own in by_problem],
    )
    return verdicts, score


def write_results(folder: Path, name: str, results: Sequence[Graded]) -> dict[str, Any]:
    """results.json, results.md and report.html in ``folder``; returns the first's content. No times or host names are
    in them: the same answers give the same bytes."""
    benchmarks: dict[str, list[Graded]] = {}
    for one in results:
        benchmarks.setdefault(one.asked.task.name, []).append(one)
    differences = {key: [_difference(group[0], other) for other in group[1:]] for key, group in benchmarks.items()}
    content = {
        "name": name,
        "benchmarks": {
            key: {
                "problems": group[0].asked.task.problems,
                "settings": asdict(group[0].asked.task.settings),
                "models": {g.asked.model.label: _as_json(g, folder) for g in group},
                "differences": differences[key],
            }
            for key, group in benchmarks.items()
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "results.md", _markdown(name, benchmarks, differences))
    pages = [_on_page(group, differences[key], folder) for key, group in benchmarks.items()]
    write_text(folder / "report.html", render(name, _lead(benchmarks), pages))
    write_json(folder / "results.json", content)  # last: an evaluation with it has the rest, too
    print(f"results  {folder / 'results.md'}\nreport   {folder / 'report.html'}", flush=True)
    return content


def _difference(model: Graded, other: Graded) -> dict[str, Any]:
    """How much the model is better than another one."""
    first, second = ([[v.correct for v in g.of(i)] for i in range(g.asked.task.problems)] for g in (other, model))
    found = statistics.difference(first, second)
    words = found.sentence(other.asked.model.label, model.asked.model.label)
    return {
        "from": other.asked.model.label,
        **_finite(found._asdict()),
        "more_than_noise": found.beyond_noise,
        "words": words,
    }


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """For JSON, which has no NaN: the error of a single problem."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def _as_json(g: Graded, folder: Path) -> dict[str, Any]:
    problems = range(g.asked.task.problems)
    return {
        "line": g.line,
        "model": g.asked.model.digest,
        **_finite(asdict(g.score)),
        "correct": [[v.correct for v in g.of(i)] for i in problems],
        "answers": [[v.answer and v.answer[:_LONGEST] for v in g.of(i)] for i in problems],
        "file": _relative(g, folder),
    }


def _relative(g: Graded, folder: Path) -> str:
    return g.asked.file.path.relative_to(folder.parent).as_posix()


def _markdown(name: str, benchmarks: dict[str, list[Graded]], differences: dict[str, list[dict[str, Any]]]) -> str:
    lines = [f"# {name}"]
    for key, group in benchmarks.items():
        labels = list(group[0].numbers())
        lines += ["", f"## {key}", "", f"| model | right | {' | '.join(labels)} |", "|---" * (len(labels) + 2) + "|"]
        for g in group:
            lines.append(f"| {g.asked.model.label} | {g.right} | {' | '.join(g.numbers().values())} |")
        lines += ["", *(f"- {d['words']}" for d in differences[key]), *(f"- {g.line}" for g in group)]
    return "\n".join(lines) + "\n"


def _lead(benchmarks: dict[str, list[Graded]]) -> str:
    models = [g.asked.model.label for g in next(iter(benchmarks.values()))]
    return f"{', '.join(models)} on {', '.join(benchmarks)}: shares of right answers, means over samples."


def _on_page(group: list[Graded], differences: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """What evaluation.html shows of one benchmark."""
    task = group[0].asked.task
    models = []
    for g in group:
        mean, low, high = (100 * share for share in (g.score.mean, g.score.low, g.score.high))
        models.append(
            {
                "label": g.asked.model.label,
                "right": g.right,
                "mean": f"{mean:.2f}",
                "low": f"{low:.2f}",
                "width": f"{high - low:.2f}",
                "numbers": list(g.numbers().values()),
                "stated": g.stated,
                "file": _relative(g, folder),
            }
        )
    return {
        "name": task.name,
        "headings": list(group[0].numbers()),
        "problems": task.problems,
        "models": models,
        "differences": [d["words"] for d in differences],
        "shown": [_problem(i, group) for i in range(min(task.problems, _SHOWN))],
    }


def _problem(i: int, group: list[Graded]) -> dict[str, Any]:
    question = group[0].asked.task.questions[i]  # of the first sample
    return {
        "number": i + 1,
        "question": question.text,
        "known": _cut(str(question.reference), 300, 300),
        "models": [
            {
                "label": g.asked.model.label,
                "marks": "".join("✓" if v.correct else "·" if v.answer is None else "✗" for v in g.of(i)),
                "text": _cut(g.answers[i].text, _HEAD, _TAIL) or "(nothing)",
                "facts": f"{g.answers[i].tokens:,} tokens" + ("" if g.answers[i].finished else ", cut at the limit"),
            }
            for g in group
        ],
    }


def _cut(text: str, head: int, tail: int) -> str:
    left_out = len(text) - head - tail
    return f"{text[:head]}\n[... {left_out:,} characters ...]\n{text[-tail:]}" if left_out > 0 else text
