"""The secret of trainer and engine hosts: where it comes from, and what is refused before anything is allocated."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from nemo_tropd.config import ConfigError, TropdConfig
from nemo_tropd.launch import __main__ as launcher
from nemo_tropd.rollout.placement import check_placement
from nemo_tropd.rollout.secret import FILE_VARIABLE, VARIABLE, read_secret

LONG = "sixteen or more of them"


def test_a_secret_comes_from_the_file_given_the_variable_or_the_file_it_names(tmp_path: Path) -> None:
    (tmp_path / "a").write_text(f" {LONG}\n")
    (tmp_path / "b").write_text("another one, as long as it must be")
    assert read_secret(env={VARIABLE: LONG}) == LONG.encode()
    assert read_secret(env={FILE_VARIABLE: str(tmp_path / "a")}) == LONG.encode()
    both = {VARIABLE: LONG, FILE_VARIABLE: str(tmp_path / "b")}
    assert read_secret(env=both) == LONG.encode()
    assert read_secret(tmp_path / "b", env=both) == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    ("env", "text"),
    [
        ({}, f"{VARIABLE}.*no secret is set; the trainer and every engine host need the same secret"),
        ({VARIABLE: "  "}, "no secret is set"),
        ({VARIABLE: "short-and-shown"}, "the secret has 15 characters, which is too short"),
        ({FILE_VARIABLE: "/nowhere/at/all"}, f"{FILE_VARIABLE}.*/nowhere/at/all.*cannot be read"),
    ],
)
def test_a_missing_or_short_secret_is_refused_and_never_shown(env: dict[str, str], text: str) -> None:
    with pytest.raises(ConfigError, match=text) as raised:
        read_secret(env=env)
    assert "short-and-shown" not in str(raised.value)


def test_dedicated_hosts_without_a_secret_are_refused_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = TropdConfig()
    cfg.model.rollout.placement = "dedicated"
    for name in (VARIABLE, FILE_VARIABLE, "RANK"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match=VARIABLE):
        check_placement(cfg)
    monkeypatch.setenv(VARIABLE, LONG)
    check_placement(cfg)
    cfg.model.rollout.placement = "process"
    monkeypatch.delenv(VARIABLE)
    check_placement(cfg)


def test_the_launchers_secret_is_its_owners_alone_and_stays(tmp_path: Path) -> None:
    path = launcher.make_secret_file(tmp_path / "run")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    secret = read_secret(path, env={})
    assert len(secret) >= 32 and launcher.make_secret_file(tmp_path / "run") == path
    assert read_secret(path, env={}) == secret != read_secret(launcher.make_secret_file(tmp_path / "other"), env={})


class RecordedSupervisor:
    """Takes the place of the supervisor that would start torchrun."""

    def __init__(
        self, command: list[str], env: dict[str, str], restarts: int, patience_s: float, stop_timeout_s: float
    ) -> None:
        self.given = env.get(FILE_VARIABLE)

    def run(self) -> int:
        given.append(self.given)
        return 0


given: list[str | None] = []


def test_the_launcher_gives_the_run_a_secret_unless_one_is_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launcher, "Supervisor", RecordedSupervisor)
    for name in (VARIABLE, FILE_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    dedicated = (
        "model.rollout.placement=dedicated",
        "model.rollout.dedicated.address=127.0.0.1:29600",
        "model.rollout.dedicated.engines=1",
    )
    arguments = ["--config-name", "smollm2_cpu", f"exp_manager.explicit_log_dir={tmp_path / 'run'}"]
    arguments += ["pretrained_checkpoint.restore_from_path=student", "model.teacher.path=teacher"]
    given.clear()
    assert launcher.main([*arguments, *dedicated, "check_only=true"]) == launcher.main(arguments) == 0
    assert given == [None, None] and not (tmp_path / "run").exists()
    assert launcher.main([*arguments, *dedicated]) == 0
    file = given[2]
    assert file is not None and file in (said := capfd.readouterr().out)
    assert read_secret(Path(file), env={}).decode() not in said
    monkeypatch.setenv(VARIABLE, LONG)
    assert launcher.main([*arguments, *dedicated]) == 0 and given[3] is None
