"""A command of this repository in a fork of the server that has imported what takes seconds, instead of an interpreter
of its own: its file is run as ``python FILE`` runs it, with the module path of an interpreter that knows no PYTHONPATH.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from functools import cache
from pathlib import Path

from tests.dist.run_distributed import child_environment, run_distributed


def run_command(file: Path, *arguments: object, cwd: Path, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    """``python FILE ARGUMENTS`` in ``cwd``: exit code and output."""
    words = [str(file), *map(str, arguments)]
    ((code, out, err),) = run_distributed(
        _run, 1, words, str(cwd), _module_path(), timeout_s=timeout_s, init_gloo=False
    )
    return subprocess.CompletedProcess(words, code, out, err)


@cache
def _module_path() -> list[str]:
    """Of an interpreter that is started for a file, but for the file's own folder."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    code = "import sys; print(*sys.path[1:], sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def _run(rank: int, world_size: int, words: list[str], cwd: str, module_path: list[str]) -> tuple[int, str, str]:
    for name in ("PYTHONPATH", *child_environment(rank, world_size, 0)):
        os.environ.pop(name, None)
    os.environ["OMP_NUM_THREADS"] = "1"  # the number of threads is that of the server
    os.chdir(cwd)
    sys.argv, sys.path[:] = words, [os.path.dirname(words[0]), *module_path]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        code: object = 0
        try:
            runpy.run_path(words[0], run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
            if isinstance(code, str):  # as the interpreter does
                print(code, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        said = []
        for stream in (out, err):
            stream.seek(0)
            said.append(stream.read())
    return (code if isinstance(code, int) else 1), said[0], said[1]
