"""Start this node's part of a run: ``python -m nemo_tropd.launch [--script FILE] [--print] ARGUMENTS OF THE SCRIPT``.

docker/launch.sh calls it. The arguments are those of examples/train_tropd.py: ``--config-name RECIPE key=value ...``,
among them trainer.num_nodes, trainer.devices, trainer.max_restarts, trainer.stop_timeout_s and trainer.rendezvous.
``--print`` prints the torchrun command and exits.
"""

import os
import secrets
import shlex
import sys
from pathlib import Path

from nemo_tropd.command_line import compose_command_line, fail
from nemo_tropd.config import ConfigError, run_dir
from nemo_tropd.config_checks import resolve
from nemo_tropd.launch.command import plan_launch
from nemo_tropd.launch.scheduler import CONSUMED, read_allocation
from nemo_tropd.launch.supervise import Supervisor
from nemo_tropd.rollout.secret import FILE_VARIABLE, REMEDY, VARIABLE

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ROOT / "examples" / "train_tropd.py"


def main(argv: list[str]) -> int:
    """See the module docstring; returns the exit code."""
    arguments, script, show = list(argv), TRAIN, False
    while arguments[:1] and arguments[0] in ("--script", "--print"):
        if arguments.pop(0) == "--print":
            show = True
        elif arguments:
            script = Path(arguments.pop(0)).absolute()
    if not script.is_file():
        raise ConfigError("--script", str(script), "no such file; give a Python script")
    allocation = read_allocation(os.environ)
    if allocation.is_worker:
        os.execv(sys.executable, [sys.executable, str(script), *arguments])
    # These describe the scheduler's processes, not the run's ranks: hide them from the configuration checks.
    env = dict(os.environ)
    for name in CONSUMED:
        os.environ.pop(name, None)
    cfg = resolve(compose_command_line(arguments, ROOT / "conf", usage=__doc__ or ""))
    launch = plan_launch(cfg, allocation, script, arguments, env)
    child = {k: v for k, v in env.items() if k not in launch.drop} | launch.environment
    if show:
        print(shlex.join(["torchrun", *launch.arguments]))
        print("\n".join(f"{k}={v}" for k, v in sorted(launch.environment.items())))
        return 0
    needs_secret = cfg.model.rollout.placement == "dedicated" and not cfg.check_only
    if needs_secret and not (env.get(VARIABLE) or env.get(FILE_VARIABLE)):
        secret = make_secret_file(run_dir(cfg))
        print(f"launch: engine hosts need this run's secret: copy {secret} to each and give it by --secret-file")
        child[FILE_VARIABLE] = str(secret)
    print(f"launch: {launch.summary}", flush=True)
    command = [sys.executable, "-m", "nemo_tropd.launch.agent", *launch.arguments]
    return Supervisor(command, child, launch.restarts, launch.patience_s, launch.stop_timeout_s).run()


def make_secret_file(folder: Path) -> Path:
    """FOLDER/engine_hosts.secret, readable by its owner alone; made if it is not there, ConfigError if it cannot be."""
    path = folder / "engine_hosts.secret"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    except FileExistsError:
        return path  # of an earlier start, or of another node's launcher
    except OSError as error:
        raise ConfigError(FILE_VARIABLE, None, f"{path} cannot be made ({error}); {REMEDY}") from error
    with os.fdopen(handle, "w") as file:
        file.write(secrets.token_hex(32) + "\n")
    return path


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ConfigError as error:
        os.environ.pop("RANK", None)  # under PyTorchJob this is the node's number, and every node must report the error
        fail(error)
