"""Rollouts: requests go to vLLM engines, rollouts come back, and after each step the student's weights follow.

The way of a request (training/guidance.py plans a step's)
    collective.py         every rank's view: rank 0 asks one engine for all (RankZeroRollouts), or every rank its own
                          (EveryRankRollouts)
    ahead.py              with steps_ahead: rank 0's engine works through a queue while the trainer trains
    restart.py            when an engine that died is replaced, for both
    engine.py             what is asked of an engine, its errors, and the one check of what comes back
    timed.py              tells the run's timeline when rank 0's engine is at work
    placement.py          which engine that is: placement_of decides, Engines makes
      vllm/in_process.py  colocated: in the trainer's own process, in turns with it; vLLM's generate is called in
                          vllm/generating.py
      vllm/child.py       process: a child process of rank 0 (vllm/__main__.py), by vllm/remote.py
      vllm/hosts.py       dedicated: hosts of their own, by vllm/remote.py; secret.py is what they must know
    arrays.py             rollouts as a few arrays, as they travel: from server to client, from rank 0 to all ranks
    vllm/remote.py        the client: deals requests out over the wire (vllm/wire.py) to one server or several, in fixed
                          shares or from one queue (vllm/dealing.py)
    vllm/server.py        the server, in the child process and on every host (engine_host.py is the host's command);
                          its engine is vllm/in_process.py

The way of a weight
    collective.py         refresh(version): all ranks gather the student, one full tensor at a time
    weights/stream.py     checks the stream against the engine's model and cuts it into buckets
    weights/senders.py    takes a bucket to the server: a file in /dev/shm, or a broadcast to all hosts
    vllm/in_process.py    update_weights, in the process that has vLLM (a colocated engine reads the stream directly)
    weights/vllm_worker.py
                          loads it into vLLM's parameters
"""
