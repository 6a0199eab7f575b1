"""Parameter server: servers own shards of the parameters and the optimizer; workers push gradients and pull parameters
(Li et al. 2014). Synchronous, asynchronous or bounded.

`worker` pushes and pulls; `coordinator` decides; `server` executes the decisions; `wire` defines the records that they
exchange, `links` how gradients and parameters travel, `pulls` how differences of parameters do.
"""

from hpctrain.strategies.parameter_server.options import ParameterServerOptions
from hpctrain.strategies.parameter_server.server import ParameterServerServer
from hpctrain.strategies.parameter_server.worker import ParameterServer

__all__ = ["ParameterServer", "ParameterServerOptions", "ParameterServerServer"]
