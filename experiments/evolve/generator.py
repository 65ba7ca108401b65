"""The generator of instructions that ``evolve generate`` and ``evolve compare`` share: evolves seeds with a policy."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
from annotated_types import Gt, Le
from gymnasium.utils import seeding
from gymnasium.vector.utils import concatenate, create_empty_array
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import VecNormalize, unwrap_vec_normalize

from ...agents.sb3.baselines import BaselineAgent
from ...agents.sb3.factory import VectorToVecEnv
from ...envs.edit.operators import tidy
from ...envs.edit.process import EditObserver, EditProcess
from ...envs.process import Transition
from ...envs.tasks.instruction.seeds import Instruction
from ...llm_backends import Backend, BackendError, Message, Sampling, request_seed, resolve
from ...rewards import RougeGate, eliminated_by
from ...rewards.elimination import STRING_RULES
from ..runs.options import BackendOptions, Count
from ..runs.statistics import distinct_n, known_mean, mean_pairwise_distance
from .train import EnvOptions, make_env


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

    def add(self, rows: Sequence[Mapping[str, Any]], returns: Sequence[float]) -> None:
        """Adds the rows of one chunk, and the return of each of its episodes."""
        self.returns += returns
        for row in rows:
            self.calls.update(row["calls"])
            if "rejected_by" in row:
                self.rejected_by[row["rejected_by"]] += 1
            else:
                self.texts.append(row["instruction"])

    def metrics(self) -> dict[str, Any]:
        """Returns the mean return, the cost in LLM calls, and diversity and length of the accepted instructions."""
        texts = self.texts
        return {
            "mean_return": known_mean(self.returns) or 0.0,
            "calls_per_accepted": self.calls.total() / len(texts) if texts else None,
            "embedding_distance": mean_pairwise_distance(texts, resolve("embedder", "minilm")),
            "distinct_2": distinct_n(texts, 2),
            "mean_words": known_mean(len(text.split()) for text in texts) or 0.0,
        }


class InstructionGenerator:
    """Evolves chunks of seeds with a policy, filters the results and has them answered.

    Args:
        agent: the policy.
        env: the vector env it acts in, with at least as many sub-environments as a chunk has seeds; elimination must
            not end episodes.
        responder: the language model that answers.
        options: sizes and thresholds.
        seed: seed of episodes, sampled actions and answers.
        deterministic: whether to take the policy's most likely operation instead of sampling one.
    """

    def __init__(
        self,
        agent: Any,
        env: VectorToVecEnv,
        responder: Backend,
        options: GenerationOptions,
        seed: int,
        deterministic: bool = False,
    ) -> None:
        self.agent, self.responder, self.options = agent, responder, options
        self.seed, self.deterministic = seed, deterministic
        self.totals = Totals()
        self.process: EditProcess = env.get_attr("process")[0]
        self.observer: EditObserver = env.get_attr("observer")[0]
        self.normalizer: VecNormalize | None = unwrap_vec_normalize(agent.get_env())
        self.gate = RougeGate(options.rouge_threshold, [instruction.text for instruction in self.process.instructions])

    def run(self, check_time: Callable[[], None], budget: int | None = None) -> Iterator[list[dict[str, Any]]]:
        """Evolves chunk after chunk of the seeds and adds up :attr:`totals`.

        Args:
            check_time: called before each chunk; it raises an exception to stop.
            budget: number of LLM calls, for passes over the seeds until it does not cover another chunk; None: one
                pass.

        Yields:
            The rows of each chunk: accepted instructions with their answers, and dropped candidates, which have the
            reason as ``rejected_by``. The same seeds always share a chunk.
        """
        seeds, size = range(len(self.process.instructions)), self.options.chunk
        # Reserve the most that a chunk may cost, so that no run exceeds its budget.
        reserve = self.options.chunk_calls(self.process.settings.horizon, self.process.reward.calls_per_sample)
        for epoch in (0,) if budget is None else itertools.count():
            for start in seeds[::size]:
                if budget is not None and self.totals.calls.total() + reserve > budget:
                    return
                check_time()
                chunk = seeds[start : start + size]
                episodes = self._evolve(chunk, epoch)
                filtered = [self._filtered(*pair, epoch) for pair in zip(chunk, episodes, strict=True)]
                rows = self._answered(list(itertools.chain(*filtered)))
                if budget is not None and not any(any(row["calls"].values()) for row in rows):
                    return  # a policy that only chooses the no-op makes no calls and would never spend its budget
                self.totals.add(rows, [sum(t.reward for t in episode) for episode in episodes])
                yield rows

    def _evolve(self, seeds: Sequence[int], epoch: int) -> list[list[Transition]]:
        """Plays one episode of full horizon per seed and returns its transitions.

        Args:
            seeds: indices of at most ``chunk`` seed instructions.
            epoch: number of the pass over the seeds; requests for the same seeds differ between epochs.
        """
        # The last chunk may be smaller than the vector env: the other sub-environments rest.
        copies = list(range(len(seeds)))
        indices = np.zeros(len(self.process.episodes), dtype=np.int64)
        indices[: len(seeds)] = seeds
        # An episode's generator depends on its seed instruction, not on the chunks before: a resumed run repeats it.
        for copy, seed in zip(copies, seeds, strict=True):
            self.process.generators[copy], _ = seeding.np_random(request_seed(self.seed, "generate", epoch, seed))
        # The policy samples the actions of a chunk together, so the chunk's first seed instruction seeds it.
        policy_seed = request_seed(self.seed, "policy", epoch, seeds[0])
        baseline = isinstance(self.agent, BaselineAgent)
        if baseline:
            self.agent.rng = np.random.default_rng(policy_seed)
        else:
            set_random_seed(policy_seed % 2**32)  # NumPy's global generator takes 32 bits
        self.process.begin(copies, {"index": indices})
        episodes: list[list[Transition]] = [[] for _ in seeds]
        state, starts, masks = None, np.ones(len(seeds), dtype=bool), {}
        for _ in range(self.process.settings.horizon):
            encoded = self.observer.encode([self.process.state(copy) for copy in copies])
            empty: Any = create_empty_array(self.observer.space, len(copies))
            observation: Any = concatenate(self.observer.space, encoded, empty)
            if self.normalizer is not None:
                observation = self.normalizer.normalize_obs(observation)
            if baseline or type(self.agent).__name__ == "MaskablePPO":
                masks = {"action_masks": np.stack([self.process.mask(copy) for copy in copies]).astype(bool)}
            actions, state = self.agent.predict(
                observation, state=state, episode_start=starts, deterministic=self.deterministic, **masks
            )
            # Only the first step resets the state of a recurrent policy.
            starts[:] = False
            for episode, transition in zip(episodes, self.process.step(list(actions), copies), strict=True):
                episode.append(transition)
        return episodes

    def _filtered(self, seed: int, episode: Sequence[Transition], epoch: int) -> list[dict[str, Any]]:
        """Returns the candidates of the episode of one seed; those that a filter drops have ``rejected_by``."""
        instruction = self.process.instructions[seed]
        rows: list[dict[str, Any]] = []
        lineage: list[dict[str, Any]] = [{"operation": "seed", "text": instruction.text}]
        for step, transition in enumerate(episode, start=1):
            info, reward = transition.info, round(transition.reward, 6)
            edit = {"operation": info["operation"], "text": info["edit"], "reward": reward}
            row = {
                "instruction": info["edit"],
                "input": instruction.input,
                "seed_id": instruction.id,
                "seed_index": seed,
                "epoch": epoch,
                "step": step,
                "reward": reward,
                "reward_valid": info["reward_valid"],
                "reward_terms": {name: round(value, 6) for name, value in info["reward_terms"].items()},
                "lineage": [*lineage, edit],
                "calls": {"rewrite": info["rewrite_calls"], "judge": info["judge_calls"]},
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
            rows.append(row | ({"rejected_by": reason} if reason else {}))
        return rows

    def _answered(self, filtered: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Returns the dropped rows, then the others with their answers, ``rejected_by`` marking unusable ones."""
        rows = [row for row in filtered if "rejected_by" in row]
        candidates = [row for row in filtered if "rejected_by" not in row]
        prompts: list[list[Message]] = [
            [{"role": "user", "content": f"{c['instruction']}\n\n{c['input']}".strip()}] for c in candidates
        ]
        sampling = Sampling(self.options.answer_tokens, temperature=0.7, top_p=0.95)
        samplings = [
            sampling.with_seed(request_seed(self.seed, "answer", c["epoch"], c["seed_index"], c["step"]))
            for c in candidates
        ]
        rules = [rule for rule in STRING_RULES if rule != "no_information_gain"]
        for candidate, reply in zip(candidates, self.responder.generate(prompts, samplings), strict=True):
            row = candidate | {"calls": candidate["calls"] | {"answer": 1}}
            if isinstance(reply, BackendError):
                rows.append(row | {"rejected_by": "responder_failed", "error": str(reply)})
                continue
            row["output"] = reply[0].text.strip()
            if reply[0].finish_reason == "length":
                row["output"] = tidy(row["output"], cut=True)
            reason = eliminated_by(row["output"], row["instruction"], rules) if row["output"] else "no_content"
            if reason:
                row["rejected_by"] = f"answer_{reason}"
            rows.append(row)
        return rows


def generation_env(
    options: EnvOptions, roles: Mapping[str, Backend], instructions: Sequence[Instruction], copies: int
) -> VectorToVecEnv:
    """Returns the env for generation: episodes start from their seed's text, all rules are on, none ends an episode."""
    rules: dict[str, Any] = {"carry_text": False, "elimination": tuple(STRING_RULES), "elimination_ends": False}
    return make_env(options, roles, instructions, n_envs=copies, **rules)
