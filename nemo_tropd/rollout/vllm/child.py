"""Rollouts by vLLM in a child process of rank 0; ``server`` is that process, weights go through shared memory."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NoReturn

from nemo_tropd.rollout.engine import EngineDied, EngineError
from nemo_tropd.rollout.vllm.remote import Member, RemoteEngine
from nemo_tropd.rollout.vllm.settings import EngineSettings
from nemo_tropd.rollout.vllm.wire import Wire
from nemo_tropd.rollout.weights.shared_memory import SharedMemory

_CLOSE_TIMEOUT_S = 10.0
_LOG_LINES_SHOWN = 12
# Set for the trainer's ranks by torchrun; vLLM would take them for its own. The secret is for engine hosts alone.
_TAKEN_OUT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE")
_PREFIXES_TAKEN_OUT = ("TORCHELASTIC_", "ROLE_", "MASTER_", "NEMO_TROPD_SECRET")


@dataclass(frozen=True)
class _Process:
    popen: subprocess.Popen[bytes]
    log: IO[bytes]

    def last_lines(self) -> str:
        """The end of what the process printed."""
        self.log.seek(0)
        lines = self.log.read().decode(errors="replace").strip().splitlines()
        return "\n".join(lines[-_LOG_LINES_SHOWN:])


class VllmEngine(RemoteEngine):
    """A ``RolloutEngine`` over a Hugging Face checkpoint, whose weights are number 0.

    The same list of requests gives the same bits on a fresh engine with the same weights and settings: every request
    has a seed of its own, chunked prefill is off, and the complete list is queued before the first step. Another order,
    other lengths or another number of threads may change the last bits.
    """

    def __init__(
        self,
        settings: EngineSettings,
        *,
        threads: int = 1,
        bucket_mib: int = 256,
        exchange_dir: str | Path | None = None,
        start_timeout_s: float = 600.0,
        answer_timeout_s: float = 3600.0,
    ) -> None:
        """Settings only; nothing is started.

        ``threads``: OpenMP threads of the engine on CPU.
        ``bucket_mib``, ``exchange_dir``: size of a bucket of weights and the folder it passes through (/dev/shm).
        ``answer_timeout_s``: an engine that says nothing for so long counts as dead.
        Raises EngineError when the checkpoint cannot be read or a setting makes no sense.
        """
        super().__init__(
            settings,
            threads=threads,
            bucket_mib=bucket_mib,
            timeout_s=answer_timeout_s,
            answer_timeout_s=answer_timeout_s,
        )
        self._exchange_dir = Path(exchange_dir) if exchange_dir is not None else None
        self._start_timeout_s = start_timeout_s
        self._process: _Process | None = None

    @property
    def process_id(self) -> int | None:
        """The engine's process, which leads a session of its own; None when it is not running."""
        return self._process.popen.pid if self._process else None

    def start(self) -> None:
        """Start the process and load the model; 15 to 20 s on two cores."""
        if self._process is not None:
            raise EngineError("the engine is running; close it before it is started again")
        if self.settings.refreshable:
            self._weights = SharedMemory(self._exchange_dir)
        ours, theirs = socket.socketpair()
        log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process; it has no name, so nothing can be left
        with theirs:
            popen = subprocess.Popen(
                [sys.executable, "-P", "-m", "nemo_tropd.rollout.vllm.server", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment(),
                pass_fds=(theirs.fileno(),),
                start_new_session=True,  # Ctrl-C and torchrun's signals go to the trainer, which then closes the engine
            )
        self._process = _Process(popen, log)
        self._members = [Member(0, f"the engine's process {popen.pid}", Wire(ours))]
        try:
            self._open(self._start_timeout_s)
        except EngineDied as error:
            raise EngineError(f"the engine could not start on {self.settings.model_dir}: {error}") from error

    def close(self, *, run_over: bool = False) -> None:
        """See ``RolloutEngine.close``."""
        self._let_go()

    def _let_go(self) -> None:
        """End the session of the process and wait until it is gone, so that memory is free for a successor."""
        super()._let_go()
        process, self._process = self._process, None
        if process is not None:
            _kill(process)
            process.log.close()

    def _died(self, members: Sequence[Member], reason: str, cause: BaseException | None = None) -> NoReturn:
        process = self._process
        assert process is not None
        _kill(process)
        status, words = process.popen.returncode, process.last_lines()
        self._let_go()
        raise EngineDied(f"{reason} (exit status {status}); last lines of its log:\n{words}") from cause

    def _refused(self, member: Member, error: EngineError) -> NoReturn:
        self._died([member], str(error), error)

    def _environment(self) -> dict[str, str]:
        env = {
            name: value
            for name, value in os.environ.items()
            if name not in _TAKEN_OUT and not name.startswith(_PREFIXES_TAKEN_OUT)
        }
        # Without byte code the process would compile all of vLLM anew; KVCACHE_SPACE would overrule kv_cache_gib;
        # interpreted Triton kernels are for the trainer's tests.
        for name in ("PYTHONDONTWRITEBYTECODE", "VLLM_CPU_KVCACHE_SPACE", "TRITON_INTERPRET"):
            env.pop(name, None)
        roots = [str(Path(__file__).parents[3]), *filter(None, [env.get("PYTHONPATH")])]
        env.update(
            PYTHONPATH=os.pathsep.join(roots),
            OMP_NUM_THREADS=str(self._threads),
            HF_HUB_OFFLINE="1",
            VLLM_NO_USAGE_STATS="1",
            VLLM_PLUGINS="",  # NeMo registers one, which costs 20 s and tracebacks
            VLLM_ENABLE_V1_MULTIPROCESSING="0",
            VLLM_CPU_OMP_THREADS_BIND="nobind",
            VLLM_HOST_IP="127.0.0.1",
            GLOO_SOCKET_IFNAME="lo",
        )
        env.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        # Threads that wait by spinning cost a busy machine twenty times the time; a short spin keeps the speed.
        env.setdefault("GOMP_SPINCOUNT", "20000")
        return env


def _kill(process: _Process) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.popen.pid, signal.SIGKILL)
    process.popen.wait(timeout=_CLOSE_TIMEOUT_S)
