"""``instructgym tuna train``: a policy learns from ranked lists, by Tuna's loss, DPO or one of their relatives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from ...agents.policy.checkpoints import policy_from, read_state
from ...agents.policy.language_model import SETTINGS, LanguageModelPolicy
from ...agents.preferences.lists import rank_agreement, request_of, tokenize_lists
from ...agents.preferences.losses import LOSSES
from ...agents.preferences.trainer import LARGEST_SCORE, RankingSettings, RankingTrainer, TokenizedRankedList
from ...envs.tasks.responses.candidates import RankedList, read_ranked_lists
from ...llm_backends import request_seed
from ...llm_backends.errors import InputError
from ...llm_backends.records import read_records
from ...llm_backends.training.adapters import LoraSettings
from ..runs.folder import RunFolder, read_json, write_json, write_once
from ..runs.options import check_counts
from ..runs.training import TrainingOptions, digest, policy_folder, stage, tokenizer_of, weights_digest
from ..teaching.finetune import TRAIN
from .rank import RANKED

BEFORE = "before.json"


@dataclass
class TunaTrain(TrainingOptions):
    """Train a policy on ranked candidates."""

    ranked: str = ""
    """Run folder of 'tuna rank', or a JSONL file of ranked lists."""
    policy: str = ""
    """Run folder of the policy to start from, which is also the reference policy of losses that need one. By default
    the model as it is, with a new adapter."""
    model: str = ""
    """embedded (by default), or a local path or hub id, where there is no --policy."""
    layout: Literal["chat", "plain", "alpaca"] = "chat"
    """How a request is written: in the model's chat template, as a text to continue, or as Stanford Alpaca did."""
    loss: str = "tuna"
    """tuna (the paper's), tuna_released (its code's), dpo, ipo, spin, sppo, lipo_lambda, tdpo1 or tdpo2."""
    margin: float | None = None
    """Of Tuna's losses, per rank, in nats per token. By default the loss's own, as the next four."""
    beta: float | None = None
    """Of the losses with a reference policy."""
    alpha: float | None = None
    """Of tdpo2: weight of the difference of the KLs from the reference policy."""
    pairs: Literal["all", "best_worst"] | None = None
    """Of dpo, ipo, sppo and TDPO's: which pairs of a list count."""
    mle_weight: float | None = None
    """Weight of the likelihood of the reference response: 1 for Tuna's losses, 0 for the others."""
    imitate: Literal["reference", "best", "all"] = "reference"
    """What that term imitates: the reference (the paper), the best candidate, or all (the released code)."""
    epochs: int = 2
    """Passes over the lists."""
    batch_size: int = 8
    """Lists per optimiser step."""
    learning_rate: float = 1e-4
    """Peak learning rate (cosine, 10% warm-up)."""
    lora_rank: int = 16
    """Rank of a new adapter; 0 trains all weights. A --policy has its own."""
    holdout: float = 0.1
    """Share of the lists on which the policy's order is compared with the ranking, and which are not trained on."""
    context_length: int = 512
    """Tokens of request and response at most; what is longer is left out and counted."""

    def check(self) -> None:
        super().check()
        check_counts(self, "epochs", "batch_size", "context_length")
        if not self.ranked:
            raise InputError("--ranked is missing: name the run folder of 'tuna rank', or a file of ranked lists")
        if self.policy and self.model:
            raise InputError("--policy and --model exclude each other: a policy brings the model it was trained on")
        if self.holdout >= 1:
            raise InputError(f"--holdout is a share below 1, got {self.holdout}")
        _ = self.settings

    @property
    def settings(self) -> RankingSettings:
        """Of the training.

        Raises:
            InputError: for a value out of range, or an option that the loss has not.
        """
        return RankingSettings(
            learning_rate=self.learning_rate,
            schedule="cosine",
            warmup=0.1,
            batch_size=self.batch_size,
            epochs=self.epochs,
            token_budget=self.token_budget,
            loss=self.loss,
            margin=self.margin,
            beta=self.beta,
            alpha=self.alpha,
            pairs=self.pairs,
            mle_weight=self.mle_weight,
            imitate=self.imitate,
        )


def run(options: TunaTrain, console: Console | None = None) -> dict[str, Any]:
    """Trains (or resumes), saves the policy, and returns the results.

    Metrics are Kendall's tau between the policy's order of candidates and their ranking, before and after training, on
    the lists trained on and on those withheld.

    Raises:
        InputError: for bad input, before a model is loaded.
    """
    console = console or Console()
    options.check()
    lists = read_ranked_lists(ranked_file(options.ranked))
    start = policy_folder(options.policy, "--policy") if options.policy else None
    model = read_state(start / SETTINGS)["model"] if start is not None else options.model or "embedded"
    train, held_out, dropped = split_lists(lists, options, model)
    if options.dry_run:
        console.print(
            f"would train on {len(train)} lists and withhold {len(held_out)}, by {options.loss}, in {options.run_dir}"
        )
        return {}
    identity = {"lists": digest([[one.id, one.candidates, one.scores] for one in lists])}
    identity |= {"weights": weights_digest(start)} if start is not None else {}
    with stage(options, "tuna train", console, True, **identity) as opened:
        if isinstance(opened, dict):
            return opened
        write_once(opened.folder.file(TRAIN), _seen(lists, options))
        policy = _policy(options, start, model)
        ratios = LOSSES[options.loss].needs_reference_policy
        before = _before(opened.folder, policy, train, held_out)
        trainer = RankingTrainer(policy, options.seed, **vars(options.settings))
        done = opened.supervised(trainer, train, f"{options.loss} on {len(train)} lists")
        if (results := opened.unfinished(done)) is not None:
            return results
        policy.save(opened.folder.file("policy", SETTINGS).parent)
        metrics = {f"{name} before": value for name, value in before.items()}
        metrics |= {f"{name} after": value for name, value in _taus(policy, train, held_out).items()}
        if ratios:
            metrics["tau, held out, log-ratios"] = rank_agreement(policy, held_out, True) if held_out else None
        metrics["loss"] = trainer.loss
        results = opened.folder.finish(
            metrics,
            {
                "train": len(train),
                "held_out": len(held_out),
                "lists_without_pairs": trainer.lists_without_pairs,
                "dropped": dropped,
                "steps": trainer.steps,
                "seconds": opened.seconds,
            },
        )
        opened.tracker.summary(results["metrics"])
        shown = (f"{name} {value:.2f}" for name, value in metrics.items() if value is not None)
        console.print("  ".join(shown), highlight=False)
        return results


def ranked_file(path: str) -> Path:
    """The file of ranked lists that an option names: itself, or the one in a run folder."""
    return Path(path) / RANKED if Path(path).is_dir() else Path(path)


def split_lists(
    lists: Sequence[RankedList], options: TunaTrain, model: str
) -> tuple[list[TokenizedRankedList], list[TokenizedRankedList], dict[str, int]]:
    """The lists to train on, those to measure on, and what was left out.

    Raises:
        InputError: if nothing is left to train on.
    """
    tokenizer = tokenizer_of(model)
    if tokenizer.context_length < options.context_length:
        raise InputError(f"{model} reads {tokenizer.context_length} tokens: set --context-length to that or less")
    names = withheld(lists, options.holdout, options.seed)
    parts = [[one for one in lists if (one.id in names) == out] for out in (False, True)]
    both = [tokenize_lists(part, options.layout, tokenizer, options.context_length) for part in parts]
    (train, dropped), (held_out, _) = both
    loss = LOSSES[options.loss]
    pairing = loss.pairing(options.settings.given())
    if (options.settings.weight and options.imitate == "reference") or pairing == "reference":
        complete = [one for one in train if one.reference is not None]
        dropped["lists without a reference"] = len(train) - len(complete)
        train = complete
    if not train:
        left_out = ", ".join(f"{count} {what}" for what, count in dropped.items() if count)
        raise InputError(f"{options.ranked} has no list to train on ({left_out or 'all withheld'})")
    if pairing != "reference" and all(len(set(one.scores or ())) == 1 for one in train):
        raise InputError(f"{options.ranked} ties all candidates of every list: there is nothing to learn")
    if loss.needs_scores and max(abs(score) for one in train for score in one.scores or ()) > LARGEST_SCORE:
        raise InputError(
            f"--loss {options.loss} needs scores of {LARGEST_SCORE:g} at most in size: scale them to [0, 1]"
        )
    return train, held_out, dropped


def withheld(lists: Sequence[RankedList], share: float, seed: int) -> set[str]:
    """Ids of the lists that no stage trains on: a share of them, chosen by a hash of id and seed."""
    order = sorted((one.id for one in lists), key=lambda name: request_seed(seed, "withheld", name))
    return set(order[: round(share * len(order))])


def _seen(lists: Sequence[RankedList], options: TunaTrain) -> list[dict[str, str]]:
    """The requests that the policy has then been trained on, those of the policy it starts from included."""
    names = withheld(lists, options.holdout, options.seed)
    rows = {row["id"]: row for row in read_records(Path(options.policy) / TRAIN)} if options.policy else {}
    return list((rows | {one.id: request_of(one).row() for one in lists if one.id not in names}).values())


def _policy(options: TunaTrain, start: Path | None, model: str) -> LanguageModelPolicy:
    if start is None:
        lora = LoraSettings(rank=options.lora_rank)
        return LanguageModelPolicy(model, lora, value="shared", dtype=options.dtype, seed=options.seed)
    policy = policy_from(start, dtype=options.dtype, reference="base")
    policy.freeze_reference("start")  # a checkpoint brings its own
    return policy


def _before(
    folder: RunFolder,
    policy: LanguageModelPolicy,
    train: Sequence[TokenizedRankedList],
    held_out: Sequence[TokenizedRankedList],
) -> dict[str, Any]:
    """The agreement at the start, which a resumed run finds in its folder."""
    if (stored := read_json(folder.path / BEFORE)) is None:
        stored = _taus(policy, train, held_out)
        write_json(folder.file(BEFORE), stored)
    return stored


def _taus(
    policy: LanguageModelPolicy, train: Sequence[TokenizedRankedList], held_out: Sequence[TokenizedRankedList]
) -> dict[str, Any]:
    """Of log-probs per token, by which Tuna ranks."""
    return {
        "tau, trained on": rank_agreement(policy, train),
        "tau, held out": rank_agreement(policy, held_out) if held_out else None,
    }
