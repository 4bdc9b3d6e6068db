"""Rollouts by vLLM, in a child process of the leader rank (``vllm_server`` is that process)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from torch import Tensor

from nemo_tropd.batch import Rollout
from nemo_tropd.rollout.engine import EngineDied, EngineError, RefreshStats, RolloutRequest, check_requests
from nemo_tropd.rollout.vllm.channel import ChannelClosed, receive_frame, send_frame
from nemo_tropd.rollout.vllm.host_link import unpack_rollouts
from nemo_tropd.rollout.vllm.settings import DTYPES, EngineSettings
from nemo_tropd.rollout.weights.stream import BucketFiles, buckets, checked_stream

_CLOSE_TIMEOUT_S = 10.0
_LOG_LINES_SHOWN = 12
_NOT_RUNNING = "the engine is not running"
# Set for the trainer's ranks by torchrun; vLLM would take them for its own.
_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE")
_RANK_PREFIXES = ("TORCHELASTIC_", "ROLE_", "MASTER_")


@dataclass(frozen=True)
class _Process:
    popen: subprocess.Popen[bytes]
    request_fd: int
    reply_fd: int
    log: IO[bytes]

    def alive(self) -> bool:
        return self.popen.poll() is None

    def last_lines(self) -> str:
        """The end of what the process printed."""
        self.log.seek(0)
        lines = self.log.read().decode(errors="replace").strip().splitlines()
        return "\n".join(lines[-_LOG_LINES_SHOWN:])


class VllmEngine:
    """A ``RolloutEngine`` over a Hugging Face checkpoint.

    The same list of requests gives the same bits on a fresh engine with the same weights and settings: every request
    has a seed of its own, chunked prefill is off, and the whole list is queued before the first step. Another order,
    other lengths or another number of threads may change the last bits.
    """

    def __init__(
        self,
        settings: EngineSettings,
        *,
        version: int = 0,
        threads: int = 1,
        bucket_mib: int = 256,
        exchange_dir: str | Path | None = None,
        start_timeout_s: float = 600.0,
        answer_timeout_s: float = 3600.0,
    ) -> None:
        """Settings only; nothing is started.

        ``version``: the number of the weights that lie in the checkpoint.
        ``threads``: OpenMP threads of the engine on CPU.
        ``bucket_mib``, ``exchange_dir``: size of a bucket of weights and the folder it passes through (/dev/shm).
        ``answer_timeout_s``: an engine that says nothing for so long counts as dead.
        Raises EngineError when the checkpoint cannot be read or a setting makes no sense.
        """
        if min(threads, bucket_mib) < 1:
            raise EngineError("threads and bucket_mib must be at least 1")
        self.settings = settings
        self._shapes, self._optional = settings.shapes
        self.vocab_size = settings.vocab_size
        self._threads = threads
        self._version = version
        self._bucket_bytes = bucket_mib << 20
        self._exchange_dir = Path(exchange_dir) if exchange_dir is not None else None
        self._start_timeout_s = start_timeout_s
        self._answer_timeout_s = answer_timeout_s
        self._files: BucketFiles | None = None
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
            self._files = BucketFiles(self._exchange_dir)
        request_read, request_write = os.pipe()
        reply_read, reply_write = os.pipe()
        log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process; it has no name, so nothing can be left
        popen = subprocess.Popen(
            [sys.executable, "-P", "-m", "nemo_tropd.rollout.vllm.server", str(request_read), str(reply_write)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=self._environment(),
            pass_fds=(request_read, reply_write),
            start_new_session=True,  # Ctrl-C and torchrun's signals go to the trainer, which then closes the engine
        )
        os.close(request_read)
        os.close(reply_write)
        self._process = _Process(popen, request_write, reply_read, log)
        opening = {
            "llm": self.settings.llm_arguments(),
            "version": self._version,
            "sampling": asdict(self.settings.sampling),
            "end_ids": self.settings.end_ids,
        }
        try:
            self._ask(opening, timeout_s=self._start_timeout_s)
        except EngineDied as error:
            raise EngineError(f"the engine could not start on {self.settings.model_dir}: {error}") from error

    def _environment(self) -> dict[str, str]:
        env = {
            name: value
            for name, value in os.environ.items()
            if name not in _RANK_VARIABLES and not name.startswith(_RANK_PREFIXES)
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

    def generate(self, requests: Sequence[RolloutRequest]) -> list[Rollout]:
        """See ``RolloutEngine.generate``."""
        requests = list(requests)
        check_requests(requests, max_model_len=self.settings.max_model_len, vocab_size=self.vocab_size)
        if not requests:
            return []
        prompts = [[*r.prompt_ids, *r.prefix_ids] for r in requests]
        header = {
            "op": "generate",
            "lengths": [len(p) for p in prompts],
            "seeds": [r.seed for r in requests],
            "max_new_tokens": [r.max_new_tokens for r in requests],
            "padding_ids": [self.vocab_size, self.settings.model_rows],
        }
        flat = np.array([token for p in prompts for token in p], dtype="<i8")
        reply, block = self._ask(header, flat.tobytes())
        return unpack_rollouts(requests, {**reply, "versions": [reply["version"]] * len(requests)}, block)

    def update_weights(self, stream: Iterable[tuple[str, Tensor]], version: int) -> RefreshStats:
        """See ``RolloutEngine.update_weights``. Tensors are cast to the engine's dtype before they are sent."""
        if not self.settings.refreshable:
            raise EngineError("this engine was made with refreshable=False: its weights stay as they are")
        if self._files is None:
            raise EngineDied(_NOT_RUNNING)
        began = time.monotonic()
        count = total = 0
        try:
            self._ask({"op": "start_update"})
            checked = checked_stream(stream, self._shapes, self._optional)
            for tensors, size in buckets(checked, bucket_bytes=self._bucket_bytes, dtype=DTYPES[self.settings.dtype]):
                self._files.send(tensors, size, lambda path: self._ask({"op": "bucket", "path": path}) and None)
                count += 1
                total += size
            self._ask({"op": "finish_update", "version": version})
        except BaseException:
            self.close()  # some layers are new and some are old
            raise
        return RefreshStats(seconds=time.monotonic() - began, bytes=total, buckets=count)

    def _ask(
        self, header: dict[str, Any], payload: bytes = b"", *, timeout_s: float | None = None
    ) -> tuple[dict[str, Any], bytes]:
        """One question, one answer. Whatever goes wrong on the way ends the process, since answers carry no number."""
        process = self._process
        if process is None:
            raise EngineDied(_NOT_RUNNING)
        try:
            send_frame(process.request_fd, header, payload)
            reply, block = receive_frame(
                process.reply_fd, alive=process.alive, timeout_s=timeout_s or self._answer_timeout_s
            )
        except (ChannelClosed, TimeoutError) as error:
            self._kill()
            status = process.popen.returncode
            raise EngineDied(f"{error} (exit status {status}); its last words:\n{self._end(process)}") from error
        except BaseException:
            self.close()
            raise
        if not reply["ok"]:
            self._kill()
            raise EngineDied(f"{reply['error']}; its last words:\n{self._end(process)}")
        return reply, block

    def _end(self, process: _Process) -> str:
        words = process.last_lines()
        self.close()
        return words

    def _kill(self) -> None:
        """End the whole session of the process and wait until it is gone, so that memory is free for a successor."""
        if self._process is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(self._process.popen.pid, signal.SIGKILL)
        self._process.popen.wait(timeout=_CLOSE_TIMEOUT_S)

    def sleep(self) -> bool:
        """See ``RolloutEngine.sleep``: a process of its own keeps its memory and its weights."""
        return False

    def close(self) -> None:
        """See ``RolloutEngine.close``."""
        if self._files is not None:
            self._files.close()
            self._files = None
        process = self._process
        if process is None:
            return
        self._kill()
        self._process = None
        os.close(process.request_fd)
        os.close(process.reply_fd)
        process.log.close()
