"""torchrun in a process of its own, whose exit code says whether another try can help.

0     the run ended well (or was stopped by a signal and saved)
1     a rank failed and trainer.max_restarts is used up, or torchrun refused
75    the launchers lost each other: another try can find them again (sysexits' EX_TEMPFAIL)
128+n torchrun was told to stop by signal n
"""

from __future__ import annotations

import sys

MEETING_LOST = 75
# Seconds the ranks have after SIGTERM: they finish the step and write a checkpoint. A torch without this option
# leaves them 30.
SHUTDOWN_S = 120


def main(arguments: list[str]) -> int:
    """Run torchrun's own main with ``arguments``; returns the exit code."""
    from torch.distributed import DistNetworkError, DistStoreError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.run import get_args_parser
    from torch.distributed.run import main as torchrun

    known = {option for action in get_args_parser()._actions for option in action.option_strings}
    patience = [f"--shutdown-timeout={SHUTDOWN_S}"] if "--shutdown-timeout" in known else []
    try:
        torchrun([*patience, *arguments])
    except ChildFailedError as error:
        print(error, file=sys.stderr, flush=True)
        return 1
    except SignalException as error:
        return 128 + int(error.sigval)
    except (RendezvousError, DistNetworkError, DistStoreError, ConnectionError) as error:
        print(f"the launchers of the nodes lost each other ({type(error).__name__}: {error})", file=sys.stderr)
        return MEETING_LOST
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
