"""Agents: stable-baselines3 algorithms by name, baselines, and token-level agents that train a language model.

For edit environments read ``sb3/factory.py`` first; for token environments ``rollouts/agent.py``, the base of PPO,
GRPO, soft Q-learning and learning from rankings. ``supervised`` trains on a fixed set of responses, ``policy`` holds
the model. ``__init__.pyi`` lists the names that can be imported from here; each is loaded on first use, so the agents
of edit environments do not import transformers and peft.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
