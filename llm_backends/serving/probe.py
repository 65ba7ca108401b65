"""Checks of a server's capabilities: small requests for each one, whose replies must show that it works.

:class:`ServerProbe` sends the requests through the library's own backends and returns :class:`Findings`.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, TypeVar

import numpy as np

from ..base import (
    BackendError,
    Completion,
    ContextLengthError,
    Prompt,
    PromptStyle,
    Sampling,
    UnsupportedRequestError,
    Usage,
)
from ..errors import InputError, check_known
from .openai_backend import OpenAIBackend, Structured
from .sending import MalformedReplyError
from .vllm_server import TokenSampling, VLLMServerBackend


@dataclass(frozen=True)
class Capability:
    """Whether a server has a capability, and the evidence."""

    answer: Literal["yes", "no", "unknown"]
    """``no``: the server refuses the request or its reply is wrong; ``unknown``: the request failed for another reason,
    or could not be made."""
    why: str = ""
    """The evidence or the error, on one line."""


@dataclass(frozen=True)
class ServedModel:
    """One entry of a server's list of models."""

    name: str
    """Name of the model in requests."""
    context_length: int | None = None
    """Maximum number of tokens of prompt and completion; None if the server does not report it."""
    parent: str | None = None
    """Name of the base model if this is an adapter, else None."""


@dataclass
class Findings:
    """The results of a server's checks."""

    base_url: str
    """``http(s)://host/v1``."""
    model: str
    """Name of the model that the checks used."""
    software: str = ""
    """``owned_by`` of the model, for example ``vllm``; empty if the server does not report it."""
    style: PromptStyle = "chat"
    """The form of request used for every check that works in either form."""
    max_tokens_field: str = "max_tokens"
    """The field that limits the tokens of a chat completion: ``max_tokens`` or ``max_completion_tokens``."""
    models: list[ServedModel] = field(default_factory=list)
    """The server's models and adapters; empty if it does not list them."""
    capabilities: dict[str, Capability] = field(default_factory=dict)
    """Capabilities by name, see :data:`~instructgym.llm_backends.serving.probe.CAPABILITIES`."""

    def can(self, *names: str) -> bool:
        """Returns whether the server has all of these capabilities."""
        return all(self.capabilities[name].answer == "yes" for name in names)

    @property
    def context_length(self) -> int | None:
        """Maximum number of tokens of prompt and completion of the checked model, or of its base; None if unknown."""
        by_name = {model.name: model for model in self.models}
        served = by_name.get(self.model)
        if served is not None and served.context_length is None and served.parent:
            served = by_name.get(served.parent)
        return served.context_length if served else None


COUNTING = "Count from one to twenty in words: one, two, three, four, five,"
INVENTING = "Invent the name of a person and a random number below one million:"
GREEDY = Sampling(max_tokens=24, temperature=0.0)

CHOICE_SETS = (("zvorblat", "quimnex"), ("plorvik", "drabwuzzle"), ("fnerp", "oskwidge"))
"""Sets of made-up words, which a model without constrained decoding would not answer."""

REFUSALS = frozenset({400, 404, 405, 415, 422, 501})
"""HTTP statuses of a server that does not support a kind of request."""

SAME = 1e-3
"""Difference of log-probs, in nats, below which they count as equal."""


ResultT = TypeVar("ResultT")


class ServerProbe:
    """Checks a server's capabilities through the library's own backends; each request is sent once, without retries.

    Args:
        base_url: ``http(s)://host/v1``.
        model: name of a model on the server; empty: its only base model.
        style: form of the requests: ``chat``, ``completion`` or ``auto``: chat if the server answers chat requests,
            else plain completions.
        key_variable: environment variable with the key.
        timeout: seconds for one request.
        on_request: called with the name of each capability before it is checked.

    Raises:
        InputError: for a bad URL, style or timeout.
    """

    def __init__(
        self,
        base_url: str,
        model: str = "",
        style: Literal["auto", "chat", "completion"] = "auto",
        key_variable: str = "OPENAI_API_KEY",
        timeout: float = 60.0,
        on_request: Callable[[str], None] = lambda name: None,
    ) -> None:
        if not base_url:
            raise InputError("the base URL is missing: name the server as http(s)://host/v1")
        check_known("style", style, ("auto", "chat", "completion"))
        self.base_url, self.requested_style, self.on_request = base_url, style, on_request
        self.options: dict[str, Any] = {"key_variable": key_variable, "timeout": timeout, "attempts": 1}
        self.findings = Findings(base_url, model)
        self._backends: dict[tuple[Any, ...], Any] = {}
        self._greedy: dict[str, Completion] = {}
        """Greedy completion of COUNTING, by prompt style."""
        self._ids: list[int] = []
        """Token ids of COUNTING; empty if the server does not report them."""
        self._forced: list[float] = []
        """Log-probs of tokens that were the only allowed ones."""
        self.openai("chat")  # refuses bad arguments before anything is sent

    def openai(self, style: PromptStyle, **options: Any) -> OpenAIBackend:
        """Returns a new backend for the model."""
        limit = self.findings.max_tokens_field if style == "chat" else "max_tokens"
        options = self.options | {"max_tokens_field": limit} | options
        return OpenAIBackend(self.findings.model, self.base_url, style, **options)

    def _openai(self, style: PromptStyle, **options: Any) -> OpenAIBackend:
        key = (style, self.findings.max_tokens_field, *sorted(options.items()))
        return self._reused(key, lambda: self.openai(style, **options))

    def _vllm(self, style: PromptStyle = "completion") -> VLLMServerBackend:
        # vLLM's CPU build (0.32.0) with --enable-lora crashes on two requests for prompt_logprobs in one batch.
        arguments = (self.findings.model, self.base_url, style)
        return self._reused(("vllm", *arguments), lambda: VLLMServerBackend(*arguments, **self.options, concurrency=1))

    def _reused(self, key: tuple[Any, ...], build: Callable[[], Any]) -> Any:
        """Returns the backend that was built under this key; each opens a connection, which takes time."""
        if key not in self._backends:
            self._backends[key] = build()
        return self._backends[key]

    def run(self) -> Findings:
        """Checks every capability and returns the findings.

        Raises:
            InputError: if there is no server, it refuses the key, or it answers neither form of request.
        """
        self._list_models()
        # The first two decide on the form of request for all others.
        for name in ("chat", "completions"):
            self._ask(name)
        self._choose_style()
        for name in list(CAPABILITIES)[2:]:
            self._ask(name)
        return self.findings

    # Each check (a function in CAPABILITIES) returns its evidence, or raises an error that _ask turns into an answer:
    # UnsupportedRequestError or MalformedReplyError is "no", another BackendError in most cases "unknown".

    # --- what every server must do -----------------------------------------------------------------------------------

    def _list_models(self) -> None:
        """Fills in the served models, the model to check and the server's software."""
        self.on_request("models")
        listed: list[dict[str, Any]] = []
        try:
            listed = [dict(entry) for entry in self._vllm().models() if entry.get("id")]
        except MalformedReplyError:
            pass  # the address answers with something else: the next requests show whether it is a server
        except (BackendError, InputError) as error:
            if _status(error) in (None, 401, 403):  # no server, or it refuses the key
                raise _final(error, self.options["key_variable"]) from None
        except (TypeError, ValueError, AttributeError):
            pass  # the list does not hold models
        self.findings.models = [
            ServedModel(str(entry["id"]), entry.get("max_model_len"), entry.get("parent")) for entry in listed
        ]
        if not self.findings.model:
            names = [model.name for model in self.findings.models if not model.parent]
            if len(names) != 1:
                served = f"serves {len(names)} models: {', '.join(names[:8])}" if names else "does not list its models"
                raise InputError(f"{self.base_url} {served}; name one with --model")
            self.findings.model = names[0]
        owners = {entry["id"]: entry.get("owned_by") for entry in listed}
        self.findings.software = str(owners.get(self.findings.model) or "")

    def _choose_style(self) -> None:
        """Sets the form of request for the other checks: the first permitted one that the server answers."""
        forms: dict[PromptStyle, str] = {"chat": "chat", "completion": "completions"}
        permitted = {style: name for style, name in forms.items() if self.requested_style in ("auto", style)}
        answered = [style for style, name in permitted.items() if self.findings.can(name)]
        if not answered:
            why = "; ".join(f"{name}: {self.findings.capabilities[name].why}" for name in permitted.values())
            raise InputError(f"{self.base_url} answers no request to model {self.findings.model!r}: {why}")
        self.findings.style = answered[0]
        if self.findings.style == "completion":  # max_completion_tokens exists in chat requests only
            self.findings.max_tokens_field = "max_tokens"

    def _chat(self) -> str:
        """Checks chat completions, and which field limits their tokens."""
        try:
            self._count("chat")
        except BackendError as error:
            if "max_completion_tokens" not in str(error):
                raise
            self.findings.max_tokens_field = "max_completion_tokens"
            self._count("chat")
        return "" if self.findings.max_tokens_field == "max_tokens" else "with max_completion_tokens"

    def _count(self, style: PromptStyle) -> str:
        """Checks one form of request by a greedy completion, which other checks compare with."""
        completion, _ = _completed(self._openai(style), COUNTING, GREEDY)
        _require(completion.text, "the completion is empty")
        self._greedy[style] = completion
        return ""

    # --- sampling parameters -----------------------------------------------------------------------------------------

    def _n(self) -> str:
        """Checks that ``n`` gives different completions of one prompt."""
        results = self._openai(self.findings.style).generate([INVENTING], Sampling(max_tokens=24, n=3, seed=1))
        texts = {completion.text for completion in _single_result(results)}
        _require(len(texts) > 1, "3 copies of one completion")
        # Sampling may repeat one text by chance: that shows neither.
        if len(texts) == 2:
            raise BackendError("2 of 3 completions are the same")
        return "3 different completions"

    def _seed(self) -> str:
        """Checks that equal seeds give equal texts and different seeds different ones."""
        backend, texts = self._openai(self.findings.style), []
        for seed in (1, 1, 2):  # one after the other, so that they do not share a batch
            completion, _ = _completed(backend, INVENTING, Sampling(max_tokens=24, seed=seed))
            texts.append(completion.text)
        _require(texts[0] == texts[1], "one seed gave two texts: it is ignored, or the server is not deterministic")
        _require(texts[0] != texts[2], "two seeds gave one text")
        return "one seed, one text; another seed, another text"

    def _stop(self) -> str:
        """Checks that a stop string ends the text, and that its tokens stay in the token ids."""
        style = self.findings.style
        # Greedy decoding generates a word from the middle of the known greedy completion again.
        greedy = self._greedy[style].text
        words = re.findall(r"\w\w+", greedy)
        stop = words[len(words) // 2] if words else ""
        before = greedy.partition(stop)[0] if stop else ""
        if not before.strip():
            raise BackendError(f"no stop string to be had from the completion {greedy[:40]!r}")
        with_ids = self.findings.can("token_ids")
        completion, _ = _completed(self._openai(style, token_ids=with_ids), COUNTING, replace(GREEDY, stop=(stop,)))
        ended = stop not in completion.text and completion.finish_reason == "stop"
        _require(ended, "the text goes on past the stop string")
        if completion.text != before:
            raise BackendError("greedy decoding gave two texts: the server is not deterministic")
        if not with_ids or not self._ids:
            return "the text ends before it"
        # Without the last space, which may be in the first token of the stop string.
        ids = _single_result(self._vllm().tokenize([before.rstrip()], special=False))
        _require(len(completion.token_ids) > len(ids), "its tokens are missing from the token ids")
        return "the text ends before it, its tokens stay"

    # --- tokens and log-probs ----------------------------------------------------------------------------------------

    def _per_token(self, kind: Literal["logprobs", "token_ids"]) -> str:
        """Checks that completions come with one value of a kind per token, as the server itself counts tokens."""
        backend = self._openai(self.findings.style, **{kind: True})
        completion, used = _completed(backend, COUNTING, Sampling(max_tokens=8))
        count, written = len(getattr(completion, kind)), used.completion_tokens
        # Servers may leave out the value of the end-of-sequence token; 0: the server reports no usage.
        valid = (written, written - 1) if completion.finish_reason == "stop" else (written,)
        value_name = {"logprobs": "log-probs", "token_ids": "token ids"}[kind]
        _require(not written or count in valid, f"{count} {value_name} of {written} tokens")
        return "one per token"

    def _tokenize(self) -> str:
        """Checks vLLM's ``/tokenize``."""
        ids = _single_result(self._vllm().tokenize([COUNTING]))
        _require(len(ids) > 1 and all(isinstance(token, int) for token in ids), "/tokenize gave no token ids")
        self._ids = ids
        return ""

    def _prompt_ids(self) -> str:
        """Checks that prompts of token ids are completed as their text is."""
        ids = self._known_ids()
        completion, used = _completed(self._openai("completion"), ids, GREEDY)
        # 0: the server reports no usage.
        read = used.prompt_tokens
        _require(read in (0, len(ids)), f"{len(ids)} ids were read as {read} tokens")
        alike = "completion" in self._greedy and completion.text[:12] == self._greedy["completion"].text[:12]
        _require(alike, "ids and their text are continued in different ways")
        return "ids are continued as their text is"

    def _given_logprobs(self) -> str:
        """Checks the log-probs of given texts, on a likely and an unlikely one."""
        texts = (" six, seven, eight", " xylophone of the moon")
        scored = self._vllm(self.findings.style).logprobs([COUNTING, COUNTING], texts)
        for values in (_single_result([result]) for result in scored):
            sound = len(values) and np.isfinite(values).all() and values.max() <= SAME
            _require(sound, "they are no numbers below 0")
        different = scored[0].sum() != scored[1].sum()  # type: ignore[union-attr]
        _require(different, "two texts got the same log-probs")
        return "prompt_logprobs"

    def _allowed_tokens(self) -> str:
        """Checks that a completion holds only allowed tokens."""
        backend, tokens = self._vllm(), self._known_ids()[:2]
        for token in tokens:
            completion, _ = _completed(backend, self._ids, TokenSampling(max_tokens=1, allowed=(token,)))
            _require(completion.token_ids == [token], "another token was written")
            self._forced += completion.logprobs
        return "allowed_token_ids"

    def _processed_logprobs(self) -> str:
        """Checks that log-probs are those of the sampled distribution, not the model's own."""
        if not self.findings.can("allowed_tokens"):
            raise BackendError("only forced tokens would show it")
        # A token that is the only allowed one has log-prob 0 in the distribution that was sampled from.
        _require(max(map(abs, self._forced)) <= SAME, "log-probs are the model's own (raw)")
        return "log-probs are those of what was sampled from"

    def _end_tokens(self) -> str:
        """Checks that the tokens that end a completion can be set."""
        backend, ids = self._vllm(), self._known_ids()
        # Without end tokens the completion has all 4 tokens; with its first token as the end it has only this one.
        whole, _ = _completed(backend, ids, TokenSampling(max_tokens=4, temperature=0.0, eos=()))
        first = whole.token_ids[0]
        ended, _ = _completed(backend, ids, TokenSampling(max_tokens=4, temperature=0.0, eos=(first,)))
        _require(len(whole.token_ids) == 4 and ended.token_ids == [first], "a completion ends elsewhere")
        return "stop_token_ids, ignore_eos"

    def _known_ids(self) -> list[int]:
        """Returns the token ids of COUNTING; raises BackendError if they are unknown."""
        if not self._ids:
            raise BackendError("no token ids to send: the server does not tokenise")
        return self._ids

    # --- structured output and adapters ------------------------------------------------------------------------------

    def _structured(self, form: Structured) -> str:
        """Checks that replies can be constrained to choices."""
        backend = self._openai(self.findings.style, structured=form)
        samplings = [Sampling(max_tokens=64, choices=choices) for choices in CHOICE_SETS]
        for result in backend.generate(["Which word is it?"] * len(samplings), samplings):
            _single_result([result])  # the backend returns an error for a reply that is not one of the choices
        return f"{len(samplings)} sets of made-up words were kept to"

    def _adapters(self) -> str:
        """Checks the loading of adapters by a path without files, so that no adapter is loaded."""
        backend, name = self._vllm(), f"instructgym-serve-check-{uuid.uuid4().hex[:8]}"
        path = f"/nonexistent/{name}"
        try:
            backend.load_adapter(name, path)
        except InputError as error:
            why = str(error).lower()
            if f"no adapter found for {path}" in why:
                return "it looked for an adapter's files"
            if "lora is not enabled" in why:
                raise UnsupportedRequestError("LoRA is not enabled") from None
            if _status(error) in (404, 405):
                raise UnsupportedRequestError("no /v1/load_lora_adapter") from None
            raise
        backend.unload_adapter(name)
        raise BackendError("it took an adapter that does not exist")

    # --- answers -----------------------------------------------------------------------------------------------------

    def _ask(self, name: str) -> None:
        """Checks one capability and records the answer."""
        self.on_request(name)
        try:
            _, check = CAPABILITIES[name]
            capability = Capability("yes", check(self))
        except (BackendError, InputError) as error:
            # Every server must answer these two: a refusal here is about the key.
            if _status(error) in (401, 403) and name in ("chat", "completions"):
                raise _final(error, self.options["key_variable"]) from None
            refused = isinstance(error, UnsupportedRequestError | MalformedReplyError) or _status(error) in REFUSALS
            # A prompt that is too long is refused with status 400 as well, but for its length only.
            refused = refused and not isinstance(error, ContextLengthError)
            capability = Capability("no" if refused else "unknown", self._reason(error))
            if "cannot be reached" in capability.why:
                self._check_alive(name)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            capability = Capability("no", f"malformed reply: {type(error).__name__} {error}")
        self.findings.capabilities[name] = capability

    def _check_alive(self, name: str) -> None:
        """Raises InputError if the server has stopped answering."""
        try:
            self._vllm().models()
        except BackendError:
            raise InputError(f"{self.base_url} went away when it was asked for {name}: see its log") from None
        except (InputError, LookupError, TypeError):  # it answers, although not with a list of models
            return

    def _reason(self, error: Exception) -> str:
        """Returns an error's text, shortened to the server's own message."""
        text = str(error).removeprefix(self.base_url).partition("; adapters need")[0].strip()
        text = text.removesuffix(" (check base_url, the model's name and the key)")
        # The openai client writes "Error code: STATUS - BODY"; the body is the repr of a dict.
        before, _, reply = text.partition("Error code: ")
        message = re.search(r"""'message': (['"])(.+?)(?:\1[,}]|$)""", reply)
        return before + (message[2] if message else re.sub(r"^\d+ - ", "", reply))


CAPABILITIES: dict[str, tuple[str, Callable[[ServerProbe], str]]] = {
    "chat": ("chat", ServerProbe._chat),
    "completions": ("plain completions", partial(ServerProbe._count, style="completion")),
    "logprobs": ("log-probs of completions", partial(ServerProbe._per_token, kind="logprobs")),
    "token_ids": ("token ids out", partial(ServerProbe._per_token, kind="token_ids")),
    "tokenize": ("tokenizer", ServerProbe._tokenize),
    "prompt_ids": ("token ids in", ServerProbe._prompt_ids),
    "given_logprobs": ("log-probs of given texts", ServerProbe._given_logprobs),
    "allowed_tokens": ("only allowed tokens", ServerProbe._allowed_tokens),
    "processed_logprobs": ("processed log-probs", ServerProbe._processed_logprobs),
    "end_tokens": ("custom end tokens", ServerProbe._end_tokens),
    "adapters": ("LoRA adapters at run time", ServerProbe._adapters),
    "structured_vllm": ("structured output, vLLM", partial(ServerProbe._structured, form="vllm")),
    "structured_json_schema": ("structured output, json_schema", partial(ServerProbe._structured, form="json_schema")),
    "n": ("n", ServerProbe._n),
    "seed": ("seed", ServerProbe._seed),
    "stop": ("stop", ServerProbe._stop),
}
"""Title and check of each capability by name, in the order in which they are run: later ones use results of earlier
ones."""


def _single_result(results: Sequence[ResultT | BackendError]) -> ResultT:
    """Returns the result of a single request; raises its error."""
    [result] = results
    if isinstance(result, BackendError):
        raise result
    return result


def _require(shown: object, otherwise: str) -> None:
    """Raises UnsupportedRequestError, which is the answer "no", unless a capability has shown."""
    if not shown:
        raise UnsupportedRequestError(otherwise)


def _completed(backend: OpenAIBackend, prompt: Prompt, sampling: Sampling) -> tuple[Completion, Usage]:
    """Returns the completion of a prompt and the usage that the server reports for it."""
    before = replace(backend.usage)
    [completion] = _single_result(backend.generate([prompt], sampling))
    return completion, backend.usage - before


def _status(error: Exception) -> int | None:
    """Returns the HTTP status in an error of the sender; None if the server did not answer with one."""
    match = re.search(r" answered (\d{3}):", str(error))
    return int(match[1]) if match else None


def _final(error: Exception, key_variable: str) -> InputError:
    """Returns the error for a server that no check can be run on."""
    refused = _status(error) in (401, 403)
    hint = f"the key comes from ${key_variable}" if refused else "is the server up, and is this its base URL?"
    return InputError(f"{error}: {hint}")
