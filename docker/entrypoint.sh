#!/usr/bin/env bash
# What the containers run.
#
#   train ARGS     this node's part of a run; scheduler variables become torchrun's arguments (docker/launch.sh)
#   doctor ARGS    what this container and machine have, what is wrong, and how to mend it
#   demo ARGS      the demo on two CPU cores (the CPU image)
#   anything else  is run as it stands
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${NEMO_TROPD_PYTHON:-python3}
command=${1:-doctor}
case $command in
  train) exec "$here/launch.sh" "${@:2}" ;;
  doctor) cd "$here/.." && exec "$python" -m nemo_tropd.doctor "${@:2}" ;;
  demo) cd "$here/.." && exec "$python" examples/demo.py "${@:2}" ;;
  *) exec "$@" ;;
esac
