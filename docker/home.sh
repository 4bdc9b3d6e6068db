# Sourced by the scripts beside it: a home for the caches of Triton, vLLM and others, and a user's name, which torch asks
# for. A container's uid may have neither: then HOME is unset or "/", or a volume that another uid writes to.
if ! mkdir -p "${HOME:=/}" 2> /dev/null || [[ $HOME == / || ! -w $HOME ]]; then
  HOME=$(mktemp -d "${TMPDIR:-/tmp}/home.XXXXXX")
fi
export HOME USER=${USER:-uid$(id -u)}
