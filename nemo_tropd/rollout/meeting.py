"""Where the processes of several machines meet: an endpoint that means the same to all of them. Imports no torch."""

from nemo_tropd.config import ConfigError, host_and_port
from nemo_tropd.parallel.addresses import UnreachableName, for_others


def meeting_point(key: str, value: str, default_port: int | None = None) -> tuple[str, int]:
    """Host and port of ``value``, the setting at ``key``: as ``host_and_port``, but a name of this machine that leads
    to the loopback is its address (``for_others``). ConfigError if it has several, or ``value`` is no endpoint."""
    host, port = host_and_port(key, value, default_port)
    try:
        return for_others(host), port
    except UnreachableName as error:
        raise ConfigError(key, value, str(error)) from error
    except OSError:
        return host, port  # whoever listens or connects there says what is wrong
