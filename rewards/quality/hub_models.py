"""Learned quality scorers from the Hugging Face hub or a local folder: UniEval, and reward models with one logit."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

import torch

from ...llm_backends.errors import InputError, check_known
from ...llm_backends.local.causal_lm import token_budget_chunks
from ...llm_backends.local.loading import ModelLoadError, load_config, load_tokenizer, quiet_loading
from ...llm_backends.prompting import fill, load_prompts
from ..base import Reward, Sample, Score

UNIEVAL_TOKENS = 1024
"""Maximum tokens of a UniEval input; longer inputs are cut at the end, where the dialogue history is."""

BATCH_TOKENS = 4096
"""Maximum tokens of one forward pass, padding included."""

_LOCK = threading.Lock()


@cache
def _load(path: str, kind: str, device: str) -> tuple[Any, Any]:
    """Returns a model in evaluation mode and its tokenizer; one copy per process.

    Args:
        path: local folder or hub id.
        kind: name of the transformers class that loads the model, such as ``AutoModelForSeq2SeqLM``.
        device: device of the model; ``auto`` uses a GPU if there is one.

    Raises:
        ModelLoadError: if the model cannot be loaded, or lacks weights that would then be random.
    """
    import transformers

    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    tokenizer = load_tokenizer(path)
    try:
        with quiet_loading():
            model, report = getattr(transformers, kind).from_pretrained(path, output_loading_info=True)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelLoadError(
            f"cannot load a {kind.removeprefix('AutoModelFor')} model from {path!r}: {reason}"
        ) from error
    # transformers only warns about missing weights and fills them with random values.
    if report["missing_keys"]:
        raise ModelLoadError(
            f"{path!r} lacks the weights {sorted(report['missing_keys'])[:3]}, which would be random: it is no trained "
            f"{kind.removeprefix('AutoModelFor')} model"
        )
    return model.to(device).eval(), tokenizer


class UniEval(Reward):
    """P(Yes) / (P(Yes) + P(No)) of UniEval-dialog at the first decoder position (Zhong et al. 2022, arXiv 2210.07197).

    UniEval is a T5 model that was trained to answer questions about a response in a dialogue. The prompt is used as the
    dialogue history; only ``coherence`` reads it. The questions are those that the checkpoint was trained on, so
    another checkpoint must have been trained on the same questions. The class was tested with random weights of the
    same architecture only.

    Args:
        aspect: ``naturalness``, ``understandability`` or ``coherence``.
        model: local folder or hub id; loaded on first use, once for all aspects.
        device: device of the model; ``auto`` uses a GPU if there is one.

    Raises:
        InputError: for another aspect; when scoring, if the tokenizer has no token for ``Yes`` or ``No``.
        ModelLoadError: on first use, if the model cannot be loaded.
    """

    name = "unieval"

    def __init__(
        self,
        aspect: Literal["naturalness", "understandability", "coherence"] = "naturalness",
        model: str = "MingZhong/unieval-dialog",
        device: str = "auto",
    ) -> None:
        templates = load_prompts(__package__, "quality")["unieval"]
        check_known("aspect", aspect, templates)
        self.template, self.aspect, self.path, self.device = templates[aspect], aspect, model, device

    def question(self, sample: Sample) -> str:
        """Returns the model's input; a turn of the history ends with a line end, the history with a blank line."""
        # UniEval separates fields with "</s>"; inside a text it would start a new field.
        texts = {"response": sample.response, "history": f"{sample.prompt}\n\n"}
        return fill(self.template, {name: text.replace("</s>", "< /s>") for name, text in texts.items()})

    @torch.inference_mode()
    def reward(self, samples: Sequence[Sample]) -> list[Score]:
        if not samples:
            return []
        with _LOCK:
            model, tokenizer = _load(self.path, "AutoModelForSeq2SeqLM", self.device)
        yes, no = (self._word(tokenizer, word) for word in ("Yes", "No"))
        texts = [self.question(sample) for sample in samples]
        ids = tokenizer(texts, truncation=True, max_length=UNIEVAL_TOKENS)["input_ids"]
        # Rows of similar length share a forward pass, which keeps padding small.
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        log_odds = [0.0] * len(ids)
        for chunk in token_budget_chunks([len(ids[i]) for i in order], BATCH_TOKENS):
            rows = [order[k] for k in chunk]
            batch = tokenizer.pad({"input_ids": [ids[i] for i in rows]}, return_tensors="pt").to(model.device)
            start = torch.full((len(rows), 1), model.config.decoder_start_token_id, device=model.device)
            logits = model(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], decoder_input_ids=start
            ).logits[:, 0]
            for i, difference in zip(rows, (logits[:, yes] - logits[:, no]).float().tolist(), strict=True):
                log_odds[i] = difference
        # P(Yes) / (P(Yes) + P(No)) is the sigmoid of the difference of the two logits.
        values = torch.tensor(log_odds, dtype=torch.float64).sigmoid().tolist()
        invalid = Score.invalid("the model's logits are NaN")
        return [invalid if math.isnan(value) else Score(value, terms={self.name: value}) for value in values]

    def _word(self, tokenizer: Any, word: str) -> int:
        """Returns the id of a word's first token."""
        token = tokenizer(word)["input_ids"][0]
        if token == tokenizer.unk_token_id:
            raise InputError(f"the tokenizer of {self.path!r} has no token for {word!r}: it is no UniEval model")
        return int(token)


class HubRewardModel(Reward):
    """The logit of a reward model on (prompt, response), for transformers sequence classifiers with one label.

    The tokenizer's chat template formats prompt and response as a user and an assistant message; without a template
    they are encoded as a pair of texts. The score is invalid if the pair is longer than the model's context. Reward
    models that need a class outside transformers, such as OpenAssistant's on GPT-NeoX, cannot be loaded.

    Args:
        model: local folder or hub id; loaded on first use.
        device: device of the model; ``auto`` uses a GPU if there is one.

    Raises:
        ModelLoadError: on first use, if the model cannot be loaded or does not have exactly one label.
    """

    name = "hub-reward-model"

    def __init__(self, model: str, device: str = "auto") -> None:
        self.path, self.device = model, device

    @torch.inference_mode()
    def reward(self, samples: Sequence[Sample]) -> list[Score]:
        if not samples:
            return []
        with _LOCK:
            model, tokenizer = self._loaded()
        rows = [self._encode(tokenizer, sample) for sample in samples]
        # Some configs set no limit; the tokenizer may set a smaller one.
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 10**9
        limit = min(positions, tokenizer.model_max_length)
        scores = [
            Score.invalid(f"prompt and response have {len(row['input_ids'])} tokens, {self.path} reads {limit}")
            for row in rows
        ]
        fit = sorted(
            (i for i, row in enumerate(rows) if len(row["input_ids"]) <= limit), key=lambda i: len(rows[i]["input_ids"])
        )
        # The model finds the end of a row by its padding tokens; without such a token each row is its own batch.
        pads = tokenizer.pad_token_id is not None
        lengths = [len(rows[i]["input_ids"]) for i in fit]
        chunks = token_budget_chunks(lengths, BATCH_TOKENS) if pads else ([k] for k in range(len(fit)))
        for chunk in chunks:
            members = [fit[k] for k in chunk]
            batch = self._batch(tokenizer, [rows[i] for i in members], pads)
            for i, value in zip(members, model(**batch.to(model.device)).logits[:, 0].float().tolist(), strict=True):
                finite = math.isfinite(value)
                scores[i] = Score(value, terms={self.name: value}) if finite else Score.invalid(f"the logit is {value}")
        return scores

    def _loaded(self) -> tuple[Any, Any]:
        try:
            config = load_config(self.path)
        except ModelLoadError as error:
            raise ModelLoadError(
                f"{error}. OpenAssistant's reward models (gpt_neox_reward_model) need a class that transformers has "
                "not: use one of AutoModelForSequenceClassification with one label"
            ) from error
        if config.num_labels != 1:
            raise ModelLoadError(f"{self.path!r} has {config.num_labels} labels, a reward model has one")
        model, tokenizer = _load(self.path, "AutoModelForSequenceClassification", self.device)
        if model.config.pad_token_id is None:
            model.config.pad_token_id = tokenizer.pad_token_id
        return model, tokenizer

    def _encode(self, tokenizer: Any, sample: Sample) -> dict[str, list[int]]:
        if not tokenizer.chat_template:
            return dict(tokenizer(sample.prompt, sample.response))
        messages = [{"role": "user", "content": sample.prompt}, {"role": "assistant", "content": sample.response}]
        # The template writes the special tokens itself.
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        return dict(tokenizer(text, add_special_tokens=False))

    def _batch(self, tokenizer: Any, rows: list[dict[str, list[int]]], pads: bool) -> Any:
        if pads:
            return tokenizer.pad(rows, padding=True, return_tensors="pt")
        from transformers import BatchEncoding

        return BatchEncoding({name: [row[name] for row in rows] for name in rows[0]}, tensor_type="pt")
