"""An optimizer as a service, the worker's side.

    opt = adashard.Adafactor(model.named_parameters(), address="localhost:50051", job="my-run")

and the loop stays as it is. This module holds the public names; it may import everything of the
client and nothing of the server. It imports them when they are asked for, since the server
imports `adashard.wire` and needs no optimizer.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from adashard.wire.version import VERSION as __version__

if TYPE_CHECKING:
    from adashard.algorithms import Adafactor
    from adashard.optimizer import RemoteOptimizer
    from adashard.scaler import GradScaler
    from adashard.wire.errors import AdashardError

__all__ = ["Adafactor", "AdashardError", "GradScaler", "RemoteOptimizer", "__version__"]

_HOMES = {
    "Adafactor": "adashard.algorithms",
    "AdashardError": "adashard.wire.errors",
    "GradScaler": "adashard.scaler",
    "RemoteOptimizer": "adashard.optimizer",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'adashard' has no attribute {name!r}")
    found: object = getattr(import_module(_HOMES[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted(__all__)
