"""The folder of embeddings: what is written is read, old files stay until new ones are whole,
damage is one line.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from imagenet_small import WNIDS

from matryoshka.checkpoint.model_file import load_model, save_model
from matryoshka.checkpoint.upstream import save_upstream
from matryoshka.embeddings import writing as embedding_writer
from matryoshka.embeddings.reading import (
    ARRAYS,
    EmbeddingError,
    labels_like,
    open_embeddings,
    trunk_sha256,
)
from matryoshka.embeddings.writing import EmbeddingWriter, RowWriter
from matryoshka.models import ModelSpec, build

META = {
    "format": "matryoshka-embeddings-1",
    "rows": 5,
    "columns": 3,
    "dtype": "float32",
    "normalised": False,
    "model": {"file": "a.pt", "weights_sha256": "00"},
    "code": {"version": "1"},
    "data": {"path": "x", "fingerprint": "ff", "num_classes": 2, "classes": None},
}


@settings(max_examples=40)
@given(
    st.lists(st.text(st.characters(), max_size=12), min_size=1, max_size=20),
    st.integers(1, 5),
    st.randoms(),
    st.sampled_from(["float32", "float16"]),
)
def test_rows_written_in_any_order_are_read(tmp_path_factory, names, columns, random, dtype):
    folder = tmp_path_factory.mktemp("any") / "e"
    n = len(names)
    values = np.random.default_rng(n).normal(size=(n, columns)).astype(dtype)
    meta = META | {"rows": n, "columns": columns, "dtype": dtype}
    order = random.sample(range(n), n)
    with EmbeddingWriter(folder) as unfinished:
        plan = unfinished.begin(meta, np.arange(n), names.__getitem__)
        with pytest.raises(EmbeddingError, match="not finished"):
            open_embeddings(folder)
        for rank in range(2):
            writer = RowWriter(folder, plan, rank)
            some = np.sort(np.array(order[rank::2], np.int64))
            if len(some):
                writer.write(some, values[some])
                writer.flush()
            writer.close()
        assert unfinished.begin(meta, np.arange(n), names.__getitem__).missing_rows == []
        unfinished.finish()
    found = open_embeddings(folder)
    assert np.array_equal(found.X, values)
    assert (list(found.ids), found.y.tolist(), len(found)) == (names, list(range(n)), n)
    assert sorted(p.name for p in folder.iterdir()) == sorted([*ARRAYS, "meta.json"])


def test_killed_ranks_keep_the_rows_that_they_flushed(tmp_path):
    with EmbeddingWriter(tmp_path) as unfinished:
        plan = unfinished.begin(META, np.zeros(5), str)
        for rank, rows in ((0, [0]), (1, [3, 4])):
            writer = RowWriter(tmp_path, plan, rank)
            writer.write(np.array(rows), np.ones((len(rows), 3)))
            writer.flush()
            writer.write(np.array([2]), np.ones((1, 3)))  # lost: not flushed
            writer.close()
        (tmp_path / ".unfinished" / "progress-7.json").write_text(
            '{"token": "of another start", "rows": [[0, 5]]}'
        )
        (tmp_path / ".unfinished" / "progress-8.json").write_text("half a fi")
    with EmbeddingWriter(tmp_path) as again, EmbeddingWriter(tmp_path) as third:
        assert again.begin(META, np.zeros(5), str)._replace(token=plan.token) == plan._replace(
            missing_rows=[(1, 3)]
        )
        with pytest.raises(EmbeddingError, match="another process"):
            third.begin(META, np.zeros(5), str)


def test_labels_of_one_data_set_as_those_of_another(tmp_path):
    def made(name, classes, labels):
        meta = META | {
            "data": META["data"] | {"classes": classes, "num_classes": len(classes or range(3))}
        }
        with EmbeddingWriter(tmp_path / name) as unfinished:
            plan = unfinished.begin(meta | {"rows": len(labels)}, np.array(labels), str)
            writer = RowWriter(tmp_path / name, plan)
            writer.write(np.arange(len(labels)), np.zeros((len(labels), 3)))
            writer.close()
            unfinished.finish()
        return open_embeddings(tmp_path / name)

    database = made("database", WNIDS, [0, 999])
    v2 = made("v2", sorted(map(str, range(1000))), [0, 1, 2, 999])  # folders 0, 1, 10, ..., 999
    assert labels_like(v2, database).tolist() == [0, 1, 10, 999]
    some = made("some", [WNIDS[7], "n00000000"], [1, 0, 0])
    assert labels_like(some, database).tolist() == [-1, 7, 7]
    nameless = made("nameless", None, [2, 1])
    assert labels_like(nameless, nameless).tolist() == [2, 1]
    for queries, target, words in ((some, v2, "none of its classes"), (nameless, v2, "no names")):
        with pytest.raises(EmbeddingError, match=words):
            labels_like(queries, target)
    with pytest.raises(EmbeddingError, match="outside"):
        labels_like(made("wrong", ["a", WNIDS[3]], [5]), database)


# ---------------------------------------------------------------- damage


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Files of small embeddings: {name: bytes}."""
    folder = tmp_path_factory.mktemp("sound") / "e"
    with EmbeddingWriter(folder) as unfinished:
        writer = RowWriter(folder, unfinished.begin(META, np.zeros(5), str))
        writer.write(np.arange(5), np.arange(15).reshape(5, 3))
        writer.close()
        unfinished.finish()
    return {file: (folder / file).read_bytes() for file in (*ARRAYS, "meta.json")}


@settings(max_examples=150)
@given(st.sampled_from([*ARRAYS, "meta.json"]), st.data())
def test_damaged_files_are_one_line(tmp_path_factory, sound, file, data):
    folder = tmp_path_factory.mktemp("damaged")
    content = bytearray(sound[file])
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    for name, good in sound.items():
        (folder / name).write_bytes(content if name == file else good)
    message = f"{folder}: one line"
    try:
        found = open_embeddings(folder)
        assert (found.X.shape, found.y.shape) == (
            (found.meta["rows"], found.meta["columns"]),
            (found.meta["rows"],),
        )
        assert len(found.X.tobytes()) == found.X.size * found.X.itemsize, (
            "not every byte can be read"
        )
        assert len(list(found.ids)) == len(found), "not every name can be read"
    except EmbeddingError as error:
        message = str(error)
    assert message.startswith(str(folder))
    assert "\n" not in message


def test_a_pickle_is_never_read(tmp_path, sound):
    for name, good in sound.items():
        (tmp_path / name).write_bytes(good)
    np.save(tmp_path / "y.npy", np.array([{}] * 5, dtype=object), allow_pickle=True)
    with pytest.raises(EmbeddingError, match=r"y\.npy.*object"):
        open_embeddings(tmp_path)


def test_old_embeddings_stay_until_the_new_are_whole(tmp_path, sound):
    for name, good in sound.items():
        (tmp_path / name).write_bytes(good)
    new = META | {"columns": 2}
    with EmbeddingWriter(tmp_path) as unfinished:
        plan = unfinished.begin(new, np.ones(5), str, overwrite=True)
        assert open_embeddings(tmp_path).X.shape == (5, 3), "the old rows"
        writer = RowWriter(tmp_path, plan)
        writer.write(np.arange(5), np.full((5, 2), 7))
        writer.flush()
        writer.close()
        assert open_embeddings(tmp_path).X[4, 2] == 14, (
            "the old rows must stay until the new ones are whole"
        )
        unfinished.finish()
    assert (open_embeddings(tmp_path).X == 7).all(), "the new rows"
    with EmbeddingWriter(tmp_path) as unfinished:
        unfinished.begin(META, np.ones(5), str, overwrite=True)  # and is killed
    with EmbeddingWriter(tmp_path) as unfinished:
        assert unfinished.begin(new, np.ones(5), str) is None  # already finished


def test_the_hash_is_that_of_the_trunk_alone(tmp_path):
    torch.manual_seed(0)
    model = build(ModelSpec("resnet10", 5, (8, 512)))
    before = trunk_sha256(model)
    save_model(model, tmp_path / "m.safetensors")
    save_upstream(model, tmp_path / "m.pt")
    assert {trunk_sha256(load_model(tmp_path / name)) for name in ("m.safetensors", "m.pt")} == {
        before
    }
    assert trunk_sha256(model.to(memory_format=torch.channels_last)) == before
    with torch.no_grad():
        model.head.heads[0].bias += 1
        assert trunk_sha256(model) == before
        next(model.trunk.parameters())[0, 0, 0, 0] += 1e-3
    assert trunk_sha256(model) != before


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with EmbeddingWriter(tmp_path) as unfinished:
        writer = RowWriter(tmp_path, unfinished.begin(META, np.zeros(5), str))
        monkeypatch.setattr(embedding_writer.os, "pwrite", full)
        with pytest.raises(EmbeddingError, match=r"X\.npy: No space left"):
            writer.write(np.arange(5), np.zeros((5, 3)))
        writer.close()
    with (
        EmbeddingWriter(tmp_path / "large") as unfinished,
        pytest.raises(EmbeddingError, match="GB are free"),
    ):
        unfinished.begin(META | {"rows": 1 << 44}, np.zeros(5), str)
