"""The page to try an index: what it answers against brute force, what it does when the index
changes, the program.
"""

import io
import shutil
import socket
import sys
from dataclasses import replace

import numpy as np
import pytest
from matryoshka.inference import serve
from PIL import Image
from served import DIMS, EVIL, ROWS, batch_of, client_of, embedded, loaded, said

from matryoshka.checkpoint.model_file import save_model
from matryoshka.data import CenterCrop, ImageFolder, Loader, write_beton
from matryoshka.data.images import central_square
from matryoshka.embeddings.reading import open_embeddings
from matryoshka.models import ModelSpec, build
from matryoshka.retrieval.store import Index
from matryoshka.retrieval.store_writer import IndexRows, Writer
from matryoshka.search_page import Pictures, Refusal, comparison, pictures


@pytest.fixture
def changed(made, tmp_path):
    """A copy of the index that a test may change."""
    shutil.copytree(made / "photos.index", tmp_path / "photos.index")
    return tmp_path / "photos.index"


def brute(rows, query, dim, without=()):
    """[(row, cosine)] of the ten nearest by the first `dim` numbers, in float64."""
    a, b = np.asarray(rows, np.float64)[:, :dim], np.asarray(query, np.float64)[:dim]
    cosines = (a * b).sum(1) / np.sqrt((a**2).sum(1) * (b**2).sum())
    found = [(i, c) for i, c in enumerate(cosines.tolist()) if i not in without]
    return sorted(found, key=lambda pair: (-pair[1], pair[0]))[:10]


def check_columns(answer, rows, query, without=()):
    """Against brute force; neighbours that are equally near may change places."""
    full = {i for i, _ in brute(rows, query, rows.shape[1], without)}
    assert [column["dim"] for column in answer["columns"]] == DIMS
    for column in answer["columns"]:
        expected = dict(brute(rows, query, column["dim"], without))
        hits = {hit["row"]: hit["cosine"] for hit in column["hits"]}
        assert hits.keys() == expected.keys()
        assert list(hits.values()) == sorted(hits.values(), reverse=True)
        np.testing.assert_allclose([hits[i] for i in expected], list(expected.values()), atol=1e-3)
        assert [hit["row"] for hit in column["hits"] if hit["agrees"]] == [
            i for i in hits if i in full
        ]
        assert (column["agree"], column["of"]) == (len(full & expected.keys()), 10)


# ---------------------------------------------------------------- answers


def test_neighbours_of_a_row_at_every_prefix(made, client):
    rows = np.asarray(open_embeddings(made / "embeddings").X)
    for row in (0, 17, len(rows) - 1):
        answer = client.get("/api/neighbours", params={"row": row}).json()
        check_columns(answer, rows, rows[row], without={row})  # it does not find itself
        assert answer["query"]["row"] == row
    about = client.get("/api/index").json()
    assert (about["rows"], about["columns"], about["dims"], about["classes"]) == (
        ROWS,
        512,
        DIMS,
        3,
    )
    assert about["rerank"]["dims"] == DIMS
    assert about["shortlist"] == {
        "dim": 8,
        "low": 10,
        "high": ROWS,
        "default": ROWS,
    }  # of 200, there are no more
    assert client.get("/api/random").json()["row"] in range(ROWS)


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_an_upload_finds_what_its_embedding_finds(made, client, photo, form):
    pixels = photo(90, 61, seed=5)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    place = made / form / "one"
    place.mkdir(parents=True)
    (place / f"upload.{form.lower()}").write_bytes(file.getvalue())
    embedded(made, made / form, f"{form}-embedded")  # the same file the usual way
    alone = np.asarray(open_embeddings(made / f"{form}-embedded").X)[0]
    key = client.post("/api/query", content=file.getvalue()).json()["query"]
    rows = np.asarray(open_embeddings(made / "embeddings").X)
    check_columns(client.get("/api/neighbours", params={"query": key}).json(), rows, alone)
    other = client.post("/api/query", content=file.getvalue()).json()["query"]
    assert other != key


def test_the_query_is_prepared_as_the_loader_does(folder):
    crop = CenterCrop(24, 0.8)
    batch = next(iter(Loader(folder / "train", 20, order="sequential", crop=crop, num_workers=1)))
    files = sorted((folder / "train").rglob("*.jpg"))
    assert len(files) == 20
    for file, expected in zip(files, batch.images.numpy(), strict=True):
        assert np.array_equal(
            central_square(pictures.read_upload(file.read_bytes()), crop), expected
        )


def test_a_phones_photo_is_turned_as_the_stored_ones(made, photo, tmp_path):
    """A .beton written with exif_rotate has upright photos: an upload is turned, too."""
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn to the right
    (tmp_path / "photos" / "x").mkdir(parents=True)
    for number in range(3):
        picture = Image.fromarray(photo(60, 40, seed=number))
        picture.save(tmp_path / "photos" / "x" / f"{number}.png", exif=exif)
    for turned in (False, True):
        data = tmp_path / f"{turned}.beton"
        source = ImageFolder(tmp_path / "photos")
        write_beton(
            source, data, max_resolution=64, write_mode="raw", exif_rotate=turned, names=True
        )
        embedded(made, data, f"turned-{turned}")
        with Writer(tmp_path / f"{turned}.index") as writer:
            writer.build(batch_of(made / f"turned-{turned}"), dim=8)
        shown, _ = client_of(made, tmp_path / f"{turned}.index")
        upload = (tmp_path / "photos" / "x" / "1.png").read_bytes()
        key = shown.post("/api/query", content=upload).json()["query"]
        found = shown.get("/api/neighbours.json", params={"query": key, "k": 1}).json()
        (best,) = next(c["hits"] for c in found["columns"] if c["dim"] == DIMS[-1])
        assert best["name"] == "x/1.png"
        assert best["cosine"] > 0.999, f"exif_rotate={turned}"


def test_upstreams_preprocessing_is_followed(made, photo):
    data = made / "upstream-photos"
    (data / "x").mkdir(parents=True)
    Image.fromarray(photo(300, 280)).save(data / "x" / "0.png")
    embedded(made, data, "upstream", "--preprocessing=upstream")
    with Writer(made / "upstream.index") as writer:
        index = writer.build(batch_of(made / "upstream"))
    encode = serve.encoder(loaded(made)[0], index.preprocessing)
    np.testing.assert_allclose(
        encode(photo(300, 280)), np.asarray(open_embeddings(made / "upstream").X)[0], atol=1e-3
    )


def test_the_fast_search_is_the_indexs_and_its_recall_is_counted(tmp_path):
    """In a part with lists, one without, and with deleted rows."""
    rng = np.random.default_rng(3)
    rows = rng.standard_normal((3000, 40)).astype(np.float32)
    rows[:, 12:] *= 0.7
    names = [f"{i}" for i in range(3000)]
    model = {"weights_sha256": "ab", "file": "m", "dims": [4, 12, 20]}
    batches = [
        IndexRows(rows[s], names[s], np.zeros(len(rows[s]), int), model, {})
        for s in (slice(0, 2500), slice(2500, 3000))
    ]
    with Writer(tmp_path / "i", 1) as writer:
        writer.build(batches[0], dim=12, lists=50)
        writer.add(batches[1])
        gone = [*range(0, 3000, 7)]
        index = writer.delete([names[i] for i in gone])
    found = comparison.Comparison(index)
    assert found.dims == [4, 12, 20, 40]  # and all dimensions
    assert (found.rerank_dims, found.lists) == ([12, 20, 40], 50)
    assert found.default == comparison.Choice(200, 32, 40)
    some, seen = rng.standard_normal((12, 40)).astype(np.float32), set()
    for query in some:
        exact = found.exact(query)
        for column in exact:
            expected = brute(rows, query, column.dim, set(gone))
            assert column.ids.tolist() == [i for i, _ in expected]
            np.testing.assert_allclose(column.cosines, [c for _, c in expected], atol=1e-3)
        for choice in (found.default, comparison.Choice(10, 1, 12), comparison.Choice(60, 5, 20)):
            fast = found.adaptive(query, choice)
            kept = {i for i, _ in brute(rows, query, 40, set(gone))}
            share = comparison.recall(fast, exact[-1])
            assert share == len(kept & set(fast.ids.tolist())) / 10
            assert not set(fast.ids.tolist()) & set(gone)
            hits = index.search(query[None], found.params(choice), k=10)
            assert fast.ids.tolist() == hits.ids[0].tolist()
            seen.add(share)
    assert len(seen) > 3, f"recalls {seen}: the choices should differ"  # not all the same
    everything = comparison.Choice(10**9, 10**9, 10**9)
    assert found.clipped(everything) == comparison.Choice(2000, 50, 40)
    assert found.clipped(comparison.Choice(-5, -5, -5)) == comparison.Choice(10, 1, 12)
    np.testing.assert_array_equal(
        found.adaptive(some[0], found.clipped(everything)).ids, found.exact(some[0])[-1].ids
    )
    live = [found.live_row(at) for at in range(len(index))]
    assert live == [i for i in range(3000) if i not in set(gone)]


def test_sliders_change_the_fast_search_alone(client):
    whole = client.get("/api/neighbours", params={"row": 4}).json()
    asked = {"row": 4, "shortlist": 10, "nprobe": 1, "rerank": 8}
    few = client.get("/api/adaptive", params=asked).json()["adaptive"]
    exact = {hit["row"] for hit in whole["columns"][-1]["hits"]}
    assert (few["shortlist"], few["rerank"], few["of"]) == (10, 8, 10)
    assert (
        few["agree"] == len(exact & {hit["row"] for hit in few["hits"]}) == 10 * few["recall"] < 10
    ), "agreeing rows are miscounted"
    best = client.get("/api/adaptive", params=asked | {"shortlist": 10**12, "rerank": 512}).json()[
        "adaptive"
    ]
    assert (best["shortlist"], best["recall"]) == (ROWS, 1.0)
    assert [hit["row"] for hit in best["hits"]] == [
        hit["row"] for hit in whole["columns"][-1]["hits"]
    ]
    assert min(best["ms"], best["exact_ms"], best["ratio"]) > 0, "times must be positive"


def test_evil_names_are_plain_values(client):
    answer = client.get("/api/neighbours", params={"row": 0})
    shown = answer.json()["query"]
    assert answer.headers["content-type"] == "application/json"
    assert shown["class"] == EVIL
    assert shown["name"] == f"{EVIL}/{EVIL}3.png"


# ---------------------------------------------------------------- changes


def test_deleted_rows_are_never_shown_and_changes_are_followed(made, changed):
    rows = np.asarray(open_embeddings(made / "embeddings").X)
    shown, _ = client_of(made, changed)
    before = shown.get("/api/neighbours", params={"row": 2}).json()
    nearest = [hit["row"] for hit in before["columns"][-1]["hits"][:3]]
    names = open_embeddings(made / "embeddings").ids
    with Writer(changed) as writer:
        writer.delete([names[row] for row in nearest])
    after = shown.get("/api/neighbours", params={"row": 2}).json()
    check_columns(after, rows, rows[2], without={2, *nearest})
    assert not {hit["row"] for hit in after["adaptive"]["hits"]} & set(nearest)
    assert after["version"] != before["version"]
    assert shown.get("/api/index").json()["rows"] == 32
    for row in nearest:
        said(shown.get(f"/image/{row}"), 404)
        said(shown.get("/api/neighbours", params={"row": row}), 404)
    assert all(shown.get("/api/random").json()["row"] not in nearest for _ in range(60))
    with Writer(changed) as writer:
        writer.compact()
    compacted = [i for i in range(ROWS) if i not in nearest]
    answer = shown.get("/api/neighbours", params={"row": compacted.index(2)}).json()
    check_columns(answer, rows[compacted], rows[2], without={compacted.index(2)})
    with Writer(changed) as writer:
        writer.delete([names[i] for i in compacted])
    assert "deleted" in said(shown.get("/api/random"), 404)


def test_an_index_that_is_damaged_or_of_another_model_meanwhile(made, changed, caplog):
    shown, _ = client_of(made, changed)
    manifest = (changed / "index.json").read_bytes()
    (changed / "index.json").write_bytes(manifest[:-9])
    for path in ("/api/index", "/image/0", "/api/neighbours?row=0"):
        assert "changed" in said(shown.get(path), 503)
    assert str(changed) in caplog.text  # for who runs the server
    (changed / "index.json").write_bytes(manifest)
    assert shown.get("/api/index").status_code == 200
    other = batch_of(made / "embeddings")
    other.model["weights_sha256"] = "0" * 64
    with Writer(changed) as writer:
        writer.build(other, overwrite=True)
    assert "changed" in said(shown.get("/api/index"), 503)


def test_what_is_said_of_recall_is_of_these_rows(made, changed):
    shown, _ = client_of(made, changed)

    def recall():
        return shown.get("/api/index").json()["certificate"]

    assert recall() == ""
    with Writer(changed) as writer:
        writer.choose(
            Index(changed).params, {"text": "0.91 or more, with 95 % confidence (200 queries)"}
        )
    assert recall() == "recall 0.91 or more, with 95 % confidence (200 queries)"
    with Writer(changed) as writer:
        writer.delete([open_embeddings(made / "embeddings").ids[0]])
    assert (
        recall()
        == "recall measured before the index changed: run `matryoshka retrieve --sweep --choose` "
        "again"
    )


def test_queries_outlive_a_change(made, changed, photo):
    shown, _ = client_of(made, changed)
    file = io.BytesIO()
    Image.fromarray(photo(40, 40)).save(file, "PNG")
    key = shown.post("/api/query", content=file.getvalue()).json()["query"]
    first = shown.get("/api/neighbours", params={"query": key}).json()["columns"][-1]["hits"][0]
    with Writer(changed) as writer:
        writer.delete([open_embeddings(made / "embeddings").ids[first["row"]]])
    now = shown.get("/api/neighbours", params={"query": key}).json()["columns"][-1]["hits"]
    assert first["row"] not in [hit["row"] for hit in now]
    assert len(now) == 10


# ---------------------------------------------------------------- the program


def refused(argv, capsys):
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        serve.main(argv)
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2
    assert len(lines) == 1, lines
    return lines[0]


def test_mistakes_are_one_line(made, tmp_path, capsys):
    index = str(made / "photos.index")
    other = build(ModelSpec("resnet10", 3, (8, 512))).eval()
    save_model(other, tmp_path / "other.safetensors")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        busy = taken.getsockname()[1]
        for argv, words in (
            ([str(tmp_path)], [str(tmp_path), "index"]),
            (
                [index, "--model=nothing.safetensors"],
                ["--model nothing.safetensors", "no such file"],
            ),
            (
                [index, f"--model={tmp_path / 'other.safetensors'}"],
                ["other.safetensors", "another model"],
            ),
            ([index, f"--port={busy}"], [f"--port {busy}", "in use"]),
            ([index, "--port=70000"], ["--port 70000"]),
            ([index, "--host=no such host"], ["--host no such host"]),
            ([index, "--data=nothing"], ["--data nothing"]),
            ([index, f"--data={tmp_path}", "--data=nothing"], ["--data nothing", "no such file"]),
            (
                [index, *2 * [f"--data={tmp_path}"]],
                ["--data", "1 data set;", f"give --data {made / 'photos'}, or"],
            ),
            ([index, "--max-upload-mb=0"], ["--max-upload-mb"]),
            ([index, "--threads=-1"], ["--threads"]),
        ):
            port = [] if any(word.startswith("--port") for word in argv) else ["--port=0"]
            line = refused([*argv, *port, "--device=cpu"], capsys)
            assert all(word in line for word in words), line
    gone = shutil.copytree(made / "photos.index", tmp_path / "gone.index")
    lost = batch_of(made / "embeddings")
    lost.model["file"] = "runs/lost.safetensors"
    with Writer(gone) as writer:
        writer.build(lost, overwrite=True)
    line = refused([str(gone), "--port=0"], capsys)
    assert all(word in line for word in ("runs/lost.safetensors", "give", "--model")), line


def test_it_says_what_is_missing_and_who_can_see_it(made, tmp_path, capsys, monkeypatch):
    started = []
    uvicorn = pytest.importorskip("uvicorn")

    def run(self, sockets):
        started.append((self.config, sockets[0].getsockname()))
        raise KeyboardInterrupt

    monkeypatch.setattr(uvicorn.Server, "run", run)
    index = str(made / "photos.index")
    for more, words, absent in (
        ([], [str(made / "photos"), "35 rows", "http://127.0.0.1:"], "note:"),
        ([f"--data={made / 'photos'}"], [str(made / "photos")], "note:"),
        (
            [f"--data={tmp_path}"],
            ["the data set cannot be used", "the page shows names", "--data"],
            "pictures from",
        ),
        (
            ["--host=0.0.0.0"],
            ["--host 0.0.0.0", "everyone", "http://localhost:"],
            "cannot be used",
        ),
    ):
        capsys.readouterr()
        assert serve.main([index, "--port=0", "--device=cpu", *more]) == 0  # Ctrl-C is a good end
        out = capsys.readouterr().out
        assert all(word in out for word in words), out
        assert absent not in out
        assert len(out.strip().splitlines()) <= 3, out
    assert [address[0] for _, address in started] == ["127.0.0.1"] * 3 + ["0.0.0.0"]
    assert all(address[1] > 0 for _, address in started), "ports of the started servers"


def test_data_sets_of_several_parts_are_counted_once(made, changed, tmp_path, capsys):
    """Two of one data set and one of another, which lies elsewhere now; its name needs quotes."""
    more = batch_of(made / "embeddings")
    other = tmp_path / "other photos"
    shutil.copytree(made / "photos", other)
    with Writer(changed) as writer:
        for prefix, path in (("again/", made / "photos"), ("other/", other)):
            about = {"path": str(path), "fingerprint": "0"}
            writer.add(replace(more, names=[prefix + name for name in more.names], data=[about]))
        index = writer.compact()
    _, service = client_of(made, changed)
    assert service.missing_pictures() == {str(made / "photos"): None, str(other): None}
    other.rename(tmp_path / "elsewhere")
    shown, service = client_of(made, changed)
    assert (list(service.missing_pictures()), shown.get("/api/index").json()["pictures"]) == (
        [str(made / "photos"), str(other)],
        True,
    )
    with socket.create_server(("127.0.0.1", 0)) as door:
        capsys.readouterr()
        serve.announce(serve.parser().parse_args([str(changed)]), index, service, door)
    out = capsys.readouterr().out
    assert f"pictures from {made / 'photos'}\n" in out
    assert (
        f"1 of 2 data sets cannot be used, the page shows names ({other}: the data set does "
        "not exist)" in out
    )
    line = refused([str(changed), f"--data={tmp_path / 'elsewhere'}"], capsys)
    assert (
        f"2 data sets; give --data {made / 'photos'} --data '{other}', in this order, or their "
        "present paths" in line
    )
    assert serve.moved_data_sets(index, [str(made), str(tmp_path)]) == {
        str(made / "photos"): str(made),
        str(other): str(tmp_path),
    }


def test_a_missing_package_is_named(made, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "pip install uvicorn" in refused([str(made / "photos.index")], capsys)


def test_refusals_are_kept_for_seconds(made, tmp_path, monkeypatch):
    """A data set that is mounted later is found; before, not every picture looks for it."""
    clock = [100.0]
    monkeypatch.setattr(pictures.time, "monotonic", lambda: clock[0])
    shown, about = Pictures(), {"path": str(tmp_path / "later")}
    for mounted in (False, True):
        if mounted:
            shutil.copytree(made / "photos" / "cat", tmp_path / "later" / "cat")
        with pytest.raises(Refusal, match="does not exist"):
            shown.open(about)
    clock[0] += pictures.RETRY_SECONDS
    assert len(shown.open(about)) == 9


def test_texts_of_refusals_are_kept():
    shown = Pictures()
    for _ in range(2):
        with pytest.raises(Refusal, match="has no path") as error:
            shown.open({})
        assert error.value.status == 404
    assert shown.path_of({"path": "here"}) == "here"
    assert Pictures({"here": "there"}).path_of({"path": "here"}) == "there"
