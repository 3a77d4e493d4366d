"""The registry in Redis, where it outlives coordinators.

Three keys, all with the prefix as hash tag, so that they lie on one node of a cluster:

    {adashard}:identities   hash    job → "generation author", what is compared
    {adashard}:entries      hash    job → the entry, packed
    {adashard}:events       stream  0-n → the event, packed; n is its sequence number

Compare-and-set is a script that Redis runs as a whole. WATCH, MULTI and EXEC would do the same in
four trips, and would hold a connection meanwhile that no other thread may use.

What is stored is packed by msgpack as {schema, value}. Fields may be added under one schema: old
programs ignore them, new ones take defaults. Whatever an old program would misread raises it.

Nothing is retried here. A command whose answer was lost may have been carried out, and only the
caller knows what that means.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import msgpack  # type: ignore[import-untyped]
import redis
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    ConnectionError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    TimeoutError,
)
from redis.retry import Retry

from adashard.wire.errors import (
    AdashardError,
    CannotReachServer,
    Internal,
    InvalidRequest,
    InvalidSettings,
    JobLost,
    Overloaded,
    Unauthenticated,
    VersionSkew,
)
from adashard.wire.messages import Entry
from adashard.wire.placement import cut
from adashard.wire.plain import from_plain, to_plain
from adashard_server.cluster.planner import check_placement
from adashard_server.cluster.registry import EVENTS_KEPT, Identity, Registry, refuse_unnamed
from adashard_server.cluster.statistics import Event

SCHEMA = 1
TIMEOUT_S = 5.0

# KEYS: identities, entries. ARGV: job, identity expected, identity and entry to be stored.
_SWAP = """
if (redis.call('HGET', KEYS[1], ARGV[1]) or '0 ') ~= ARGV[2] then return 0 end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[3])
redis.call('HSET', KEYS[2], ARGV[1], ARGV[4])
return 1
"""

# KEYS: identities, entries. ARGV: job, identity expected.
_REMOVE = """
if redis.call('HGET', KEYS[1], ARGV[1]) ~= ARGV[2] then return 0 end
redis.call('HDEL', KEYS[1], ARGV[1])
redis.call('HDEL', KEYS[2], ARGV[1])
return 1
"""

T = TypeVar("T")


class RedisRegistry(Registry):
    """A registry in Redis 7 or later, or in a server that speaks its protocol.

    Connects at the first call, and anew whenever a connection was lost.

    Args:
        url: redis://, rediss:// or unix://, as redis-py reads them.
        prefix: what the names of its keys begin with; one for each cluster that shares a Redis.
        events_kept: length of the log of events.

    Raises:
        InvalidSettings: the URL or the prefix cannot be used.
    """

    name = "redis"

    def __init__(
        self, url: str, *, prefix: str = "adashard", events_kept: int = EVENTS_KEPT
    ) -> None:
        if not prefix or set("{}") & set(prefix):
            raise InvalidSettings(f"{prefix!r} cannot be a prefix of keys: no braces, not empty")
        self.address = _address(url)
        self._client = _client(url, self.address)
        self._identities, self._entries, self._events = (
            f"{{{prefix}}}:{name}" for name in ("identities", "entries", "events")
        )
        self._swap = self._client.register_script(_SWAP)
        self._remove = self._client.register_script(_REMOVE)
        self._events_kept = events_kept

    def jobs(self) -> list[str]:
        """The names of all jobs, sorted."""
        with _in_our_words(self.address):
            names: Any = self._client.hkeys(self._identities)
        return sorted(name.decode() for name in names)

    def read(self, job: str) -> Entry | None:
        """The entry of `job`; None if there is no such job.

        Raises:
            VersionSkew: a newer version of adashard has written it.
            JobLost: it is damaged, or places other slices than the job has.
        """
        with _in_our_words(self.address):
            packed: Any = self._client.hget(self._entries, job)
        if packed is None:
            return None
        entry = _unpacked(Entry, packed, f"job {job!r}")
        _refuse_misplaced(entry)
        return entry

    def swap(self, entry: Entry, *, expected: Identity) -> bool:
        """As `Registry.swap`."""
        refuse_unnamed(entry)
        identity = (entry.generation, entry.author)
        arguments: list[str | bytes] = [entry.job, _text(expected), _text(identity), _packed(entry)]
        with _in_our_words(self.address):
            done = self._swap(keys=[self._identities, self._entries], args=arguments)
        return bool(done)

    def remove(self, job: str, *, expected: Identity) -> bool:
        """As `Registry.remove`."""
        with _in_our_words(self.address):
            done = self._remove(keys=[self._identities, self._entries], args=[job, _text(expected)])
        return bool(done)

    def append_event(
        self, job: str, name: str, text: str, facts: Mapping[str, str], time_s: float
    ) -> int:
        """As `Registry.append_event`. The number comes from the stream, which never repeats one."""
        event = Event(sequence=0, time_s=time_s, job=job, name=name, text=text, facts=facts)
        with _in_our_words(self.address):
            number: Any = self._client.xadd(
                self._events,
                {"event": _packed(event)},
                id="0-*",
                maxlen=self._events_kept,
                approximate=False,
            )
        return _sequence(number)

    def events(self, after: int = 0, limit: int = 1000) -> list[Event]:
        """As `Registry.events`.

        Raises:
            VersionSkew: a newer version of adashard has written one of them.
            JobLost: one is damaged.
        """
        with _in_our_words(self.address):
            found: Any = self._client.xrange(self._events, min=f"0-{after + 1}", count=limit)
        return [
            replace(
                _unpacked(Event, fields[b"event"], f"event {_sequence(number)}"),
                sequence=_sequence(number),
            )
            for number, fields in found
        ]

    def close(self) -> None:
        """Closes all connections."""
        self._client.close()


def _client(url: str, address: str) -> redis.Redis:
    try:
        return redis.Redis.from_url(
            url,
            socket_timeout=TIMEOUT_S,
            socket_connect_timeout=TIMEOUT_S,
            retry=Retry(NoBackoff(), 0),
        )
    except ValueError:
        # Its text is not repeated: it may hold the password.
        raise InvalidSettings(
            f"the registry's URL ({address}) cannot be used",
            remedy="Use --registry redis://user:password@host:6379/0, rediss:// or unix://.",
            url=address,
        ) from None


def _address(url: str) -> str:
    """`url` without user, password and options, for people."""
    try:
        parts = urlsplit(url)
        host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname or ""
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        return "not a URL"
    return f"{parts.scheme}://{host}{port}{parts.path}"


# --- what is stored ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Envelope:
    """What stands around every value that is stored."""

    schema: int


def _text(identity: Identity) -> str:
    generation, author = identity
    return f"{generation} {author}"


def _sequence(number: bytes) -> int:
    """The sequence number in the id of a stream's item, which is b"0-n"."""
    return int(number.partition(b"-")[2])


def _packed(value: object) -> bytes:
    packed: bytes = msgpack.packb({"schema": SCHEMA, "value": to_plain(value)})
    return packed


def _unpacked(kind: type[T], packed: bytes, what: str) -> T:
    """The `kind` in `packed`; `what` it is, for errors."""
    try:
        stored = msgpack.unpackb(packed)
        schema = from_plain(_Envelope, stored).schema
        if schema <= SCHEMA:
            return from_plain(kind, stored.get("value"))
    except (ValueError, msgpack.UnpackException, InvalidRequest) as error:
        detail = error.message if isinstance(error, InvalidRequest) else error
        raise JobLost(
            f"what the registry holds of {what} cannot be read: {detail}",
            remedy="Restore Redis from its own backup, or choose another job=.",
        ) from error
    raise VersionSkew(
        f"{what} was stored by a newer adashard: its schema is {schema}, "
        f"and this version reads up to {SCHEMA}",
        remedy="Start a coordinator of that version or newer.",
    )


def _refuse_misplaced(entry: Entry) -> None:
    """Refuses a placement that was made of other slices: by a version that cuts in another way."""
    if not entry.placement:
        return  # nothing has been placed yet
    slices = len(cut(entry.spec))
    try:
        check_placement(entry.placement, slice_count=slices, shard_count=len(entry.shards))
    except ValueError as error:
        raise JobLost(
            f"what the registry holds of job {entry.job!r} cannot be used: {error}",
            remedy="Start the version that it was begun with, or choose another job=.",
        ) from error


# --- when it does not work -----------------------------------------------------------------------


class _Cause(NamedTuple):
    """What Redis may raise, and what it means here."""

    raised: tuple[type[RedisError], ...]
    kind: type[AdashardError]
    words: str
    remedy: str


# The first that fits counts; what is left is a defect.
_CAUSES = (
    _Cause(
        (AuthenticationError, AuthorizationError, NoPermissionError),
        Unauthenticated,
        "lets nobody in without the right user and password",
        "Put them into the URL: --registry redis://user:password@host:6379/0.",
    ),
    _Cause(
        (OutOfMemoryError,),
        Overloaded,
        "has no memory left",
        "Raise its maxmemory; adashard itself needs a few megabytes.",
    ),
    _Cause(
        (ConnectionError, TimeoutError, ReadOnlyError),
        CannotReachServer,
        "does not answer, or takes no writes",
        "Check that Redis runs there and is no replica. Steps go on meanwhile.",
    ),
    _Cause((RedisError,), Internal, "does not do what it was asked to", Internal.default_remedy),
)


@contextmanager
def _in_our_words(address: str) -> Iterator[None]:
    """Turns whatever Redis raises into an error of the catalogue."""
    try:
        yield
    except RedisError as error:
        cause = next(cause for cause in _CAUSES if isinstance(error, cause.raised))
        raise cause.kind(
            f"the registry at {address} {cause.words}: {error}", remedy=cause.remedy, url=address
        ) from error
