"""Which of several engines is asked for which request, if they share one queue: the longest expected first.

vLLM is busy as long as ``max_num_seqs`` sequences run, or a request waits to take the place of one that ends. So each
engine is given that many and a few that wait; the others stay here until one of theirs is finished. What comes last is
short, and goes to whoever is free.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from nemo_tropd.rollout.engine import RolloutRequest


def held_by_one(max_num_seqs: int) -> int:
    """Requests that an engine has at a time: those that run, and enough that wait until the next ones come, which takes
    them a step or two."""
    return max_num_seqs + 1 + max_num_seqs // 16


class Lengths:
    """Tokens of the responses that were seen, prefixes included, by prompt."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[int, int]] = {}  # how many, and their sum

    def add(self, request: RolloutRequest, new_tokens: int) -> None:
        """A response to ``request`` had so many tokens after its prefix."""
        count, tokens = self._seen.get(_prompt(request), (0, 0))
        self._seen[_prompt(request)] = count + 1, tokens + len(request.prefix_ids) + new_tokens

    def expected(self, request: RolloutRequest) -> int:
        """New tokens of a response: the mean of those to the same prompt, or as many as it may have."""
        count, tokens = self._seen.get(_prompt(request), (0, 0))
        if not count:
            return request.max_new_tokens
        return min(max(tokens // count - len(request.prefix_ids), 1), request.max_new_tokens)


def _prompt(request: RolloutRequest) -> int:
    """Held-out prompts and those to train on have the same indices."""
    return hash((request.prompt_index, *request.prompt_ids))


class Queue:
    """Requests by place, and which of them each of ``members`` engines has, at most ``held`` at a time. Requests of one
    expected length keep their order. What it does depends on the order of its calls alone."""

    def __init__(self, requests: Sequence[RolloutRequest], members: int, held: int, lengths: Lengths) -> None:
        self.requests: list[RolloutRequest] = []
        self.closed = False  # no more are added
        self._held, self._lengths = held, lengths
        self._expected: list[int] = []
        self._undealt: deque[int] = deque()
        self._has: list[set[int]] = [set() for _ in range(members)]
        self._told = [False] * members  # that it has had its last
        self.add(requests)

    def add(self, requests: Sequence[RolloutRequest]) -> None:
        """Behind those that are there."""
        first = len(self.requests)
        self.requests += requests
        self._expected += map(self._lengths.expected, requests)
        self._undealt.extend(sorted(range(first, len(self.requests)), key=lambda place: -self._expected[place]))

    def deal(self) -> list[tuple[int, list[int], bool]]:
        """Members that are to be told something, what each is given, and whether that is its last: the next request
        goes to the one of those with room from which the fewest tokens are expected."""
        given: list[list[int]] = [[] for _ in self._has]
        room = [i for i, has in enumerate(self._has) if len(has) < self._held] if self._undealt else []
        loads = {i: sum(self._expected[place] for place in self._has[i]) for i in room}
        while self._undealt and loads:
            i, place = min(loads, key=lambda i: loads[i]), self._undealt.popleft()
            given[i].append(place)
            self._has[i].add(place)
            loads[i] += self._expected[place]
            if len(self._has[i]) == self._held:
                del loads[i]
        last = self.closed and not self._undealt
        told = [i for i, places in enumerate(given) if places or (last and not self._told[i])]
        for i in told:
            self._told[i] = last
        return [(i, given[i], last) for i in told]

    def finished(self, member: int, place: int, new_tokens: int) -> bool:
        """Take a request from a member; False if that one does not have it."""
        if place not in self._has[member]:
            return False
        self._has[member].remove(place)
        self._lengths.add(self.requests[place], new_tokens)
        return True

    def done(self, member: int) -> bool:
        """Whether a member has had its last request and finished all."""
        return self._told[member] and not self._has[member]
