"""What a vLLM server answers, by a made-up language model over bytes: for tests of what asks such servers."""

import json
import math
import random

from instructgym.llm_backends import Completion

LETTERS = [ord(letter) for letter in "abcdefghijklmnopqrstuvwxyz "]
OTHER = math.log(1e-4 / 256)
"""Log-prob of every byte that the model does not write."""


class ImitatedVLLM:
    """The model and its server's extra endpoints.

    Args:
        processed: whether log-probs are those of the distribution that was sampled from.
        adapters: ``loads``, ``off`` (no --enable-lora) or ``no endpoint`` (no VLLM_ALLOW_RUNTIME_LORA_UPDATING).
    """

    def __init__(self, processed=True, adapters="loads"):
        self.processed, self.adapters = processed, adapters

    def logprobs(self, context):
        chooser = random.Random(bytes(context))
        weights = [math.exp(chooser.gauss(0, 1)) for _ in LETTERS[:-1]] + [8.0]  # many spaces: short words
        return {token: math.log(weight / sum(weights)) for token, weight in zip(LETTERS, weights, strict=True)}

    def ids(self, body):
        prompt = body.get("prompt", "")
        if "messages" in body:
            prompt = "".join(f"<{m['role']}>{m['content']}" for m in body["messages"]) + "<assistant>"
        return list(prompt.encode()) if isinstance(prompt, str) else prompt

    def complete(self, body):
        choices = (body.get("structured_outputs") or {}).get("choice")
        schema = (body.get("response_format") or {}).get("json_schema")
        return [self._completion(body, (body.get("seed", 0), i), choices, schema) for i in range(body.get("n", 1))]

    def _completion(self, body, seed, choices, schema):
        chooser = random.Random(str(seed))
        if choices or schema:
            answers = choices or schema["schema"]["properties"]["answer"]["enum"]
            text = chooser.choice(answers) if choices else json.dumps({"answer": chooser.choice(answers)})
            return Completion(text, list(text.encode()), [-0.1] * len(text), "stop")
        context, written, logprobs = self.ids(body), [], []
        for _ in range(body["max_tokens"]):
            raw = self.logprobs(context + written)
            allowed = body.get("allowed_token_ids") or list(raw)
            weights = [math.exp(raw.get(token, OTHER)) for token in allowed]
            token = chooser.choices(allowed, weights)[0] if body["temperature"] else max(raw, key=raw.get)
            share = math.exp(raw.get(token, OTHER)) / sum(weights)
            logprobs.append(min(0.0, math.log(share)) if self.processed else raw.get(token, OTHER))
            written.append(token)
            text = bytes(written).decode()
            if token in body.get("stop_token_ids", ()):
                return Completion(text, written, logprobs, "stop")
            for stop in body.get("stop") or ():
                if stop in text:
                    return Completion(text[: text.index(stop)], written, logprobs, "stop")
        return Completion(text, written, logprobs, "length")

    def extras(self, path, body):
        """(status, reply) of the endpoints outside OpenAI's API; None for all others."""
        if path == "/tokenize":
            return 200, {"tokens": self.ids(body)}
        if path == "/v1/load_lora_adapter" and self.adapters != "no endpoint":
            if self.adapters == "off":
                return 500, {"error": {"message": "Call to add_lora method failed: LoRA is not enabled.", "code": 500}}
            missing = f"Loading lora {body['lora_name']} failed: No adapter found for {body['lora_path']}"
            return 404, {"error": {"message": missing, "type": "NotFoundError", "param": None, "code": 404}}
        return None

    def prompt_logprobs(self, ids):
        """Of each token but the first, as vLLM gives them."""
        rows = [None]
        for at in range(1, len(ids)):
            rows.append({str(ids[at]): {"logprob": self.logprobs(ids[:at]).get(ids[at], OTHER), "rank": 1}})
        return rows
