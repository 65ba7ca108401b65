"""Who acts: stable-baselines3 algorithms by name, baselines, and token-level agents on language models.

``__init__.pyi`` says what can be imported from here; each name is loaded when it is asked for, so that the agents of
edit environments do not import transformers and peft.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
