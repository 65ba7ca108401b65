"""Holds ``instructgym/GeneratePrompt-v0``: a prompt for a frozen language model, written as a token MDP.

The reward is how well the frozen model does with the prompt (RLPrompt, Directional Stimulus prompting). The env is a
:class:`~instructgym.envs.tokens.env.TokenEnv`; this file turns its arguments into openings, reward and settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from ..llm_backends import resolve
from ..llm_backends.errors import InputError, check_known
from ..rewards.prompt_scoring.rewards import HintedResponse, TaskReward
from ..rewards.prompt_scoring.scorer import TaskScorer
from .tasks.prompt_search.generated import Level, Openings, label_hints, response_hints, scored_prompt, task_openings
from .tasks.prompt_search.tasks import load_prompt_task
from .tasks.responses.openings import Layout, response_requests
from .tokens.env import TokenEnv, TokenVectorEnv
from .tokens.episode import PromptExample
from .tokens.process import take_settings

Measure = Literal["gap", "accuracy", "rouge"]
"""How the frozen model's work with a prompt is scored, see :func:`generate_prompt`."""

MAX_TOKENS = 16
"""Default length of a prompt, in tokens: one line. RLPrompt writes 5 tokens."""
STOPS = ("\n", '"')
"""Default stop strings: a prompt is one line without quotation marks."""


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
    tokenizer: Any = "embedded",
    **others: Any,
) -> dict[str, Any]:
    _check(level, measure)
    settings = take_settings(others, fixed=("constrained",), max_tokens=MAX_TOKENS, stop=STOPS)
    # Resolved once, so that prompts and env share it.
    tokenizer = resolve("tokenizer", tokenizer)
    model = "embedded" if backend is None else backend
    kind = "response" if measure == "rouge" else "task" if level == "task" else "label"
    openings = Openings(kind, layout, tokenizer, opening)
    if measure == "rouge":
        reward = HintedResponse(model) if reward is None else reward
        if examples is None:
            examples = response_hints(response_requests(data, split, limit, data_seed), openings)
    elif examples is None or reward is None:
        # This scorer, with default content-free inputs, reports bad arguments before data are read.
        scorer = TaskScorer(model, calibrate) if reward is None else None
        prompt_task = load_prompt_task(task, split, limit, data_seed, data_dir)
        if scorer is not None:
            scorer = TaskScorer(scorer.backend, calibrate, content_free=prompt_task.content_free)
            scored = prompt_task.examples(split) if level == "task" else ()
            prompt = scored_prompt(prompt_task, level, instruction)
            reward = TaskReward(prompt, scored, size, scorer, measure, seed=data_seed)
            # A stand-in for the longest prompt that the policy can write, to check that it fits.
            longest = reward.prompt_of(" ".join(["any"] * max(settings.max_tokens, 1)))
            scorer.check([longest], prompt_task.examples(split))
        if examples is None:
            if level == "task":
                examples = task_openings(prompt_task, minibatches, openings)
            else:
                examples = label_hints(prompt_task, split, openings)
    return dict(others, examples=examples, tokenizer=tokenizer, reward=reward, backend=backend, settings=settings)


def _check(level: str, measure: str) -> None:
    check_known("level", level, get_args(Level))
    check_known("measure", measure, get_args(Measure))
    if measure == "rouge" and level != "instance":
        raise InputError("measure 'rouge' compares the answer to one input with its reference: use level='instance'")


def generate_prompt(**kwargs: Any) -> TokenEnv:
    r"""Builds ``instructgym/GeneratePrompt-v0``, in which a policy writes a prompt for a frozen language model.

    Task-level, as in RLPrompt (Deng et al. 2022, arXiv 2205.12548): every episode continues the same short opening with
    an instruction for a labelled task, which is scored on a minibatch of the split. Instance-level, as in Directional
    Stimulus prompting (Li et al. 2023, arXiv 2302.11520): the opening holds one input, the response is a hint for it,
    and the frozen model's answer to this input is scored.

    ## Action Space
    ``Discrete(vocabulary)``: the id of the next token.

    ## Observation Space
    Opening and prompt so far, by default as padded token ids and their mask.

    ## Rewards
    At the last token the score of the frozen model with the prompt, by ``measure``; 0 before.

    - ``gap``: RLPrompt's margin reward, in [-180, 200], of which agents take z-scores. It is computed from label
      likelihoods, nothing is generated (:class:`~instructgym.rewards.prompt_scoring.rewards.TaskReward`). An empty
      instruction or hint gets -180.
    - ``accuracy``: the share of right answers, in [0, 1], from the same label likelihoods. An empty instruction or hint
      gets 0.
    - ``rouge``: ROUGE-L of the model's answer and the reference
      (:class:`~instructgym.rewards.prompt_scoring.rewards.HintedResponse`). An empty hint gets the score of the answer
      without a hint.

    The same prompt on the same minibatch or input always gets the same score: to the last digit while the label
    likelihoods are cached, else up to the rounding of a model that reads it in another batch (in float32 about 1e-5
    nats of a likelihood and, by RLPrompt's factors, about 1e-3 of a ``gap``).

    ## Starting State
    Task-level: the opening, with one of the minibatches; instance-level: the opening with one input. Both are drawn in
    shuffled epochs.

    ## Episode End
    ``terminated`` is True after an end-of-sequence token, a stop string or ``max_tokens``.

    See :class:`~instructgym.envs.tokens.env.TokenEnv` for the details.

    Options that do not apply are ignored: ``rouge`` ignores ``task``, ``data_dir``, ``size``, ``minibatches``,
    ``instruction`` and ``calibrate``, the other measures ignore ``data``, and the level ``instance`` ignores ``size``
    and ``minibatches``. With a ``reward``, ``calibrate``, ``size`` and ``instruction`` are ignored, and ``measure``
    only determines whether the examples have labels or reference answers. With ``examples``, ``minibatches`` and
    ``opening`` are ignored. With both, no task is read.

    Args:
        **kwargs: the keyword arguments below.

    Keyword Args:
        task: the labelled task: one of GLUE or SuperGLUE, or ``rotten-tomatoes`` (works offline).
        level: what a prompt is for: ``task`` (the whole task) or ``instance`` (one input).
        measure: the score of a prompt: ``gap``, ``accuracy`` or, only with level ``instance``, ``rouge``.
        data: source of the inputs of ``rouge``, which has no task: ``reviews`` (works offline), or a JSONL file with
            ``prompt`` or ``instruction`` and ``reference``; see
            :func:`~instructgym.envs.tasks.responses.openings.response_prompts`.
        data_dir: folder of the task's files; by default the ``datasets`` library downloads them.
        split: the split on which prompts are scored: ``train``, ``validation`` or ``test``.
        limit: largest number of examples of the split; None for all.
        data_seed: seed by which the examples of ``limit`` and the minibatches are drawn.
        size: task-level: number of examples of a minibatch; 0 for the whole split.
        minibatches: task-level: number of minibatches, which are drawn once; an episode is scored on one of them, and
            episodes with the same one form a group.
        layout: ``plain``: the response continues the opening; ``chat``: the opening is a message in the tokenizer's
            chat template, which the response answers.
        opening: the text that the policy reads first, with ``{input}`` for a hint and ``{request}`` for ``rouge``; None
            for the package's own.
        instruction: the text that the frozen model reads before the input, with ``{response}`` in the place of the
            response; only for labelled tasks.
        calibrate: how to remove the label bias, see :class:`~instructgym.rewards.prompt_scoring.scorer.TaskScorer`.
        examples: openings to use instead of those that the arguments above select.
        reward: a reward to use instead of that of ``measure``.
        backend: the frozen model; None for the embedded one.
        max_tokens, stop, context_length, group_size, on_invalid: the fields of
            :class:`~instructgym.envs.tokens.process.TokenSettings`, with ``max_tokens=16``, and a line end and a
            quotation mark as stop strings by default.
        tokenizer, observation, embedder, render_mode: see :class:`~instructgym.envs.tokens.env.TokenEnv`.

    Raises:
        InputError: for an unknown level or measure, a task without labels, data that cannot be used, a minibatch larger
            than the split, batch calibration of single examples, an opening or instruction without its placeholder,
            openings that do not fit, verbalizers or examples that cannot be scored, and prompts of ``max_tokens`` that
            would not fit into the frozen model's context.
        UnsupportedRequestError: for a backend that reports no log-probs where labels are scored.
    """
    return TokenEnv(**_arguments(**kwargs))


def generate_prompt_vector(num_envs: int = 1, **kwargs: Any) -> TokenVectorEnv:
    """Builds the vector env for ``gymnasium.make_vec``.

    Args:
        num_envs: number of copies.
        **kwargs: the arguments of :func:`generate_prompt`, and ``autoreset_mode`` of
            :class:`~instructgym.envs.tokens.env.TokenVectorEnv`.
    """
    return TokenVectorEnv(num_envs, **_arguments(**kwargs))
