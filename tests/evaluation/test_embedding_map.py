"""Two-dimensional maps: PCA against a singular value decomposition, the file of an index."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matryoshka.inference import index as index_program
from sklearn.decomposition import PCA

from matryoshka.evaluation.embedding_map import (
    MAP_FILE,
    embedding_map,
    make_map,
    map_dims,
    read_map,
    remove_map,
    write_map,
)
from matryoshka.retrieval.store import Index
from matryoshka.retrieval.store_writer import IndexRows, Writer

MODEL = {"weights_sha256": "ab", "file": "m", "dims": [4, 16]}


def clusters(n, d, seed=0):
    """Embeddings around three centres, float32 [n, d]."""
    rng = np.random.default_rng(seed)
    centres = 3 * rng.standard_normal((3, d))
    return (centres[np.arange(n) % 3] + rng.standard_normal((n, d))).astype(np.float32)


def by_svd(rows):
    """The two principal components of rows that are scaled to length 1, float64 [n, 2]."""
    unit = rows.astype(np.float64) / np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    centred = unit - unit.mean(0)
    left, lengths, _ = np.linalg.svd(centred, full_matrices=False)
    return left[:, :2] * lengths[:2]


def same_up_to_sign(a, b):
    for one, other in zip(a.T, b.T, strict=True):
        sign = np.sign(one @ other)
        np.testing.assert_allclose(one, sign * other, atol=2e-3 * np.abs(other).max())


@pytest.fixture
def index(tmp_path):
    rows = clusters(90, 16)
    names = [f"{i}" for i in range(90)]
    with Writer(tmp_path / "i", 1) as writer:
        return writer.build(IndexRows(rows, names, np.zeros(90, int), MODEL, {}))


@pytest.mark.parametrize("d", [3, 20, 300])
def test_pca_is_that_of_a_decomposition_and_of_scikit_learn(d):
    rows = clusters(120, d)
    found = embedding_map(rows)
    assert (found.shape, found.dtype) == ((120, 2), np.float32)
    same_up_to_sign(found, by_svd(rows))
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    same_up_to_sign(found, PCA(2, svd_solver="full").fit_transform(unit))


def test_rows_outside_of_the_sample_and_bad_rows_have_no_point():
    rows = clusters(50, 8)
    rows[7] = np.nan
    rows[9, 3] = np.inf
    found = embedding_map(rows, max_rows=20, seed=3)
    placed = np.isfinite(found).all(1)
    assert 18 <= placed.sum() <= 20
    assert not placed[[7, 9]].any()
    np.testing.assert_array_equal(found, embedding_map(rows, max_rows=20, seed=3))
    same_up_to_sign(found[placed], by_svd(rows[placed]))
    with pytest.raises(ValueError, match="umap"):
        embedding_map(rows, method="umap")


def test_tsne_keeps_clusters_together():
    rows = clusters(60, 12)
    found = embedding_map(rows, method="tsne", seed=1)
    distances = np.linalg.norm(found[:, None] - found[None], axis=2)
    np.fill_diagonal(distances, np.inf)
    assert (distances.argmin(1) % 3 == np.arange(60) % 3).mean() > 0.9


@settings(max_examples=40)
@given(st.integers(0, 6), st.integers(1, 4), st.floats(0, 1e30), st.sampled_from(["pca", "tsne"]))
def test_few_rows_and_equal_rows_have_finite_points(n, d, scale, method):
    found = embedding_map(np.full((n, d), scale, np.float32), method=method)
    assert found.shape == (n, 2)
    assert np.isfinite(found).all()


def test_pca_places_other_rows_where_it_would_have_put_them():
    rows = clusters(200, 16)
    made = make_map(rows, [4, 16], max_rows=50)
    for at, dim in enumerate(made.dims):
        np.testing.assert_allclose(made.place(dim, rows[made.rows]), made.points[at], atol=1e-4)
        same_up_to_sign(made.points[at], by_svd(rows[made.rows][:, :dim]))
    assert np.isnan(make_map(rows[:9], [16], method="tsne").place(16, rows)).all()
    assert map_dims([8, 16, 32], "pca") == [8, 16, 32]
    assert map_dims([8, 16, 32], "tsne") == [8, 32]


def test_a_map_is_stored_with_its_index_and_belongs_to_its_rows(index):
    made = make_map(index.parts[0].rows, [4, 16])
    write_map(index, made)
    stored = read_map(Index(index.path))
    assert stored is not None
    assert stored.dims == (4, 16)
    np.testing.assert_array_equal(stored.points, made.points)
    with Writer(index.path) as writer:
        kept = writer.delete(["3"])  # rows keep their numbers
        assert read_map(kept) is not None
        assert read_map(writer.compact()) is None
    remove_map(kept)
    assert read_map(kept) is None


def test_a_damaged_map_is_as_none(index):
    write_map(index, make_map(index.parts[0].rows, [4, 16]))
    file = index.path / MAP_FILE
    whole = file.read_bytes()
    for damaged in (b"", b"PK", whole[:-30], whole[: len(whole) // 2], b"x" + whole[1:]):
        file.write_bytes(damaged)
        assert read_map(index) is None
    made = make_map(index.parts[0].rows, [4, 16])
    for wrong in (
        {"rows": made.rows + 5},
        {"dims": (4, 17)},
        {"points": made.points[:, 1:]},
        {"means": np.full_like(made.means, np.nan)},
        {"method": "umap"},
    ):
        write_map(index, made._replace(**wrong))
        assert read_map(index) is None


def test_the_program_makes_and_renews_it(embeddings_folder, tmp_path, capsys):
    path = tmp_path / "photos.index"
    build = ["build", str(path), "--embeddings", str(embeddings_folder)]
    assert index_program.main(build) == 0
    first = read_map(Index(path))
    assert first is not None
    assert first.method == "pca"
    assert first.dims[-1] == Index(path).columns
    assert index_program.main(["delete", str(path), Index(path).name(0)]) == 0
    assert index_program.main(["compact", str(path)]) == 0
    renewed = read_map(Index(path))
    assert renewed is not None
    assert len(renewed.rows) == len(first.rows) - 1
    assert index_program.main([*build, "--overwrite", "--map", "none"]) == 0
    assert read_map(Index(path)) is None
    assert not (path / MAP_FILE).exists()
    with pytest.raises(SystemExit):
        index_program.main([*build, "--map", "umap"])
    assert "--map" in capsys.readouterr().err


@pytest.fixture
def embeddings_folder(tmp_path_factory, photo):
    from served import made_once

    return made_once(tmp_path_factory, photo) / "embeddings"
