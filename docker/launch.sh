#!/usr/bin/env bash
# Starts this node's part of a run; run it on every node, by a scheduler or by hand, in the container or without one.
#
#   docker/launch.sh --config-name RECIPE trainer.devices=8                                     one node
#   docker/launch.sh --config-name RECIPE trainer.num_nodes=2 trainer.rendezvous=node1:29400    each of two nodes
#
# Under Slurm, PyTorchJob or torchrun's customary variables trainer.rendezvous need not be given. Every knob is a key of
# nemo_tropd/config.py: trainer.num_nodes, trainer.devices, trainer.max_restarts, trainer.distributed_timeout_s.
# Python is that of NEMO_TROPD_PYTHON, else of the checkout's .venv, else python3.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${NEMO_TROPD_PYTHON:-}
if [[ -z $python ]]; then
  python=$root/.venv/bin/python
  [[ -x $python ]] || python=python3
fi
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
exec "$python" -m nemo_tropd.launch "$@"
