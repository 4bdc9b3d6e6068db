#!/usr/bin/env bash
# Starts this node's part of a run. Run it on every node, by a scheduler or by hand, inside the container or without one.
#
#   docker/launch.sh --config-name RECIPE trainer.devices=8                                     one node
#   docker/launch.sh --config-name RECIPE trainer.num_nodes=2 trainer.rendezvous=node1:29400    each of two nodes
#
# Rollout engines on hosts of their own (one process per engine, on a GPU that no rank uses), and the run they serve:
#
#   python -m nemo_tropd.rollout.engine_host --join node1:29600 --index 0 --secret-file FILE   then --index 1, and so on
#   docker/launch.sh --config-name RECIPE model.rollout.placement=dedicated \
#       model.rollout.dedicated.address=node1:29600 model.rollout.dedicated.engines=2
#
# FILE is a copy of the secret that this script makes and names, unless NEMO_TROPD_SECRET (or _FILE) is set.
#
# Under Slurm, PyTorchJob or torchrun's usual variables trainer.rendezvous is not needed. Every setting is a key of
# nemo_tropd/config.py: trainer.num_nodes, trainer.devices, trainer.max_restarts, trainer.distributed_timeout_s.
# Uses the Python of NEMO_TROPD_PYTHON, else of the checkout's .venv, else python3.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=docker/home.sh
source "$root/docker/home.sh"
python=${NEMO_TROPD_PYTHON:-}
if [[ -z $python ]]; then
  python=$root/.venv/bin/python
  [[ -x $python ]] || python=python3
fi
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
exec "$python" -m nemo_tropd.launch "$@"
