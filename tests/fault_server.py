"""A server on loopback that speaks OpenAI's API, counts what it gets, and fails on purpose."""

import json
import random
import threading
import time
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from instructgym.llm_backends import Completion, Sampling, ScriptedBackend

FAULTS = ("drop", "429", "500", "slow", "truncated", "empty", "lengths")
REFUSALS = ("429", "500", "401", "403", "400")


class FaultServer(ThreadingHTTPServer):
    """Answers ``echo: PROMPT``; a share of the attempts, drawn by a seeded generator, fails in one of the ways.

    Args:
        rate: share of attempts that fail.
        faults: the ways.
        latency: seconds that an answer takes.
        usage: tokens that a reply says it used, (prompt, completion); None for the true ones.
        text: what to answer to a request's body in place of the echo.
        slow: seconds that a slow answer takes.
        why: part of the text of refusals.
        scripted: answer as :class:`ScriptedBackend` does, by prompt, seed, stop strings and so on.
        vllm: an :class:`ImitatedVLLM` that answers.
        models: names of the models that are listed; None for a server without a list.
    """

    daemon_threads = True
    request_queue_size = 256

    def __init__(
        self, rate=0.0, faults=FAULTS, latency=0.0, usage=(7, 3), text=None, scripted=False, slow=1.0, why="",
        vllm=None, models=("m",),
    ):  # fmt: skip
        super().__init__(("127.0.0.1", 0), _Handler)
        self.vllm, self.models = vllm, models
        self.refuses = self.fails = ""
        """Fields of a request that is answered by 400, and by 500."""
        self.rate, self.faults, self.latency, self.used = rate, faults, latency, usage
        self.text = text
        self.random, self.lock = random.Random(0), threading.Lock()
        self.attempts, self.answered, self.failed = Counter(), Counter(), Counter()
        self.in_flight = self.most_in_flight = 0
        self.bodies, self.keys = [], []
        self.slow, self.why, self.trickle, self.finish = slow, why, 0, "stop"
        self.scripted = ScriptedBackend() if scripted else None

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def complete(self, body):
        """The completions of a request."""
        if self.vllm is not None:
            return self.vllm.complete(body)
        if self.scripted is None:
            text = self.text(body) if self.text else f"echo: {prompt_of(body)}"
            ids = list(range(len(text.split())))
            return [Completion(text, ids, [-0.5] * len(ids), self.finish)] * body.get("n", 1)
        names = ("max_tokens", "temperature", "top_p", "n", "seed")
        sampling = Sampling(**{name: body[name] for name in names}, stop=tuple(body.get("stop", ())))
        return self.scripted.generate([prompt_of(body)], sampling)[0]

    def handle_error(self, request, client_address):
        """A client that hangs up is part of the game."""


def prompt_of(body):
    return body["messages"][-1]["content"] if "messages" in body else body["prompt"]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        server = self.server
        fault = server.random.choice(server.faults) if server.random.random() < server.rate else ""
        if fault in REFUSALS:
            self._send(int(fault), {"error": {"message": f"fault {fault} {server.why}"}})
            return
        if fault == "drop":
            self._drop()
            return
        time.sleep(server.slow if fault == "slow" else 0)
        if self.path != "/v1/models" or server.models is None:
            self._send(404, {"detail": "Not Found"})
            return
        about = {"owned_by": "vllm", "max_model_len": 512} if server.vllm else {"owned_by": "tests"}
        self._send(200, {"data": [{"id": name, **about} for name in server.models]})

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path not in ("/v1/chat/completions", "/v1/completions"):
            known = server.vllm.extras(self.path, body) if server.vllm else None
            self._send(*(known or (404, {"detail": "Not Found"})))
            return
        with server.lock:
            server.bodies.append(body)
            server.keys.append(self.headers["Authorization"])
            server.attempts[str(prompt_of(body))] += 1
            server.in_flight += 1
            server.most_in_flight = max(server.most_in_flight, server.in_flight)
            fault = server.random.choice(server.faults) if server.random.random() < server.rate else ""
            server.failed[fault] += 1
        try:
            time.sleep(server.latency)
            self._answer(body, fault)
        finally:
            with server.lock:
                server.in_flight -= 1

    def _answer(self, body, fault):
        server = self.server
        if server.refuses in body or server.fails in body:
            status = 400 if server.refuses in body else 500
            self._send(status, {"error": {"message": f"fault {status}: not {server.refuses}, max_completion_tokens"}})
            return
        if fault == "drop":
            self._drop()
            return
        if fault in REFUSALS:
            self._send(int(fault), {"error": {"message": f"fault {fault} {server.why}"}}, {"Retry-After": "0.05"})
            return
        if fault == "slow":
            time.sleep(server.slow)
        reply = completion(body, server.complete(body), server.used)
        if server.vllm is not None and body.get("prompt_logprobs") is not None:
            reply["choices"][0]["prompt_logprobs"] = server.vllm.prompt_logprobs(body["prompt"])
        if fault == "empty":
            reply["choices"] = []
        if fault == "lengths" and reply["choices"][0]["logprobs"]:
            reply["choices"][0]["token_ids"].append(1)
        if fault == "filtered":
            for choice in reply["choices"]:
                choice["finish_reason"] = "content_filter"
        if fault == "one choice":
            reply["choices"] = reply["choices"][:1]
        if fault == "truncated":
            self._send(200, reply, cut=40)
            return
        if not fault or (fault == "lengths" and not reply["choices"][0]["logprobs"]):
            with server.lock:
                server.answered[str(prompt_of(body))] += 1
        self._send(200, reply)

    def _drop(self):
        self.close_connection = True
        self.connection.close()

    def _send(self, status, reply, headers=None, cut=0):
        data = json.dumps(reply).encode()
        data = data[: len(data) - cut]
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        for _ in range(self.server.trickle):  # white space that keeps a connection alive
            self.wfile.write(b"\n")
            time.sleep(0.2)
        self.wfile.write(data[self.server.trickle :] if self.server.trickle else data)


def completion(body, completions, used):
    chat, choices = "messages" in body, []
    for index, one in enumerate(completions):
        logprobs = None
        if body.get("logprobs") not in (None, False):
            content = [{"token": "", "logprob": value, "bytes": None, "top_logprobs": []} for value in one.logprobs]
            logprobs = {"content": content} if chat else {"token_logprobs": one.logprobs}
        part = {"message": {"role": "assistant", "content": one.text}} if chat else {"text": one.text}
        ends = {"index": index, "finish_reason": one.finish_reason, "token_ids": list(one.token_ids)}
        choices.append({**part, **ends, "logprobs": logprobs})
    prompt = prompt_of(body)
    read = len(prompt.split()) if isinstance(prompt, str) else len(prompt)
    used = used or (read, sum(len(one.token_ids) for one in completions))
    return {
        "id": "x",
        "object": "chat.completion" if chat else "text_completion",
        "created": 0,
        "model": body["model"],
        "choices": choices,
        "usage": {"prompt_tokens": used[0], "completion_tokens": used[1], "total_tokens": sum(used)},
    }


@contextmanager
def serving(**options):
    server = FaultServer(**options)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
