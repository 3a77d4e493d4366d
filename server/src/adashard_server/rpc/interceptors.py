"""Errors of the catalogue as gRPC statuses, and the unknown as INTERNAL."""

from __future__ import annotations

import logging
from types import TracebackType
from typing import NoReturn

import grpc

from adashard.transport.grpc import ERROR_KEY
from adashard.wire import codec
from adashard.wire.errors import AdashardError, Internal

log = logging.getLogger("adashard.errors")


class Answering:
    """Turns what a handler raises in a `with` block into the status of its call.

    An error of the catalogue travels whole; anything else is logged with its traceback and
    answered without it. A call whose peer has gone is left alone.

    Args:
        context: the call's.
        call: its name, for the log.
    """

    def __init__(self, context: grpc.ServicerContext, call: str) -> None:
        self._context, self._call = context, call

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        if error is None or not isinstance(error, Exception):
            return False
        if isinstance(error, AdashardError):
            abort(self._context, error)
        if not self._context.is_active():
            log.debug("%s: the peer has gone", self._call)
            return True
        log.error("%s failed", self._call, exc_info=error)
        abort(self._context, Internal(f"{self._call} failed on the server"))


def abort(context: grpc.ServicerContext, error: AdashardError) -> NoReturn:
    """Ends the call with `error`."""
    context.set_trailing_metadata(((ERROR_KEY, codec.to_proto(error.info()).SerializeToString()),))
    context.abort(grpc.StatusCode[error.code.name], error.message)
    raise AssertionError("abort raises")
