"""The secret that the trainer and its engine hosts share; each proves it to the other before anything else is read.

It is the text of the environment variable NEMO_TROPD_SECRET or of the file that NEMO_TROPD_SECRET_FILE names. The
launcher makes such a file in the run's directory if neither is set. Imports no torch: the launcher reads it, too.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from nemo_tropd.config import ConfigError

VARIABLE, FILE_VARIABLE = "NEMO_TROPD_SECRET", "NEMO_TROPD_SECRET_FILE"
_LEAST_CHARACTERS = 16
_REMEDY = (
    f"the trainer and every engine host need the same secret of at least {_LEAST_CHARACTERS} characters: set "
    f"{VARIABLE}, or {FILE_VARIABLE} to a file that has it (python -c 'import secrets; print(secrets.token_hex(32))' "
    "makes one; docker/launch.sh does if neither is set)"
)


def read_secret(file: str | Path | None = None, env: Mapping[str, str] = os.environ) -> bytes:
    """The secret in ``file``, else that of the environment. Surrounding white space does not count.

    Raises:
        ConfigError: there is none, its file cannot be read, or it is too short. The secret itself is never shown.
    """
    path = file or (None if env.get(VARIABLE) else env.get(FILE_VARIABLE))
    if path is None:
        key, text = VARIABLE, env.get(VARIABLE, "")
    else:
        key = "--secret-file" if file else FILE_VARIABLE
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ConfigError(key, str(path), f"cannot be read ({error}); {_REMEDY}") from error
    secret = text.strip()
    if not secret:
        raise ConfigError(key, None if path is None else str(path), f"no secret is set; {_REMEDY}")
    if len(secret) < _LEAST_CHARACTERS:
        shown = f"a secret of {len(secret)} characters" if path is None else str(path)
        raise ConfigError(key, shown, f"the secret has {len(secret)} characters, which is too short; {_REMEDY}")
    return secret.encode()


def make_secret_file(folder: Path) -> Path:
    """FOLDER/engine_hosts.secret, readable by its owner alone; made if it is not there.

    Raises:
        ConfigError: it cannot be written.
    """
    path = folder / "engine_hosts.secret"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    except FileExistsError:
        return path  # of an earlier start, or of another node's launcher
    except OSError as error:
        raise ConfigError(FILE_VARIABLE, None, f"{path} cannot be made ({error}); {_REMEDY}") from error
    with os.fdopen(handle, "w") as file:
        file.write(secrets.token_hex(32) + "\n")
    return path
