"""``instructgym tuna ppo``: the baseline of RLHF on the same rankings: a reward model of them, then token-level PPO."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from ...agents.policy.checkpoints import read_state
from ...agents.policy.language_model import SETTINGS
from ...agents.preferences.lists import finished_flags, request_of
from ...envs.tasks.instruction.data import OPENINGS, DataLayout, prompt_text
from ...envs.tasks.responses.candidates import RankedList, ranked_row, read_ranked_lists
from ...envs.tokens.episode import PromptExample
from ...llm_backends.errors import InputError
from ...llm_backends.local.tokenization import Tokenizer
from ...rewards.learned.edits import EditedPair
from ..fine_grained.common import Part
from ..fine_grained.ppo import FineGrainedPPO
from ..fine_grained.ppo import run as ppo
from ..fine_grained.reward import FineGrainedRewardModel
from ..fine_grained.reward import run as reward_model
from ..runs.folder import RunFolder, write_once
from ..runs.options import check_counts
from ..runs.training import Deadline, OutOfTimeError, TrainingOptions, digest, policy_folder, tokenizer_of
from .train import ranked_file, withheld

LISTS, PAIRS = "lists.jsonl", "pairs.jsonl"


@dataclass
class TunaPPO(TrainingOptions):
    """Train a reward model on ranked candidates, and a policy by token-level PPO on its reward."""

    ranked: str = ""
    """Run folder of 'tuna rank', or a JSONL file of ranked lists. Their requests are the prompts of PPO."""
    policy: str = ""
    """Run folder of the policy to start from, which is also the KL reference."""
    layout: Literal["chat", "plain"] = "chat"
    """How a request is written: in the model's chat template, or as a text to continue."""
    reward_epochs: int = 1
    """Passes of the reward model over pairs of neighbours in rank."""
    updates: int = 16
    """Updates of PPO."""
    batch_size: int = 32
    """Responses per update."""
    learning_rate: float = 2e-4
    """Peak learning rate of PPO (cosine, 10% warm-up)."""
    holdout: float = 0.1
    """Share of the lists that is not trained on: with the same seed, those that 'tuna train' withholds."""
    kl_coefficient: float = 0.05
    """Weight of the KL penalty against the start."""
    max_tokens: int = 128
    """Tokens of a response at most."""
    context_length: int = 512
    """Tokens of request and response at most; what is longer is left out and counted."""

    def check(self) -> None:
        super().check()
        check_counts(self, "reward_epochs", "updates", "batch_size", "max_tokens", "context_length")
        if not self.ranked:
            raise InputError("--ranked is missing: name the run folder of 'tuna rank', or a file of ranked lists")
        if self.holdout >= 1:
            raise InputError(f"--holdout is a share below 1, got {self.holdout}")


@dataclass
class _ListPPO(FineGrainedPPO):
    """PPO whose prompts are the requests of ranked lists, all of them that fit."""

    def prompts(self, part: Part, model: str, limit: int = 0) -> list[PromptExample]:
        return self.fitting(read_ranked_lists(self.data), model)[: limit or None]

    def fitting(self, lists: Sequence[RankedList], model: str) -> list[PromptExample]:
        """The requests that leave room for a response.

        Raises:
            InputError: if none does.
        """
        tokenizer = tokenizer_of(model)
        texts = [prompt_text(request_of(one), self.layout, tokenizer) for one in lists]
        room = self.context_length - self.max_tokens
        fitting = [
            PromptExample(one.id, text, one.reference)
            for one, text, ids in zip(lists, texts, tokenizer.encode_batch(texts), strict=True)
            if len(ids) <= room
        ]
        if not fitting:
            raise InputError(
                f"no request fits --context-length {self.context_length} beside --max-tokens {self.max_tokens}"
            )
        return fitting


def run(options: TunaPPO, console: Console | None = None) -> dict[str, Any]:
    """Trains (or resumes) both, and returns the results of PPO.

    The run folder gets ``lists.jsonl`` and ``pairs.jsonl``, what is trained on, and the run folders ``reward-model``
    and ``ppo``, which holds the policy.

    Raises:
        InputError: for bad input, before a model is loaded.
    """
    console = console or Console()
    options.check()
    start = policy_folder(options.policy, "--policy")
    model = read_state(start / SETTINGS)["model"]
    everything = read_ranked_lists(ranked_file(options.ranked))
    names = withheld(everything, options.holdout, options.seed)
    lists = [one for one in everything if one.id not in names]
    pairs = neighbour_pairs(lists, options.layout, tokenizer_of(model))
    if not pairs:
        raise InputError(f"--ranked {options.ranked} has no two candidates of different rank")
    root = Path(options.run_dir)
    shared: dict[str, Any] = {
        "context_length": options.context_length,
        "token_budget": options.token_budget,
        "dtype": options.dtype,
        "seed": options.seed,
        "track": options.track,
        "minutes": options.minutes,
    }
    learned = FineGrainedRewardModel(
        run_dir=str(root / "reward-model"),
        pairs=str(root / PAIRS),
        model=model,
        level="sequence",
        epochs=options.reward_epochs,
        **shared,
    )
    trained = _ListPPO(
        run_dir=str(root / "ppo"),
        data=str(root / LISTS),
        policy=options.policy,
        reward_model=learned.run_dir,
        layout=options.layout,
        judge="",
        updates=options.updates,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        kl_coefficient=options.kl_coefficient,
        max_tokens=options.max_tokens,
        temperature=1.0,
        **shared,
    )
    learned.check()
    trained.check()
    prompts = trained.fitting(lists, model)
    if options.dry_run:
        console.print(f"would train a reward model on {len(pairs)} pairs, then {options.updates} updates of PPO")
        return {}
    folder = RunFolder(root, asdict(options) | {"lists": digest([[one.id, one.scores] for one in lists])}, "tuna ppo")
    if (results := folder.finished(console)) is not None:
        return results
    deadline = Deadline(options.minutes)
    with folder.opened():
        write_once(folder.file(LISTS), [ranked_row(one) for one in lists])
        write_once(folder.file(PAIRS), [vars(pair) | {"metadata": {}} for pair in pairs])
        try:
            judged = deadline.run(reward_model, learned, console)
            results = deadline.run(ppo, trained, console)
        except OutOfTimeError:
            return folder.finish({}, {}, status="stopped")
        return folder.finish(
            {f"reward model, {name}": value for name, value in judged["metrics"].items()},
            results["counts"] | {"prompts": len(prompts), "dropped": {"too long": len(lists) - len(prompts)}},
        )


def neighbour_pairs(lists: Sequence[RankedList], layout: DataLayout, tokenizer: Tokenizer) -> list[EditedPair]:
    """Each candidate against the next one in rank, better and worse; ties are no pairs.

    Args:
        lists: ranked candidates.
        layout: how a request is written.
        tokenizer: whose chat template the layout ``chat`` takes.
    """
    pairs = []
    for one in lists:
        prompt, opening = prompt_text(request_of(one), layout, tokenizer), OPENINGS[layout]
        finished = finished_flags(one)
        order = sorted(range(len(one.candidates)), key=lambda k: -one.scores[k])
        for number, (better, worse) in enumerate(pairwise(order)):
            if one.scores[better] > one.scores[worse]:
                pairs.append(
                    EditedPair(
                        prompt,
                        opening + one.candidates[worse],
                        opening + one.candidates[better],
                        f"{one.id}/{number}",
                        finished=finished[better] and finished[worse],
                    )
                )
    return pairs
