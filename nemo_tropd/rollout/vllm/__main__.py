"""The process that ``child.VllmEngine`` starts: ``python -m nemo_tropd.rollout.vllm FD OWNER``, never run by a person.

FD is its end of a socket pair, OWNER the id of the process that has the other end. A scheduler signals every process
of a job, but the trainer needs its engine until it has saved: signals are ignored here. The process ends with its owner
or at the end of FD, also while it still imports: libraries are imported last.
"""

import os
import select
import signal
import sys
import threading
import traceback

from nemo_tropd.imports import without_collections
from nemo_tropd.parallel.signals import SIGNALS  # as the other, it needs the standard library alone

_CHECK_EVERY_S = 0.5


def end_session() -> None:
    """End this process and every worker vLLM started: they share a session of their own, led by this process."""
    if os.getpgid(0) == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(1)


def watch(fd: int, owner: int) -> None:
    """End the session with the owner. Its id is checked, too: a process it forked may hold its end of ``fd`` open."""
    link = select.poll()
    link.register(fd, select.POLLRDHUP)
    while not link.poll(1000 * _CHECK_EVERY_S) and os.getppid() == owner:
        pass
    end_session()


def main() -> None:
    fd, owner = int(sys.argv[1]), int(sys.argv[2])
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    os.set_inheritable(fd, False)
    threading.Thread(target=watch, args=(fd, owner), daemon=True).start()
    try:
        with without_collections(freeze=True):
            from nemo_tropd.rollout.vllm.server import serve_owner

        serve_owner(fd)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    end_session()


if __name__ == "__main__":
    main()
