"""Agents: they learn where something can be learnt, baselines follow their rules, policies survive on disk."""

import json
import shutil
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from stable_baselines3.common.callbacks import CallbackList
from stable_baselines3.common.vec_env import VecMonitor, VecNormalize

import instructgym  # noqa: F401 - registers the ids
from instructgym.agents import (
    UnknownAlgorithmError,
    algorithm_names,
    load_policy,
    make_agent,
    normalize_observations,
    save_policy,
)
from instructgym.agents.sb3.callbacks import EpisodeRows, InvalidRewardGuard, StopAtDeadline
from instructgym.agents.sb3.factory import make_sb3_env
from instructgym.agents.sb3.policy_io import PolicyFileError
from instructgym.envs.edit.operators import load_operations
from instructgym.envs.process import InvalidRewardRateError
from instructgym.llm_backends import BackendError, ScriptedBackend

SEEDS = ["Name a bird that sings.", "Explain how rain forms.", "Describe a deep sea.", "Count the old trees."]
LEARNERS = ["TRPO", "PPO", "A2C", "DQN", "MaskablePPO", "RecurrentPPO"]
BASELINES = ["random", "round-robin", "schedule"]
MODES = pytest.mark.parametrize("observation", ["last_edit", "embedding"])


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def make(n=4, **kwargs):
    settings = {"backend": "scripted", "embedder": "hashing", "seeds": SEEDS, "elimination": ()}
    return make_sb3_env("instructgym/EvolveInstruction-v0", n, **(settings | kwargs))


def constant(samples):
    return [1.0] * len(samples)


def paying(*names, twice=True):
    """A backend that edits the text for some operations and repeats it for the others; as a judge it sees through that.

    The equality judge gives 1 where the text changed and 0, without a call, where it did not. With ``twice=False`` an
    operation that was the last to change the text does not pay again.
    """
    headers = {operation.header: operation.name for operation in load_operations()}

    def reply(prompt):
        header, *_, query = prompt.split("\n\n")
        text = query.removeprefix("Instruction: ").split("\n")[0]
        name = headers[header]
        pays = name in names and (twice or not text.endswith(f"{name}."))
        return f"{text} And {len(text)} by {name}." if pays else text

    return ScriptedBackend(reply=reply, score=lambda prompt, completion: -1.0 if "Not" in completion else -9.0)


def mean_return(agent, env, episodes=8):
    """Of deterministic play."""
    env.seed(123)
    observation, state, starts = env.reset(), None, np.ones(env.num_envs, dtype=bool)
    returns, running = [], np.zeros(env.num_envs)
    while len(returns) < episodes:
        action, state = agent.predict(observation, state, starts, deterministic=True)
        observation, rewards, starts, _ = env.step(action)
        running += rewards
        returns += running[starts].tolist()
        running[starts] = 0
    return float(np.mean(returns))


# --- learning ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("algorithm", ["TRPO", "PPO", "DQN"])
def test_agents_find_the_operations_that_pay(algorithm, seed):
    env = make(8, backend=paying("deepening", "complicate_input"))
    agent = make_agent(algorithm, env, seed=seed, n_steps=6)
    agent.learn(768)
    assert mean_return(agent, agent.get_env()) >= 0.9 * 6


@pytest.mark.parametrize("algorithm", ["TRPO", "PPO"])
def test_agents_use_what_they_see(algorithm):
    """The best return needs two operations in turn, so a policy that ignores the last edit gets a sixth of it."""
    env = make(8, backend=paying("deepening", "complicate_input", twice=False))
    agent = make_agent(algorithm, env, seed=0, n_steps=6)
    agent.learn(1152)
    assert mean_return(agent, agent.get_env()) >= 0.9 * 6


def test_baselines_cannot_find_them():
    env = make(8, backend=paying("deepening", "complicate_input"))
    for name, expected in (("random", 2.0), ("round-robin", 2.0), ("schedule", 4 / 3)):
        agent = make_agent(name, env, seed=0)
        assert mean_return(agent, env, episodes=80) == pytest.approx(expected, abs=0.35)


@pytest.mark.parametrize("name", LEARNERS)
@MODES
def test_every_algorithm_learns_and_predicts(name, observation):
    env = VecMonitor(make(observation=observation))
    agent = make_agent(name, env, seed=0, n_steps=6)
    agent.learn(48)
    assert agent.num_timesteps == 48
    batch = env.reset()
    actions, _ = agent.predict(batch, deterministic=True)
    assert actions.shape == (4,) and set(actions.tolist()) <= set(range(6))
    one = {key: rows[0] for key, rows in batch.items()} if isinstance(batch, dict) else batch[0]
    assert int(agent.predict(one, deterministic=True)[0]) == actions[0]
    assert all(torch.isfinite(parameter).all() for parameter in agent.policy.parameters())


def test_names_are_found_whatever_their_case():
    assert set(algorithm_names()) == {*LEARNERS, *BASELINES}
    assert type(make_agent("trpo", make())).__name__ == "TRPO"
    assert type(make_agent("Round-Robin", make())).__name__ == "RoundRobinAgent"


@pytest.mark.parametrize("name", ["SAC", "", "PPO2"])
def test_unknown_algorithms(name):
    with pytest.raises(UnknownAlgorithmError, match=f"unknown algorithm '{name}': use TRPO, .*schedule"):
        make_agent(name, make())


@pytest.mark.parametrize("name", ["PPO", "random"])
def test_unknown_arguments(name):
    with pytest.raises(ValueError, match=f"{name} has no argument 'temperature'"):
        make_agent(name, make(), temperature=1.0)


def test_arguments_replace_the_settings():
    agent = make_agent("PPO", make(), n_steps=3, gamma=0.5, n_epochs=2)
    assert (agent.gamma, agent.n_epochs, agent.n_steps, agent.batch_size) == (0.5, 2, 3, 12)


def test_trpo_has_the_papers_settings():
    agent = make_agent("TRPO", make())
    found = (agent.gamma, agent.gae_lambda, agent.target_kl, agent.cg_damping, agent.cg_max_steps)
    assert found == (0.995, 0.97, 0.01, 0.1, 10)
    layers = [type(layer).__name__ for layer in agent.policy.mlp_extractor.policy_net]
    assert layers == ["Linear", "ReLU"] * 2
    assert [layer.out_features for layer in agent.policy.mlp_extractor.policy_net[::2]] == [64, 64]


@pytest.mark.parametrize("name", ["TRPO", "PPO", "MaskablePPO", "A2C"])
@pytest.mark.parametrize("reward", [constant, lambda samples: [0.0] * len(samples)], ids=["one", "zero"])
@pytest.mark.parametrize("copies", [1, 4])
def test_equal_advantages_give_no_nan(name, reward, copies):
    """The original divides by a standard deviation without an epsilon, over one episode of six steps."""
    agent = make_agent(name, make(copies, reward=reward, horizon=1), seed=0, n_steps=6, gamma=0.0, gae_lambda=0.0)
    agent.learn(6 * copies * 3)
    assert all(torch.isfinite(parameter).all() for parameter in agent.policy.parameters())
    assert np.isfinite(agent.predict(agent.get_env().reset())[0]).all()


@pytest.mark.parametrize("name", [*LEARNERS, *BASELINES])
def test_same_seed_same_actions(name):
    def operations(seed):
        rows = []
        agent = make_agent(name, make(), seed=seed, n_steps=6)
        agent.learn(72, callback=EpisodeRows(rows.append))
        return [(row["operations"], row["text"], row["return"]) for row in rows]

    first = operations(3)
    assert operations(3) == first
    assert operations(4) != first


def test_maskable_ppo_takes_no_masked_action():
    infos = []

    class Watch(EpisodeRows):
        def _on_step(self):
            infos.extend(self.locals["infos"])
            return True

    env = make(max_words=6)  # masks most operations on these texts once they have grown
    make_agent("MaskablePPO", env, seed=0).learn(96, callback=Watch(print))
    assert any(not info["action_mask"].all() for info in infos)
    assert not any(info["masked"] for info in infos)
    infos.clear()
    make_agent("PPO", make(max_words=6), seed=0).learn(96, callback=Watch(print))
    assert any(info["masked"] for info in infos)  # others may try; it does nothing


# --- baselines ---------------------------------------------------------------------------------------------------


def acted(agent, steps, masks=None):
    """Actions of whole episodes, shape (steps, copies)."""
    n = agent.env.num_envs
    observation, state, starts, actions = np.zeros((n, 6), np.float32), None, np.ones(n, bool), []
    for step in range(steps):
        action, state = agent.predict(observation, state, starts, action_masks=masks)
        actions.append(action)
        starts = np.full(n, (step + 1) % 6 == 0)
    return np.array(actions)


def test_random_is_uniform_over_what_is_possible():
    agent = make_agent("random", make(8), seed=0)
    counts = Counter(acted(agent, 600).ravel().tolist())
    assert set(counts) == set(range(6))
    assert all(abs(count / 4800 - 1 / 6) < 0.025 for count in counts.values())
    mask = np.array([0, 1, 0, 0, 1, 0], dtype=np.int8)
    counts = Counter(acted(agent, 300, np.tile(mask, (8, 1))).ravel().tolist())
    assert set(counts) == {1, 4}
    assert abs(counts[1] / 2400 - 0.5) < 0.04


def test_round_robin_takes_turns_and_passes_over_the_impossible():
    agent = make_agent("round-robin", make(2))
    assert acted(agent, 12)[:, 0].tolist() == [*range(6), *range(6)]
    masks = np.ones((2, 6), bool)
    masks[1, [0, 3]] = False
    assert acted(agent, 6, masks).T.tolist() == [[0, 1, 2, 3, 4, 5], [1, 1, 2, 4, 4, 5]]


def test_round_robin_turns_with_more_steps_than_operations():
    agent = make_agent("round-robin", make(1, operations=["breadth", "deepening"]))
    actions, state = [], None
    for _ in range(5):
        action, state = agent.predict(np.zeros((1, 2)), state)
        actions.append(int(action[0]))
    assert actions == [0, 1, 0, 1, 0]


@pytest.mark.parametrize("operations", [None, ["deepening", "add_constraints", "breadth"]])
def test_the_schedule_has_breadth_at_one_and_four_and_nowhere_else(operations):
    env = make(8, operations=operations)
    breadth = env.get_attr("operations")[0].index("breadth")
    rows = []
    agent = make_agent("schedule", env, seed=1)
    agent.learn(6 * 8 * 20, callback=EpisodeRows(rows.append))
    assert len(rows) == 160
    for row in rows:
        assert [t for t, name in enumerate(row["operations"]) if name == "breadth"] == [1, 4]  # exactly 2 of 6
    actions = acted(agent, 60).reshape(10, 6, 8)
    assert ((actions == breadth) == np.isin(np.arange(6), (1, 4))[None, :, None]).all()


def test_the_schedule_puts_add_constraints_where_breadth_came_up():
    rows = []
    make_agent("schedule", make(8), seed=1).learn(6 * 8 * 40, callback=EpisodeRows(rows.append))
    free = [name for row in rows for t, name in enumerate(row["operations"]) if t not in (1, 4)]
    shares = {name: count / len(free) for name, count in Counter(free).items()}
    assert shares.pop("add_constraints") == pytest.approx(2 / 6, abs=0.05)
    assert len(shares) == 4 and all(share == pytest.approx(1 / 6, abs=0.04) for share in shares.values())


def test_the_schedule_respects_masks():
    agent = make_agent("schedule", make(4), seed=0)
    only_breadth = np.zeros((4, 6), bool)
    only_breadth[:, 0] = True
    assert not acted(agent, 6, only_breadth).any()


def test_the_schedule_needs_its_operations():
    with pytest.raises(ValueError, match=r"breadth and add_constraints; missing: \['breadth'\]"):
        make_agent("schedule", make(operations=["add_constraints", "deepening"]))


@pytest.mark.parametrize("name", BASELINES)
@MODES
def test_baselines_predict_like_any_agent(name, observation):
    env = make(3, observation=observation)
    agent = make_agent(name, env, seed=0)
    batch = env.reset()
    actions, state = agent.predict(batch, deterministic=True)
    assert actions.shape == (3,) and state[0].tolist() == [1, 1, 1]
    _, state = agent.predict(batch, state, np.array([False, True, False]))
    assert state[0].tolist() == [2, 1, 2]
    one = {key: rows[0] for key, rows in batch.items()} if isinstance(batch, dict) else batch[0]
    action, state = agent.predict(one, None, np.array([True]))
    assert np.ndim(action) == 0 and env.action_space.contains(action)
    action, state = agent.predict(one, state, np.array([False]), action_masks=np.eye(6, dtype=bool)[0])
    assert state[0].tolist() == [2] and action == 0


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_learn_and_log(name, tmp_path):
    from stable_baselines3.common.logger import configure

    agent = make_agent(name, make(4, reward=constant), n_steps=6)
    agent.set_logger(configure(str(tmp_path), ["json"]))
    assert agent.learn(96) is agent
    rows = [json.loads(line) for line in (tmp_path / "progress.json").read_text().splitlines()]
    assert [row["time/total_timesteps"] for row in rows] == [24, 48, 72, 96]
    assert rows[-1]["rollout/ep_rew_mean"] == rows[-1]["rollout/ep_len_mean"] == 6.0
    agent.learn(24, reset_num_timesteps=False)
    assert agent.num_timesteps == 96  # it had done that many already, as stable-baselines3 counts a total
    assert agent.learn(24).num_timesteps == 24


# --- saving ------------------------------------------------------------------------------------------------------


def trained(name, observation="last_edit", normalize=True, **kwargs):
    env = VecMonitor(make(observation=observation))
    agent = make_agent(name, normalize_observations(env) if normalize else env, seed=0, n_steps=6, **kwargs)
    agent.learn(96)
    return agent


@pytest.fixture(scope="module")
def saved_ppo(tmp_path_factory):
    """The folder of a trained policy; tests that change its files take a copy."""
    folder = tmp_path_factory.mktemp("saved") / "policy"
    save_policy(trained("PPO"), folder, "PPO", n_steps=6)
    return folder


def walk(env):
    """Raw observations along a fixed walk."""
    env.seed(77)
    seen = [env.reset()]
    for step in range(9):
        seen.append(env.step(np.arange(env.num_envs) + step % 3)[0])
    return seen


@pytest.mark.parametrize("name", LEARNERS)
@MODES
def test_a_saved_policy_acts_the_same(name, observation, tmp_path):
    agent = trained(name, observation)
    save_policy(agent, tmp_path / "policy", name, n_steps=6)
    loaded = load_policy(tmp_path / "policy", make(observation=observation), seed=5)
    old, new = agent.get_env(), loaded.get_env()
    assert isinstance(new, VecNormalize) and not new.training and new.clip_obs == 5.0 and not new.norm_reward
    for raw in walk(make(observation=observation)):
        before, after = old.normalize_obs(raw), new.normalize_obs(raw)
        pairs = [(before[k], after[k]) for k in before] if isinstance(before, dict) else [(before, after)]
        for one, other in pairs:
            np.testing.assert_array_equal(one, other)
            assert one.dtype == other.dtype == np.float32
        expected, _ = agent.predict(before, deterministic=True)
        np.testing.assert_array_equal(loaded.predict(after, deterministic=True)[0], expected)
    assert set(agent.policy.state_dict()) == set(loaded.policy.state_dict())


@MODES
def test_the_normaliser_of_a_loaded_policy_stands_still(observation, tmp_path):
    agent = trained("PPO", observation)
    save_policy(agent, tmp_path, "PPO", n_steps=6)
    env = load_policy(tmp_path, make(observation=observation)).get_env()

    def statistics():
        parts = env.obs_rms if isinstance(env.obs_rms, dict) else {"all": env.obs_rms}
        return {key: (part.mean.copy(), part.var.copy(), float(part.count)) for key, part in parts.items()}

    before = statistics()
    assert all(count > 90 for _, _, count in before.values())
    walk(env)
    for key, (mean, variance, count) in statistics().items():
        np.testing.assert_array_equal(mean, before[key][0])
        np.testing.assert_array_equal(variance, before[key][1])
        assert count == before[key][2]


@pytest.mark.parametrize("name", ["PPO", *BASELINES])
def test_without_a_normaliser(name, tmp_path):
    agent = trained(name, normalize=False)
    save_policy(agent, tmp_path, name, n_steps=6)
    loaded = load_policy(tmp_path, make())
    assert type(loaded) is type(agent)
    assert not isinstance(loaded.get_env(), VecNormalize)


def test_arguments_travel_with_the_policy(tmp_path):
    wide = {"gamma": 0.9, "policy_kwargs": {"net_arch": [8]}}
    save_policy(trained("PPO", **wide), tmp_path, "PPO", n_steps=6, **wide)
    loaded = load_policy(tmp_path, make())
    assert loaded.gamma == 0.9
    assert loaded.policy.mlp_extractor.policy_net[0].out_features == 8


def test_a_saved_policy_holds_no_pickle(tmp_path):
    agent = trained("TRPO")
    for _ in range(2):  # the second time over the old one
        save_policy(agent, tmp_path / "policy", "TRPO", n_steps=6)
    assert sorted(path.name for path in (tmp_path / "policy").iterdir()) == ["agent.json", "policy.safetensors"]
    settings = json.loads((tmp_path / "policy/agent.json").read_text())
    assert settings["algorithm"] == "TRPO" and settings["operations"][0] == "breadth"
    tensors = load_file(tmp_path / "policy/policy.safetensors")
    assert any(key.startswith("policy.") for key in tensors)
    assert any(key.startswith("normalizer.") for key in tensors)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"operations": ["deepening", "breadth"]}, "trained with operations .*complicate_input.*, the env has"),
        ({"no_op": True}, "trained with operations .*the env has .*no_op"),
        ({"observation": "embedding"}, "trained with observation .*the env has .*embedding"),
    ],
)
def test_a_policy_that_does_not_fit_the_env_is_refused(kwargs, message, saved_ppo):
    with pytest.raises(PolicyFileError, match=message):
        load_policy(saved_ppo, make(**kwargs))


def test_missing_and_broken_policy_files(tmp_path, saved_ppo):
    with pytest.raises(PolicyFileError, match="no trained policy in"):
        load_policy(tmp_path, make())
    shutil.copytree(saved_ppo, tmp_path, dirs_exist_ok=True)
    weights = tmp_path / "policy.safetensors"
    whole = weights.read_bytes()
    for broken in (b"", whole[:100], whole[:-100]):
        weights.write_bytes(broken)
        with pytest.raises(PolicyFileError, match="no weights in"):
            load_policy(tmp_path, make())
    weights.unlink()
    with pytest.raises(PolicyFileError, match="no weights in"):
        load_policy(tmp_path, make())
    (tmp_path / "agent.json").write_text('{"algorithm": ')
    with pytest.raises(PolicyFileError, match="no trained policy in"):
        load_policy(tmp_path, make())


def test_weights_of_another_network_are_refused(tmp_path, saved_ppo):
    shutil.copytree(saved_ppo, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "policy.safetensors")
    save_file({k: v for k, v in tensors.items() if "action_net" not in k}, tmp_path / "policy.safetensors")
    with pytest.raises(PolicyFileError, match="action_net"):
        load_policy(tmp_path, make())


# --- callbacks ---------------------------------------------------------------------------------------------------


def test_episode_rows():
    rows = []
    env = make(2, reward=constant, horizon=3)
    watch = EpisodeRows(rows.append)
    make_agent("round-robin", env, n_steps=3).learn(12, callback=watch)
    assert json.loads(json.dumps(rows)) == rows
    assert [row["episode"] for row in rows] == [1, 2, 3, 4]
    assert [row["timesteps"] for row in rows] == [6, 6, 12, 12]
    for row in rows:
        assert row["operations"] == ["breadth", "add_constraints", "deepening"]
        assert (row["return"], row["length"], row["finish_reason"]) == (3.0, 3, "horizon")
        assert (row["rewrite_calls"], row["judge_calls"]) == (3, 0)
        assert any(row["text"].startswith(text) for text in SEEDS)
    assert len({row["episode_id"] for row in rows}) == 4
    assert watch.calls == {"rewrite_calls": 12, "judge_calls": 0} and watch.episodes == 4


@pytest.mark.parametrize("name", ["TRPO", "DQN", "random"])
def test_episode_rows_account_for_every_step(name):
    rows = []
    make_agent(name, make(4, backend=paying("deepening")), seed=0).learn(96, callback=EpisodeRows(rows.append))
    assert sum(row["length"] for row in rows) == 96
    for row in rows:
        assert row["return"] == row["operations"].count("deepening") == row["judge_calls"]


@pytest.mark.parametrize("name", ["TRPO", "random"])
def test_the_guard_stops_training_on_made_up_rewards(name):
    env = make(4, backend=lambda prompt: BackendError("server is down"), reward=constant)
    with pytest.raises(InvalidRewardRateError, match=r"100% of the last \d+ rewards.*limit 20%.*server is down"):
        make_agent(name, env, seed=0).learn(600, callback=InvalidRewardGuard(0.2, window=24))


def test_the_guard_waits_for_half_a_window_and_tolerates_its_share():
    env = make(4, backend=lambda prompt: BackendError("server is down"), reward=constant)
    agent = make_agent("random", env, n_steps=1)
    agent.learn(8, callback=InvalidRewardGuard(0.2, window=24))
    assert agent.num_timesteps == 8
    for tolerant, share in ((env, 1.0), (make(4, reward=constant), 0.0)):
        agent = make_agent("random", tolerant)
        agent.learn(120, callback=InvalidRewardGuard(share, window=24))
        assert agent.num_timesteps >= 120


@pytest.mark.parametrize(("share", "window"), [(-0.1, 96), (1.1, 96), (0.2, 1)])
def test_bad_guards(share, window):
    with pytest.raises(ValueError, match="max_share must be"):
        InvalidRewardGuard(share, window)


def test_callbacks_log_shares_and_counts(tmp_path):
    from stable_baselines3.common.logger import configure

    agent = make_agent("round-robin", make(4, reward=constant), n_steps=6)
    agent.set_logger(configure(str(tmp_path), ["json"]))
    agent.learn(48, callback=CallbackList([EpisodeRows(lambda row: None), InvalidRewardGuard()]))
    row = json.loads((tmp_path / "progress.json").read_text().splitlines()[-1])
    assert row["operations/breadth"] == pytest.approx(1 / 6)
    assert (row["calls/rewrite"], row["calls/judge"], row["rollout/episodes"]) == (48, 0, 8)
    assert row["rollout/invalid_reward_share"] == 0


def test_a_deadline_stops_training():
    stop = StopAtDeadline(1e-9)
    agent = make_agent("PPO", make())
    agent.learn(10_000, callback=stop)
    assert stop.out_of_time and agent.num_timesteps == 4
    for never in (StopAtDeadline(0), StopAtDeadline(1e-9, clock_started=lambda: False)):
        make_agent("random", make()).learn(24, callback=never)
        assert not never.out_of_time


def test_making_agents_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in algorithm_names():
            make_agent(name, make()).learn(24)
