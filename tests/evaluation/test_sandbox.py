"""Hostile programs end within their limits and harm nothing, with namespaces and, as far as promised, without."""

import contextlib
import os
import socket
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from nemo_tropd.evaluation import sandbox, sandbox_child
from nemo_tropd.evaluation.sandbox import Limits, SandboxError, run

SMALL = Limits(cpu_seconds=2, memory_bytes=128 << 20)
SHORT = replace(SMALL, seconds=0.3)
BOTH = pytest.mark.parametrize("namespaces", [True, False])
MARK = f"61.{os.getpid()}"  # a time to sleep, and a name: other tests run programs at the same time
NAMED = f"import ctypes\nctypes.CDLL(None).prctl(15, b'{MARK}')\n"
FORK_BOMB = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
DETACHED = (
    "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
    f"        os.execvp('/bin/sleep', ['sleep', '{MARK}'])\n    os._exit(0)\ntime.sleep(0.2)"
)
ENDLESS = {
    "a loop that keeps signals off": (
        "import signal\nfor s in range(1, 32):\n    try: signal.signal(s, signal.SIG_IGN)\n    except OSError: pass\n"
        "while True: pass"
    ),
    "a fork bomb": FORK_BOMB,
    "a detached process": DETACHED + "\ntime.sleep(99)",
}
MEMORY = {
    "a list": "x = []\nwhile True: x.append('a' * 1000000)",
    "by many processes": (
        "import os, time\nfor _ in range(8):\n    if os.fork() == 0:\n        x = b'a' * (50 << 20)\n"
        "        time.sleep(99)\ntime.sleep(99)"
    ),
}


@pytest.fixture(autouse=True)
def no_process_stays():
    yield
    assert not left()


def left():
    """What programs have started and is still there."""

    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if MARK in (process / "comm").read_text() or MARK in (process / "cmdline").read_text():
                found.append(process)
    return found


def test_what_ends_by_itself_is_told_as_it_was():
    outcome = run("import sys\nprint(input()[::-1])\nprint('oh', file=sys.stderr)\nsys.exit(3)", "abc\n")
    assert outcome == ("ended", 3, "cba\n", "oh\n")
    assert run("raise ValueError('no')").code == 1
    assert run("import os; os.kill(os.getpid(), 9)") == ("ended", -9, "", "")
    assert run("x = '\ud800'").code == 0  # no text for a file as it stands
    assert run("def f(n): return n and f(n - 1)\nimport sys\nsys.setrecursionlimit(50000)\nprint(f(40000))").code == 0


@BOTH
@pytest.mark.parametrize("program", ENDLESS.values(), ids=ENDLESS)
def test_the_endless_end(program, namespaces):
    start = time.monotonic()
    outcome = run(NAMED + program, limits=SHORT, namespaces=namespaces)
    assert outcome.status in ("time", "processes") and time.monotonic() - start < 20


def test_processor_time_is_bounded():
    program = "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"
    assert run(program, limits=replace(SMALL, cpu_seconds=1)).status == "time"


@BOTH
@pytest.mark.parametrize("program", MEMORY.values(), ids=MEMORY)
def test_memory_is_bounded(program, namespaces):
    assert run(NAMED + program, limits=SMALL, namespaces=namespaces).status == "memory"


@BOTH
def test_what_is_started_and_left_ends_with_the_program(namespaces):
    assert run(DETACHED, namespaces=namespaces).status == "ended" and not left()


@BOTH
def test_a_gigabyte_printed_is_cut(namespaces):
    start = time.monotonic()
    outcome = run("for _ in range(1024): print('a' * (1 << 20))", limits=SMALL, namespaces=namespaces)
    assert outcome.status == "output" and len(outcome.stdout) == SMALL.output_bytes
    assert time.monotonic() - start < 20
    deaf = "import os\nfor _ in range(999):\n    try: os.write(1, b'a' * 9999)\n    except OSError: pass"
    assert run(deaf, limits=SMALL, namespaces=namespaces).status == "output"


@BOTH
def test_files_elsewhere_are_neither_read_nor_changed(namespaces, tmp_path):
    tmp_path.chmod(0o777)
    (tmp_path / "secret").write_text("s3cret")
    home, here = Path.home(), Path(__file__)
    program = f"""
import os
for path in ({str(home)!r}, {str(tmp_path)!r}, "/etc", "/var"):
    try: print(os.listdir(path))
    except OSError: print("no")
for path in ({str(tmp_path / "secret")!r}, {str(here)!r}, "/etc/passwd", "/proc/1/environ"):
    try: print(open(path).read())
    except OSError: print("no")
for path in ({str(tmp_path / "new")!r}, {str(home / "tropd-new")!r}, "/usr/new", "/new", "/dev/shm/x", "/var/tmp/x"):
    try: print(open(path, "w").write("x"))
    except OSError: print("no")
try: print(os.remove({str(tmp_path / "secret")!r}))
except OSError: print("no")
print(open("mine", "w").write("x"))
"""
    outcome = run(program, namespaces=namespaces)
    lines = outcome.stdout.splitlines()
    if namespaces:  # folders on the way to the interpreter may be there, with nothing else in them
        lines[:4] = [
            "no" if "s3cret" not in line and ".ssh" not in line and "passwd" not in line else line for line in lines[:4]
        ]
    assert lines == ["no"] * 15 + ["1"], outcome
    assert (tmp_path / "secret").read_text() == "s3cret" and not (tmp_path / "new").exists()


@BOTH
def test_no_connection_is_made(namespaces):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        outcome = run(f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)", namespaces=namespaces)
    assert outcome.code == 1 and ("Network is unreachable" if namespaces else "Permission denied") in outcome.stderr


@BOTH
def test_disk_is_bounded(namespaces):
    program = (
        "import itertools\nfor i in itertools.count():\n    with open(f'f{i}', 'wb') as f:\n"
        "        for _ in range(8): f.write(bytes(1 << 20))\n    print(i, flush=True)"
    )
    outcome = run(program, limits=replace(Limits(), file_bytes=16 << 20), namespaces=namespaces)
    if namespaces:
        assert outcome.code == 1 and "No space left" in outcome.stderr and int(outcome.stdout.split()[-1]) < 8
    else:
        assert outcome.status == "disk" and int(outcome.stdout.split()[-1]) < 200
    outcome = run("f = open('f', 'wb')\nwhile True: f.write(bytes(1 << 20))", namespaces=namespaces)
    assert outcome.code == 1 and "File too large" in outcome.stderr


@BOTH
def test_an_interpreter_in_the_folder_of_temporary_files_is_found(namespaces, tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox.sys, "base_prefix", str(tmp_path))  # one more folder that is readable
    (tmp_path / "library.py").write_text("there")
    program = f"print(open({str(tmp_path / 'library.py')!r}).read())\nopen('own', 'w').write('x')\n"
    if os.geteuid() == 0:
        os.chmod(tmp_path, 0o755)
        for folder in tmp_path.parents[:2]:
            os.chmod(folder, 0o711)
    outcome = run(program, namespaces=namespaces)
    assert (outcome.code, outcome.stdout) == (0, "there\n"), outcome
    outcome = run(f"open({str(tmp_path / 'more')!r}, 'w')", namespaces=namespaces)
    assert outcome.code == 1 and not (tmp_path / "more").exists()


@BOTH
def test_other_processes_get_no_signals(namespaces):
    outcome = run(f"import os\nos.kill({os.getpid()}, 0)", namespaces=namespaces)
    assert outcome.code == 1 and ("No such process" in outcome.stderr or "not permitted" in outcome.stderr)
    assert run("import os\nos.kill(-1, 9)", namespaces=namespaces).status in ("ended", "killed")


def test_threads_run_programs_at_once_and_leave_no_files(tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path))
    found = {}
    threads = [threading.Thread(target=lambda n=n: found.update({n: run(f"print({n})").stdout})) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {n: f"{n}\n" for n in range(3)}
    assert not list(tmp_path.iterdir())


@pytest.fixture
def probed_anew():
    sandbox._probed.cache_clear()
    yield
    sandbox._probed.cache_clear()


def test_an_interpreter_that_cannot_start_is_an_error_and_no_verdict(monkeypatch, probed_anew):
    monkeypatch.setattr(sandbox.sys, "base_prefix", sandbox.sys.prefix)
    monkeypatch.setattr(sandbox.Path, "resolve", lambda path: path)
    with pytest.raises(SandboxError):
        run("print(1)")


def test_what_a_machine_refuses_is_said_once(monkeypatch, probed_anew, capsys):
    complete = sandbox._run

    def without_mounts(program, stdin, limits, namespaces):
        if namespaces:
            raise SandboxError("mount: refused")
        return complete(program, stdin, limits, namespaces)

    monkeypatch.setattr(sandbox, "_run", without_mounts)
    assert run("print(1)").stdout == run("print(1)").stdout == "1\n"
    assert sandbox.missing()[0] == "namespaces (mount: refused)"
    assert capsys.readouterr().err.count("is without namespaces (mount: refused)") == 1


def test_control_groups_that_killed_ones_left_hinder_nothing_and_are_removed(monkeypatch):
    def groups():
        return sandbox_child.control_groups(1 << 30, 50)

    with monkeypatch.context() as patch:
        patch.setattr(sandbox_child.os, "getpid", lambda: 4_194_999)  # no process can be called so
        old = groups()
    if not old:
        pytest.skip("this machine refuses control groups, which nemo_tropd.evaluation.sandbox.missing() says")
    with subprocess.Popen(["sleep", "60"]) as process:
        for folder in old:
            (folder / "cgroup.procs").write_text(str(process.pid))
        made = groups()
        process.kill()
    assert len(made) == len(old) and all(folder.exists() for folder in old)
    end = time.monotonic() + 10
    while any(folder.exists() for folder in old) and time.monotonic() < end:
        for folder in {*made, *groups()}:
            folder.rmdir()
        made = []
    assert not any(folder.exists() for folder in old)
