"""Graders: what a benchmark asks of a model, and which answers are right."""

from collections.abc import Callable, Mapping

from nemo_tropd.config import ConfigError
from nemo_tropd.evaluation.graders.choice import ChoiceGrader
from nemo_tropd.evaluation.graders.code import HumanEvalGrader, LiveCodeBenchGrader
from nemo_tropd.evaluation.graders.contract import Grader, Verdict
from nemo_tropd.evaluation.graders.expressions import MathGrader
from nemo_tropd.evaluation.graders.instructions import IfevalGrader, InstructionGrader
from nemo_tropd.evaluation.graders.mentions import MentionsGrader

_GRADERS: dict[str, Callable[[str, Mapping[str, str], Mapping[str, object]], Grader]] = {
    "math": MathGrader,
    "choice": ChoiceGrader,
    "mentions": MentionsGrader,
    "humaneval": HumanEvalGrader,
    "livecodebench": LiveCodeBenchGrader,
    "ifbench": InstructionGrader,
    "ifeval": IfevalGrader,
}
NAMES = tuple(_GRADERS)

__all__ = ["NAMES", "Grader", "Verdict", "build"]


def build(name: str, prompt: str, columns: Mapping[str, str], options: Mapping[str, object]) -> Grader:
    """The grader called ``name``.

    ``prompt`` is the benchmark file's text, whose places like {problem} are filled from a row: ``columns`` names the
    row's column for each place, and for whatever else the grader needs. Raises ConfigError for an unknown grader,
    place, column name or option, for a missing one, and if the grader's package is not installed.
    """
    if name not in _GRADERS:
        raise ConfigError("grader", name, f"there is no such grader; choose one of {', '.join(NAMES)}")
    return _GRADERS[name](prompt, columns, options)
