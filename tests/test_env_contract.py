"""What Gymnasium and stable-baselines3 ask of every id: checkers, specs, seeding, options, bad arguments."""

import json
import subprocess
import sys
import types
import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env
from hypothesis import given
from hypothesis import strategies as st

import instructgym
from instructgym.envs.process import Unicode
from instructgym.llm_backends import ScriptedBackend, UnknownPartError
from instructgym.llm_backends.local.embeddings import HashingEmbedder
from instructgym.rewards import DiversityReward, FunctionReward

IDS = ("instructgym/EvolveInstruction-v0",)  # of the edit MDP; tests/test_token_env.py has those of the token MDP
QUICK = {"backend": "scripted", "embedder": "hashing"}
SEEDS = ["Name a bird that sings.", "Explain how rain forms.", "Describe a deep sea.", "Count the old trees."]
BOTH = {"id": "weighted-sum", "kwargs": {"terms": {"judge": "judge", "new": "diversity"}}}
PRESETS, NUMERIC = ("published", "corrected"), ("last_edit", "embedding")

ALL = pytest.mark.parametrize(
    ("env_id", "preset", "observation"),
    [(env_id, preset, mode) for env_id in IDS for preset in PRESETS for mode in (*NUMERIC, "text")],
)


def make(env_id="instructgym/EvolveInstruction-v0", **kwargs):
    return gym.make(env_id, **(QUICK | kwargs))


def plain(value):
    """The value with arrays as lists, so that it can be compared and kept."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return value.tolist() if isinstance(value, np.ndarray) else value


def play(env, actions, **reset):
    """Everything that an env says while the actions are played; episodes that end are followed by reset()."""
    observation, info = env.reset(**reset)
    said = [(plain(observation), plain(info))]
    for action in actions:
        observation, reward, terminated, truncated, info = env.step(action)
        said.append((plain(observation), reward, terminated, truncated, plain(info)))
        if terminated or truncated:
            observation, info = env.reset()
            said.append((plain(observation), plain(info)))
    return said


ACTIONS = np.random.default_rng(0).integers(6, size=25).tolist()


# --- checkers ----------------------------------------------------------------------------------------------------


@ALL
def test_gymnasiums_checker_finds_nothing(env_id, preset, observation):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(make(env_id, preset=preset, observation=observation, reward=BOTH).unwrapped)


@pytest.mark.parametrize("observation", NUMERIC)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("env_id", IDS)
def test_stable_baselines3s_checker_finds_nothing(env_id, preset, observation):
    from stable_baselines3.common.env_checker import check_env as check_sb3_env

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_sb3_env(make(env_id, preset=preset, observation=observation).unwrapped)


@ALL
def test_a_random_walk_stays_within_the_contract(env_id, preset, observation):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = make(env_id, preset=preset, observation=observation)
        env.action_space.seed(0)
        seen, info = env.reset(seed=0)
        for _ in range(20):
            assert env.observation_space.contains(seen)
            mask = info["action_mask"]
            assert mask.dtype == np.int8
            np.testing.assert_array_equal(env.unwrapped.action_masks(), mask.astype(bool))
            seen, reward, terminated, truncated, info = env.step(env.action_space.sample())
            assert type(reward) is float and type(terminated) is bool and type(truncated) is bool
            assert not truncated
            if terminated:
                seen, info = env.reset()


# --- making and specs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("env_id", IDS)
@pytest.mark.parametrize(("line", "prefix"), [("import instructgym", ""), ("", "instructgym:")])
def test_both_spellings_work_in_a_fresh_process(env_id, line, prefix):
    code = (
        f"{line}\nimport gymnasium\n"
        f"env = gymnasium.make({prefix + env_id!r}, backend='scripted', embedder='hashing')\n"
        "env.reset(seed=0); env.step(0); print('done')"
    )
    done = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "done", done.stderr


def test_registering_twice_changes_nothing():
    before = dict(gym.registry)
    instructgym.register_envs()
    assert gym.registry == before


@ALL
def test_a_spec_survives_json(env_id, preset, observation):
    env = make(env_id, preset=preset, observation=observation, reward=BOTH, seeds=SEEDS)
    spec = EnvSpec.from_json(env.spec.to_json())
    assert spec.kwargs["reward"] == BOTH
    assert play(gym.make(spec), ACTIONS, seed=4) == play(env, ACTIONS, seed=4)
    assert play(gym.make(env.spec), ACTIONS, seed=4) == play(env, ACTIONS, seed=4)


def test_a_vector_spec_survives_json():
    env = gym.make_vec("instructgym/EvolveInstruction-v0", num_envs=2, **QUICK, reward=BOTH)
    assert json.loads(env.spec.to_json())["kwargs"]["reward"] == BOTH


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("backend", ScriptedBackend()),
        ("backend", lambda prompt: "A rewrite."),
        ("reward", FunctionReward(lambda samples: [1.0] * len(samples))),
        ("reward", {"id": "judge", "kwargs": {"backend": ScriptedBackend()}}),
        ("judge_backend", ScriptedBackend()),
        ("embedder", HashingEmbedder()),
    ],
)
def test_a_live_part_works_but_cannot_be_saved(argument, value):
    for env in (
        make(**{argument: value}),
        gym.make_vec("instructgym/EvolveInstruction-v0", num_envs=2, **(QUICK | {argument: value})),
    ):
        env.reset(seed=0)
        with pytest.raises(ValueError, match=rf"argument '{argument}' holds a live.*{argument}=\"module:factory\""):
            env.spec.to_json()


def test_live_parts_are_shared_not_copied():
    backend, reward, embedder = ScriptedBackend(), DiversityReward("rouge"), HashingEmbedder()
    env = make(backend=backend, reward=reward, embedder=embedder, observation="embedding")
    play(env, [0, 1], seed=0)
    assert env.unwrapped.backend is backend and env.unwrapped.reward is reward
    assert backend.usage.calls == 2
    assert embedder.usage.calls == 3
    assert gym.make(env.spec).unwrapped.backend is backend


def test_parts_by_module_and_factory(monkeypatch):
    module = types.ModuleType("tests_of_parts")
    module.make_backend = lambda word="loudly": ScriptedBackend(reply=lambda prompt: f"Sing {word}.")
    module.make_reward = lambda: lambda samples: [float(len(s.response.split())) for s in samples]
    module.make_embedder = lambda: HashingEmbedder(8)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    env = make(
        backend={"id": "tests_of_parts:make_backend", "kwargs": {"word": "very softly"}},
        reward="tests_of_parts:make_reward",
        embedder="tests_of_parts:make_embedder",
        observation="embedding",
        seeds=SEEDS,
    )
    observation, _ = env.reset(seed=0)
    assert observation["embedding"].shape == (8,)
    _, reward, _, _, info = env.step(1)
    assert (info["text"], reward) == ("Sing very softly.", 3.0)
    again = gym.make(EnvSpec.from_json(env.spec.to_json()))
    again.reset(seed=0)
    assert again.step(1)[1] == 3.0


def test_time_limits_truncate():
    env = make(max_episode_steps=2, elimination=())
    env.reset(seed=0)
    assert env.step(0)[2:4] == (False, False)
    assert env.step(0)[2:4] == (False, True)


# --- seeding -----------------------------------------------------------------------------------------------------


@ALL
def test_same_seed_same_trajectory(env_id, preset, observation):
    first = make(env_id, preset=preset, observation=observation, reward=BOTH)
    second = make(env_id, preset=preset, observation=observation, reward=BOTH)
    said = play(first, ACTIONS, seed=7)
    assert play(second, ACTIONS, seed=7) == said
    assert play(first, ACTIONS, seed=7) == said  # a seed restores pool, carried text, data order, running mean
    assert play(first, ACTIONS, seed=8) != said


@pytest.mark.parametrize("preset", PRESETS)
def test_reset_without_a_seed_continues(preset):
    env = make(preset=preset, reward=BOTH, seeds=SEEDS, elimination=())
    said = play(env, ACTIONS, seed=7)
    assert play(env, ACTIONS) != said
    if preset == "published":
        assert env.unwrapped.process.episodes[0].start != SEEDS[0]


def test_an_env_need_not_be_seeded():
    assert len(play(make(), ACTIONS)) > len(ACTIONS)


def test_infos_and_observations_are_not_shared():
    env = make(observation="embedding", reward=BOTH, elimination=())
    observation, info = env.reset(seed=0)
    kept = [(observation, info)]
    for action in ACTIONS[:5]:
        observation, _, _, _, info = env.step(action)
        kept.append((observation, info))
    frozen = [plain(info) for _, info in kept]
    arrays = [array for seen, info in kept for array in (*seen.values(), info["action_mask"])]
    for array in arrays:
        assert sum(np.shares_memory(array, other) for other in arrays) == 1
    for _, info in kept:
        info["action_mask"][:] = 0
        info.get("reward_terms", {}).clear()
        info["text"] = "changed"
    _, _, _, _, info = env.step(0)
    assert info["action_mask"].all() and info["previous_text"] != "changed"
    assert frozen[1]["reward_terms"]


# --- options -----------------------------------------------------------------------------------------------------


def test_option_index_chooses_the_example_and_leaves_the_order_alone():
    env, untouched = make(seeds=SEEDS), make(seeds=SEEDS)
    order = [untouched.reset(seed=3)[1]["index"], *(untouched.reset()[1]["index"] for _ in range(3))]
    assert sorted(order) == [0, 1, 2, 3]
    assert env.reset(seed=3)[1]["index"] == order[0]
    for index, seed_text in enumerate(SEEDS):
        _, info = env.reset(options={"index": index})
        assert (info["index"], info["text"]) == (index, seed_text)
    assert [env.reset()[1]["index"] for _ in range(3)] == order[1:]


def test_option_prefix_is_the_text_to_start_from():
    env = make(seeds=SEEDS, observation="text")
    observation, info = env.reset(seed=0, options={"prefix": "Sing a song.", "index": 2})
    assert observation == info["text"] == "Sing a song."
    assert info["index"] == 2
    assert env.step(1)[4]["previous_text"] == "Sing a song."


def test_option_index_beats_a_carried_text():
    env = make(preset="published")
    play(env, ACTIONS, seed=0)
    assert env.reset()[1]["text"] != "How to cook food?"
    assert env.reset(options={"index": 0})[1]["text"] == "How to cook food?"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"idx": 1}, "unknown reset option 'idx'.*index"),
        ({"index": 4}, r"index'\] must be in \[0, 4\), got 4"),
        ({"index": -1}, r"index'\] must be in \[0, 4\), got -1"),
        ({"index": [0, 1]}, r"index'\] needs one entry per copy \(1\), got 2"),
        ({"prefix": "  "}, "prefix'.*non-empty"),
        ({"prefix": 5}, "prefix'.*non-empty"),
        ({"reset_mask": np.array([True])}, "reset_mask'.*vector"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(seeds=SEEDS).unwrapped.reset(seed=0, options=options)


# --- bad arguments -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"preset": "fixed"}, "unknown preset 'fixed'.*corrected"),
        ({"operations": ["shorten"]}, "unknown operation 'shorten'.*deepening"),
        ({"operations": []}, "at least one"),
        ({"operations": ["breadth", "breadth"]}, "distinct"),
        ({"elimination": ["length"]}, "unknown elimination rule 'length'.*refusal"),
        ({"observation": "pixels"}, "unknown observation mode 'pixels'.*last_edit"),
        ({"horizon": 0}, "horizon must be at least 1, got 0"),
        ({"horizon": -3}, "horizon must be at least 1, got -3"),
        ({"candidates": 0}, "candidates must be at least 1"),
        ({"max_words": 0}, "max_words must be at least 1"),
        ({"sampling": {"heat": 1}}, "unknown sampling parameter.*heat"),
        ({"sampling": {"top_p": 2}}, r"top_p must be in \(0, 1\]"),
        ({"on_invalid": "ignore"}, "on_invalid must be one of retry, raise"),
        ({"split": "dev"}, "unknown split 'dev'.*train"),
        ({"seeds": []}, "seeds is empty"),
        ({"seeds": "/no/such/file.txt"}, "/no/such/file.txt"),
        ({"backend": "gpt"}, "unknown backend 'gpt'.*embedded"),
        ({"backend": 3}, "3 is no backend"),
        ({"judge_backend": "gpt"}, "unknown backend 'gpt'"),
        ({"reward": "nice"}, "unknown reward 'nice'.*judge"),
        ({"reward": "no.such:thing"}, "cannot load reward 'no.such:thing'"),
        ({"reward": {"id": "judge", "kwargs": {"tone": 1}}}, "cannot build reward 'judge'.*tone"),
        ({"embedder": "bert", "observation": "embedding"}, "unknown embedder 'bert'.*minilm"),
        ({"operator": "shuffle"}, "unknown operator 'shuffle'"),
    ],
)
def test_bad_arguments_are_refused_with_a_clear_message(kwargs, message):
    with pytest.raises(ValueError, match=message) as single:
        make(**kwargs)
    with pytest.raises(ValueError, match=message):
        gym.make_vec("instructgym/EvolveInstruction-v0", num_envs=2, **(QUICK | kwargs))
    assert "\n" not in str(single.value)


def test_unknown_arguments_and_functions_as_operators_are_refused():
    with pytest.raises(TypeError, match="temprature"):
        make(temprature=1.0)
    with pytest.raises(UnknownPartError, match="is no operator"):
        make(operator=lambda text: text)


def test_actions_outside_the_space_are_refused():
    env = make().unwrapped
    env.reset(seed=0)
    for action in (6, -1, 1.5, "breadth"):
        with pytest.raises(ValueError, match=r"not in Discrete\(6\)"):
            env.step(action)


def test_reset_comes_first():
    with pytest.raises(RuntimeError, match=r"reset\(\)"):
        make().unwrapped.step(0)


# --- spaces ---------------------------------------------------------------------------------------------------


@given(st.text())
def test_unicode_holds_any_text_and_nothing_else(text):
    space = Unicode()
    assert space.contains(text)
    for other in (None, 3, text.encode("utf-8", "replace"), [text]):
        assert not space.contains(other)


def test_unicode_samples_are_seeded_and_bounded():
    one, other = Unicode(5, seed=1), Unicode(5, seed=1)
    samples = [one.sample() for _ in range(50)]
    assert samples == [other.sample() for _ in range(50)]
    assert {len(sample) for sample in samples} == set(range(6))
    with pytest.raises(ValueError, match="sample_length"):
        Unicode(0)


# --- rendering and closing ---------------------------------------------------------------------------------------


def test_rendering_shows_the_episode_line_by_line():
    env = make(render_mode="ansi", seeds=SEEDS, elimination=())
    env.reset(seed=0, options={"index": 1})
    assert env.render() == SEEDS[1]
    texts = [env.step(action)[4] for action in (0, 3)]
    lines = env.render().split("\n")
    assert lines[0] == SEEDS[1] and len(lines) == 3
    for line, info, name in zip(lines[1:], texts, ("breadth", "concretizing"), strict=True):
        assert line.startswith(f"{name}: {info['text']} [")


def test_render_modes():
    env = make()
    env.reset(seed=0)
    assert env.unwrapped.render() is None
    assert env.metadata["render_modes"] == ["ansi"]


def test_closing_twice():
    for env in (make(), gym.make_vec("instructgym/EvolveInstruction-v0", num_envs=2, **QUICK)):
        env.reset(seed=0)
        env.close()
        env.close()
