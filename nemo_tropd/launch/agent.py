"""Runs torchrun in a process of its own; the exit code says whether a restart can help.

A scheduler or a closed terminal signals every process of a job: those that ask a run to stop are for the ranks, which
save and exit; torchrun would end them, and itself with an error.

0     the run finished (or was stopped by a signal and saved)
1     a rank failed and trainer.max_restarts is exhausted, or torchrun rejected its arguments
2     the same, and the first rank that failed ended with 2: an expected error, which it printed
75    lost the rendezvous with the other nodes: a restart may find them again (EX_TEMPFAIL of sysexits.h)
128+n torchrun was stopped by signal n
"""

import signal
import sys

from nemo_tropd.imports import without_collections
from nemo_tropd.parallel.signals import SIGNALS, die_with_parent

RENDEZVOUS_LOST = 75
# Seconds that torchrun leaves the ranks which it asks to end since another one failed; its own default is 30.
SHUTDOWN_S = 120


def main(arguments: list[str]) -> int:
    """Run torchrun's ``main`` with ``arguments``; returns the exit code."""
    with without_collections(freeze=True):
        from torch.distributed import DistNetworkError, DistStoreError
        from torch.distributed.elastic.multiprocessing.api import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.elastic.rendezvous.api import RendezvousError
        from torch.distributed.run import get_args_parser
        from torch.distributed.run import main as torchrun

    known = {option for action in get_args_parser()._actions for option in action.option_strings}
    wanted = {"--shutdown-timeout": SHUTDOWN_S, "--signals-to-handle": "SIGQUIT"}
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # by nohup, which ranks inherit; a handler they do not
            signal.signal(number, lambda number, frame: None)
    try:
        torchrun([*(f"{option}={value}" for option, value in wanted.items() if option in known), *arguments])
    except ChildFailedError as error:
        print(error, file=sys.stderr, flush=True)
        return 2 if error.get_first_failure()[1].exitcode == 2 else 1
    except SignalException as error:
        return 128 + int(error.sigval)
    except (RendezvousError, DistNetworkError, DistStoreError, ConnectionError) as error:
        print(f"lost the rendezvous with the other nodes ({type(error).__name__}: {error})", file=sys.stderr)
        return RENDEZVOUS_LOST
    return 0


if __name__ == "__main__":
    die_with_parent()  # the supervisor's ranks must not outlive it
    sys.exit(main(sys.argv[1:]))
