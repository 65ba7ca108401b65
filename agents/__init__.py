"""Who acts: stable-baselines3 algorithms by name, and baselines with the same interface."""

from .baselines import BaselineAgent, RandomAgent, RoundRobinAgent, ScheduleAgent
from .factory import UnknownAlgorithmError, algorithm_names, make_agent
from .policy_io import load_policy, normalize_observations, save_policy

__all__ = [
    "BaselineAgent",
    "RandomAgent",
    "RoundRobinAgent",
    "ScheduleAgent",
    "UnknownAlgorithmError",
    "algorithm_names",
    "load_policy",
    "make_agent",
    "normalize_observations",
    "save_policy",
]
