"""The page to try an index: number of neighbours, classes, predictions, files to save."""

import csv
import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from served import DIMS, EVIL, ROWS, batch_of, client_of, loaded, said

from matryoshka.data import CenterCrop
from matryoshka.data.augment import normalise
from matryoshka.data.images import read_images
from matryoshka.embeddings.reading import open_embeddings
from matryoshka.evaluation.embedding_map import make_map, write_map
from matryoshka.retrieval.store import Index
from matryoshka.retrieval.store_writer import Writer
from matryoshka.search_page import comparison
from matryoshka.search_page.classes import ClassRows
from matryoshka.search_page.download import FORMULA, plain_text


@pytest.fixture(scope="module")
def rows(made):
    return np.asarray(open_embeddings(made / "embeddings").X, np.float64)


@pytest.fixture(scope="module")
def class_of(made):
    embeddings = open_embeddings(made / "embeddings")
    classes = embeddings.meta["data"]["classes"]
    return [classes[label] for label in embeddings.y]


def nearest(rows, query, dim, allowed, k):
    """Row numbers by falling cosine of the first `dim` numbers, of `allowed` rows only."""
    prefixes = rows[:, :dim]
    cosines = prefixes @ query[:dim] / np.linalg.norm(prefixes, axis=1)
    return sorted(allowed, key=lambda row: -cosines[row])[:k]


def predicted_by_torch(made, pixels_file):
    """[(class, probability)] of the three best, by the whole model."""
    model, _ = loaded(made)
    images = read_images([pixels_file], CenterCrop(32, 0.875))
    prepared = normalise(
        torch.from_numpy(images), model.preprocessing.mean, model.preprocessing.std
    )
    with torch.no_grad():
        probabilities = model(prepared)[-1, 0].softmax(0)
    best = probabilities.argsort(descending=True)[:3].tolist()
    return [(model.classes[label], float(probabilities[label])) for label in best]


@pytest.mark.parametrize("k", [1, 7, 34, 100])
@pytest.mark.parametrize("classes", [(), ("cat",), ("ant", EVIL)])
def test_k_and_classes_choose_among_the_rows(client, rows, class_of, k, classes):
    row = 14
    answer = client.get("/api/neighbours", params={"row": row, "k": k, "class": classes}).json()
    allowed = [i for i in range(ROWS) if i != row and (not classes or class_of[i] in classes)]
    for column in [*answer["columns"], {**answer["adaptive"], "dim": DIMS[-1]}]:
        expected = nearest(rows, rows[row], column["dim"], allowed, k)
        found = [hit["row"] for hit in column["hits"]]
        assert sorted(found) == sorted(expected)  # equal cosines may change places
        assert [hit["class"] for hit in column["hits"]] == [class_of[i] for i in found]
        same = [class_of[i] == class_of[row] for i in found]
        assert [hit["same_class"] for hit in column["hits"]] == same
        assert column["same_class"] == sum(same)
    assert answer["expected_class"] == class_of[row]


def test_requests_for_what_an_index_lacks(client):
    for k in (0, -1, 101, 10**30):
        assert "k:" in said(client.get("/api/neighbours", params={"row": 0, "k": k}), 400)
    for path in ("neighbours", "neighbours.csv", "neighbours.json", "adaptive"):
        answer = client.get(f"/api/{path}", params={"row": 0, "class": ["cat", "dog"]})
        assert "no class" in said(answer, 400)
    assert "row" in said(client.get("/api/prediction"), 400)
    assert "row" in said(client.get("/api/prediction", params={"row": ROWS}), 404)
    assert "expired" in said(client.get("/api/prediction", params={"query": "?"}), 404)


def test_classes_are_listed_with_their_rows(client):
    listed = client.get("/api/classes").json()["classes"]
    assert listed == [
        {"name": EVIL, "rows": 12},
        {"name": "ant", "rows": 14},
        {"name": "cat", "rows": 9},
    ]


def test_parts_may_number_classes_differently(tmp_path, made):
    batch = batch_of(made / "embeddings")
    names = [f"more/{name}" for name in batch.names]
    classes = batch.classes
    assert classes is not None
    other = replace(
        batch, names=names, labels=2 - batch.labels, classes=[*reversed(classes), "n01440764"]
    )
    unnamed = replace(batch, names=[f"last/{name}" for name in batch.names], classes=None)
    with Writer(tmp_path / "i") as writer:
        writer.build(batch)
        writer.add(replace(other, labels=np.where(np.arange(ROWS) == 3, 3, other.labels)))
        writer.add(unnamed)
        index = writer.delete([batch.names[20]])
    known = ClassRows(index)
    assert known.names == sorted([*classes, "tench"])
    for name in known.names:
        own = [i for i in range(index.total) if index.class_name(i) == name]
        expected = [3 + ROWS] if name == "tench" else [i for i in own if i != 20]
        assert known.rows_of((name,)).tolist() == expected
    assert known.filter(()) is None


def test_predicted_classes_are_the_models(made, client):
    names = open_embeddings(made / "embeddings").ids
    for row in (0, 20, ROWS - 1):
        file = made / "photos" / names[row]
        expected = predicted_by_torch(made, file)
        key = client.post("/api/query", content=file.read_bytes()).json()["query"]
        for query in ({"row": row}, {"query": key}):
            classes = client.get("/api/prediction", params=query).json()["classes"]
            assert [one["class"] for one in classes] == [name for name, _ in expected]
            np.testing.assert_allclose(
                [one["probability"] for one in classes], [p for _, p in expected], atol=1e-3
            )
        answer = client.get("/api/neighbours", params={"query": key}).json()
        assert answer["expected_class"] == expected[0][0]  # the label of an upload is unknown


def test_an_index_without_classes_has_names_only(tmp_path, made):
    with Writer(tmp_path / "i") as writer:
        writer.build(replace(batch_of(made / "embeddings"), classes=None))
    shown, _ = client_of(made, tmp_path / "i")
    assert shown.get("/api/index").json()["classes"] == 0
    assert shown.get("/api/classes").json() == {"classes": []}
    answer = shown.get("/api/neighbours", params={"row": 3}).json()
    assert answer["expected_class"] is None
    for column in (*answer["columns"], answer["adaptive"]):
        assert column["same_class"] is None
        assert {hit["class"] for hit in column["hits"]} == {None}
        assert all(hit["name"] for hit in column["hits"])


def test_neighbours_are_saved_as_csv_and_json(client):
    params = {"row": 2, "k": 12}
    answer = client.get("/api/neighbours", params=params).json()
    saved = client.get("/api/neighbours.json", params=params)
    assert saved.json()["columns"] == answer["columns"]
    assert saved.headers["content-disposition"] == 'attachment; filename="neighbours.json"'
    answered = client.get("/api/neighbours.csv", params=params)
    assert answered.headers["content-type"].startswith("text/csv")
    assert answered.headers["content-disposition"] == 'attachment; filename="neighbours.csv"'
    assert "default-src 'none'" in answered.headers["content-security-policy"]
    lines = list(csv.DictReader(io.StringIO(answered.text)))
    assert len(lines) == 12 * (len(DIMS) + 1)
    expected = [
        (search, str(dim), str(rank), str(hit["row"]), hit["name"], hit["class"])
        for search, dim, column in (
            *(("exact", column["dim"], column) for column in answer["columns"]),
            ("adaptive", answer["adaptive"]["rerank"], answer["adaptive"]),
        )
        for rank, hit in enumerate(column["hits"], 1)
    ]
    assert expected == [
        tuple(line[c] for c in ("search", "dimensions", "rank", "row", "name", "class"))
        for line in lines
    ]
    refused = client.get(
        "/api/neighbours.csv", params=params, headers={"Sec-Fetch-Site": "cross-site"}
    )
    assert "site" in said(refused, 403)


@given(st.text())
def test_a_name_is_never_a_formula(name):
    cell = plain_text(name)
    assert not cell.startswith(FORMULA)
    assert not cell.lstrip().startswith(FORMULA)
    assert cell.endswith(name)
    assert cell in (name, f"'{name}")


def test_only_a_slow_index_needs_the_fast_search(made, tmp_path, monkeypatch):
    def exact_only(path=None):
        return client_of(made, path)[0].get("/api/index").json()["exact_only"]

    monkeypatch.setattr(comparison, "FAST_ENOUGH", 10.0)
    assert exact_only() is True
    monkeypatch.setattr(comparison, "MAX_TIMED_NUMBERS", ROWS * DIMS[-1] - 1)
    assert exact_only() is False
    monkeypatch.undo()
    monkeypatch.setattr(comparison, "FAST_ENOUGH", 0.0)
    assert exact_only() is False
    monkeypatch.setattr(comparison, "FAST_ENOUGH", 10.0)
    with Writer(tmp_path / "lists") as writer:
        writer.build(batch_of(made / "embeddings"), dim=8, lists=5)
    assert exact_only(tmp_path / "lists") is False


def test_a_picture_is_sent_up_to_1024_pixels(made, tmp_path, photo):
    (tmp_path / "photos" / "a").mkdir(parents=True)
    Image.fromarray(photo(1400, 700)).save(tmp_path / "photos" / "a" / "0.png")
    batch = batch_of(made / "embeddings")
    one = replace(
        batch,
        rows=batch.rows[:1],
        names=["a/0.png"],
        labels=batch.labels[:1],
        data=[{"path": str(tmp_path / "photos")}],
    )
    with Writer(tmp_path / "i") as writer:
        writer.build(one)
    shown, _ = client_of(made, tmp_path / "i")
    content = shown.get("/image/0", params={"size": 1024}).content
    with Image.open(io.BytesIO(content)) as image:
        assert image.size == (1024, 512)


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_the_map_has_the_rows_the_query_and_its_neighbours(made, tmp_path, method, photo):
    with Writer(tmp_path / "i") as writer:
        index = writer.build(batch_of(made / "embeddings"))
        stored = make_map(index.parts[0].rows, [8, 512], method=method, max_rows=30)
        write_map(index, stored)
        writer.delete([index.name(int(stored.rows[0]))])
    shown, _ = client_of(made, tmp_path / "i")
    assert shown.get("/api/index").json()["map"] == [8, 512]
    answer = shown.get("/api/map", params={"dim": 512}).json()
    rows = stored.rows[1:].tolist()  # the first one is deleted
    assert (answer["rows"], answer["method"]) == (rows, method)
    np.testing.assert_allclose(answer["points"], stored.points[1, 1:], atol=1e-4)
    index = Index(tmp_path / "i")
    assert answer["names"] == [index.name(row) for row in rows]
    assert [answer["classes"][one] for one in answer["class"]] == [
        index.class_name(row) for row in rows
    ]
    column = shown.get("/api/neighbours", params={"row": rows[2]}).json()["columns"][-1]
    places = dict(zip(rows, answer["points"], strict=True))
    np.testing.assert_allclose(column["map"]["query"], places[rows[2]], atol=1e-3)
    for hit, place in zip(column["hits"], column["map"]["hits"], strict=True):
        if hit["row"] in places:
            np.testing.assert_allclose(place, places[hit["row"]], atol=1e-3)
        else:
            assert (place is None) == (method == "tsne")
    file = io.BytesIO()
    Image.fromarray(photo(40, 40)).save(file, "PNG")
    key = shown.post("/api/query", content=file.getvalue()).json()["query"]
    uploaded = shown.get("/api/neighbours", params={"query": key}).json()["columns"]
    assert (uploaded[-1]["map"]["query"] is None) == (method == "tsne")
    assert uploaded[1]["map"] is None  # 32 dimensions have no map
    for dim in (32, -1, "x", None):
        said(
            shown.get("/api/map", params={"dim": dim} if dim else {}),
            404 if dim in (32, -1) else 400,
        )


def test_an_index_without_a_map(client):
    assert client.get("/api/index").json()["map"] is None
    assert "map" in said(client.get("/api/map", params={"dim": 8}), 404)
