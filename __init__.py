"""instructgym: Gymnasium environments in which making language models better at instructions is an MDP.

Importing this package registers the ids ``instructgym/...`` with Gymnasium; it imports neither torch nor transformers.
"""

from importlib.metadata import PackageNotFoundError, version

from .envs.registration import register_envs

try:
    __version__ = version("instructgym")
except PackageNotFoundError:  # a checkout on sys.path that was never installed
    __version__ = "0+unknown"

__all__ = ["__version__", "register_envs"]

register_envs()
