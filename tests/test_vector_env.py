"""The vector form: autoreset modes, equality with single envs, one call per role and step, shared epochs and pool."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

import instructgym  # noqa: F401 - registers the ids
from instructgym.llm_backends import BackendError, ScriptedBackend
from instructgym.llm_backends.local.embeddings import HashingEmbedder
from instructgym.rewards import FunctionReward

ENV_ID = "instructgym/EvolveInstruction-v0"
SEEDS = ["Name a bird that sings.", "Explain how rain forms.", "Describe a deep sea.", "Count the old trees."]
MODES = [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP, AutoresetMode.DISABLED]
QUICK = {"backend": "scripted", "embedder": "hashing"}
N = 3


def make(n=N, mode=AutoresetMode.SAME_STEP, **kwargs):
    return gym.make_vec(ENV_ID, num_envs=n, autoreset_mode=mode, **(QUICK | {"seeds": SEEDS} | kwargs))


def some_actions(steps, n=N, operations=6, seed=0):
    return np.random.default_rng(seed).integers(operations, size=(steps, n))


def plain(value):
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def row(batched, i):
    """Copy i's info out of a vector env's."""
    return {
        key: row(value, i) if isinstance(value, dict) else plain(value[i])
        for key, value in batched.items()
        if not key.startswith("_") and batched[f"_{key}"][i]
    }


def observation_of(batched, i):
    return {key: plain(part[i]) for key, part in batched.items()} if isinstance(batched, dict) else plain(batched[i])


# --- the contract of vector envs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [*MODES, *(mode.value for mode in MODES)])
def test_modes_by_enum_or_name(mode):
    env = make(mode=mode)
    assert env.metadata["autoreset_mode"] is AutoresetMode(mode)


def test_next_step_is_the_default_mode():
    env = gym.make_vec(ENV_ID, num_envs=2, **QUICK)
    assert env.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP


@pytest.mark.parametrize("observation", ["last_edit", "embedding", "text"])
@pytest.mark.parametrize("mode", MODES)
def test_spaces_types_and_masks(mode, observation):
    env = make(mode=mode, observation=observation)
    assert env.action_space == gym.spaces.MultiDiscrete([6] * N)
    seen, infos = env.reset(seed=0)
    for actions in some_actions(5):
        assert env.observation_space.contains(seen)
        assert infos["action_mask"].shape == env.action_masks().shape == (N, 6)
        seen, rewards, terminated, truncated, infos = env.step(actions)
        assert (rewards.dtype, rewards.shape) == (np.float64, (N,))
        assert terminated.dtype == truncated.dtype == bool and not truncated.any()


def test_next_step_mode_resets_in_the_step_after_the_last():
    env = make(mode=AutoresetMode.NEXT_STEP, horizon=2, elimination=())
    env.reset(seed=0)
    assert not env.step([0] * N)[2].any()
    assert env.step([0] * N)[2].all()
    observation, rewards, terminated, _, infos = env.step([5] * N)  # the action is ignored
    assert not observation.any() and not rewards.any() and not terminated.any()
    assert "index" in infos and "operation" not in infos
    assert env.step([5] * N)[0][:, 5].all()


def test_next_step_mode_steps_some_copies_while_others_reset():
    env = make(
        mode=AutoresetMode.NEXT_STEP, backend=lambda p: "Sorry." if "rain" in p[-60:] else "Sing it.", reward=ones
    )
    env.reset(seed=0, options={"index": [0, 1, 2]})
    _, _, terminated, _, infos = env.step([0] * N)
    assert terminated.tolist() == [False, True, False]
    _, rewards, terminated, _, infos = env.step([0] * N)
    assert terminated.tolist() == [True, False, True]  # "Sing it." again gains nothing
    assert rewards.tolist() == [0, 0, 0]
    assert infos["_operation"].tolist() == [True, False, True]
    assert infos["_index"].tolist() == [False, True, False]


def ones(samples):
    return [1.0] * len(samples)


@pytest.mark.parametrize("observation", ["last_edit", "embedding", "text"])
def test_same_step_mode_hands_out_the_last_observation_and_info(observation):
    env = make(horizon=2, elimination=(), observation=observation)
    env.reset(seed=0)
    env.step([1] * N)
    seen, _, terminated, _, infos = env.step([2] * N)
    assert terminated.all()
    assert infos["_final_obs"].all() and infos["_final_info"].all()
    for i in range(N):
        final, fresh = row(infos["final_info"], i), row(infos, i)
        assert (final["operation"], final["step"], final["finish_reason"]) == ("deepening", 2, "horizon")
        assert fresh["text"] == SEEDS[fresh["index"]]
        assert "operation" not in fresh
        last = infos["final_obs"][i]
        assert env.single_observation_space.contains(last)
        if observation == "text":
            assert (last, seen[i]) == (final["text"], fresh["text"])
        elif observation == "embedding":
            assert last["progress"] == 1 and seen["progress"][i] == 0
            np.testing.assert_array_equal(last["embedding"], HashingEmbedder().embed([final["text"]])[0])
            np.testing.assert_array_equal(seen["embedding"][i], HashingEmbedder().embed([fresh["text"]])[0])
        else:
            assert last[2] == 1 and not seen[i].any()


def test_disabled_mode_waits_for_a_reset_mask():
    env = make(mode=AutoresetMode.DISABLED, horizon=2, elimination=())
    env.reset(seed=0)
    env.step([0] * N)
    env.reset(options={"reset_mask": np.array([False, True, False])})
    observation, _, terminated, _, _ = env.step([3] * N)
    assert terminated.tolist() == [True, False, True]
    with pytest.raises(RuntimeError, match=r"copies \[0, 2\] have ended.*reset_mask"):
        env.step([0] * N)
    observation, infos = env.reset(options={"reset_mask": terminated})
    assert infos["_text"].tolist() == [True, False, True]
    assert observation[1, 3] == 1 and not observation[[0, 2]].any()  # copy 1 goes on
    assert env.step([0] * N)[2].tolist() == [False, True, False]


@pytest.mark.parametrize("mode", MODES)
def test_a_reset_clears_what_had_ended(mode):
    env = make(mode=mode, horizon=1)
    env.reset(seed=0)
    env.step([0] * N)
    observation, _ = env.reset()
    assert not observation.any()
    assert env.step([4] * N)[2].all()


@pytest.mark.parametrize(
    "mask",
    [
        [True, False, False],
        np.array([1, 0, 0]),
        np.array([True, False]),
        np.zeros(N, bool),
        np.ones((N, 1), bool),
        "all",
    ],
)
def test_wrong_reset_masks_are_refused(mask):
    env = make(mode=AutoresetMode.DISABLED)
    env.reset(seed=0)
    # As Gymnasium's vector envs: TypeError for what is no bool array, ValueError for its shape and for no copy at all.
    error = ValueError if isinstance(mask, np.ndarray) and mask.dtype == bool else TypeError
    with pytest.raises(error, match="reset_mask"):
        env.reset(options={"reset_mask": mask})


def test_seeds_of_the_copies_are_told_as_gymnasium_tells_them():
    env = make(mode=AutoresetMode.DISABLED)
    env.reset(seed=42)
    assert env.np_random_seed == (42, 43, 44)
    env.reset()
    assert env.np_random_seed == (42, 43, 44), "without a seed the generators go on"
    env.reset(seed=[7, None, 9])
    assert env.np_random_seed == (7, 43, 9)
    env.reset(seed=[1, 2, 3], options={"reset_mask": np.array([False, True, False])})
    assert env.np_random_seed == (7, 2, 9) and env.np_random == tuple(env.process.generators)


def test_bad_arguments():
    with pytest.raises(ValueError, match="num_envs must be at least 1"):
        make(n=0)
    with pytest.raises(ValueError, match="Sometimes"):
        make(mode="Sometimes")
    env = make()
    with pytest.raises(ValueError, match="one seed per copy"):
        env.reset(seed=[1, 2])
    with pytest.raises(ValueError, match="unknown reset option 'idx'"):
        env.reset(options={"idx": 0})
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"one action per copy is needed \(3\), got 2"):
        env.step([0, 0])
    with pytest.raises(ValueError, match=r"not in Discrete\(6\)"):
        env.step([0, 0, 6])


@pytest.mark.parametrize("mode", MODES[:2])
def test_episode_statistics(mode):
    env = gym.wrappers.vector.RecordEpisodeStatistics(make(mode=mode, horizon=2, elimination=(), reward=ones))
    env.reset(seed=0)
    seen = []
    for _ in range(6):
        infos = env.step([0] * N)[4]
        if "episode" in infos:
            seen.append((infos["episode"]["r"].tolist(), infos["episode"]["l"].tolist()))
    assert seen == [([2.0] * N, [2] * N)] * (2 if mode is AutoresetMode.NEXT_STEP else 3)


def test_gymnasiums_own_vector_envs_work_too():
    env = gym.make_vec(ENV_ID, num_envs=2, vectorization_mode="sync", **QUICK, observation="text")
    observations, _ = env.reset(seed=0)
    assert len(observations) == 2
    assert env.step(np.array([0, 1]))[1].shape == (2,)


def test_rendering():
    env = make(render_mode="ansi")
    env.reset(seed=0)
    env.step([0, 1, 2])
    lines = [text.split("\n") for text in env.render()]
    assert [len(text) for text in lines] == [2] * N
    assert [text[1].split(":")[0] for text in lines] == ["breadth", "add_constraints", "deepening"]
    assert make().render() is None


# --- seeds, and equality with single envs ------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["published", "corrected"])
@pytest.mark.parametrize("mode", MODES[:2])
def test_same_seed_same_trajectory(mode, preset):
    def play(env, seed):
        said = [plain(env.reset(seed=seed))]
        return said + [plain(list(map(plain, env.step(actions)))) for actions in some_actions(15)]

    both = {"id": "weighted-sum", "kwargs": {"terms": {"judge": "judge", "new": "diversity"}}}
    first, second = (make(mode=mode, preset=preset, reward=both) for _ in range(2))
    said = repr(play(first, 5))
    assert repr(play(second, 5)) == said
    assert repr(play(first, 5)) == said
    assert repr(play(first, [5, 6, 7])) == said
    assert repr(play(first, 6)) != said


@pytest.mark.parametrize("observation", ["last_edit", "embedding"])
@pytest.mark.parametrize("mode", MODES)
def test_copy_i_is_a_single_env_seeded_with_s_plus_i(mode, observation):
    """The published preset shares nothing: one example, no pool."""
    kwargs = {"preset": "published", "seeds": None, "observation": observation}
    env, steps = make(mode=mode, **kwargs), 20
    actions = some_actions(steps)
    seen, infos = env.reset(seed=11)
    stories = [[(observation_of(seen, i), row(infos, i))] for i in range(N)]
    for taken in actions:
        seen, rewards, terminated, _, infos = env.step(taken)
        if mode is AutoresetMode.DISABLED and terminated.any():
            for i in np.flatnonzero(terminated):
                stories[i].append((observation_of(seen, i), rewards[i], True, row(infos, i)))
            done, (seen, infos) = terminated, env.reset(options={"reset_mask": terminated})
            for i in np.flatnonzero(done):
                stories[i].append((observation_of(seen, i), row(infos, i)))
            assert done.all()  # the horizon is the only end, so all end together
            continue
        for i in range(N):
            if mode is AutoresetMode.SAME_STEP and terminated[i]:
                final = row(infos, i).pop("final_info")
                stories[i].append((plain(infos["final_obs"][i]), rewards[i], True, final))
                fresh = {k: v for k, v in row(infos, i).items() if k not in ("final_obs", "final_info")}
                stories[i].append((observation_of(seen, i), fresh))
            elif "index" in row(infos, i):  # NEXT_STEP: this was a reset
                stories[i].append((observation_of(seen, i), row(infos, i)))
            else:
                stories[i].append((observation_of(seen, i), rewards[i], bool(terminated[i]), row(infos, i)))
    for i in range(N):
        single = gym.make(ENV_ID, **QUICK, preset="published", observation=observation)
        seen, info = single.reset(seed=11 + i)
        story, ended = [(plain(seen), plain(info))], False
        for action in actions[:, i]:
            if ended and mode is AutoresetMode.NEXT_STEP:
                seen, info = single.reset()
                story.append((plain(seen), plain(info)))
                ended = False
                continue
            seen, reward, ended, _, info = single.step(action)
            story.append((plain(seen), reward, ended, plain(info)))
            if ended and mode is not AutoresetMode.NEXT_STEP:
                seen, info = single.reset()
                story.append((plain(seen), plain(info)))
        assert stories[i] == story


def test_copies_equal_single_envs_on_chosen_examples():
    env = make(mode=AutoresetMode.DISABLED, horizon=4)
    singles = [gym.make(ENV_ID, **QUICK, seeds=SEEDS, horizon=4) for _ in range(N)]
    index = [2, 0, 3]
    _, infos = env.reset(seed=3, options={"index": index})
    starts = [single.reset(seed=3 + i, options={"index": index[i]})[1] for i, single in enumerate(singles)]
    assert [row(infos, i) for i in range(N)] == [plain(info) for info in starts]
    for actions in some_actions(12, seed=1):
        seen, rewards, terminated, _, infos = env.step(actions)
        for i, single in enumerate(singles):
            observation, reward, ended, _, info = single.step(actions[i])
            assert (plain(observation), reward, ended, plain(info)) == (
                plain(seen[i]),
                rewards[i],
                terminated[i],
                row(infos, i),
            )
        if terminated.any():
            _, infos = env.reset(options={"reset_mask": terminated, "index": index})
            for i in np.flatnonzero(terminated):
                assert plain(singles[i].reset(options={"index": index[i]})[1]) == row(infos, i)


def test_a_copys_story_does_not_depend_on_who_else_is_there():
    def texts(n):
        env = make(n=n, preset="published", seeds=None)
        env.reset(seed=0)
        return [env.step([step % 6] * n)[4]["text"][0] for step in range(5)]

    assert texts(1) == texts(2) == texts(5)


def test_a_seed_with_a_mask_reseeds_those_copies_only():
    env = make(mode=AutoresetMode.DISABLED, preset="published", seeds=None, carry_text=False)
    mask = np.array([False, True, False])

    def after(seed):
        env.reset(seed=0)
        env.reset(seed=seed, options={"reset_mask": mask})
        return env.step([0] * N)[4]["text"].tolist()

    one, other = after(50), after(60)
    assert one[0] == other[0] and one[2] == other[2]
    assert one[1] != other[1]
    assert after([None, 50, None])[1] != after([None, 60, None])[1]
    assert after(50) == one


# --- what copies share -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("mode", MODES[:2])
def test_epochs_are_shared_without_replacement(mode, n):
    env = make(n=n, mode=mode, horizon=1, elimination=())
    _, infos = env.reset(seed=0)
    drawn = infos["index"].tolist()
    while len(drawn) < 5 * len(SEEDS):
        infos = env.step([0] * n)[4]
        drawn += infos["index"][infos["_index"]].tolist() if "index" in infos else []
    epochs = [sorted(drawn[start : start + len(SEEDS)]) for start in range(0, 5 * len(SEEDS), len(SEEDS))]
    assert epochs == [[0, 1, 2, 3]] * 5


def test_options_may_be_given_per_copy_or_for_all():
    env = make()
    _, infos = env.reset(seed=0, options={"index": np.array([3, 3, 0])})
    assert infos["index"].tolist() == [3, 3, 0]
    _, infos = env.reset(options={"index": 1})
    assert infos["text"].tolist() == [SEEDS[1]] * N
    _, infos = env.reset(options={"prefix": ["One.", None, "Three."], "index": [0, 2, None]})
    assert infos["text"].tolist() == ["One.", SEEDS[2], "Three."]
    with pytest.raises(ValueError, match=r"one entry per copy \(3\), got 2"):
        env.reset(options={"index": [0, 1]})
    with pytest.raises(ValueError, match=r"prefix'\] must be a non-empty text, got ''"):
        env.reset(options={"prefix": ["a", "", "b"]})


def test_copies_share_one_pool_by_its_state_at_the_start_of_the_step():
    env = make(backend=lambda prompt: "Name a fish.", reward="diversity", elimination=(), horizon=3)
    env.reset(seed=0)
    first = env.step([0] * N)[1]
    assert (first > 0.4).all()  # three equal texts at once are all new
    assert env.step([0] * N)[1] == pytest.approx(np.zeros(N), abs=1e-6)
    assert env.reward.pool == ["Name a fish."] * 6


def test_texts_enter_the_pool_in_the_order_of_the_copies():
    env = make(reward="diversity", elimination=())
    env.reset(seed=0)
    texts = []
    for actions in some_actions(4):
        texts += env.step(actions)[4]["text"].tolist()
    assert env.reward.pool == texts


def test_the_running_mean_of_valid_rewards_is_shared():
    def reply(prompt):
        return BackendError("no") if prompt[-80:].count("rain") else "Name a fish."

    env = make(backend=reply, reward=FunctionReward(lambda samples: [0.5] * len(samples)), elimination=())
    env.reset(seed=0, options={"index": [0, 1, 2]})
    _, rewards, _, _, infos = env.step([0] * N)
    assert rewards.tolist() == [0.5, 0.5, 0.5]
    assert infos["reward_valid"].tolist() == [True, False, True]


@pytest.mark.parametrize("mode", MODES[:2])
def test_a_vector_step_costs_one_call_per_role(mode):
    n = 8
    rewriter, judge, embedder = ScriptedBackend(), ScriptedBackend(), HashingEmbedder()
    terms = {"judge": "judge", "new": "diversity", "rules": "judged-elimination"}
    env = make(
        n=n,
        mode=mode,
        backend=rewriter,
        judge_backend=judge,
        embedder=embedder,
        observation="embedding",
        reward={"id": "weighted-sum", "kwargs": {"terms": terms}},
        max_words=20,
    )
    env.reset(seed=0)
    for actions in some_actions(20, n=n):
        before = rewriter.usage.calls, judge.usage.calls, embedder.usage.calls
        infos = env.step(actions)[4]
        started = "index" in infos
        assert rewriter.usage.calls - before[0] <= 1
        assert judge.usage.calls - before[1] <= 2  # two roles: equality and elimination
        assert embedder.usage.calls - before[2] <= 1 + started  # the reward's; the observation's of new examples
    assert rewriter.usage.requests > 100


def test_unequal_copies_are_one_call_too():
    backend = ScriptedBackend()
    env = make(backend=backend, no_op=True, reward=ones)
    env.reset(seed=0, options={"prefix": ["One two.", " ".join(["word"] * 201), None]})
    infos = env.step([1, 1, 6])[4]  # an edit, a masked action, the no-op
    assert (backend.usage.calls, backend.usage.requests) == (1, 1)
    assert infos["rewrite_calls"].tolist() == [1, 0, 0]
    assert infos["masked"].tolist() == [False, True, False]


@pytest.mark.slow
def test_the_embedded_model_writes_the_same_alone_and_in_company():
    """Log-probs of a batch differ in the last bits, so texts can part at a tie; at these seeds none does."""
    n, steps = 8, 2
    kwargs = {"seeds": SEEDS, "elimination": (), "horizon": steps}
    env = gym.make_vec(ENV_ID, num_envs=n, autoreset_mode="Disabled", **kwargs)
    index, actions = [i % len(SEEDS) for i in range(n)], some_actions(steps, n=n)
    env.reset(seed=0, options={"index": index})
    together = np.array([env.step(taken)[4]["text"] for taken in actions])
    assert env.backend.usage.calls == steps
    alone = []
    some = [0, 3, 7]
    for i in some:
        single = gym.make(ENV_ID, **kwargs)
        single.reset(seed=i, options={"index": index[i]})
        alone.append([single.step(action)[4]["text"] for action in actions[:, i]])
    assert together.T[some].tolist() == alone
