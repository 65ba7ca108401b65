"""Rollouts on vLLM servers: the policy's adapter is pushed after each update, token ids come back with log-probs."""

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
"""Scored by server and policy alike, to see whether they are of one model."""

LARGEST_GAP = 0.5
"""Nats per token on the probe: bfloat16 makes a tenth of this, another model several times as much."""


class RolloutEngine(Protocol):
    """What writes the episodes of on-policy agents in the policy's place."""

    def take(self, policy: LanguageModelPolicy, processes: Processes) -> None:
        """Takes over the policy's weights as they are now; called by all processes before each rollout."""

    def generate(
        self,
        prompts: Sequence[Sequence[int] | np.ndarray],
        sampling: Sampling | Sequence[Sampling],
        choices: Sequence[Choices | None] | None = None,
        eos: frozenset[int] | None = None,
    ) -> list[list[Completion]]:
        """As :meth:`LanguageModelPolicy.generate`, one completion per prompt."""

    def close(self) -> None:
        """Gives back what the engine holds elsewhere; called by one process when training ends."""


class VLLMEngine:
    """Writes episodes on one or more vLLM servers.

    Each update's adapter gets a name of its own, so that no server can answer from a prefix cache of older weights.
    Servers sample in arithmetic of their own: the agent scores the tokens again, weights them by the truncated ratio
    of both probabilities, and logs the gap.

    The servers need ``--enable-lora``, ``--max-lora-rank`` at least the policy's rank, ``--logprobs-mode
    processed_logprobs``, and ``VLLM_ALLOW_RUNTIME_LORA_UPDATING=True`` in their environment.

    Args:
        urls: base URLs, ``http://host:port/v1``; prompts are shared out evenly.
        adapter_dir: folder, visible to the servers under the same path, through which adapters are handed over; by
            default a temporary one, which suits servers on this machine.
        concurrency: requests in flight per server at most.
        timeout: seconds for one request.

    Raises:
        InputError: by :meth:`take`, for a server of another model or tokenizer, or one started without what it needs.
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
        """Adapters handed over so far."""
        self._run = ""
        self._decode: Callable[[Sequence[int]], str] = str

    # --- weights -----------------------------------------------------------------------------------------------------

    def take(self, policy: LanguageModelPolicy, processes: Processes) -> None:
        """Hands the policy's adapter to all servers.

        Raises:
            InputError: for a policy without adapters, and by the first call for servers that do not fit.
        """
        first = not self._run
        if first:
            if not policy.lora.rank:
                raise InputError("rollouts on a server need a policy with adapters: set a LoRA rank")
            self._run = processes.gather(uuid.uuid4().hex[:8])[0]
            self._decode = policy.lm.decode
            bases = [self._base(server) for server in self.servers]
        old, self.pushes = self._name, self.pushes + 1
        problem = ""
        if processes.is_main:
            try:
                self._push(policy, old)
            except (InputError, BackendError) as error:
                problem = str(error)
        problem = processes.gather(problem)[0]  # all of them stop, none waits for ever
        if problem:
            raise InputError(problem)
        for server in self.servers:
            server.model = self._name
        if first:
            for server, base in zip(self.servers, bases, strict=True):
                self._check(server, base, policy)

    @property
    def _name(self) -> str:
        return f"instructgym-{self._run}-{self.pushes}"

    def _push(self, policy: LanguageModelPolicy, old: str) -> None:
        folder = self.adapter_dir / self._name
        try:
            policy.export_adapter(folder)
            for server in self.servers:
                server.load_adapter(self._name, folder / POLICY)
                if self.pushes > 1:
                    self._drop(server, old)
        except OSError as error:
            raise InputError(f"cannot hand adapters over through {self.adapter_dir}: {error}") from error
        # Not before: a server that has more adapters than room reads them again.
        shutil.rmtree(self.adapter_dir / old, ignore_errors=True)

    @staticmethod
    def _base(server: VLLMServerBackend) -> str:
        names = [model["id"] for model in server.models() if not model.get("parent")]
        if len(names) != 1:
            raise InputError(f"{server.url} serves {names or 'no model'}: rollouts need one base model")
        return str(names[0])

    def _check(self, server: VLLMServerBackend, base: str, policy: LanguageModelPolicy) -> None:
        """Refuses a server that would write something else than the policy."""
        ids = policy.lm.encode(PROBE)
        server.model = base
        [theirs] = server.tokenize([PROBE])
        server.model = self._name
        if theirs != ids:
            raise InputError(f"{server.url} has another tokenizer than {policy.model_name}")
        one = TokenSampling(max_tokens=1, temperature=1.0, allowed=(ids[-1],))
        [result] = server.generate([ids[:1]], one)
        if isinstance(result, BackendError):
            raise InputError(str(result))
        if abs(result[0].logprobs[0]) > 1e-3:
            raise InputError(f"{server.url} must be started with --logprobs-mode processed_logprobs")
        with policy.adapter(POLICY) as lm:
            [mine] = lm.logprobs([ids[:1]], [ids[1:]])
        policy.clear_prefix_cache()  # the prefix of the probe, too
        gap = float(np.abs(mine - server.score(ids[:1], ids[1:])).mean())
        if gap > LARGEST_GAP:
            raise InputError(
                f"{server.url} gives log-probs that are {gap:.2f} nats per token off those of {policy.model_name}: "
                f"its model {base!r} is another one"
            )

    def close(self) -> None:
        """Drops the run's adapters from the servers, and their folders. Only one process of a run does it."""
        for number in range(max(self.pushes - 1, 1), self.pushes + 1):  # where a push failed there may be two
            name = f"instructgym-{self._run}-{number}"
            for server in self.servers:
                self._drop(server, name)
            shutil.rmtree(self.adapter_dir / name, ignore_errors=True)

    @staticmethod
    def _drop(server: VLLMServerBackend, name: str) -> None:
        """Unloads an adapter; a server that has it no longer, or is gone, is not waited for."""
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
        """Continues prompts of token ids, with log-probs of the distribution that was sampled from.

        Raises:
            BackendError: when a request fails for good.
        """
        samplings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
        limits = list(choices) if choices is not None else [None] * len(prompts)
        ends = None if eos is None else tuple(sorted(eos))
        rows = [_Row([int(t) for t in p], s, c, ends) for p, s, c in zip(prompts, samplings, limits, strict=True)]
        while live := [row for row in rows if not row.done()]:
            self._advance(live)
        return [[row.completion(self._decode)] for row in rows]

    def _advance(self, rows: list[_Row]) -> None:
        """One request for each of the rows, shared out over the servers."""
        shares = np.array_split(np.arange(len(rows)), min(len(self.servers), len(rows)))

        def ask(server: VLLMServerBackend, share: np.ndarray) -> None:
            mine = [rows[i] for i in share]
            requests = [row.request() for row in mine]
            results = server.generate([prompt for prompt, _ in requests], [sampling for _, sampling in requests])
            for row, result in zip(mine, results, strict=True):
                if isinstance(result, BackendError):
                    raise result
                row.take(result[0])

        pool = ThreadPoolExecutor(len(shares))
        try:
            list(pool.map(ask, self.servers, shares))
        finally:  # an interrupt does not wait for the rest
            pool.shutdown(wait=False, cancel_futures=True)


@dataclass
class _Row:
    """One episode in the making. Under constraints every branching of the trie is a request of its own."""

    prompt: list[int]
    sampling: Sampling
    choices: Choices | None
    eos: tuple[int, ...] | None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str = ""
    reason: Any = None
    """Why the server ended; None while it has not."""

    def done(self) -> bool:
        """Whether nothing is to be asked any more; writes tokens that have no alternative."""
        if self.choices is None:
            return self.reason is not None
        while len(self.token_ids) < self.sampling.max_tokens:
            allowed = self.choices.allowed(self.token_ids)
            if allowed is None or len(allowed) != 1:
                return allowed is None or not len(allowed)
            self.token_ids.append(int(allowed[0]))
            self.logprobs.append(0.0)
        return True

    def request(self) -> tuple[list[int], TokenSampling]:
        plain = vars(self.sampling)
        if self.choices is None:
            return self.prompt, TokenSampling(**plain, eos=self.eos)
        allowed = self.choices.allowed(self.token_ids)
        seed = request_seed(self.sampling.seed, len(self.token_ids))
        one = plain | {"max_tokens": 1, "stop": (), "seed": seed}
        limits = () if allowed is None else tuple(allowed.tolist())
        return [*self.prompt, *self.token_ids], TokenSampling(**one, allowed=limits, eos=())

    def take(self, completion: Completion) -> None:
        self.token_ids += completion.token_ids
        self.logprobs += completion.logprobs
        self.text, self.reason = completion.text, completion.finish_reason

    def completion(self, decode: Callable[[Sequence[int]], str]) -> Completion:
        if self.choices is None:
            return Completion(self.text, self.token_ids, self.logprobs, self.reason)
        reason = "stop" if self.choices.complete(self.token_ids) else "length"
        return Completion(decode(self.token_ids), self.token_ids, self.logprobs, reason)  # type: ignore[arg-type]
