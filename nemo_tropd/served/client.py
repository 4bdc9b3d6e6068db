"""HTTP to a teacher's servers: requests in flight together, each with a deadline, tried again elsewhere."""

import asyncio
import logging
import os
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Annotated, Any, Generic, Protocol, TypeVar

import httpx
import msgspec
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception_type,
    stop_after_delay,
    wait_random_exponential,
)

from nemo_tropd.config import ConfigError
from nemo_tropd.config_teacher import ServerConfig
from nemo_tropd.parallel.signals import STOP, Stopped
from nemo_tropd.rollout.engine import EngineError

R = TypeVar("R")
VARIABLE = "NEMO_TROPD_TEACHER_TOKEN"
_PROXIES = ("all_proxy", "http_proxy", "https_proxy")
_SMALL = 1 << 20  # bytes, of answers that are not scores
_SAY_S = 30.0  # between lines about a server that does not answer
_GARBAGE = 5  # answers that are none, to one question: waiting does not help
_TRY_AGAIN = (408, 425, 429)  # and 500 to 599
_Count = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]


class ServerError(EngineError):
    """A teacher's server refuses, gives no proper answer, or has another teacher. Checkpoints are intact."""


class RefusedError(ServerError):
    """The server says that the request itself is wrong."""


class BadAnswer(ValueError):
    """Not an answer to what was asked."""


class _Later(Exception):
    """Another attempt, or another server, may succeed."""


class _Garbage(_Later):
    """What came is no answer."""


class LogProb(msgspec.Struct):
    """One candidate, nats."""

    logprob: float
    rank: _Count | None = None


class Tokens(msgspec.Struct):
    """Log-probabilities of generated tokens."""

    token_logprobs: list[float | None] = []


class Choice(msgspec.Struct):
    """The one answer of a request to /v1/completions, in vLLM's form; other fields are ignored."""

    prompt_logprobs: list[dict[_Count, LogProb] | None] | None = None  # of each prompt token; the first has none
    prompt_token_ids: list[_Count] | None = None
    token_ids: list[_Count] | None = None
    logprobs: Tokens | None = None


class Completion(msgspec.Struct):
    """What /v1/completions answers."""

    choices: list[Choice]


class Card(msgspec.Struct):
    """A model in the list of /v1/models."""

    id: str
    root: str | None = None
    parent: str | None = None  # of an adapter: its base model
    max_model_len: int | None = None


class _Cards(msgspec.Struct):
    data: list[Card]


@dataclass(frozen=True)
class Question(Generic[R]):
    """A request to /v1/completions. ``read`` raises BadAnswer; ``most_bytes`` bounds the answer's text."""

    body: Mapping[str, Any]
    read: Callable[[Choice], R]
    most_bytes: int = _SMALL


class Fixed(Protocol):
    """The fixed text and what its answer was."""

    @property
    def question(self) -> Question[Any]:
        """Asks for it."""

    def check(self, url: str, answer: Any) -> None:
        """ServerError if this is another teacher's."""


def read_token(env: Mapping[str, str] = os.environ) -> str | None:
    """The servers' bearer token, if there is one. ConfigError, which does not show it, for what HTTP cannot carry."""
    token = env.get(VARIABLE, "").strip()
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise ConfigError(VARIABLE, "***", "a bearer token is one word of printable ASCII characters")
    return token or None


class Servers:
    """The servers of one teacher, which serve it as ``model``. ``first``: the one that a rank asks first."""

    def __init__(self, urls: Sequence[str], settings: ServerConfig, *, first: int = 0) -> None:
        self.urls, self.settings, self._first = tuple(urls), settings, first
        self.model = ""
        self.fixed: Fixed | None = None
        self._token = read_token()
        self._unsure: set[str] = set()  # did not answer: asked for the fixed text before anything else
        self._said = -_SAY_S
        self._tls = httpx.create_ssl_context()  # once: reading the certificates takes longer than a request
        self._check()
        for name in ("httpx", "httpcore"):  # a line a request, and in debug mode the headers
            logging.getLogger(name).setLevel(logging.WARNING)

    def _check(self) -> None:
        """Raise ConfigError for an address, or a proxy of the environment, that httpx cannot use."""
        for url in self.urls:
            try:
                httpx.URL(url)
            except (httpx.InvalidURL, UnicodeError) as error:
                raise ConfigError(
                    "model.teacher.url", url, f"is no address ({error}): give http://HOST:PORT"
                ) from error
        try:
            self.client()
        except (ImportError, ValueError, httpx.InvalidURL) as error:
            names = (name for name in os.environ if name.lower() in _PROXIES and os.environ[name])
            variable = ", ".join(sorted(names)) or "ALL_PROXY"
            kinds = "the teacher's servers are reached through http:// and https:// proxies alone"
            why = f"{kinds}: unset it, or name the servers in NO_PROXY ({type(error).__name__})"
            raise ConfigError(variable, "***", why) from error

    def ask(self, questions: Sequence[Question[R]], url: str | None = None) -> list[R]:
        """The answers in order, of any server or of ``url`` alone. Raises ServerError; Stopped, if they take too long
        after a request to stop."""
        return asyncio.run(self._all([partial(self.patient, n, q, url) for n, q in enumerate(questions)]))

    def models(self, url: str) -> list[Card]:
        """What a server says it serves."""

        async def listed(client: httpx.AsyncClient, gate: asyncio.Semaphore) -> list[Card]:
            async def once(_: str) -> list[Card]:
                return _decoded(await self._request(client, "GET", f"{url}/v1/models", _SMALL), _Cards, url).data

            return await self._persist(gate, lambda _: url, once)

        return asyncio.run(self._all([listed]))[0]

    def reach(self) -> None:
        """As ``vouch``, and all of them must answer: ServerError."""
        if (fixed := self.fixed) is not None:
            for url in self.urls:
                fixed.check(url, self.ask([fixed.question], url)[0])

    def vouch(self) -> None:
        """Compare every server's answer to the fixed text with what it was; ServerError if it is another's. One that
        does not answer is compared before it is used again."""

        async def check(url: str, client: httpx.AsyncClient, _: asyncio.Semaphore) -> None:
            try:
                await self._vouch(client, url)
            except _Later:
                self._unsure.add(url)

        asyncio.run(self._all([partial(check, url) for url in self.urls]))

    def gate(self) -> asyncio.Semaphore:
        """A place for each request in flight."""
        return asyncio.Semaphore(self.settings.requests)

    def client(self) -> httpx.AsyncClient:
        """What sends requests."""
        headers = {"Accept-Encoding": "identity"}  # so that an answer's size is what is read of it
        if self._token is not None:
            headers["Authorization"] = f"Bearer {self._token}"
        limits = httpx.Limits(max_connections=None)
        return httpx.AsyncClient(headers=headers, timeout=None, limits=limits, verify=self._tls)

    async def _all(self, work: Sequence[Callable[[httpx.AsyncClient, asyncio.Semaphore], Awaitable[R]]]) -> list[R]:
        gate = self.gate()
        async with self.client() as client:
            tasks = [asyncio.ensure_future(one(client, gate)) for one in work]
            pending = set(tasks)
            try:
                while pending:
                    done, pending = await asyncio.wait(pending, timeout=0.25, return_when=asyncio.FIRST_EXCEPTION)
                    for task in done:
                        task.result()
                    if STOP.overdue and pending:
                        raise Stopped("asked to stop")
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        return [task.result() for task in tasks]

    async def patient(
        self, number: int, question: Question[R], url: str | None, client: httpx.AsyncClient, gate: asyncio.Semaphore
    ) -> R:
        """The answer to question ``number`` of any server, or of ``url``; ServerError."""

        def choose(attempt: int) -> str:
            sure = [u for u in self.urls if u not in self._unsure] or self.urls
            return url or sure[(self._first + number + attempt) % len(sure)]

        async def once(server: str) -> R:
            if server in self._unsure:
                await self._vouch(client, server)
            try:
                return await self._post(client, server, question)
            except _Later:
                self._unsure.add(server)
                raise

        return await self._persist(gate, choose, once)

    async def _persist(
        self, gate: asyncio.Semaphore, choose: Callable[[int], str], once: Callable[[str], Awaitable[R]]
    ) -> R:
        """``once`` with one server after another until one answers."""
        limit, garbage, began = self.settings.give_up_s, count(1), time.monotonic()
        late = stop_after_delay(limit)
        tries = AsyncRetrying(
            retry=retry_if_exception_type(_Later),
            stop=lambda state: late(state) or (_is_garbage(state) and next(garbage) >= _GARBAGE),
            wait=wait_random_exponential(multiplier=0.2, max=10),
            before_sleep=self._say,
            reraise=True,
        )
        async with gate:
            try:
                async for attempt in tries:
                    with attempt:
                        return await once(choose(attempt.retry_state.attempt_number))
            except _Later as error:
                raise ServerError(
                    f"the teacher's servers have given no answer in {time.monotonic() - began:.0f} s "
                    f"(model.teacher.server.give_up_s = {limit:g}). The last attempt: {error}. See to them "
                    f"(model.teacher.url = {', '.join(self.urls)}) and rerun the command: the run resumes from its "
                    "last checkpoint"
                ) from error
        raise AssertionError("tenacity returns or raises")

    def _say(self, state: RetryCallState) -> None:
        now = time.monotonic()
        if now - self._said >= _SAY_S and state.outcome is not None:
            self._said = now
            print(f"teacher's server: {state.outcome.exception()}; trying again", flush=True)

    async def _vouch(self, client: httpx.AsyncClient, url: str) -> None:
        if self.fixed is not None:
            self.fixed.check(url, await self._post(client, url, self.fixed.question))
        self._unsure.discard(url)

    async def _post(self, client: httpx.AsyncClient, url: str, question: Question[R]) -> R:
        body = {**question.body, "model": self.model}
        raw = await self._request(client, "POST", f"{url}/v1/completions", question.most_bytes, json=body)
        choices = _decoded(raw, Completion, url).choices
        try:
            if len(choices) != 1:
                raise BadAnswer(f"{len(choices)} choices")
            return question.read(choices[0])
        except BadAnswer as error:
            raise _Garbage(f"{url} gives no proper answer: {error}") from error

    async def _request(
        self, client: httpx.AsyncClient, method: str, url: str, most_bytes: int, **content: Any
    ) -> bytes:
        body, limit = bytearray(), self.settings.timeout_s
        try:
            async with asyncio.timeout(limit), client.stream(method, url, **content) as response:
                async for part in response.aiter_raw():
                    body += part
                    if len(body) > most_bytes:
                        raise _Garbage(f"{url} answers with more than {most_bytes:,} bytes")
        except TimeoutError:
            raise _Later(f"{url} has not answered within model.teacher.server.timeout_s = {limit:g}") from None
        except (httpx.HTTPError, httpx.InvalidURL, UnicodeError, OSError) as error:  # an invalid one: of a redirection
            raise _Later(f"{url} cannot be reached: {type(error).__name__}: {error}") from error
        status = response.status_code
        if status == 200:
            return bytes(body)
        said = f"{url} answers {status}: {self._quoted(body)}"
        if status in (401, 403):
            has = "is not the token it wants" if self._token else "is not set"
            raise ServerError(f"{said}. {VARIABLE} {has}: set it on every rank to what the server's --api-key has")
        raise _Later(said) if status >= 500 or status in _TRY_AGAIN else RefusedError(said)

    def _quoted(self, body: bytearray) -> str:
        text = " ".join(bytes(body[:400]).decode(errors="replace").split())
        return text.replace(self._token, "***") if self._token else text


class Asking:
    """Questions that are asked as they come, in a thread of their own."""

    def __init__(self, servers: Servers) -> None:
        self._servers = servers
        self._loop = asyncio.new_event_loop()
        self._client, self._gate = servers.client(), servers.gate()
        self._thread = threading.Thread(target=self._loop.run_forever, name="teacher-questions", daemon=True)
        self._thread.start()

    def ask(self, question: Question[R], number: int) -> Future[R]:
        """Its answer, of any server, or ServerError. ``number`` alone decides which server is asked first."""
        work = self._servers.patient(number, question, None, self._client, self._gate)
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def close(self) -> None:
        """Drop what is not answered yet; twice is fine."""
        if self._loop.is_closed():
            return

        async def end() -> None:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            await self._client.aclose()

        asyncio.run_coroutine_threadsafe(end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def _decoded(raw: bytes, kind: type[R], url: str) -> R:
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise _Garbage(f"{url} gives no proper answer: {error}") from error


def _is_garbage(state: RetryCallState) -> bool:
    return state.outcome is not None and isinstance(state.outcome.exception(), _Garbage)
