"""``instructgym tuna train``: trains a policy on ranked lists with the loss of Tuna, of DPO or a related one.

The losses are in :mod:`~instructgym.agents.preferences.losses`, the training loop in
:mod:`~instructgym.agents.preferences.trainer`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Lt
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
from ..runs.folder import read_json, write_json, write_once
from ..runs.options import Count, Required
from ..runs.training import (
    Run,
    TrainingOptions,
    digest,
    new_policy,
    policy_folder,
    run_stage,
    tokenizer_of,
    trainer_settings,
    weights_digest,
)
from ..teaching.finetune import TRAIN
from .rank import RANKED

BEFORE = "before.json"


@dataclass
class RankedOptions(TrainingOptions):
    """Options of the stages that train on ranked lists."""

    ranked: Annotated[str, Required("the run folder of 'tuna rank', or a file of ranked lists")] = ""
    """Run folder of 'tuna rank', or a JSONL file of ranked lists."""
    holdout: Annotated[float, Lt(1)] = 0.1
    """Share of the lists that is withheld from training. With the same seed, all stages withhold the same lists."""
    context_length: Count = 512
    """Maximum number of tokens of request and response together. Longer examples are left out and counted."""

    def lists(self) -> tuple[list[RankedList], list[RankedList], list[RankedList]]:
        """Reads the ranked lists and returns all, those to train on, and those to withhold.

        Raises:
            InputError: if the file cannot be read.
        """
        path = Path(self.ranked)
        lists = read_ranked_lists(path / RANKED if path.is_dir() else path)
        # Sorted by a hash, not drawn: the choice depends neither on the order of the lists nor on the stage.
        order = sorted((ranked.id for ranked in lists), key=lambda name: request_seed(self.seed, "withheld", name))
        withheld = set(order[: round(self.holdout * len(order))])
        used, unused = ([ranked for ranked in lists if (ranked.id in withheld) == out] for out in (False, True))
        return lists, used, unused


@dataclass
class TunaTrain(RankedOptions):
    """Train a policy on ranked candidates."""

    policy: str = ""
    """Run folder of the policy to start from. It is also the reference policy of losses that need one. Empty: start
    from --model, with a new adapter."""
    model: str = ""
    """Model to train if there is no --policy: embedded, or a local path or hub id. Empty: embedded."""
    layout: Literal["chat", "plain", "alpaca"] = "chat"
    """Prompt format of a request. chat: the chat template of the model; plain: a text to continue; alpaca: the template
    of Stanford Alpaca."""
    loss: str = "tuna"
    """Loss of the training: tuna (as in the paper), tuna_released (as in the released code of Tuna), dpo, ipo, spin,
    sppo, lipo_lambda, tdpo1 or tdpo2."""
    margin: float | None = None
    """Margin of tuna and tuna_released per difference of ranks, in nats per token. None: the default of the loss."""
    beta: float | None = None
    """Parameter beta of the losses with a reference policy (all but tuna and tuna_released). None: the default of the
    loss."""
    alpha: float | None = None
    """Weight of the difference of the KL divergences from the reference policy in the loss tdpo2. None: its default."""
    pairs: Literal["all", "best_worst"] | None = None
    """Pairs of candidates of a list that dpo, ipo, sppo, tdpo1 and tdpo2 compare: all, or only the best with the worst.
    None: the default of the loss."""
    mle_weight: float | None = None
    """Weight of the likelihood term, which imitates responses. None: 1 for tuna and tuna_released, 0 for other
    losses."""
    imitate: Literal["reference", "best", "all"] = "reference"
    """Responses that the likelihood term imitates: reference (the reference response, as in the paper), best (the best
    candidate) or all (as in the released code)."""
    epochs: Count = 2
    """Epochs over the lists."""
    batch_size: Count = 8
    """Lists per optimiser step."""
    learning_rate: float = 1e-4
    """Peak learning rate (cosine, 10% warm-up)."""
    lora_rank: int = 16
    """Rank of a new LoRA adapter. 0: train all weights. Not used with --policy, which has an adapter already."""
    holdout: Annotated[float, Lt(1)] = 0.1
    """Share of the lists that is withheld from training. On it, the order of candidates by the policy is compared with
    the ranking."""

    def check(self) -> None:
        super().check()
        if self.policy and self.model:
            raise InputError("--policy and --model exclude each other: a policy brings the model it was trained on")
        _ = self.settings

    @property
    def settings(self) -> RankingSettings:
        """Settings of the trainer.

        Raises:
            InputError: if a value is out of range, or the loss does not have an option that is set.
        """
        of_loss = ("loss", "margin", "beta", "alpha", "pairs", "mle_weight", "imitate")
        return RankingSettings(**trainer_settings(self, "batch_size", *of_loss))


def run(options: TunaTrain, console: Console | None = None) -> dict[str, Any]:
    """Trains (or resumes), saves the policy, and returns the results.

    Metrics are Kendall's tau between the order of candidates by the policy and their ranking, before and after
    training, on the training lists and on the withheld ones.

    Raises:
        InputError: if the input is invalid, before a model is loaded.
    """
    console = console or Console()
    options.check()
    lists, used, withheld = options.lists()
    start = policy_folder(options.policy, "--policy") if options.policy else None
    model = read_state(start / SETTINGS)["model"] if start is not None else options.model or "embedded"
    train, held_out, dropped = tokenized(options, model, used, withheld)
    # A resumed run must use the same rankings and weights: the options hold only their paths.
    identity: dict[str, Any] = {"lists": digest([[ranked.id, ranked.candidates, ranked.scores] for ranked in lists])}
    identity |= {"weights": weights_digest(start)} if start is not None else {}

    def work(opened: Run) -> dict[str, Any]:
        # All requests on which the policy was trained, including those of the policy that it starts from.
        rows = {row["id"]: row for row in read_records(Path(options.policy) / TRAIN)} if options.policy else {}
        rows |= {ranked.id: request_of(ranked).row() for ranked in used}
        write_once(opened.folder.file(TRAIN), list(rows.values()))
        policy = _policy(options, start, model)

        def taus() -> dict[str, Any]:
            """Returns Kendall's tau for log-probs per token, by which Tuna orders candidates."""
            by_name = {"trained on": train, "held out": held_out}
            return {f"tau, {name}": rank_agreement(policy, part) for name, part in by_name.items()}

        # Before the trainer restores a checkpoint, which would replace the initial weights; a resumed run reads it.
        if (before := read_json(opened.folder.path / BEFORE)) is None:
            write_json(opened.folder.file(BEFORE), before := taus())
        trainer = RankingTrainer(policy, options.seed, **vars(options.settings))
        opened.supervised(trainer, train, f"{options.loss} on {len(train)} lists")
        opened.save_policy(policy)
        metrics = {f"{name} before": value for name, value in before.items()}
        metrics |= {f"{name} after": value for name, value in taus().items()}
        if LOSSES[options.loss].needs_reference_policy:
            metrics["tau, held out, log-ratios"] = rank_agreement(policy, held_out, ratios=True)
        metrics["loss"] = trainer.loss
        opened.show(metrics, 2)
        return opened.finish(
            metrics,
            {
                "train": len(train),
                "held_out": len(held_out),
                "lists_without_pairs": trainer.lists_without_pairs,
                "dropped": dropped,
                "steps": trainer.steps,
            },
        )

    plan = f"train on {len(train)} lists and withhold {len(held_out)}, by {options.loss}"
    return run_stage(options, "tuna train", console, work, plan=plan, **identity)


def tokenized(
    options: TunaTrain, model: str, used: Sequence[RankedList], withheld: Sequence[RankedList]
) -> tuple[list[TokenizedRankedList], list[TokenizedRankedList], dict[str, int]]:
    """Returns the training lists, the withheld lists, and counts by reason of what was left out of training.

    Raises:
        InputError: if nothing is left to train on, the model's context is too short, or scores are too large for the
            loss.
    """
    tokenizer = tokenizer_of(model, options.context_length)
    (train, dropped), (held_out, _) = (
        tokenize_lists(part, options.layout, tokenizer, options.context_length) for part in (used, withheld)
    )
    loss = LOSSES[options.loss]
    pairing = loss.pairing(options.settings.loss_options())
    # Some losses and the likelihood term need the reference response.
    if (options.settings.weight and options.imitate == "reference") or pairing == "reference":
        complete = [ranked for ranked in train if ranked.reference is not None]
        dropped["lists without a reference"] = len(train) - len(complete)
        train = complete
    if not train:
        left_out = ", ".join(f"{count} {reason}" for reason, count in dropped.items() if count)
        raise InputError(f"{options.ranked} has no list to train on ({left_out or 'all withheld'})")
    # Ties give no pairs; pairs with the reference exist even if all candidates tie.
    if pairing != "reference" and all(len(set(ranked.scores or ())) == 1 for ranked in train):
        raise InputError(f"{options.ranked} ties all candidates of every list: there is nothing to learn")
    if loss.needs_scores and max(abs(score) for ranked in train for score in ranked.scores or ()) > LARGEST_SCORE:
        raise InputError(
            f"--loss {options.loss} needs scores of {LARGEST_SCORE:g} at most in size: scale them to [0, 1]"
        )
    return train, held_out, dropped


def _policy(options: TunaTrain, start: Path | None, model: str) -> LanguageModelPolicy:
    """Returns the policy to train: a new one of the model, or the one in ``start`` with itself as the reference."""
    if start is None:
        return new_policy(replace(options, model=model), value="shared")
    policy = policy_from(start, dtype=options.dtype, reference="base")
    policy.freeze_reference("start")  # the start as it is now; a checkpoint that is resumed restores its own copy
    return policy
