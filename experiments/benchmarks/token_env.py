"""``instructgym bench token-env``: compares rollouts with transformers' ``generate`` and measures the ``step`` rate."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from ...envs.generate_label import generate_label_vector
from ...envs.tokens.env import TokenVectorEnv
from ...envs.tokens.episode import PromptExample
from ...llm_backends import Sampling, request_seed
from ...llm_backends.local.causal_lm import CausalLM, selective_log_softmax
from ...llm_backends.local.loading import quiet_loading
from ...llm_backends.local.sampling import generate
from .frame import RATIO, BenchOptions, alternate, compare, publish, scratch_folder, spread_text, torch_threads
from .tiny import EndlessTokenizer, endless_model, make_prompts, model_folder, share_of_e

STEP_ENV = "instructgym/GenerateLabel-v0"
RATE = "tokens_per_cpu_second"


@dataclass
class BenchTokenEnv(BenchOptions):
    """Tokens per CPU-second of sampling and play against transformers' generate, and steps per second of the env."""

    model: str = "tiny"
    """Model that samples: tiny (a GPT-2 of four layers with random weights), embedded, or the path of a model."""
    batch: int = 32
    """Number of episodes that are sampled at once."""
    prompt_tokens: int = 24
    """Number of tokens of every prompt."""
    response_tokens: int = 64
    """Number of tokens of every response. No end-of-sequence token shortens it."""
    rounds: int = 5
    """Measurements of each side, taken alternately after a warm-up."""
    threads: int = 1
    """Number of threads of torch."""
    step_tokens: int = 512
    """Number of tokens of the episodes that measure the rate of ``step``."""
    episodes: int = 5
    """Number of episodes that measure the rate of ``step``, after a warm-up."""


def run(options: BenchTokenEnv, console: Console | None = None) -> dict[str, Any]:
    """Measures both sides and returns ``{"ours": ..., "theirs": ..., "ratio": ..., "settings": ...}``.

    Raises:
        InputError: if an option is out of range, or the model cannot be used.
    """
    options.check()
    with torch_threads(options.threads):
        with scratch_folder() as scratch:
            figures = _rollouts(options, model_folder(options.model, scratch))
        figures["ours"] |= _steps(options)
    figures["settings"] = options.settings()
    ours, baseline = figures["ours"], figures["theirs"]
    steps = f"steps per second, {options.step_tokens} tokens, {ours['steps_tokenizer']}"
    rows = [
        ("", "sampling and play (ours)", "transformers' generate", RATIO),
        ("tokens per CPU-second", f"{ours[RATE]:.0f}", f"{baseline[RATE]:.0f}", spread_text(RATE, figures["ratio"])),
        ("tokens measured", str(ours["tokens"]), str(baseline["tokens"]), ""),
        ("share of play in a rollout", f"{ours['play_share']:.2%}", "", ""),
        (steps, f"{ours['steps_per_second']:.0f}", "", ""),
    ]
    size = f"{options.batch} x {options.response_tokens} tokens, float32, threads: {options.threads}"
    return publish(options, figures, f"rollouts of {options.model}, {size}", rows, console)


@dataclass
class _Ours:
    """The side of this library: a vector env whose responses have the maximum length, and the sampling for it."""

    lm: CausalLM
    env: TokenVectorEnv
    sampling: Sampling
    play_seconds: float = 0.0
    """Seconds spent in ``play``, without resets."""

    def rollout(self, number: int) -> int:
        """Samples and plays one episode in every env; returns the number of tokens that the envs consumed."""
        self.env.reset(options={"index": _indices(number, self.env.num_envs)})
        self.lm.prefix_cache.clear()  # as in training, where an update has changed the weights
        prompts = [prompt.tolist() for prompt in self.env.prompts()]
        samplings = [replace(self.sampling, seed=request_seed(number, i)) for i in range(len(prompts))]
        responses = [row[0].token_ids for row in generate(self.lm, prompts, samplings)]
        start = time.perf_counter()
        played = self.env.play(responses)
        self.play_seconds += time.perf_counter() - start
        if not played.valid.all():
            raise RuntimeError("a rule reward gave no verdict")
        return int(played.n_consumed.sum())


def _indices(number: int, count: int) -> np.ndarray:
    """Returns the indices of the prompts of a round."""
    return np.arange(number * count, (number + 1) * count)


@torch.inference_mode()
def _plain_rollout(model: Any, prompts: torch.Tensor, length: int, pad: int) -> int:
    """Samples as many tokens and their log-probs with transformers alone; returns the number of tokens."""
    output = model.generate(
        input_ids=prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=True,
        top_k=0,
        top_p=1.0,
        temperature=1.0,
        max_new_tokens=length,
        pad_token_id=pad,
        return_dict_in_generate=True,
        output_logits=True,
    )
    written = output.sequences[:, prompts.shape[1] :]
    logprobs = selective_log_softmax(torch.stack(output.logits, dim=1).float(), written)
    return logprobs.numel()


def _rollouts(options: BenchTokenEnv, folder: str) -> dict[str, Any]:
    """Returns tokens per CPU-second of both sides with their ratio, and the share of ``play`` in a rollout."""
    tokenizer = EndlessTokenizer(folder)
    prompts = make_prompts(folder, options.batch * (options.rounds + 1), options.prompt_tokens)
    # The env searches every token for its stop string, a closing tag, but random text does not contain it.
    env = generate_label_vector(
        options.batch,
        examples=[PromptExample(str(i), prompt) for i, prompt in enumerate(prompts)],
        tokenizer=tokenizer,
        reward=share_of_e,
        max_tokens=options.response_tokens,
    )
    env.reset(seed=0)
    ours = _Ours(
        endless_model(folder, tokenizer, "float32"),
        env,
        Sampling(max_tokens=options.response_tokens, stop=env.generation.stop),
    )
    with quiet_loading():
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    pad = tokenizer.hf.pad_token_id or 0
    ids = torch.tensor(tokenizer.encode_batch(prompts))
    shares = []

    def play(number: int) -> tuple[int, float]:
        ours.play_seconds = 0.0
        wall = time.perf_counter()
        measured = _timed(lambda: ours.rollout(number))
        shares.append(ours.play_seconds / (time.perf_counter() - wall))
        return measured

    def plain(number: int) -> tuple[int, float]:
        rows = ids[_indices(number, options.batch)]
        return _timed(lambda: _plain_rollout(model, rows, options.response_tokens, pad))

    measured = alternate({"ours": play, "theirs": plain}, options.rounds)
    env.close()
    rates = {side: [count / seconds for count, seconds in rounds] for side, rounds in measured.items()}
    figures = compare(RATE, **rates)
    figures["ours"]["play_share"] = float(np.median(shares[1:]))
    for side, rounds in measured.items():
        figures[side]["tokens"] = sum(count for count, _ in rounds)
    return figures


def _timed(function: Callable[[], int]) -> tuple[int, float]:
    """Returns the result of a function and the CPU-seconds of its call."""
    start = time.process_time()
    return function(), time.process_time() - start


def _steps(options: BenchTokenEnv) -> dict[str, Any]:
    """Returns steps per second of an env from ``gym.make``, including its wrappers and resets."""
    name = "embedded" if options.model == "embedded" else "bytes"
    env = gym.make(
        STEP_ENV,
        examples=[PromptExample(str(i), f"Text {i}: a fine day. Answer:") for i in range(8)],
        tokenizer=name,
        reward=share_of_e,
        max_tokens=options.step_tokens,
    )
    tokens = _letters(env, options.step_tokens)
    env.reset(seed=0)
    rates = []
    for episode in range(options.episodes + 1):
        start, steps, terminated = time.perf_counter(), 0, False
        env.reset()
        while not terminated:
            terminated = env.step(tokens[steps])[2]
            steps += 1
        if steps != options.step_tokens:
            raise RuntimeError(f"an episode ended after {steps} steps of {options.step_tokens}")
        if episode:  # the first episode warms up
            rates.append(steps / (time.perf_counter() - start))
    env.close()
    return {"steps_per_second": float(np.median(rates)), "steps_tokenizer": name}


def _letters(env: gym.Env, count: int) -> Sequence[int]:
    """Returns tokens of plain text, none of which ends an episode."""
    text = "the river runs past a quiet garden and winter light falls on old stone "
    ids = env.unwrapped.tokenizer.encode_continuation(text * (count // 8 + 1))  # type: ignore[attr-defined]
    return [int(token) for token in ids[:count]]
