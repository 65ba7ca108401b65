"""``instructgym tuna ppo``: the RLHF baseline: trains a reward model on ranked lists, then a policy by token-level PPO.

Both stages are those of :mod:`~instructgym.experiments.fine_grained`, with one reward per response.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
from ..runs.folder import write_once
from ..runs.options import Count, named
from ..runs.progress import Deadline
from ..runs.training import Run, digest, policy_folder, run_stage, tokenizer_of
from .train import RankedOptions

LISTS, PAIRS = "lists.jsonl", "pairs.jsonl"


@dataclass
class TunaPPO(RankedOptions):
    """Train a reward model on ranked candidates, and a policy by token-level PPO on its reward."""

    policy: str = ""
    """Run folder of the policy to start from. It is also the reference policy of the KL penalty."""
    layout: Literal["chat", "plain"] = "chat"
    """Prompt format of a request. chat: the chat template of the model; plain: a text to continue."""
    reward_epochs: Count = 1
    """Epochs of the reward model over its pairs: candidates of neighbouring ranks."""
    updates: Count = 16
    """Number of PPO updates. The prompts are the requests of the lists."""
    batch_size: Count = 32
    """Responses per PPO update."""
    learning_rate: float = 2e-4
    """Peak learning rate of PPO (cosine, 10% warm-up)."""
    kl_coefficient: float = 0.05
    """Weight of the KL penalty against the policy to start from."""
    max_tokens: Count = 128
    """Maximum number of tokens of a response."""


@dataclass
class _ListPPO(FineGrainedPPO):
    """Options of a PPO run whose prompts are the requests of ranked lists, as many as fit the context."""

    def prompts(self, part: Part, model: str, limit: int = 0) -> list[PromptExample]:
        return self.fitting(read_ranked_lists(self.data), model)[: limit or None]

    def fitting(self, lists: Sequence[RankedList], model: str) -> list[PromptExample]:
        """Returns the requests that leave room for a response within the context length.

        Raises:
            InputError: if no request does.
        """
        tokenizer = tokenizer_of(model)
        texts, chat = (
            [prompt_text(request_of(ranked), self.layout, tokenizer) for ranked in lists],
            self.layout == "chat",
        )
        room = self.context_length - self.max_tokens
        fitting = [
            PromptExample(ranked.id, text, ranked.reference, markup=chat)
            for ranked, text, ids in zip(lists, texts, tokenizer.encode_batch(texts, chat), strict=True)
            if len(ids) <= room
        ]
        if not fitting:
            raise InputError(
                f"no request fits --context-length {self.context_length} beside --max-tokens {self.max_tokens}"
            )
        return fitting


def run(options: TunaPPO, console: Console | None = None) -> dict[str, Any]:
    """Trains (or resumes) the reward model and the policy, and returns the results of PPO.

    Writes the training data, ``lists.jsonl`` and ``pairs.jsonl``, and the run folders ``reward-model`` and ``ppo``. The
    latter holds the policy.

    Raises:
        InputError: if the input is invalid, before a model is loaded.
    """
    console = console or Console()
    options.check()
    start = policy_folder(options.policy, "--policy")
    model = read_state(start / SETTINGS)["model"]
    _, lists, _ = options.lists()
    pairs = neighbour_pairs(lists, options.layout, tokenizer_of(model))
    if not pairs:
        raise InputError(f"--ranked {options.ranked} has no two candidates of different rank")
    root = Path(options.run_dir)
    shared = ("context_length", "token_budget", "dtype", "seed", "track", "minutes")
    reward_options = FineGrainedRewardModel(
        run_dir=str(root / "reward-model"),
        pairs=str(root / PAIRS),
        model=model,
        level="sequence",
        epochs=options.reward_epochs,
        **named(options, *shared),
    )
    own = ("policy", "layout", "updates", "batch_size", "learning_rate", "kl_coefficient", "max_tokens")
    ppo_options = _ListPPO(
        run_dir=str(root / "ppo"),
        data=str(root / LISTS),
        reward_model=reward_options.run_dir,
        judge="",
        temperature=1.0,
        **named(options, *shared, *own),
    )
    reward_options.check()
    ppo_options.check()  # both stages are checked before the first one runs
    prompts = ppo_options.fitting(lists, model)

    def work(opened: Run) -> dict[str, Any]:
        write_once(opened.folder.file(LISTS), [ranked_row(ranked) for ranked in lists])
        write_once(opened.folder.file(PAIRS), [vars(pair) | {"metadata": {}} for pair in pairs])
        deadline = Deadline(options.minutes)
        reward_results = deadline.run(reward_model, reward_options, console)
        results = deadline.run(ppo, ppo_options, console)
        metrics = {f"reward model, {name}": value for name, value in reward_results["metrics"].items()}
        dropped = {"too long": len(lists) - len(prompts)}
        results = opened.folder.finish(metrics, results["counts"] | {"prompts": len(prompts), "dropped": dropped})
        opened.tracker.summary(results)
        return results

    plan = f"train a reward model on {len(pairs)} pairs, then a policy by {options.updates} updates of PPO"
    # A resumed run must have the same rankings.
    lists_digest = digest([[ranked.id, ranked.scores] for ranked in lists])
    return run_stage(options, "tuna ppo", console, work, distributed=False, plan=plan, lists=lists_digest)


def neighbour_pairs(lists: Sequence[RankedList], layout: DataLayout, tokenizer: Tokenizer) -> list[EditedPair]:
    """Returns pairs of each candidate and the next one in rank; two candidates of equal rank give no pair.

    Args:
        lists: ranked candidates.
        layout: prompt format of a request.
        tokenizer: tokenizer with the chat template for the layout ``chat``.
    """
    pairs = []
    for ranked in lists:
        prompt, finished = prompt_text(request_of(ranked), layout, tokenizer), finished_flags(ranked)
        responses = [OPENINGS[layout] + text for text in ranked.candidates]
        # Best first; the sort is stable, so candidates of equal score keep their order.
        order = sorted(range(len(responses)), key=lambda k: -ranked.scores[k])
        pairs += [
            EditedPair(
                prompt,
                responses[worse],
                responses[better],
                f"{ranked.id}/{number}",
                finished=finished[better] and finished[worse],
                markup=layout == "chat",
            )
            for number, (better, worse) in enumerate(pairwise(order))
            if ranked.scores[better] > ranked.scores[worse]
        ]
    return pairs
