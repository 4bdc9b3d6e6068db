"""Rollouts: requests go to vLLM engines, rollouts come back, and after each step the student's weights follow.

The way of a request
    guidance.py           plans a step's requests; prefixes come from teacher_responses.py
    collective.py         every rank's view: rank 0 asks one engine for all (RankZeroRollouts), or every rank its own
                          (EveryRankRollouts); the one check that rollouts are complete and of the right weights
    engine.py             what is asked of an engine, and its errors
    placement.py          which engine that is: placement_of decides, Engines makes
      vllm/in_process.py  colocated: in the trainer's own process, in turns with it
      vllm/child.py       process: a child process of rank 0, by vllm/remote.py
      vllm/hosts.py       dedicated: hosts of their own, by vllm/remote.py; secret.py is what they must know
    vllm/remote.py        the client: deals requests out over the wire (vllm/wire.py) to one server or several
    vllm/server.py        the server, in the child process and on every host (engine_host.py is the host's command)
    vllm/generate.py      calls vLLM's generate

The way of a weight
    collective.py         refresh(version): all ranks gather the student, one full tensor at a time
    weights/stream.py     checks the stream against the engine's model and cuts it into buckets
    weights/shared_memory.py or weights/broadcast.py
                          takes a bucket to the server: a file in /dev/shm, or a broadcast to all hosts
    vllm/in_process.py    update_weights, in the process that has vLLM (a colocated engine reads the stream directly)
    weights/vllm_worker.py
                          loads it into vLLM's parameters
"""
