"""Embedders: unit vectors in order, one call of the model per batch, a bounded memory."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from instructgym.llm_backends import Embedder, UnknownPartError, part_ids, resolve
from instructgym.llm_backends.local.embeddings import FunctionEmbedder, HashingEmbedder


class Recording(Embedder):
    """Embeds a text as (length, 1) and remembers each batch that it was given."""

    dimension = 2

    def __init__(self, memory=4096):
        super().__init__(memory)
        self.batches = []

    def _embed(self, texts):
        self.batches.append(texts)
        return np.array([[len(text), 1] for text in texts], dtype=np.float64)


def expected(texts):
    vectors = np.array([[len(text), 1] for text in texts], dtype=np.float32).reshape(-1, 2)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


TEXTS = st.lists(st.sampled_from(["", "a", "bb", "ccc", "dddd", "eeeee"]), max_size=8)


@given(batches=st.lists(TEXTS, max_size=5), memory=st.integers(0, 4))
def test_any_memory_gives_the_same_vectors_in_order(batches, memory):
    embedder = Recording(memory)
    for texts in batches:
        calls = len(embedder.batches)
        vectors = embedder.embed(texts)
        assert vectors.shape == (len(texts), 2)
        assert vectors.dtype == np.float32
        np.testing.assert_allclose(vectors, expected(texts), rtol=1e-6)
        assert len(embedder.batches) - calls <= 1
    assert all(len(set(texts)) == len(texts) for texts in embedder.batches)


def test_a_remembered_text_costs_nothing():
    embedder = Recording()
    embedder.embed(["a", "bb", "a"])
    embedder.embed(["bb", "ccc"])
    embedder.embed(["ccc", "a"])
    assert embedder.batches == [["a", "bb"], ["ccc"]]
    assert (embedder.usage.calls, embedder.usage.requests, embedder.usage.cache_hits) == (2, 7, 4)


def test_the_texts_seen_last_are_remembered():
    embedder = Recording(memory=2)
    for text in ("a", "bb", "a", "ccc"):
        embedder.embed([text])
    embedder.embed(["a", "ccc"])
    assert embedder.batches == [["a"], ["bb"], ["ccc"]]


def test_results_are_the_callers_to_change():
    embedder = Recording()
    embedder.embed(["a"])[:] = 7
    np.testing.assert_allclose(embedder.embed(["a"]), expected(["a"]))


def test_a_text_without_tokens_has_the_zero_vector():
    vectors = HashingEmbedder().embed(["", "word"])
    assert np.linalg.norm(vectors, axis=1).tolist() == pytest.approx([0, 1])


def test_hashing_is_the_same_everywhere():
    one, other = HashingEmbedder(dimension=16), HashingEmbedder(dimension=16)
    texts = ["list three things", "list three words", "Things three list"]
    np.testing.assert_array_equal(one.embed(texts), other.embed(texts[::-1])[::-1])
    similarity = one.embed(texts) @ one.embed(texts).T
    assert similarity[0, 2] == pytest.approx(1)
    assert similarity[0, 1] < 0.99


def test_a_function_can_embed():
    embedder = resolve("embedder", lambda texts: np.array([[len(text), 0, 0] for text in texts]))
    assert isinstance(embedder, FunctionEmbedder)
    assert embedder.dimension == 3
    np.testing.assert_array_equal(embedder.embed(["ab", "abc"]), [[1, 0, 0], [1, 0, 0]])
    assert embedder.embed([]).shape == (0, 3)


def test_embedders_by_id():
    assert {"minilm", "sentence-transformers", "hashing"} <= set(part_ids("embedder"))
    assert resolve("embedder", {"id": "hashing", "kwargs": {"dimension": 8}}).dimension == 8
    assert resolve("embedder", "minilm").dimension == 384  # without loading it
    with pytest.raises(UnknownPartError, match="word2vec"):
        resolve("embedder", "word2vec")


@pytest.mark.slow
def test_minilm_knows_meaning():
    embedder = resolve("embedder", "minilm")
    vectors = embedder.embed(["The cat sleeps.", "A kitten is napping.", "Interest rates rose."])
    assert vectors.shape == (3, embedder.dimension)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    assert vectors[0] @ vectors[1] > 0.4 > vectors[0] @ vectors[2]
    by_path = resolve("embedder", {"id": "sentence-transformers", "kwargs": {"model": embedder.model}})
    assert by_path.dimension == 384
