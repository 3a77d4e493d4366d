"""An optimizer as a service, the worker's side.

    opt = adashard.Adafactor(model.named_parameters(), address="localhost:50051", job="my-run")

and the loop stays as it is. This module holds the public names; it may import everything of the
client and nothing of the server.
"""

from adashard.algorithms import Adafactor
from adashard.optimizer import RemoteOptimizer
from adashard.wire.errors import AdashardError
from adashard.wire.version import VERSION as __version__

__all__ = ["Adafactor", "AdashardError", "RemoteOptimizer", "__version__"]
