"""The secret that the trainer and its engine hosts share; each proves it to the other before anything else is read.

It is the text of the environment variable NEMO_TROPD_SECRET or of the file that NEMO_TROPD_SECRET_FILE names; the
launcher makes such a file if neither is set. Imports no torch: the launcher reads it, too.
"""

import os
from collections.abc import Mapping
from pathlib import Path

from nemo_tropd.config import ConfigError

VARIABLE, FILE_VARIABLE = "NEMO_TROPD_SECRET", "NEMO_TROPD_SECRET_FILE"
_LEAST_CHARACTERS = 16
REMEDY = (
    f"the trainer and every engine host need the same secret of at least {_LEAST_CHARACTERS} characters: set "
    f"{VARIABLE}, or {FILE_VARIABLE} to a file that has it (python -c 'import secrets; print(secrets.token_hex(32))' "
    "makes one; docker/launch.sh does if neither is set)"
)


def read_secret(file: str | Path | None = None, env: Mapping[str, str] = os.environ) -> bytes:
    """The secret in ``file``, else that of the environment, without surrounding white space. Raises ConfigError, which
    never shows it, if there is none, its file cannot be read, or it is too short."""
    key, shown, secret = VARIABLE, None, env.get(VARIABLE, "").strip()
    path = file or (None if env.get(VARIABLE) else env.get(FILE_VARIABLE))
    if path is not None:
        key, shown = "--secret-file" if file else FILE_VARIABLE, str(path)
        try:
            secret = Path(path).read_text(encoding="utf-8").strip()
        except (OSError, ValueError) as error:
            raise ConfigError(key, shown, f"cannot be read ({error}); {REMEDY}") from error
    if not secret:
        raise ConfigError(key, shown, f"no secret is set; {REMEDY}")
    if len(secret) < _LEAST_CHARACTERS:
        raise ConfigError(key, shown, f"the secret has {len(secret)} characters, which is too short; {REMEDY}")
    return secret.encode()
