"""GeneratePrompt: a prompt for a frozen language model as a token MDP, rewarded by what the model makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from ..llm_backends import resolve
from ..llm_backends.errors import InputError
from ..rewards.prompt_scoring.rewards import HintedResponse, TaskReward
from ..rewards.prompt_scoring.scorer import TaskScorer
from .tasks.prompt_search.generated import (
    LEVELS,
    Level,
    Openings,
    label_hints,
    response_hints,
    scored_prompt,
    task_openings,
)
from .tasks.prompt_search.tasks import load_prompt_task
from .tasks.responses.openings import Layout, response_requests
from .tokens.env import TokenEnv, TokenVectorEnv
from .tokens.episode import PromptExample
from .tokens.process import TokenSettings

Measure = Literal["gap", "accuracy", "rouge"]
MEASURES: tuple[Measure, ...] = ("gap", "accuracy", "rouge")

MAX_TOKENS = 16
"""Of a prompt: a line. RLPrompt writes 5."""
STOPS = ("\n", '"')
"""A prompt is a line without quotation marks."""


def _arguments(
    task: str | Path = "rotten-tomatoes",
    level: Level = "task",
    measure: Measure = "gap",
    data: str | Path = "reviews",
    data_dir: str = "",
    split: str = "train",
    limit: int | None = None,
    data_seed: int = 0,
    size: int = 16,
    minibatches: int = 16,
    layout: Layout = "plain",
    opening: str | None = None,
    instruction: str | None = None,
    calibrate: bool | str = False,
    examples: Sequence[PromptExample] | None = None,
    reward: Any = None,
    backend: Any = None,
    max_tokens: int = MAX_TOKENS,
    stop: Sequence[str] = STOPS,
    context_length: int = 1024,
    group_size: int = 1,
    on_invalid: str = "retry",
    tokenizer: Any = "embedded",
    **others: Any,
) -> dict[str, Any]:
    _check(level, measure)
    tokenizer = resolve("tokenizer", tokenizer)  # once, for the prompts and for the env
    model = "embedded" if backend is None else backend
    kind = "response" if measure == "rouge" else "task" if level == "task" else "label"
    openings = Openings(kind, layout, tokenizer, opening)
    if measure == "rouge":
        reward = HintedResponse(model) if reward is None else reward
        if examples is None:
            examples = response_hints(response_requests(data, split, limit, data_seed), openings)
    elif examples is None or reward is None:
        scorer = TaskScorer(model, calibrate) if reward is None else None  # refuses before data are read
        found = load_prompt_task(task, split, limit, data_seed, data_dir)
        if scorer is not None:
            scorer = TaskScorer(scorer.backend, calibrate, content_free=found.content_free)
            drawn = found.examples(split) if level == "task" else ()
            prompt = scored_prompt(found, level, instruction)
            reward = TaskReward(prompt, drawn, size, scorer, measure, seed=data_seed)
            longest = reward.prompt_of(" ".join(["any"] * max(max_tokens, 1)))
            scorer.check([longest], found.examples(split))
        if examples is None:
            at_task = level == "task"
            examples = task_openings(found, minibatches, openings) if at_task else label_hints(found, split, openings)
    return others | {
        "examples": examples,
        "tokenizer": tokenizer,
        "reward": reward,
        "backend": backend,
        "settings": TokenSettings(
            max_tokens=max_tokens,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            on_invalid=on_invalid,
            context_length=context_length,
            group_size=group_size,
        ),
    }


def _check(level: str, measure: str) -> None:
    if level not in LEVELS:
        raise InputError(f"unknown level {level!r}: use {' or '.join(LEVELS)}")
    if measure not in MEASURES:
        raise InputError(f"unknown measure {measure!r}: use {', '.join(MEASURES)}")
    if measure == "rouge" and level != "instance":
        raise InputError("measure 'rouge' compares the answer to one input with its reference: use level='instance'")


def generate_prompt(**kwargs: Any) -> TokenEnv:
    r"""``instructgym/GeneratePrompt-v0``.

    The tokens of an episode are a prompt for a frozen language model; what the model does with it is paid with the last
    token. Task-level, as in RLPrompt (Deng et al. 2022, arXiv 2205.12548): every episode continues the same short
    opening with an instruction for a labelled task, which is scored on a minibatch of the split. Instance-level, as in
    Directional Stimulus prompting (Li et al. 2023, arXiv 2302.11520): the state begins with one input, the response is
    a hint for it, and the model's answer to this input is scored.

    ``gap`` is RLPrompt's margin reward, in [-180, 200], of which agents take z-scores; ``accuracy`` is in [0, 1]. Both
    come from label likelihoods (:class:`~instructgym.rewards.prompt_scoring.rewards.TaskReward`), nothing is
    generated; an empty instruction or hint is worth the least, -180 or 0. ``rouge`` has the model answer and compares
    with the reference (:class:`~instructgym.rewards.prompt_scoring.rewards.HintedResponse`); an empty hint is
    worth the answer without any.
    The same prompt on the same minibatch or input always gets the same score: to the last digit while the label
    likelihoods are remembered, else up to the rounding of a model that reads it in another batch (in float32 some 1e-5
    nats of a likelihood, and by RLPrompt's factors some 1e-3 of a ``gap``).

    Options that do not apply are not looked at: ``rouge`` reads no ``task``, ``data_dir``, ``size``, ``minibatches``,
    ``instruction`` and ``calibrate``, the other measures no ``data``; instance-level has no ``size`` and
    ``minibatches``. With a ``reward``, ``calibrate``, ``size`` and ``instruction`` do nothing, and ``measure`` only
    says whether examples are labelled or answered; with ``examples``, ``minibatches`` and ``opening`` do nothing, and
    with both no task is read.

    Args:
        **kwargs: as follows.

    Keyword Args:
        task: the labelled task, of GLUE or SuperGLUE or ``rotten-tomatoes`` (offline).
        level: ``task`` or ``instance``.
        measure: ``gap``, ``accuracy``, or, instance-level, ``rouge``.
        data: for ``rouge`` in place of task: ``reviews`` (offline), or a JSONL file with ``prompt`` or ``instruction``
            and ``reference``; see :func:`~instructgym.envs.tasks.responses.openings.response_prompts`.
        data_dir: folder of the task's files; by default the ``datasets`` library fetches them.
        split: ``train``, ``validation`` or ``test``, on which prompts are scored.
        limit: its examples at most; None for all.
        data_seed: of limit and minibatches.
        size: task-level: examples of a minibatch; 0 for all of the split.
        minibatches: task-level: so many are drawn once; each episode is about one of them, and those about the same one
            form a group.
        layout: ``plain``: the response continues the opening; ``chat``: it answers it, in the tokenizer's chat
            template.
        opening: another one than the package's; of a hint with ``{input}``, or with ``{request}`` for ``rouge``.
        instruction: what the frozen model reads before the input, with ``{response}`` where the response goes; for the
            labelled tasks.
        calibrate: as of :class:`~instructgym.rewards.prompt_scoring.scorer.TaskScorer`.
        examples: ready-made ones in place of the above.
        reward: another reward.
        backend: the frozen model; the embedded one by default.
        max_tokens: of a prompt.
        stop: texts that end a prompt, of which they are no part; a line end or a quotation mark by default.
        context_length: tokens of opening and prompt at most.
        group_size: vector form: that many consecutive copies are about the same minibatch or input.
        on_invalid: ``retry`` or ``raise``.
        tokenizer, observation, embedder, render_mode: as of :class:`TokenEnv`.

    Raises:
        InputError: for an unknown level or measure, a task without labels, data that cannot be used, a minibatch larger
            than the split, batch calibration of single examples, an opening or instruction without its place, openings
            that do not fit, verbalizers or examples that cannot be scored, and prompts of ``max_tokens`` that would not
            fit into the frozen model's context.
        UnsupportedRequestError: for a backend that reports no log-probs where labels are scored.
    """
    return TokenEnv(**_arguments(**kwargs))


def generate_prompt_vector(num_envs: int = 1, **kwargs: Any) -> TokenVectorEnv:
    """The vector form, for ``gymnasium.make_vec``: as :func:`generate_prompt`, with ``autoreset_mode``."""
    return TokenVectorEnv(num_envs, **_arguments(**kwargs))
