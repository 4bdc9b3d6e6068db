"""What ``examples/evaluate.py`` calls: the command line is read before seconds of imports."""

import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from nemo_tropd.command_line import fail
from nemo_tropd.config import ConfigError
from nemo_tropd.evaluation.settings import read_command_line
from nemo_tropd.files import name_compiler_cache


def main(argv: Sequence[str], conf_dir: Path, convert: Callable[[Path, Path], None], usage: str = "") -> None:
    """Evaluate. ``convert`` makes a Hugging Face folder of a Megatron checkpoint. Expected errors end the process with
    code 2 and one readable message, a signal with 128 and its number, after the engine has ended."""
    try:
        plan = read_command_line(argv, conf_dir, usage)
    except ConfigError as error:
        fail(error)
    name_compiler_cache()
    from nemo_tropd.evaluation.run import EXPECTED, evaluate

    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop)
    try:
        evaluate(plan, convert)
    except EXPECTED as error:
        fail(error)


def _stop(number: int, frame: FrameType | None) -> None:
    print("stopped: the same command resumes after the last saved batch", flush=True)
    raise SystemExit(128 + number)
