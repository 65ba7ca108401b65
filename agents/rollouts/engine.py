"""Rollouts on vLLM servers: the policy's adapter is pushed before each rollout, token ids come back with log-probs.

:class:`RolloutEngine` is the protocol of whatever generates episodes in place of the policy. docs/servers.md describes
how to start the servers.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ...llm_backends import BackendError, Completion, Sampling, request_seed
from ...llm_backends.errors import InputError
from ...llm_backends.local.sampling import Choices
from ...llm_backends.serving.vllm_server import TokenSampling, VLLMServerBackend
from ..policy.language_model import POLICY, LanguageModelPolicy
from ..policy.optimization import Processes

PROBE = "The film is good, and its end is better than its beginning."
"""Text that server and policy score, to check that they have the same model."""

LARGEST_GAP = 0.5
"""Largest mean difference of log-probs on the probe, in nats per token; bfloat16 causes a tenth of it, another model
several times as much."""


class RolloutEngine(Protocol):
    """A generator of the episodes of on-policy agents, in place of the policy."""

    def push_weights(self, policy: LanguageModelPolicy, processes: Processes) -> None:
        """Copies the policy's current weights to the engine; called by all processes before each rollout."""

    def generate(
        self,
        prompts: Sequence[Sequence[int] | np.ndarray],
        sampling: Sampling | Sequence[Sampling],
        choices: Sequence[Choices | None] | None = None,
        eos: frozenset[int] | None = None,
    ) -> list[list[Completion]]:
        """Samples one completion per prompt.

        Arguments and result are those of
        :meth:`~instructgym.agents.policy.language_model.LanguageModelPolicy.generate`.
        """

    def close(self) -> None:
        """Frees what the engine holds outside this process; called by one process when training ends."""


class VLLMEngine:
    """An engine that generates episodes on one or more vLLM servers.

    The adapter of each update gets a new name, so that no server can answer from a prefix cache of older weights. The
    arithmetic of a server differs from that of training: the agent scores the tokens again, weights them by the
    truncated ratio of both probabilities, and logs the difference.

    The servers need ``--enable-lora``, ``--max-lora-rank`` at least the policy's rank, ``--logprobs-mode
    processed_logprobs``, and ``VLLM_ALLOW_RUNTIME_LORA_UPDATING=True`` in their environment.

    Args:
        urls: base URLs of the servers, ``http://host:port/v1``; each gets an equal share of the prompts.
        adapter_dir: folder through which adapters are pushed, which the servers must see under the same path; empty:
            the system's temporary folder, which suits servers on this machine.
        concurrency: largest number of requests in flight per server.
        timeout: limit of one request in seconds.

    Raises:
        InputError: if ``urls`` is empty or a string; by :meth:`push_weights`, for a server with another model or
            tokenizer, or
            one that was started without the options above.
    """

    def __init__(
        self, urls: Sequence[str], adapter_dir: str = "", concurrency: int = 256, timeout: float = 600.0
    ) -> None:
        if isinstance(urls, str) or not urls:
            raise InputError(f"urls must be a list of base URLs, got {urls!r}")
        self.servers = [
            VLLMServerBackend("", url, "completion", concurrency=concurrency, timeout=timeout) for url in urls
        ]
        self.adapter_dir = Path(adapter_dir or tempfile.gettempdir())
        self.pushes = 0
        """Number of adapters pushed so far."""
        self._run = ""
        self._decode: Callable[[Sequence[int]], str] = str

    # --- weights -----------------------------------------------------------------------------------------------------

    def push_weights(self, policy: LanguageModelPolicy, processes: Processes) -> None:
        """Pushes the policy's adapter to all servers; the first call also checks that they fit the policy.

        Raises:
            InputError: for a policy without adapters, for servers that do not fit, or if an adapter cannot be pushed.
        """
        first = not self._run
        if first:
            if not policy.lora.rank:
                raise InputError("rollouts on a server need a policy with adapters: set a LoRA rank")
            # All processes use the name that the first one drew; it keeps apart training runs that share a server.
            self._run = processes.gather(uuid.uuid4().hex[:8])[0]
            self._decode = policy.lm.decode
            bases = [self._base_model(server) for server in self.servers]
        old, self.pushes = self._name, self.pushes + 1
        # Only the first process pushes; all of them raise its error, so that none waits for ever for the others.
        problem = ""
        if processes.is_main:
            try:
                self._push(policy, old)
            except (InputError, BackendError) as error:
                problem = str(error)
        problem = processes.gather(problem)[0]
        if problem:
            raise InputError(problem)
        for server in self.servers:
            server.model = self._name
        if first:
            for server, base in zip(self.servers, bases, strict=True):
                self._check(server, base, policy)

    @property
    def _name(self) -> str:
        """Name of the current adapter on the servers."""
        return f"instructgym-{self._run}-{self.pushes}"

    def _push(self, policy: LanguageModelPolicy, old: str) -> None:
        """Writes the policy's adapter, loads it on all servers and unloads the ``old`` one."""
        folder = self.adapter_dir / self._name
        try:
            policy.export_adapter(folder)
            for server in self.servers:
                server.load_adapter(self._name, folder / POLICY)
                if self.pushes > 1:
                    self._unload(server, old)
        except OSError as error:
            raise InputError(f"cannot hand adapters over through {self.adapter_dir}: {error}") from error
        # Only now, as a server with more adapters than slots reads an adapter's files again when it is used.
        shutil.rmtree(self.adapter_dir / old, ignore_errors=True)

    @staticmethod
    def _base_model(server: VLLMServerBackend) -> str:
        """Returns the name of a server's model, the only one that is not an adapter."""
        names = [model["id"] for model in server.models() if not model.get("parent")]
        if len(names) != 1:
            raise InputError(f"{server.url} serves {names or 'no model'}: rollouts need one base model")
        return str(names[0])

    def _check(self, server: VLLMServerBackend, base: str, policy: LanguageModelPolicy) -> None:
        """Refuses a server whose episodes would not be those of the policy."""
        # 1. The same tokenizer: prompts go out and responses come back as token ids.
        ids = policy.lm.encode(PROBE)
        server.model = base
        [server_ids] = server.tokenize([PROBE])
        server.model = self._name
        if server_ids != ids:
            raise InputError(f"{server.url} has another tokenizer than {policy.model_name}")
        # 2. Log-probs of the distribution that is sampled from: with a single allowed token it must be 0.
        forced = TokenSampling(max_tokens=1, temperature=1.0, allowed=(ids[-1],))
        [result] = server.generate([ids[:1]], forced)
        if isinstance(result, BackendError):
            raise InputError(str(result))
        if abs(result[0].logprobs[0]) > 1e-3:
            raise InputError(f"{server.url} must be started with --logprobs-mode processed_logprobs")
        # 3. The same weights, adapter included: both score the probe alike, up to their arithmetic.
        with policy.adapter(POLICY) as lm:
            [policy_logprobs] = lm.logprobs([ids[:1]], [ids[1:]])
        policy.clear_prefix_cache()  # the prefix of the probe, too
        gap = float(np.abs(policy_logprobs - server.score(ids[:1], ids[1:])).mean())
        if gap > LARGEST_GAP:
            raise InputError(
                f"{server.url} gives log-probs that are {gap:.2f} nats per token off those of {policy.model_name}: "
                f"its model {base!r} is another one"
            )

    def close(self) -> None:
        """Unloads the run's adapters from the servers and deletes their folders; only one process may call it."""
        # After a push that failed, servers may hold both the last adapter and the one before it.
        for number in range(max(self.pushes - 1, 1), self.pushes + 1):
            name = f"instructgym-{self._run}-{number}"
            for server in self.servers:
                self._unload(server, name)
            shutil.rmtree(self.adapter_dir / name, ignore_errors=True)

    @staticmethod
    def _unload(server: VLLMServerBackend, name: str) -> None:
        """Unloads an adapter; errors are ignored, as the server may have restarted without it or be down."""
        with contextlib.suppress(InputError, BackendError):
            server.unload_adapter(name)

    # --- episodes ----------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[Sequence[int] | np.ndarray],
        sampling: Sampling | Sequence[Sampling],
        choices: Sequence[Choices | None] | None = None,
        eos: frozenset[int] | None = None,
    ) -> list[list[Completion]]:
        """Samples one completion per prompt, with log-probs of the distribution that was sampled from.

        Arguments and result are those of
        :meth:`~instructgym.agents.policy.language_model.LanguageModelPolicy.generate`.

        Raises:
            BackendError: if a request fails after all retries.
        """
        samplings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
        limits = list(choices) if choices is not None else [None] * len(prompts)
        ends = None if eos is None else tuple(sorted(eos))
        rows = [_Row([int(t) for t in p], s, c, ends) for p, s, c in zip(prompts, samplings, limits, strict=True)]
        # Free rows are finished after one round; constrained ones take a round per token that has alternatives.
        while live := [row for row in rows if not row.done()]:
            self._advance(live)
        return [[row.completion(self._decode)] for row in rows]

    def _advance(self, rows: list[_Row]) -> None:
        """Sends one request for each of the rows, an equal share to each server."""
        shares = np.array_split(np.arange(len(rows)), min(len(self.servers), len(rows)))

        def ask(server: VLLMServerBackend, share: np.ndarray) -> None:
            server_rows = [rows[i] for i in share]
            requests = [row.request() for row in server_rows]
            results = server.generate([prompt for prompt, _ in requests], [sampling for _, sampling in requests])
            for row, result in zip(server_rows, results, strict=True):
                if isinstance(result, BackendError):
                    raise result
                row.append(result[0])

        pool = ThreadPoolExecutor(len(shares))
        try:
            list(pool.map(ask, self.servers, shares))
        finally:
            # Not a with block, which would wait for all requests also after an interrupt.
            pool.shutdown(wait=False, cancel_futures=True)


@dataclass
class _Row:
    """A response that is being generated.

    Without constraints it takes one request. With constraints it takes one request per position at which the trie of
    allowed responses branches, as the tokens that are allowed there depend on those before it.
    """

    prompt: list[int]
    sampling: Sampling
    choices: Choices | None
    eos: tuple[int, ...] | None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str = ""
    reason: Any = None
    """Finish reason of the server; None before its reply."""

    def done(self) -> bool:
        """Returns whether the response is finished; before that, appends tokens that have no alternative."""
        if self.choices is None:
            return self.reason is not None
        # A token without alternatives has probability 1: log-prob 0, and no request.
        while len(self.token_ids) < self.sampling.max_tokens:
            allowed = self.choices.allowed(self.token_ids)
            if allowed is None or len(allowed) != 1:
                return allowed is None or not len(allowed)
            self.token_ids.append(int(allowed[0]))
            self.logprobs.append(0.0)
        return True

    def request(self) -> tuple[list[int], TokenSampling]:
        """Returns the tokens to continue and the sampling parameters of the next request."""
        fields = vars(self.sampling)
        if self.choices is None:
            return self.prompt, TokenSampling(**fields, eos=self.eos)
        # One token out of the allowed ones. Neither a stop string nor an end-of-sequence token ends the response: the
        # trie does. Each position has its own seed, or all draws would use the same random numbers.
        allowed = self.choices.allowed(self.token_ids)
        seed = request_seed(self.sampling.seed, len(self.token_ids))
        single_token = fields | {"max_tokens": 1, "stop": (), "seed": seed}
        limits = () if allowed is None else tuple(allowed.tolist())
        return [*self.prompt, *self.token_ids], TokenSampling(**single_token, allowed=limits, eos=())

    def append(self, completion: Completion) -> None:
        """Appends the reply to :meth:`request`."""
        self.token_ids += completion.token_ids
        self.logprobs += completion.logprobs
        self.text, self.reason = completion.text, completion.finish_reason

    def completion(self, decode: Callable[[Sequence[int]], str]) -> Completion:
        """Returns the finished response; ``decode`` turns tokens into text."""
        if self.choices is None:
            return Completion(self.text, self.token_ids, self.logprobs, self.reason)
        reason = "stop" if self.choices.complete(self.token_ids) else "length"
        return Completion(decode(self.token_ids), self.token_ids, self.logprobs, reason)  # type: ignore[arg-type]
