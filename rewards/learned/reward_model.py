"""Reward models on a causal language model: one scalar per response token, or one per response.

The token-level model is that of fine-grained supervision (Xu et al. 2024, arXiv 2406.02756): r(x, y, t) is the output
of a linear head on the hidden state at token t, and R(x, y) is its mean over the response.
:mod:`instructgym.rewards.learned.token_reward` turns a model into a reward.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ...llm_backends.errors import InputError, check_known
from ...llm_backends.local.causal_lm import GROUP_TOKENS, PREFILL_TOKENS, CausalLM, token_budget_chunks
from ...llm_backends.local.loading import ModelLoadError, quiet_loading, resolved_dtype
from ...llm_backends.local.tokenization import LoadedTokenizer, Tokenizer
from ...llm_backends.parts import SharedModel
from ...llm_backends.training.adapters import AdaptedTrunk, LoraSettings, autocast, load_all_weights, open_model
from ...llm_backends.training.teacher_forcing import response_hidden, training_pass

ADAPTER = "reward"
SETTINGS, HEAD = "reward_model.json", "reward_head.safetensors"

DEFAULT_LORA = LoraSettings(rank=8, alpha=16)

Level = Literal["token", "sequence"]
Transform = Literal["identity", "signed-probability"]


class RewardModel(SharedModel):
    """A causal language model with an adapter and a linear head that scores responses.

    The reward of token t is the head's output on the hidden state *after* token t was read, so the reward of an action
    depends on that action, EOS included. It never depends on later tokens, so the rewards of a prefix equal those of
    the same tokens in the whole response. A new model scores everything 0;
    :class:`~instructgym.agents.supervised.reward_modelling.RewardTrainer` trains it.

    Args:
        model: ``"embedded"``, a local path or hub id, a live
            :class:`~instructgym.llm_backends.local.causal_lm.CausalLM` (which is then changed in place), or a trunk
            that holds other adapters, such as ``policy.trunk``: the model is then in memory once.
        lora: adapter that is trained besides the head; rank 0 trains all weights, which no other part can share then.
        level: ``token``: one reward per response token; ``sequence``: one reward per response, at its last token.
        dtype: ``float32``, ``bfloat16`` or ``auto``, as in
            :class:`~instructgym.agents.policy.language_model.LanguageModelPolicy`. The head computes in float32.
        device: device of the model; ``auto`` uses a GPU if there is one.
        seed: seed of the adapter's initial weights.

    Raises:
        InputError: if the model cannot be loaded or has a reward model already, or the level is unknown.
    """

    def __init__(
        self,
        model: str | CausalLM | AdaptedTrunk = "embedded",
        lora: LoraSettings = DEFAULT_LORA,
        level: Level = "token",
        dtype: str = "auto",
        device: str = "auto",
        seed: int = 0,
    ) -> None:
        check_known("level", level, get_args(Level))
        self.lora, self.level, self.dtype = lora, level, resolved_dtype(dtype, device)
        self.lm, self.model_name = open_model(model, lora, self.dtype, device)
        training_pass(self.lm)  # refuses a model that cannot be trained, before it is changed
        self.trunk = AdaptedTrunk.of(self.lm)
        with quiet_loading():
            # The adapter's initial weights are drawn from torch's global generator.
            torch.manual_seed(seed)
            if lora.rank:
                self.trunk.add(ADAPTER, lora)
            else:
                self.trunk.train_whole(ADAPTER)
            self.head = torch.nn.Linear(self.lm.head.weight.shape[1], 1, bias=False, device=self.lm.device)
            torch.nn.init.zeros_(self.head.weight)
        self.tokenizer: Tokenizer = LoadedTokenizer(
            self.lm.tokenizer, self.model_name, self.lm.context_length, self.lm.eos_token_ids
        )
        self.loss = ""
        """Name of the loss that the model was trained with; empty before training."""
        self.transform: Transform = "identity"
        """Map from the head's output z to the reward: z itself, or 2 sigmoid(z) - 1, in (-1, 1)."""
        self.free_level = False
        """Whether the loss does not change when a constant is added to all scores."""
        self.mean: float | None = None
        """Mean score of the less preferred training responses; None before training."""
        self.std: float | None = None
        """Standard deviation of the scores of the less preferred training responses; None before training."""

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """Returns the trained weights by name, those of the head included."""
        head = {f"reward_head.{name}": parameter for name, parameter in self.head.named_parameters()}
        return self.trunk.parameters(ADAPTER) | head

    # --- scoring -----------------------------------------------------------------------------------------------------

    def logits(self, prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray]) -> torch.Tensor:
        """Returns the head's output, from which the losses are computed; differentiable if gradients are enabled.

        Args:
            prompts: n int arrays of token ids, none empty.
            responses: n int arrays of token ids, none empty, each with its end token if it has one.

        Returns:
            float32; level token: shape (total response tokens,), response after response; level sequence: shape (n,).

        Raises:
            InputError: for an empty prompt or response, more tokens than the context, or ids outside the vocabulary.
        """
        self.check(prompts, responses)
        with self.trunk.active(ADAPTER, torch.is_grad_enabled()) as lm, autocast(lm, self.dtype):
            hidden = response_hidden(lm, prompts, responses, after_token=True)
        if self.level == "sequence":
            # Rows are concatenated, so the cumulative lengths give the position of each last token.
            hidden = hidden[torch.from_numpy(np.cumsum([len(r) for r in responses]) - 1)]
        return self.head(hidden.float()).squeeze(-1)

    def rewards(self, prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray]) -> torch.Tensor:
        """Returns the rewards, i.e. :meth:`logits` under :attr:`transform`; same arguments, shapes and errors."""
        logits = self.logits(prompts, responses)
        return torch.tanh(logits / 2) if self.transform == "signed-probability" else logits  # = 2 sigmoid - 1

    @torch.no_grad()
    def score(
        self, prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray], token_budget: int | None = None
    ) -> list[np.ndarray]:
        """Returns the rewards without gradients, computed in micro-batches of similar lengths.

        Args:
            prompts: n int arrays of token ids, none empty.
            responses: n int arrays of token ids, none empty.
            token_budget: tokens per micro-batch, padding included; None or 0: a default for the device.

        Returns:
            n float32 arrays; level token: shape (len(response),); level sequence: shape (1,).

        Raises:
            InputError: for the same inputs as :meth:`logits`.
        """
        self.check(prompts, responses)
        lengths = [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]
        # Rows of similar length share a micro-batch, which keeps padding small.
        order = np.argsort(lengths, kind="stable")
        budget = token_budget or (GROUP_TOKENS if self.lm.device.type == "cpu" else PREFILL_TOKENS)
        rows: list[np.ndarray] = [np.empty(0, np.float32)] * len(lengths)
        for chunk in token_budget_chunks([lengths[i] for i in order], budget):
            members = [int(order[k]) for k in chunk]
            flat = self.rewards([prompts[i] for i in members], [responses[i] for i in members]).cpu().numpy()
            counts = [len(responses[i]) if self.level == "token" else 1 for i in members]
            for i, row in zip(members, np.split(flat, np.cumsum(counts)[:-1]), strict=True):
                rows[i] = row
        return rows

    def sequence_scores(self, prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray]) -> np.ndarray:
        """Returns R(x, y), float32, shape (n,): the mean token reward (level token) or the score (level sequence)."""
        return np.array([row.mean() for row in self.score(prompts, responses)], np.float32)

    def check(self, prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray]) -> None:
        """Checks that the model can read all prompts and responses.

        Raises:
            InputError: for an empty prompt or response, more tokens than the context, or ids outside the vocabulary;
                the message names the row.
        """
        limit, vocabulary = self.lm.context_length, self.tokenizer.vocabulary
        for number, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            if not len(prompt) or not len(response):
                raise InputError(f"row {number}: a reward model needs a prompt and a response of at least one token")
            if len(prompt) + len(response) > limit:
                raise InputError(
                    f"row {number}: prompt and response have {len(prompt)} + {len(response)} tokens, {self.lm.name} "
                    f"reads {limit}: shorten them"
                )
            low, high = min(np.min(prompt), np.min(response)), max(np.max(prompt), np.max(response))
            if low < 0 or high >= vocabulary:
                raise InputError(
                    f"row {number} has token ids {low} to {high}, the reward model's vocabulary is [0, {vocabulary}): "
                    "use the tokenizer of its model"
                )

    # --- saving and loading ------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Writes the adapter (peft's format) or the whole model, then the head, and last ``reward_model.json``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self.lora.rank:
            self.trunk.save(folder, [ADAPTER])
        else:
            self.lm.model.save_pretrained(folder / ADAPTER)
        save_file({k: v.detach().cpu().contiguous() for k, v in self.head.state_dict().items()}, folder / HEAD)
        # Written last: loading needs this file, so an interrupted save to a new folder is not loaded.
        (folder / SETTINGS).write_text(json.dumps(self.settings(), indent=2) + "\n", "utf-8")

    def settings(self) -> dict[str, Any]:
        """Returns everything but the weights, as JSON-serialisable values."""
        return {
            "model": self.model_name,
            "lora": asdict(self.lora),
            "level": self.level,
            "loss": self.loss,
            "transform": self.transform,
            "free_level": self.free_level,
            "vocabulary": self.tokenizer.vocabulary,
            "tokenizer": self.tokenizer.fingerprint,
            "mean": self.mean,
            "std": self.std,
        }

    @classmethod
    def load(
        cls,
        folder: str | Path,
        model: str | CausalLM | AdaptedTrunk | None = None,
        dtype: str = "auto",
        device: str = "auto",
    ) -> RewardModel:
        """Returns the reward model that :meth:`save` wrote.

        Args:
            folder: folder that :meth:`save` wrote.
            model: base language model; None: the one it was trained on, by name; a live model or trunk is shared.
            dtype: ``float32``, ``bfloat16`` or ``auto``, as in the constructor.
            device: device of the model; ``auto`` uses a GPU if there is one.

        Raises:
            InputError: if files are missing, broken, or do not fit the model.
        """
        settings = read_reward_settings(folder)
        try:
            lora = LoraSettings(**settings["lora"])
            reward_model = cls(settings["model"] if model is None else model, lora, settings["level"], dtype, device)
        except ModelLoadError as error:
            hint = "" if model is not None else " (the reward model's own: pass another place of it as model=)"
            raise InputError(f"{error}{hint}") from error
        except TypeError as error:
            raise InputError(f"cannot read a reward model from {folder}: {error}") from error
        reward_model.restore(folder)
        return reward_model

    def restore(self, folder: str | Path) -> None:
        """Loads what :meth:`save` wrote into this model, which must have the same ``lora`` and ``level``.

        Raises:
            InputError: if files are missing, broken, or do not fit.
        """
        folder, settings = Path(folder), read_reward_settings(folder)
        for key, expected in (("lora", asdict(self.lora)), ("level", self.level)):
            if settings[key] != expected:
                raise InputError(
                    f"the reward model in {folder} was built with {key}={settings[key]}, this one with {expected}"
                )
        check_fingerprint(settings, self.tokenizer, str(folder))
        try:
            if self.lora.rank:
                self.trunk.load(folder, ADAPTER)
            else:
                load_all_weights(self.lm.model, folder / ADAPTER)
            self.head.load_state_dict(load_file(folder / HEAD, device=str(self.lm.device)))
        except (OSError, KeyError, RuntimeError, SafetensorError) as error:
            raise InputError(f"cannot read a reward model from {folder}: {' '.join(str(error).split())}") from error
        self.loss, self.transform, self.free_level = settings["loss"], settings["transform"], settings["free_level"]
        self.mean, self.std = settings["mean"], settings["std"]


def read_reward_settings(folder: str | Path) -> dict[str, Any]:
    """Returns the contents of ``reward_model.json`` without loading a model.

    Raises:
        InputError: if the file is missing, broken or incomplete.
    """
    try:
        settings = json.loads((Path(folder) / SETTINGS).read_text("utf-8"))
        missing = _KEYS - set(settings)
    except (OSError, json.JSONDecodeError, TypeError) as error:
        raise InputError(f"cannot read a reward model from {folder}: {' '.join(str(error).split())}") from error
    if missing:
        raise InputError(f"cannot read a reward model from {folder}: {SETTINGS} lacks {', '.join(sorted(missing))}")
    return settings


_KEYS = {"model", "lora", "level", "loss", "transform", "free_level", "vocabulary", "tokenizer", "mean", "std"}


def check_fingerprint(settings: dict[str, Any], tokenizer: Tokenizer, name: str) -> None:
    """Checks that a tokenizer is the one that a reward model was trained with.

    Args:
        settings: settings of the reward model, see :meth:`RewardModel.settings`.
        tokenizer: the tokenizer to check.
        name: name of the reward model in the error message.

    Raises:
        InputError: if it is another tokenizer; the message names both vocabularies.
    """
    if settings["vocabulary"] != tokenizer.vocabulary or settings["tokenizer"] != tokenizer.fingerprint:
        raise InputError(
            f"the reward model {name} reads the tokens of {settings['model']!r} (vocabulary {settings['vocabulary']}), "
            f"not those of tokenizer {tokenizer.name!r} (vocabulary {tokenizer.vocabulary}): use one tokenizer for both"
        )
