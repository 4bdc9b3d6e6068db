"""Signals as in a terminal's foreground: nohup and a shell's background ignore some, which children inherit."""

import signal


def default_signals() -> None:
    """Undo what this process was started with."""
    for number, handler in ((signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, handler)
