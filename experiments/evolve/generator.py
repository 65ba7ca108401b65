"""The generator of instructions that ``evolve generate`` and ``evolve compare`` share: evolves seeds with a policy."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
from annotated_types import Gt, Le
from gymnasium.utils import seeding
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import VecNormalize, unwrap_vec_normalize

from ...agents.sb3.baselines import BaselineAgent
from ...agents.sb3.factory import VectorToVecEnv
from ...envs.edit.operators import tidy
from ...envs.edit.process import EditProcess
from ...envs.process import Transition
from ...envs.tasks.instruction.seeds import Instruction
from ...llm_backends import BackendError, Message, Sampling, request_seed, resolve
from ...rewards import RougeGate, eliminated_by
from ...rewards.elimination import STRING_RULES
from ..runs.options import BackendOptions, Count
from ..runs.statistics import distinct_n, mean_pairwise_distance
from .train import EnvOptions, Roles, make_env, mean


@dataclass
class GenerationOptions(BackendOptions):
    """Options of generating and filtering instructions."""

    chunk: Count = 16
    """Seed instructions evolved together in one batch of generation."""
    rouge_threshold: Annotated[float, Gt(0), Le(1)] = 0.7
    """Drop an instruction if its ROUGE-L to a seed or to an accepted instruction is above this."""
    answer_tokens: Count = 96
    """Maximum length of an answer, in tokens; an answer that is cut off there loses its unfinished sentence."""

    def chunk_calls(self, horizon: int, verdicts: int) -> int:
        """Returns the largest number of LLM calls of one chunk, without retries.

        Args:
            horizon: edits per seed, each of which costs a rewrite, its verdicts and an answer.
            verdicts: judge calls per edit.
        """
        return self.chunk * horizon * (2 + verdicts)


@dataclass
class Generated:
    """The result of evolving one chunk of seeds."""

    accepted: list[dict[str, Any]] = field(default_factory=list)
    """Rows of accepted instructions, with their answers."""
    rejected: list[dict[str, Any]] = field(default_factory=list)
    """Rows of dropped candidates, with the reason as ``rejected_by``."""
    returns: list[float] = field(default_factory=list)
    """Return of each episode."""
    calls: Counter[str] = field(default_factory=Counter)
    """LLM calls by kind: ``rewrite``, ``judge`` and ``answer``."""


@dataclass
class Totals:
    """What all chunks so far gave."""

    texts: list[str] = field(default_factory=list)
    """Accepted instructions."""
    returns: list[float] = field(default_factory=list)
    """Return of each episode, one per seed."""
    calls: Counter[str] = field(default_factory=Counter)
    """LLM calls by kind."""
    rejected_by: Counter[str] = field(default_factory=Counter)
    """Dropped candidates by reason."""

    def add(self, made: Generated) -> None:
        """Adds the rows and counts of one chunk."""
        self.texts += [row["instruction"] for row in made.accepted]
        self.returns += made.returns
        self.calls.update(made.calls)
        self.rejected_by.update(row["rejected_by"] for row in made.rejected)

    def metrics(self) -> dict[str, Any]:
        """Returns the mean return, the cost in LLM calls, and diversity and length of the accepted instructions."""
        texts = self.texts
        return {
            "mean_return": mean(self.returns),
            "calls_per_accepted": self.calls.total() / len(texts) if texts else None,
            "embedding_distance": mean_pairwise_distance(texts, resolve("embedder", "minilm")),
            "distinct_2": distinct_n(texts, 2),
            "mean_words": mean([len(text.split()) for text in texts]),
        }


class InstructionGenerator:
    """Evolves chunks of seeds with a policy, filters the results and has them answered.

    Args:
        agent: the policy.
        env: the vector env it acts in, with at least as many sub-environments as a chunk has seeds; elimination must
            not end episodes.
        roles: the language models that rewrite, judge and answer.
        options: sizes and thresholds.
        seed: seed of episodes, sampled actions and answers.
        deterministic: whether to take the policy's most likely operation instead of sampling one.
    """

    def __init__(
        self,
        agent: Any,
        env: VectorToVecEnv,
        roles: Roles,
        options: GenerationOptions,
        seed: int,
        deterministic: bool = False,
    ) -> None:
        self.agent, self.roles, self.options = agent, roles, options
        self.seed, self.deterministic = seed, deterministic
        self.totals = Totals()
        vector: Any = env.env.unwrapped
        self.process: EditProcess = vector.process
        self.observer = vector.observer
        self.normalizer: VecNormalize | None = unwrap_vec_normalize(agent.get_env())
        self.gate = RougeGate(options.rouge_threshold, [instruction.text for instruction in self.process.instructions])

    def run(self, check_time: Callable[[], None], budget: int | None = None) -> Iterator[Generated]:
        """Evolves chunk after chunk of the seeds and adds up :attr:`totals`.

        Args:
            check_time: called before each chunk; it raises an exception to stop.
            budget: number of LLM calls, for passes over the seeds until it does not cover another chunk; None: one
                pass.

        Yields:
            The result of each chunk. The same seeds always share a chunk.
        """
        rows, size = range(len(self.process.instructions)), self.options.chunk
        # Reserve the most that a chunk may cost, so that no run exceeds its budget.
        reserve = self.options.chunk_calls(self.process.settings.horizon, self.process.reward.calls_per_sample)
        for epoch in (0,) if budget is None else itertools.count():
            for start in rows[::size]:
                if budget is not None and self.totals.calls.total() + reserve > budget:
                    return
                check_time()
                made = self.chunk(rows[start : start + size], epoch)
                if budget is not None and not made.calls.total():
                    return  # a policy that only chooses the no-op makes no calls and would never spend its budget
                self.totals.add(made)
                yield made

    def chunk(self, rows: Sequence[int], epoch: int = 0) -> Generated:
        """Evolves the seed instructions with the given indices, filters the texts and answers those that are left.

        Args:
            rows: indices of at most ``chunk`` seed instructions.
            epoch: number of the pass over the seeds; requests for the same rows differ between epochs.
        """
        episodes = self._evolve(rows, epoch)
        result = Generated()
        candidates: list[dict[str, Any]] = []
        for row, transitions in zip(rows, episodes, strict=True):
            result.returns.append(sum(t.reward for t in transitions))
            candidates += self._filter(self.process.instructions[row], row, transitions, epoch, result)
        self._answer(candidates, result)
        return result

    def _evolve(self, rows: Sequence[int], epoch: int) -> list[list[Transition]]:
        """Plays one episode of full horizon per row and returns its transitions."""
        # The last chunk may be smaller than the vector env: the other sub-environments rest.
        copies = list(range(len(rows)))
        indices = np.zeros(len(self.process.episodes), dtype=np.int64)
        indices[: len(rows)] = rows
        # An episode's seed depends on its row, not on the chunks before it: a resumed run repeats it.
        for copy, row in zip(copies, rows, strict=True):
            self.process.generators[copy], _ = seeding.np_random(request_seed(self.seed, "generate", epoch, row))
        # The policy samples the actions of a chunk together, so the chunk's first row seeds it.
        self._reseed(request_seed(self.seed, "policy", epoch, rows[0]))
        self.process.begin(copies, {"index": indices})
        episodes: list[list[Transition]] = [[] for _ in rows]
        state, starts = None, np.ones(len(rows), dtype=bool)
        for _ in range(self.process.settings.horizon):
            observation = self._observe(copies)
            actions, state = self._predict(observation, state, starts, copies)
            # Only the first step resets the state of a recurrent policy.
            starts[:] = False
            for episode, transition in zip(episodes, self.process.step(list(actions), copies), strict=True):
                episode.append(transition)
        return episodes

    def _observe(self, copies: Sequence[int]) -> Any:
        rows = self.observer.encode([self.process.state(copy) for copy in copies])
        batch = (
            {key: np.stack([row[key] for row in rows]) for key in rows[0]}
            if isinstance(rows[0], dict)
            else np.stack(rows)
        )
        return batch if self.normalizer is None else self.normalizer.normalize_obs(batch)

    def _predict(self, observation: Any, state: Any, starts: np.ndarray, copies: Sequence[int]) -> tuple[Any, Any]:
        """Returns an action per sub-environment and the policy's next recurrent state."""
        masks = np.stack([self.process.mask(copy) for copy in copies]).astype(bool)
        kwargs = {"state": state, "episode_start": starts, "deterministic": self.deterministic}
        if isinstance(self.agent, BaselineAgent) or type(self.agent).__name__ == "MaskablePPO":
            kwargs["action_masks"] = masks
        return self.agent.predict(observation, **kwargs)

    def _reseed(self, seed: int) -> None:
        if isinstance(self.agent, BaselineAgent):
            self.agent.rng = np.random.default_rng(seed)
        else:
            set_random_seed(seed % 2**32)  # NumPy's global generator takes 32 bits

    def _filter(
        self, instruction: Instruction, row: int, transitions: Sequence[Transition], epoch: int, result: Generated
    ) -> list[dict[str, Any]]:
        """Returns the candidates of one episode that pass the filters; the others go to ``result.rejected``."""
        survivors = []
        lineage: list[dict[str, Any]] = []
        for step, transition in enumerate(transitions, start=1):
            info = transition.info
            calls = {"rewrite": info["rewrite_calls"], "judge": info["judge_calls"]}
            result.calls.update(calls)
            edit = {"operation": info["operation"], "text": info["edit"], "reward": round(transition.reward, 6)}
            candidate = {
                "instruction": info["edit"],
                "input": instruction.input,
                "seed_id": instruction.id,
                "seed_index": row,
                "epoch": epoch,
                "step": step,
                "reward": round(transition.reward, 6),
                "reward_valid": info["reward_valid"],
                "reward_terms": {name: round(value, 6) for name, value in info["reward_terms"].items()},
                "lineage": [{"operation": "seed", "text": instruction.text}, *lineage, edit],
                "calls": calls,
            }
            unchanged = info["edit"] == info["previous_text"]
            if not unchanged and not info["eliminated_by"]:
                lineage.append(edit)  # an eliminated edit leaves the text as it was: later edits do not build on it
            reason = info["eliminated_by"] or ("no_information_gain" if unchanged else "")
            if info["rewrite_failed"]:
                reason = "rewriter_failed"
            # Last, because the gate adds every text that it accepts to its pool.
            if not reason and not self.gate.add_if_new(info["edit"]):
                reason = "rouge"
            if reason:
                result.rejected.append(candidate | {"rejected_by": reason})
            else:
                survivors.append(candidate)
        return survivors

    def _answer(self, candidates: list[dict[str, Any]], result: Generated) -> None:
        """Answers the candidates and sorts them into ``result.accepted`` and ``result.rejected``."""
        prompts: list[list[Message]] = [
            [{"role": "user", "content": f"{c['instruction']}\n\n{c['input']}".strip()}] for c in candidates
        ]
        samplings = [
            Sampling(
                max_tokens=self.options.answer_tokens,
                temperature=0.7,
                top_p=0.95,
                seed=request_seed(self.seed, "answer", c["epoch"], c["seed_index"], c["step"]),
            )
            for c in candidates
        ]
        for candidate, reply in zip(candidates, self.roles.responder.generate(prompts, samplings), strict=True):
            candidate["calls"] = candidate["calls"] | {"answer": 1}
            result.calls["answer"] += 1
            if isinstance(reply, BackendError):
                result.rejected.append(candidate | {"rejected_by": "responder_failed", "error": str(reply)})
                continue
            output = reply[0].text.strip()
            if reply[0].finish_reason == "length":
                output = tidy(output, cut=True)
            rules = [rule for rule in STRING_RULES if rule != "no_information_gain"]
            reason = eliminated_by(output, candidate["instruction"], rules) if output else "no_content"
            if reason:
                result.rejected.append(candidate | {"output": output, "rejected_by": f"answer_{reason}"})
            else:
                result.accepted.append(candidate | {"output": output})


def generation_env(
    training_options: EnvOptions, roles: Roles, instructions: Sequence[Instruction], copies: int
) -> VectorToVecEnv:
    """Returns the env for generation: episodes start from their seed's text, all rules are on, none ends an episode."""
    return make_env(
        training_options,
        roles,
        instructions,
        n_envs=copies,
        carry_text=False,
        elimination=tuple(STRING_RULES),
        elimination_ends=False,
    )
