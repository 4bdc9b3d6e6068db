"""The images themselves, where ``--images`` asks for them; and that the changed Dockerfile is the one of docker/.

``--image-storage DIR`` uses the layers that another run, or ``python -m tests.docker.build --storage DIR``, left there.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.docker.bases import EDITS, gpu_dockerfile
from tests.docker.build import IMAGES, main, run_checks
from tests.docker.buildah import Buildah, missing_tools
from tests.docker.checks import CHECKS
from tests.docker.test_image_files import DOCKER


@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize("role", IMAGES)
def test_an_image_is_built_and_used(role: str, request: pytest.FixtureRequest) -> None:
    if role not in request.config.option.images:
        pytest.skip(f"takes from 20 minutes to hours, and many GB: asked for by --images {role}")
    if reason := missing_tools():
        pytest.skip(reason)
    storage = request.config.option.image_storage
    assert main([role, *(["--storage", storage] if storage else [])]) == 0


def test_a_check_that_takes_too_long_leaves_those_after_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def hangs(tools: Buildah, image: str) -> None:
        subprocess.run(["sleep", "60"], timeout=0.1, check=True)

    monkeypatch.setitem(CHECKS, "cpu", [("hangs", hangs), ("passes", lambda tools, image: None)])
    assert run_checks(Buildah(tmp_path), "cpu", "") == 1
    said = capsys.readouterr().out
    assert "cpu: hangs (0 s): FAILED" in said and "timed out" in said and "cpu: passes (0 s): ok" in said


def test_only_what_needs_cudas_compilers_is_changed() -> None:
    text = (DOCKER / "Dockerfile").read_text()
    before, after = text.splitlines(), gpu_dockerfile(text).splitlines()
    gone = [line for line in before if line not in after]
    assert gone and not [line for line in gone if line.startswith(("FROM", "COPY", "ENV", "USER", "ENTRYPOINT"))]
    assert len(before) - len(after) == len(gone) - 2  # the other edit's two lines
    assert any("-r source.txt" in line for line in gone) and all("-r source.txt" not in line for line in after)
    with pytest.raises(ValueError, match="adapt EDITS"):
        gpu_dockerfile(text.replace(EDITS[0][0], "RUN other="))
