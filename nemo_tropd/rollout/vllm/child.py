"""Rollouts by vLLM in child processes of rank 0 (``vllm.__main__``); weights go through shared memory."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import psutil

from nemo_tropd.rollout.engine import EngineDied, EngineError
from nemo_tropd.rollout.vllm.remote import RemoteEngine
from nemo_tropd.rollout.vllm.wire import Wire
from nemo_tropd.rollout.weights.senders import SharedMemory

_CLOSE_TIMEOUT_S = 10.0
_POLL_S = 0.02
_LOG_LINES_SHOWN = 12
# Set for the trainer's ranks by torchrun; vLLM would take them for its own. The secret is for engine hosts
# alone, the token for a teacher's servers.
# Without byte code the process would compile all of vLLM anew; KVCACHE_SPACE would overrule kv_cache_gib; interpreted
# Triton kernels are for the trainer's tests.
_TAKEN_OUT = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE"}
_TAKEN_OUT |= {"PYTHONDONTWRITEBYTECODE", "VLLM_CPU_KVCACHE_SPACE", "TRITON_INTERPRET"}
_PREFIXES_TAKEN_OUT = ("TORCHELASTIC_", "ROLE_", "MASTER_", "NEMO_TROPD_SECRET", "NEMO_TROPD_TEACHER_TOKEN")


def session_members(leader: int) -> list[int]:
    """Processes of the session that ``leader`` led, but for dead ones that wait to be reaped: they hold nothing."""
    found = []
    for process in psutil.process_iter(["status"]):
        with suppress(OSError):
            if os.getsid(process.pid) == leader and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found


@dataclass(eq=False, repr=False, kw_only=True)
class VllmEngine(RemoteEngine):
    """A ``RolloutEngine`` over a Hugging Face checkpoint, whose weights are number 0.

    The same list of requests gives the same bits on a fresh engine: every request has a seed of its own, chunked
    prefill is off, and the list is queued before the first step. Other lists or threads may change the last bits.
    """

    _errors_are_deaths = True
    exchange_dir: Path | None = None  # the folder that weights pass through; None: /dev/shm
    timeout_s: float = 3600.0
    # CUDA_VISIBLE_DEVICES of each process: with several, each has an engine and a share of the requests
    devices: tuple[str | None, ...] = (None,)
    _processes: list[tuple[subprocess.Popen[bytes], IO[bytes]]] = field(default_factory=list, init=False)  # with logs

    @property
    def process_id(self) -> int | None:
        """The first engine's process, which leads a session of its own; None when it is not running."""
        return self._processes[0][0].pid if self._processes else None

    def start(self) -> None:
        """Start the processes and load the model; 15 to 20 s on two cores."""
        if self._processes:
            raise EngineError("the engine is running; close it before it is started again")
        if self.settings.refreshable:
            self._weights = SharedMemory(self.exchange_dir)
        self._ready = True
        try:
            for devices in self.devices:
                self._spawn(devices)
            self._open()
        except EngineDied as error:
            raise EngineError(f"the engine could not start on {self.settings.model_dir}: {error}") from error

    def _spawn(self, devices: str | None) -> None:
        ours, theirs = socket.socketpair()
        log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process; it has no name to be left behind
        chosen = {} if devices is None else {"CUDA_VISIBLE_DEVICES": devices}
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "nemo_tropd.rollout.vllm", str(theirs.fileno()), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment() | chosen,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,  # Ctrl-C and torchrun's signals go to the trainer, which then closes the engine
            )
        self._processes.append((process, log))
        self._members.append(Wire(ours, f"the engine's process {process.pid}"))

    def close(self, *, run_over: bool = False) -> None:
        self._let_go()

    def _let_go(self) -> None:
        """End the sessions of the processes and wait until they are gone: memory is free for a successor."""
        super()._let_go()
        for process, log in self._processes:
            self._kill(process)
            log.close()
        self._processes = []

    def _kill(self, process: subprocess.Popen[bytes]) -> None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=_CLOSE_TIMEOUT_S)
        # vLLM's workers, which hold the memory if there are several, are nobody's children any more.
        until = time.monotonic() + _CLOSE_TIMEOUT_S
        while session_members(process.pid) and time.monotonic() < until:
            time.sleep(_POLL_S)

    def _describe(self, members: Sequence[Wire], reason: str) -> str:
        at = self._members.index(members[0]) if members else 0
        process, log = self._processes[at]
        self._kill(process)
        log.seek(0)
        words = log.read().decode(errors="replace").strip().splitlines()[-_LOG_LINES_SHOWN:]
        return "\n".join([f"{reason} (exit status {process.returncode}); last lines of its log:", *words])

    def _environment(self) -> dict[str, str]:
        """What has to be there before Python starts; ``ColocatedEngine``, which runs there, sets the rest."""
        kept = {k: v for k, v in os.environ.items() if k not in _TAKEN_OUT and not k.startswith(_PREFIXES_TAKEN_OUT)}
        return {
            # Threads that wait by spinning cost a busy machine twenty times the time; a short spin keeps the speed.
            "GOMP_SPINCOUNT": "20000",
            **kept,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parents[3]), kept.get("PYTHONPATH")])),
            "OMP_NUM_THREADS": str(self.threads),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_HOST_IP": "127.0.0.1",
            "GLOO_SOCKET_IFNAME": "lo",
        }
