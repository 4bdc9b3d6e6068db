"""A benchmark's problems by the name of a data set, from a hub of this machine."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

from tests.e2e.tiny_run import ROOT

FILES = {
    "README.md": b"---\nconfigs:\n- config_name: main\n  data_files: [{split: test, path: main/test.jsonl}]\n---\n",
    "main/test.jsonl": b'{"question": "1 + 1?", "answer": "so\\n#### 2"}\n',
}


def digest(content: bytes) -> str:
    """Names a file's content: the hub's client keeps equal ones once."""
    return hashlib.sha1(content).hexdigest()


class Hub(http.server.BaseHTTPRequestHandler):
    """A hub with one data set, owner/gsm8k."""

    def do_HEAD(self) -> None:
        self.answer(b"")

    def do_GET(self) -> None:
        self.answer(None)

    def answer(self, body: bytes | None) -> None:
        path, files = self.path.partition("?")[0], FILES
        found: bytes | None = None
        if path.startswith("/datasets/owner/gsm8k/resolve/"):
            found = files.get(path.split("/", 6)[6])
        elif path.startswith("/api/datasets/owner/gsm8k"):
            entries = [
                {"type": "file", "oid": hashlib.sha1(b).hexdigest(), "size": len(b), "path": p}
                for p, b in files.items()
            ]
            whole = {"id": "owner/gsm8k", "sha": "a" * 40, "siblings": [{"rfilename": p} for p in files]}
            listing = [e for e in entries if e["path"].startswith("main/")]
            found = json.dumps(listing if "/tree/" in path else whole).encode()
        self.send_response(404 if found is None else 200)
        for name, value in (
            ("Content-Length", len(found or b"")),
            ("ETag", digest(found or b"")),
            ("X-Repo-Commit", "a" * 40),
            *([("X-Error-Code", "EntryNotFound")] if found is None else []),
        ):
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write((found or b"") if body is None else body)

    def log_message(self, *_: object) -> None:
        """Nothing is printed."""


def test_a_data_set_is_read_by_its_name_on_the_hub(tmp_path: Path) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        kept = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy") and k != "HF_HUB_OFFLINE"}
        code = (
            "from nemo_tropd.evaluation.settings import benchmarks_of\n"
            "from nemo_tropd.evaluation.problems import read_task\n"
            "entry = {'name': 'gsm8k', 'path': 'owner/gsm8k:main'}\n"
            "task = read_task('gsm8k', benchmarks_of([entry], 'key')['gsm8k'][1], 0)\n"
            "print(task.problems, task.questions[0].text.partition('?')[0], task.questions[0].reference)"
        )
        env = {**kept, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path)}
        ran = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=240, check=False
        )
        server.shutdown()
    assert ran.stdout.splitlines()[-1:] == ["1 1 + 1 ['so\\n#### 2']"], ran.stderr[-3000:]
