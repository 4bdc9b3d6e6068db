#!/usr/bin/env bash
# The containers' entrypoint.
#
#   train ARGS     start this node's part of a run; scheduler variables become torchrun's arguments (docker/launch.sh)
#   doctor ARGS    check this container and machine: what is wrong, and how to fix it
#   demo ARGS      run the demo on two CPU cores (the CPU image)
#   anything else  is run as a command
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=docker/home.sh
source "$here/home.sh"
python=${NEMO_TROPD_PYTHON:-python3}
command=${1:-doctor}
case $command in
  train) exec "$here/launch.sh" "${@:2}" ;;
  doctor) exec "$python" -m nemo_tropd.doctor "${@:2}" ;; # of the runs in the working directory
  demo) cd "$here/.." && exec "$python" examples/demo.py "${@:2}" ;;
  *) exec "$@" ;;
esac
