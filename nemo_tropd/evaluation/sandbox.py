"""Programs of strangers, in Python: run with limits, and away from all that is this machine's.

Where the kernel allows it, a program has a root folder of its own (the system's libraries and this interpreter, read
only, and an empty /tmp that goes with it), no network, processes and shared memory of its own, a control group, and no
privileges. Elsewhere Landlock keeps it from other files and from TCP. What a machine cannot do, :func:`missing` says.
"""

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

_START_S = 30.0  # for the sandbox's own processes, on a busy machine


class SandboxError(RuntimeError):
    """The sandbox could not be set up: no program was judged."""


@dataclass(frozen=True)
class Limits:
    """Of one program with all its processes, save that ``file_bytes`` is for each file (all: four times that)."""

    seconds: float = 10.0
    cpu_seconds: int = 10
    memory_bytes: int = 1 << 30
    file_bytes: int = 16 << 20
    processes: int = 16
    output_bytes: int = 1 << 20


class Outcome(NamedTuple):
    """``status`` is "ended" (``code``: the exit code), or the limit it went over: "time", "memory", "processes",
    "disk" or "output"; or "killed". Output is cut at its limit."""

    status: str
    code: int | None
    stdout: str
    stderr: str


def run(program: str, stdin: str = "", limits: Limits | None = None, namespaces: bool | None = None) -> Outcome:
    """Runs a Python program to its end or over a limit; when it returns, no process of it is left. Thread-safe.

    ``namespaces`` False does without them, as if the kernel refused them. Raises SandboxError.
    """
    return _run(program, stdin, limits or Limits(), _probed()[0] if namespaces is None else namespaces)[0]


def missing() -> tuple[str, ...]:
    """The guards that this machine refuses; stderr is told once. Raises SandboxError if no program runs at all."""
    return _probed()[1]


@cache
def _probed() -> tuple[bool, tuple[str, ...]]:
    """Whether to ask for namespaces, and what is missing."""
    try:
        namespaces, (outcome, lacking) = True, _run("print('ready')", "", Limits(), True)
    except SandboxError as error:  # some container has them, but no mounts in them
        namespaces, (outcome, lacking) = False, _run("print('ready')", "", Limits(), False)
        lacking = [f"namespaces ({error})", *lacking]
    if outcome.stdout != "ready\n":
        raise SandboxError(f"python does not run in the sandbox: {outcome}; is {sys.prefix} readable by all users?")
    if lacking:
        print(f"the sandbox for programs of models is without {'; '.join(lacking)}", file=sys.stderr, flush=True)
    return namespaces, tuple(lacking)


def _run(program: str, stdin: str, limits: Limits, namespaces: bool) -> tuple[Outcome, list[str]]:
    python = Path(sys.executable).resolve()
    task = {
        **asdict(limits),
        "program": program.encode(errors="replace").decode(),
        "input": stdin,
        "namespaces": namespaces,
        "python": sys.executable,
        "readable": [p for p in dict.fromkeys((sys.prefix, sys.base_prefix, str(python.parent.parent))) if p != "/usr"],
        # can a user without privileges start the interpreter where it is?
        "reachable": all(p.stat().st_mode & 1 for p in (*Path(sys.executable).absolute().parents, *python.parents)),
    }
    # Its real name: a link in it would not lead anywhere in another root.
    with tempfile.TemporaryDirectory(prefix="tropd-sandbox-") as folder, tempfile.TemporaryFile("w+") as said:
        json.dump({**task, "folder": os.path.realpath(folder)}, said)
        said.seek(0)
        got, report = os.pipe()
        child = Path(__file__).with_name("sandbox_child.py")
        command = [sys.executable, "-I", "-S", "-B", str(child), str(report), str(os.getpid())]
        try:
            process = subprocess.Popen(
                command, stdin=said, stdout=subprocess.PIPE, stderr=subprocess.PIPE, pass_fds=(report,),
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            os.close(got)
            raise SandboxError(f"cannot start {' '.join(command)}: {error}") from error
        finally:
            os.close(report)
        try:
            texts, over = _read(process, got, limits)
        finally:
            os.close(got)
            _end(process, limits)
    return _outcome(texts, over)


def _read(process: "subprocess.Popen[bytes]", report: int, limits: Limits) -> tuple[list[bytearray], bool]:
    """What came of output, error output and report, and whether output was over its limit."""
    assert process.stdout is not None and process.stderr is not None
    texts, over, end = [bytearray(), bytearray(), bytearray()], False, time.monotonic() + limits.seconds + _START_S
    with selectors.DefaultSelector() as selector:
        for i, stream in enumerate((process.stdout.fileno(), process.stderr.fileno(), report)):
            selector.register(stream, selectors.EVENT_READ, i)
        while selector.get_map() and time.monotonic() < end:
            for key, _ in selector.select(max(0.0, end - time.monotonic())):
                some = os.read(key.fd, 1 << 16)
                texts[key.data] += some
                if len(texts[key.data]) > limits.output_bytes:
                    texts[key.data], over, some = texts[key.data][: limits.output_bytes], True, b""
                if not some:
                    selector.unregister(key.fd)
            if over:
                break
    return texts, over


def _end(process: "subprocess.Popen[bytes]", limits: Limits) -> None:
    """The pipes are closed: what still prints ends by that, or else in time; after that it is killed."""
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    process.stderr.close()
    try:
        process.wait(limits.seconds + _START_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _outcome(texts: list[bytearray], over: bool) -> tuple[Outcome, list[str]]:
    stdout, stderr = (text.decode(errors="replace") for text in texts[:2])
    told: dict[str, Any] = json.loads(texts[2].splitlines()[0]) if texts[2] else {"status": "killed", "code": None}
    if "error" in told:
        raise SandboxError(f"the sandbox could not be set up: {told['error']}\n{stderr}")
    status, code = ("output", None) if over else (told["status"], told["code"])
    if status == "ended" and code == 1 and "MemoryError" in stderr[-200:]:
        status = "memory"
    return Outcome(status, code, stdout, stderr), told.get("missing", [])
