"""``instructgym bench token-env``: compares rollouts with transformers' ``generate`` and measures the ``step`` rate."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from ...envs.generate_label import generate_label_vector
from ...envs.tokens.episode import PromptExample
from ...llm_backends import Sampling, request_seed
from ...llm_backends.local.causal_lm import selective_log_softmax
from ...llm_backends.local.loading import quiet_loading
from ...llm_backends.local.sampling import generate
from ..runs.options import Count
from .frame import RATIO, BenchOptions, alternate, compare, publish, ratio_row, scratch_folder, timed, torch_threads
from .tiny import EndlessTokenizer, endless_model, make_prompts, model_folder, share_of_e

RATE = "tokens_per_cpu_second"
TEXT = "the river runs past a quiet garden and winter light falls on old stone "


@dataclass
class BenchTokenEnv(BenchOptions):
    """Tokens per CPU-second of sampling and play against transformers' generate, and steps per second of the env."""

    model: str = "tiny"
    """Model that samples: tiny (a GPT-2 of four layers with random weights), embedded, or the path of a model."""
    batch: Count = 32
    """Number of episodes that are sampled at once."""
    prompt_tokens: Count = 24
    """Number of tokens of every prompt."""
    response_tokens: Count = 64
    """Number of tokens of every response. No end-of-sequence token shortens it."""
    rounds: Count = 5
    """Measurements of each side, taken alternately after a warm-up."""
    threads: Count = 1
    """Number of threads of torch."""
    step_tokens: Count = 512
    """Number of tokens of the episodes that measure the rate of ``step``."""
    episodes: Count = 5
    """Number of episodes that measure the rate of ``step``, after a warm-up."""


def run(options: BenchTokenEnv, console: Console) -> dict[str, Any]:
    """Measures both sides and returns ``{"ours": ..., "theirs": ..., "ratio": ..., "settings": ...}``.

    Raises:
        InputError: if an option is out of range, or the model cannot be used.
    """
    options.check()
    with torch_threads(options.threads):
        with scratch_folder() as scratch:
            figures = _rollouts(options, model_folder(options.model, scratch))
        figures["ours"] |= _steps(options)
    ours = figures["ours"]
    steps = f"steps per second, {options.step_tokens} tokens, {ours['steps_tokenizer']}"
    rows = [
        ("", "sampling and play (ours)", "transformers' generate", RATIO),
        ratio_row("tokens per CPU-second", RATE, figures, ".0f"),
        ("tokens measured", str(ours["tokens"]), str(figures["theirs"]["tokens"]), ""),
        ("share of play in a rollout", f"{ours['play_share']:.2%}", "", ""),
        (steps, f"{ours['steps_per_second']:.0f}", "", ""),
    ]
    size = f"{options.batch} x {options.response_tokens} tokens, float32, threads: {options.threads}"
    return publish(options, figures, f"rollouts of {options.model}, {size}", rows, console)


def _rollouts(options: BenchTokenEnv, folder: str) -> dict[str, Any]:
    """Returns tokens per CPU-second of both sides with their ratio, and the share of ``play`` in a rollout."""
    tokenizer, batch = EndlessTokenizer(folder), options.batch
    prompts = make_prompts(folder, batch * (options.rounds + 1), options.prompt_tokens)
    # The env searches every token for its stop string, a closing tag, but random text does not contain it.
    env = generate_label_vector(
        batch,
        examples=[PromptExample(str(i), prompt) for i, prompt in enumerate(prompts)],
        tokenizer=tokenizer,
        reward=share_of_e,
        max_tokens=options.response_tokens,
    )
    env.reset(seed=0)
    lm = endless_model(folder, tokenizer, "float32")
    sampling = Sampling(max_tokens=options.response_tokens, stop=env.generation.stop)
    with quiet_loading():
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    ids = torch.tensor(tokenizer.encode_batch(prompts))
    shares = []

    def sample_and_play(number: int) -> int:
        """Samples and plays one episode in every env; returns the number of tokens that the envs consumed."""
        begun = time.perf_counter()
        env.reset(options={"index": np.arange(number * batch, (number + 1) * batch)})
        lm.prefix_cache.clear()  # as in training, where an update has changed the weights
        samplings = [sampling.with_seed(request_seed(number, i)) for i in range(batch)]
        completions = generate(lm, [prompt.tolist() for prompt in env.prompts()], samplings)
        played, seconds = timed(lambda: env.play([row[0].token_ids for row in completions]))
        if not played.valid.all():
            raise RuntimeError("a rule reward gave no verdict")
        shares.append(seconds / (time.perf_counter() - begun))
        return int(played.n_consumed.sum())

    @torch.inference_mode()
    def plain(number: int) -> int:
        """Samples as many tokens and their log-probs with transformers alone; returns the number of tokens."""
        rows = ids[number * batch : (number + 1) * batch]
        output = model.generate(
            input_ids=rows,
            attention_mask=torch.ones_like(rows),
            do_sample=True,
            top_k=0,
            top_p=1.0,
            temperature=1.0,
            max_new_tokens=options.response_tokens,
            pad_token_id=tokenizer.hf.pad_token_id or 0,
            return_dict_in_generate=True,
            output_logits=True,
        )
        written = output.sequences[:, rows.shape[1] :]
        return selective_log_softmax(torch.stack(output.logits, dim=1).float(), written).numel()

    measured = alternate(
        {
            "ours": lambda number: timed(lambda: sample_and_play(number), time.process_time),
            "theirs": lambda number: timed(lambda: plain(number), time.process_time),
        },
        options.rounds,
    )
    env.close()
    figures = compare(RATE, **{side: [count / each for count, each in rounds] for side, rounds in measured.items()})
    figures["ours"]["play_share"] = float(np.median(shares[1:]))
    for side, rounds in measured.items():
        figures[side]["tokens"] = sum(count for count, _ in rounds)
    return figures


def _steps(options: BenchTokenEnv) -> dict[str, Any]:
    """Returns steps per second of an env from ``gym.make``, including its wrappers and resets."""
    name = "embedded" if options.model == "embedded" else "bytes"
    env = gym.make(
        "instructgym/GenerateLabel-v0",
        examples=[PromptExample(str(i), f"Text {i}: a fine day. Answer:") for i in range(8)],
        tokenizer=name,
        reward=share_of_e,
        max_tokens=options.step_tokens,
    )
    # Tokens of plain text, none of which ends an episode.
    text = TEXT * (options.step_tokens // 8 + 1)
    ids = env.unwrapped.tokenizer.encode_continuation(text)  # type: ignore[attr-defined]
    tokens = [int(token) for token in ids[: options.step_tokens]]

    def episode() -> int:
        """Plays an episode and returns the number of its steps."""
        env.reset()
        return next(steps for steps, token in enumerate(tokens, 1) if env.step(token)[2])

    env.reset(seed=0)
    measured = [timed(episode) for _ in range(options.episodes + 1)]
    env.close()
    for steps, _ in measured:
        if steps != options.step_tokens:
            raise RuntimeError(f"an episode ended after {steps} steps of {options.step_tokens}")
    # The first episode warms up.
    return {"steps_per_second": float(np.median([n / each for n, each in measured[1:]])), "steps_tokenizer": name}
