"""TokenEnv: the token MDP as a Gymnasium environment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...llm_backends import Tokenizer, resolve
from ...llm_backends.errors import InputError
from ...rewards import Reward
from ..process.faces import ProcessEnv
from .episode import GenerationSpec
from .examples import PromptExample
from .observations import TokenObservation, make_token_observation
from .process import TokenProcess, TokenSettings

DEFAULT_SETTINGS = TokenSettings()


class TokenParts:
    """What the single and the vector env have in common: building the process from arguments."""

    process: TokenProcess
    observer: TokenObservation

    def _build(
        self,
        copies: int,
        examples: Sequence[PromptExample],
        tokenizer: Any,
        reward: Any,
        settings: TokenSettings,
        observation: str,
        backend: Any,
        embedder: Any,
    ) -> None:
        if reward is None:
            raise InputError("reward is missing: pass an id, 'module:factory', a Reward or a function of the samples")
        defaults = {"embedder": resolve("embedder", embedder)} | ({} if backend is None else {"backend": backend})
        scorer = resolve("reward", reward, **defaults)
        self.process = TokenProcess(copies, examples, resolve("tokenizer", tokenizer), scorer, settings)
        spec = self.process.generation
        self.observer = make_token_observation(observation, spec.vocabulary, spec.context_length)

    @property
    def generation(self) -> GenerationSpec:
        """What a generator has to know to write responses that the env takes whole."""
        return self.process.generation

    @property
    def tokenizer(self) -> Tokenizer:
        """What a token is."""
        return self.process.tokenizer

    @property
    def has_references(self) -> bool:
        """Whether every example has a reference response, the ``info["reference"]`` of its episodes' last steps."""
        return all(example.reference is not None for example in self.process.examples)

    @property
    def reward(self) -> Reward:
        """The reward."""
        return self.process.reward


class TokenEnv(TokenParts, ProcessEnv[TokenProcess, TokenObservation]):
    """An episode is one response to a prompt, written token by token.

    ## Action Space
    ``Discrete(vocabulary)``: the next token. Where responses are constrained to an example's choices,
    ``info["action_mask"]`` (int8) and :meth:`action_masks` say which tokens are allowed; another one ends the episode.

    ## Observation Space
    ``tokens``: a Dict of ``ids`` (``Box``, int32, shape (context_length,), prompt and response, right-padded with 0)
    and ``mask`` (int8, 1 where there is a token). ``onehot``: ``MultiDiscrete``, the same ids with ``vocabulary`` as
    padding, for learners that one-hot it; small vocabularies only.

    ## Rewards
    By the timing of the reward: *terminal* and *whole* are paid with the last token, *causal* with every token. Where
    there is no verdict, the running mean of valid rewards is paid and ``info["reward_valid"]`` is False.

    ## Starting State
    A prompt, drawn in shuffled epochs; ``options={"index": i}`` chooses one, ``{"prefix": token ids or text}`` starts
    from a response that is partly written. ``reset(seed=)`` restores everything, the data order and the reward's memory
    included.

    ## Episode End
    ``terminated``, and ``info["finish_reason"]`` says why: ``illegal`` or ``choice`` (constrained: a token that is not
    allowed, a choice complete), ``eos``, ``stop`` (a stop string; neither is part of ``info["text"]``) or ``length``
    (``max_tokens`` written). ``info["reference"]`` is then the example's reference response, if it has one.

    Args:
        examples: the prompts.
        tokenizer: what a token is.
        reward: scores responses.
        settings: where responses end, what to do without a verdict.
        observation: ``tokens`` or ``onehot``.
        backend: the judge LLM of rewards that need one and name none; the reward's own default if None.
        embedder: sentence embeddings for rewards.
        render_mode: ``ansi`` or None.

    Raises:
        ValueError: for bad settings, examples, parts and observations; see
            :class:`~instructgym.envs.tokens.process.TokenProcess`.
    """

    metadata = {"render_modes": ["ansi"], "render_fps": 1}

    def __init__(
        self,
        examples: Sequence[PromptExample],
        tokenizer: Any = "embedded",
        reward: Any = None,
        settings: TokenSettings = DEFAULT_SETTINGS,
        observation: str = "tokens",
        backend: Any = None,
        embedder: Any = "minilm",
        render_mode: str | None = None,
    ) -> None:
        self._build(1, examples, tokenizer, reward, settings, observation, backend, embedder)
        self.observation_space, self.action_space = self.observer.space, self.process.action_space
        self.render_mode = render_mode

    def render(self) -> str | None:
        """Prompt and response so far, in render mode ``ansi``."""
        return self.process.render(0) if self.render_mode == "ansi" else None
