"""Two processes of one launch do what a single one does. Run as a script, this file is one of the processes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from stable_baselines3.common.logger import KVWriter, Logger

from instructgym.agents.policy.language_model import LanguageModelPolicy
from instructgym.agents.policy.optimization import Processes
from instructgym.agents.policy_gradient.grpo import GRPO, RLOO
from instructgym.agents.policy_gradient.ppo import TokenPPO
from instructgym.agents.preferences.agent import RankingAgent
from instructgym.agents.preferences.trainer import RankingTrainer, TokenizedRankedList
from instructgym.agents.soft_q.agent import SoftQ
from instructgym.agents.supervised.reward_modelling import RewardTrainer, tokenize_pairs
from instructgym.agents.supervised.sft import SFT, TokenizedDemonstration
from instructgym.envs.tokens.env import TokenVectorEnv
from instructgym.envs.tokens.episode import PromptExample
from instructgym.envs.tokens.process import TokenSettings
from instructgym.llm_backends.errors import InputError
from instructgym.llm_backends.training.adapters import LoraSettings
from instructgym.rewards import Reward, Score
from instructgym.rewards.learned.edits import EditedPair
from instructgym.rewards.learned.reward_model import RewardModel

EXAMPLES = [PromptExample("one", "red sea"), PromptExample("two", "sky sky end"), PromptExample("three", "blue")]
CASES = {
    "ppo": (TokenPPO, 6, {"epochs": 2, "kl_target": 0.1, "kl_horizon": 50}),
    "ppo, whitened rewards": (TokenPPO, 5, {"whiten_rewards": True, "epochs": 1, "target_kl": 1e-6}),
    "ppo, one process without episodes": (TokenPPO, 2, {"max_invalid_share": 1.0}),
    "grpo": (GRPO, 9, {}),
    "rloo": (RLOO, 9, {"entropy_coefficient": 0.01}),
    "rloo, examples that repeat": (RLOO, 15, {"minibatches": 2, "rollout_batches": 2}),
    "ppo, minibatches": (TokenPPO, 5, {"minibatches": 3, "epochs": 2, "rollout_batches": 2}),
    "soft q, minibatches": (SoftQ, 9, {"minibatches": 2, "rollout_batches": 2, "replay_ratio": 0.5}),
    "online ranking, examples that repeat": (RankingAgent, 12, {"loss": "dpo", "minibatches": 2, "rollout_batches": 2}),
    "online ranking": (RankingAgent, 9, {"loss": "dpo", "epochs": 2, "minibatches": 2, "refresh_reference": 1}),
    "soft q": (SoftQ, 9, {"epochs": 2, "replay_ratio": 0.5, "zscore": "group"}),
    "soft q, one process without episodes": (SoftQ, 6, {"max_invalid_share": 1.0, "target_rate": 0.5}),
    "online ranking, too few lists for both": (RankingAgent, 6, {"mle_weight": 0.0, "max_invalid_share": 1.0}),
}
SAME = ["train/loss", "train/policy_loss", "train/value_loss", "train/kl", "train/kl_coefficient"]
SAME += [
    "train/approx_kl",
    "train/multi_step",
    "train/target_value",
    "train/reference_kl",
    "train/entropy",
    "train/epochs",
    "rollout/reward",
    "rollout/length",
    "rollout/episodes",
]


class Varied(Reward):
    """Different for every response; without a verdict on one of the prompts where asked for."""

    name = "varied"

    def __init__(self, moody):
        self.moody = moody

    def reward(self, samples):
        return [
            Score.invalid("no idea") if self.moody and s.episode_id == "two" else Score(0.1 * float(s.token_ids.sum()))
            for s in samples
        ]


class Rows(KVWriter):
    def __init__(self):
        self.rows = []

    def write(self, key_values, key_excluded, step=0):
        self.rows.append({key: float(key_values[key]) for key in SAME if key in key_values})

    def close(self):
        pass


def plain_steps(optimizer):
    """Plain gradient steps, which do not magnify rounding as Adam's first ones do."""
    optimizer.inner = torch.optim.SGD([dict(group) for group in optimizer.inner.param_groups])


def policy_of(model, processes, value):
    # Each process starts with weights of its own: training has to begin with the first one's.
    policy = LanguageModelPolicy(model, LoraSettings(rank=4), value=value, dtype="float32", seed=processes.index)
    return moved(policy, processes.index)


def moved(trained, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trained.parameters().values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return trained


def play(model, folder, name):
    """Two updates of one case; writes what was logged, the weights of each process and a checkpoint."""
    cls, copies, options = CASES[name]
    processes, writer = Processes(), Rows()
    policy = policy_of(model, processes, "shared" if cls is TokenPPO else "none")
    moody = "without" in name or "too few" in name
    settings = TokenSettings(max_tokens=4, context_length=16, group_size=1 if cls is TokenPPO else 3)
    env = TokenVectorEnv(copies, EXAMPLES[: 2 if moody else 3], policy.tokenizer, Varied(moody), settings)
    agent = cls(env, policy, learning_rate=0.01, **options)
    plain_steps(agent.optimizer)
    agent.set_logger(Logger(folder=None, output_formats=[writer]))
    agent.learn(10**6, lambda agent: agent.updates < 2)
    finish(agent, folder / name, writer)


def fit(model, folder):
    """Supervised fine-tuning, of batches that the processes share unequally."""
    writer = Rows()
    trainer = SFT(policy_of(model, Processes(), "none"), learning_rate=0.01, batch_size=3)
    plain_steps(trainer.optimizer)
    trainer.set_logger(Logger(folder=None, output_formats=[writer]))
    trainer.fit([TokenizedDemonstration([i, 1], [2] * (1 + i)) for i in range(4)])
    finish(trainer, folder / "sft", writer)


def fit_ranking(model, folder):
    """Training on ranked candidates, likewise; one of the lists has nothing to rank."""
    writer = Rows()
    policy = policy_of(model, Processes(), "none")
    trainer = RankingTrainer(policy, loss="tdpo2", learning_rate=0.01, batch_size=3, token_budget=8)
    plain_steps(trainer.optimizer)
    trainer.set_logger(Logger(folder=None, output_formats=[writer]))
    trainer.fit([TokenizedRankedList([i, 1], [[2] * (1 + k) for k in range(1 + i)], range(1 + i)) for i in range(4)])
    finish(trainer, folder / "ranking", writer)


def fit_rewards(model, folder):
    """Training of a reward model, likewise."""
    processes, writer = Processes(), Rows()
    trainer = RewardTrainer(
        moved(RewardModel(model, dtype="float32"), processes.index),
        unchanged_penalty=0.1,
        learning_rate=0.01,
        batch_size=3,
    )
    plain_steps(trainer.optimizer)
    trainer.set_logger(Logger(folder=None, output_formats=[writer]))
    pairs = [EditedPair("sky", "red sea " + "sky " * i, "blue sea " + "sky " * i) for i in range(4)]
    trainer.fit(tokenize_pairs(pairs, trainer.model.tokenizer, 64)[0])
    finish(trainer, folder / "reward", writer, trainer.model)


def finish(agent, folder, writer, model=None):
    folder.mkdir(parents=True, exist_ok=True)
    index = agent.processes.index
    weights = {n: p.detach().contiguous().clone() for n, p in (model or agent.policy).parameters().items()}
    save_file(weights, folder / f"{index}.safetensors")
    (folder / f"{index}.json").write_text(json.dumps(writer.rows), "utf-8")
    agent.save(folder / "checkpoint")
    assert (folder / "checkpoint" / "trainer.json").exists()  # also where another process wrote it


def main():
    torch.set_num_threads(1)
    model, folder = sys.argv[1], Path(sys.argv[2])
    for name in CASES:
        play(model, folder, name)
    fit(model, folder)
    fit_ranking(model, folder)
    fit_rewards(model, folder)


def launched(model, folder, count):
    """Runs this file in processes that find each other as those of ``accelerate launch`` do on several GPUs.

    On a CPU, ``accelerate launch`` itself starts several processes through MPI only.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, __file__, model, str(folder)],
            env=os.environ | common | {"RANK": str(i), "LOCAL_RANK": str(i), "ACCELERATE_USE_CPU": "true"},
        )
        for i in range(count)
    ]
    try:
        assert [process.wait(timeout=250) for process in started] == [0] * count
    finally:
        for process in started:
            process.kill()


@pytest.mark.slow
def test_two_processes_do_what_one_does(tmp_path):
    from tiny_models import build_model

    from instructgym.llm_backends.local.tokenization import WordTokenizer

    tokenizer, model = WordTokenizer(words=("red", "blue", "sea", "sky", "end")).hf, tmp_path / "model"
    network = build_model(vocabulary=len(tokenizer))
    network.generation_config.eos_token_id = tokenizer.eos_token_id
    network.save_pretrained(model)
    tokenizer.save_pretrained(model)
    for name in CASES:
        play(str(model), tmp_path / "alone", name)
    fit(str(model), tmp_path / "alone")
    fit_ranking(str(model), tmp_path / "alone")
    fit_rewards(str(model), tmp_path / "alone")
    launched(str(model), tmp_path / "together", 2)
    for name in [*CASES, "sft", "ranking", "reward"]:
        alone, together = tmp_path / "alone" / name, tmp_path / "together" / name
        expected, first, second = (
            load_file(p / f"{i}.safetensors") for p, i in ((alone, 0), (together, 0), (together, 1))
        )
        [rows, *others] = [json.loads(p.read_text("utf-8")) for p in (alone / "0.json", *together.glob("?.json"))]
        assert len(rows) == 2 and len(others) == 2
        for mine in others:
            for one, other in zip(rows, mine, strict=True):
                assert other == pytest.approx(one, abs=1e-5, rel=1e-5), name
        for key, weight in expected.items():
            assert torch.equal(first[key], second[key]), (name, key)
            torch.testing.assert_close(first[key], weight, atol=1e-5, rtol=1e-5, msg=lambda m: f"{name}: {key}: {m}")  # noqa: B023


# --- in one process ----------------------------------------------------------------------------------------------


def test_a_single_process_has_nothing_to_agree_on():
    processes = Processes()
    assert processes.is_main and processes.count == 1
    assert processes.gather({"a": 1}) == [{"a": 1}]
    assert processes.total(np.array([1.0, 2.0])).tolist() == [1, 2]
    assert processes.share(3).tolist() == [True] * 3
    weight = torch.nn.Parameter(torch.ones(2))
    processes.add_gradients([weight])
    assert weight.grad is None


def test_copies_are_shared_out_in_whole_groups():
    shares = []
    processes = Processes()
    processes.count = 3
    for processes.index in range(3):
        shares.append(processes.share(20, group_size=4))
    assert np.sum(shares, axis=0).tolist() == [1] * 20
    assert [share.sum() for share in shares] == [8, 8, 4]
    assert all((share.reshape(5, 4).any(axis=1) == share.reshape(5, 4).all(axis=1)).all() for share in shares)
    with pytest.raises(InputError, match="at least 3 groups of env copies, got 2 of 4"):
        processes.share(8, group_size=4)


if __name__ == "__main__":
    main()
