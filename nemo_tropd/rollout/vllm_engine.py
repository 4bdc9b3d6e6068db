"""Rollouts by vLLM, in a child process of the leader rank (``vllm_server`` is that process)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from nemo_tropd.batch import Rollout
from nemo_tropd.rollout.channel import ChannelClosed, receive_frame, send_frame
from nemo_tropd.rollout.engine import (
    EngineDied,
    EngineError,
    RefreshStats,
    RolloutRequest,
    Sampling,
    check_requests,
)
from nemo_tropd.rollout.weight_sync import BucketFiles, buckets, checked_stream, checkpoint_shapes

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_FIXED_ARGUMENTS: dict[str, Any] = {
    "enable_chunked_prefill": False,  # a seeded request whose prompt is cut in chunks crashes on CPU
    "skip_tokenizer_init": True,  # token ids in, token ids out
    "generation_config": "vllm",  # no sampling defaults from the checkpoint
    "logprobs_mode": "raw_logprobs",
    "load_format": "safetensors",
}
_REFRESH_ARGUMENTS: dict[str, Any] = {
    "weight_transfer_config": {"backend": "tropd_buckets"},  # registered when a worker imports the extension
    "worker_extension_cls": "nemo_tropd.rollout.weight_receiver.WorkerExtension",
}
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
        model_dir: str | Path,
        *,
        dtype: str,
        max_model_len: int,
        max_num_seqs: int = 64,
        seed: int = 0,
        sampling: Sampling | None = None,
        eos_ids: Sequence[int] | None = None,
        vocab_size: int | None = None,
        version: int = 0,
        refreshable: bool = True,
        kv_cache_gib: float | None = 1.0,
        gpu_memory_utilization: float = 0.9,
        tensor_parallel: int = 1,
        threads: int = 1,
        enforce_eager: bool = True,
        prefix_caching: bool = True,
        bucket_mib: int = 256,
        exchange_dir: str | Path | None = None,
        start_timeout_s: float = 600.0,
        answer_timeout_s: float = 3600.0,
    ) -> None:
        """Settings only; nothing is started.

        ``eos_ids``: tokens that end a response; those of the checkpoint's config files unless given.
        ``vocab_size``: the tokenizer's true size; ids from there on, which are padding, are never drawn.
        ``version``: the number of the weights that lie in ``model_dir``.
        ``refreshable``: False for a frozen model, such as a teacher that writes responses.
        ``kv_cache_gib``: memory of the key-value cache; None (GPU only) takes what ``gpu_memory_utilization`` leaves.
        ``threads``: OpenMP threads of the engine on CPU.
        ``bucket_mib``, ``exchange_dir``: size of a bucket of weights and the folder it passes through (/dev/shm).
        ``answer_timeout_s``: an engine that says nothing for so long counts as dead.
        Raises EngineError when ``model_dir`` is not a checkpoint in safetensors or a setting makes no sense.
        """
        self.model_dir = Path(model_dir)
        config_file = self.model_dir / "config.json"
        if not config_file.is_file():
            raise EngineError(f"{self.model_dir} is not a Hugging Face checkpoint: it has no config.json")
        if dtype not in _DTYPES:
            raise EngineError(f"dtype is {dtype!r}; the engine computes in one of {', '.join(_DTYPES)}")
        if min(max_model_len, max_num_seqs, threads, tensor_parallel, bucket_mib) < 1:
            raise EngineError("max_model_len, max_num_seqs, threads, tensor_parallel and bucket_mib must be at least 1")
        self._config = json.loads(config_file.read_text())
        self._shapes, self._optional = checkpoint_shapes(self.model_dir)
        self._dtype = _DTYPES[dtype]
        self._sampling = sampling or Sampling()
        self.vocab_size = vocab_size or int(self._config["vocab_size"])
        self._max_model_len = max_model_len
        self._threads = threads
        self._version = version
        self._refreshable = refreshable
        self._bucket_bytes = bucket_mib << 20
        self._exchange_dir = Path(exchange_dir) if exchange_dir is not None else None
        self._start_timeout_s = start_timeout_s
        self._answer_timeout_s = answer_timeout_s
        self._eos_ids = sorted(set(eos_ids if eos_ids is not None else self._checkpoint_eos_ids()))
        self._files: BucketFiles | None = None
        self._process: _Process | None = None
        self._llm_arguments: dict[str, Any] = {
            **_FIXED_ARGUMENTS,
            "model": str(self.model_dir),
            "dtype": dtype,
            "seed": seed,
            "max_model_len": max_model_len,
            "max_num_seqs": max_num_seqs,
            "max_num_batched_tokens": max(max_model_len, 2048),
            "enable_prefix_caching": prefix_caching,
            "enforce_eager": enforce_eager,
            "tensor_parallel_size": tensor_parallel,
            "gpu_memory_utilization": gpu_memory_utilization,
        }
        if kv_cache_gib is not None:
            self._llm_arguments["kv_cache_memory_bytes"] = int(kv_cache_gib * 2**30)
        if refreshable:
            self._llm_arguments |= _REFRESH_ARGUMENTS

    def _checkpoint_eos_ids(self) -> list[int]:
        found: list[int] = []
        for name in ("config.json", "generation_config.json"):
            file = self.model_dir / name
            value = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
            found += value if isinstance(value, list) else [] if value is None else [value]
        return found

    @property
    def process_id(self) -> int | None:
        """The engine's process, which leads a session of its own; None when it is not running."""
        return self._process.popen.pid if self._process else None

    def start(self) -> None:
        """Start the process and load the model; 15 to 20 s on two cores."""
        if self._process is not None:
            raise EngineError("the engine is running; close it before it is started again")
        if self._refreshable:
            self._files = BucketFiles(self._exchange_dir)
        request_read, request_write = os.pipe()
        reply_read, reply_write = os.pipe()
        log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process; it has no name, so nothing can be left
        popen = subprocess.Popen(
            [sys.executable, "-P", "-m", "nemo_tropd.rollout.vllm_server", str(request_read), str(reply_write)],
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
        settings = {"llm": self._llm_arguments, "version": self._version, "eos_ids": self._eos_ids}
        try:
            self._ask(settings, timeout_s=self._start_timeout_s)
        except EngineDied as error:
            raise EngineError(f"the engine could not start on {self.model_dir}: {error}") from error

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
        roots = [str(Path(__file__).parents[2]), *filter(None, [env.get("PYTHONPATH")])]
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
        check_requests(requests, max_model_len=self._max_model_len, vocab_size=self.vocab_size)
        if not requests:
            return []
        prompts = [[*r.prompt_ids, *r.prefix_ids] for r in requests]
        header = {
            "op": "generate",
            "lengths": [len(p) for p in prompts],
            "seeds": [r.seed for r in requests],
            "max_new_tokens": [r.max_new_tokens for r in requests],
            "temperature": self._sampling.temperature,
            "top_p": self._sampling.top_p,
            "top_k": self._sampling.top_k,
            "padding_ids": [self.vocab_size, int(self._config["vocab_size"])],
        }
        flat = np.array([token for p in prompts for token in p], dtype="<i8")
        reply, block = self._ask(header, flat.tobytes())
        lengths = reply["lengths"]
        total = sum(lengths)
        ids = np.frombuffer(block, dtype="<i8", count=total).tolist()
        log_probs = np.frombuffer(block, dtype="<f8", offset=8 * total).tolist()
        ends = np.cumsum(lengths).tolist()
        return [
            Rollout(
                prompt_ids=list(r.prompt_ids),
                prefix_ids=list(r.prefix_ids),
                response_ids=ids[end - length : end],
                response_log_probs=log_probs[end - length : end],
                weight_version=version,
                sequence_id=r.sequence_id,
                prompt_index=r.prompt_index,
                finished=finished,
            )
            for r, end, length, version, finished in zip(
                requests, ends, lengths, reply["versions"], reply["finished"], strict=True
            )
        ]

    def update_weights(self, stream: Iterable[tuple[str, Tensor]], version: int) -> RefreshStats:
        """See ``RolloutEngine.update_weights``. Tensors are cast to the engine's dtype before they are sent."""
        if not self._refreshable:
            raise EngineError("this engine was made with refreshable=False: its weights stay as they are")
        if self._files is None:
            raise EngineDied(_NOT_RUNNING)
        began = time.monotonic()
        count = total = 0
        try:
            self._ask({"op": "start_update"})
            checked = checked_stream(stream, self._shapes, self._optional)
            for tensors, size in buckets(checked, bucket_bytes=self._bucket_bytes, dtype=self._dtype):
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
