"""Errors of the catalogue as gRPC statuses, and the unknown as INTERNAL."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import grpc

from adashard.transport.grpc import ERROR_KEY
from adashard.wire import codec
from adashard.wire.errors import AdashardError, Internal

log = logging.getLogger("adashard.errors")


@contextmanager
def answering(context: grpc.ServicerContext, call: str) -> Iterator[None]:
    """Turns what a handler raises into the status of its call.

    An error of the catalogue travels whole; anything else is logged with its traceback and
    answered without it. A call whose peer has gone is left alone.
    """
    try:
        yield
    except AdashardError as error:
        abort(context, error)
    except Exception:
        if not context.is_active():
            log.debug("%s: the peer has gone", call)
            return
        log.exception("%s failed", call)
        abort(context, Internal(f"{call} failed on the server"))


def abort(context: grpc.ServicerContext, error: AdashardError) -> NoReturn:
    """Ends the call with `error`."""
    context.set_trailing_metadata(((ERROR_KEY, codec.to_proto(error.info()).SerializeToString()),))
    context.abort(grpc.StatusCode[error.code.name], error.message)
    raise AssertionError("abort raises")
