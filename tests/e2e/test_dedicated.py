"""A run whose engine is on a host of its own, by the command a user types, beside one with the engine's usual place."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nemo_tropd.training.run import train
from tests.e2e.compose import compose_config
from tests.e2e.test_training import figures
from tests.e2e.tiny_run import ROOT, TinyRun, environment
from tests.ports import free_port


@pytest.mark.timeout(400)  # with the session's own engine, which starts first
def test_a_dedicated_engine_gives_the_same_steps(
    tiny: TinyRun, engines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {
        "model.tropd.guidance.enabled": False,
        "model.data.held_out": 0,
        "trainer.tropd.max_steps": 3,
        "trainer.tropd.save_interval": 10,
    }
    address = f"127.0.0.1:{free_port()}"
    secret = tmp_path / "secret"
    secret.write_text("a secret of this test\n")
    command = [sys.executable, "-m", "nemo_tropd.rollout.engine_host", "--join", address, "--index", "0"]
    command += ["--secret-file", str(secret)]
    with (tmp_path / "host.log").open("w") as log:
        host = subprocess.Popen(command, cwd=tmp_path, env=environment(), stdout=log, stderr=log)
    try:
        train(compose_config(tiny.overrides(tmp_path / "beside", **keys)), engines)
        dedicated = {
            "model.rollout.placement": "dedicated",
            "model.rollout.dedicated.address": address,
            "model.rollout.dedicated.engines": 1,
            "model.rollout.dedicated.timeout_s": 60,
        }
        monkeypatch.setenv("NEMO_TROPD_SECRET_FILE", str(secret))
        outcome = train(compose_config(tiny.overrides(tmp_path / "apart", **keys, **dedicated)))
        assert outcome is not None and outcome.step == 3
        assert figures(tmp_path / "apart") == figures(tmp_path / "beside") and len(figures(tmp_path / "apart")) == 3
        assert host.wait(30) == 0, (tmp_path / "host.log").read_text()
    finally:
        host.kill()
        host.wait()
    assert str(ROOT) not in (tmp_path / "host.log").read_text()  # no traceback
