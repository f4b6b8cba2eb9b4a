"""The page to try an index: what uploads may be, which pictures go out, and who may ask."""

import asyncio
import io
import json
import os
import shutil
import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from served import HOST, ROWS, batch_of, client_of, embedded, said

from matryoshka.data import ImageFolder, write_beton
from matryoshka.embeddings.reading import open_embeddings
from matryoshka.retrieval.store_writer import Writer
from matryoshka.search_page import pictures


def png(width, height, body=b""):
    """A PNG file of one grey channel that says that it has these sides."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    )


# ---------------------------------------------------------------- uploads


def test_uploads_that_are_no_pictures(made, client, photo, monkeypatch):
    file = io.BytesIO()
    Image.fromarray(photo(64, 64)).save(file, "JPEG")
    whole = file.getvalue()
    tiff = io.BytesIO()
    Image.fromarray(photo(8, 8)).save(tiff, "TIFF")

    def refused(data, status):
        return said(client.post("/api/query", content=data), status)

    for data in (
        b"",
        b"hello",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        tiff.getvalue(),
        whole[:30],
    ):
        assert "not a JPEG" in (text := refused(data, 415))
        assert "convert" in text
    assert "damaged" in refused(whole[: len(whole) // 2], 400)
    assert "damaged" in refused(png(20, 20, b"no zlib stream"), 400)
    for sides in ((60_000, 60_000), (10_000, 8_000)):  # Pillow's limit, and ours
        assert "50 million" in refused(png(*sides, zlib.compress(b"")), 400)
    small, _ = client_of(made, max_upload=len(whole))
    assert small.post("/api/query", content=whole).status_code == 200
    assert "MB" in said(small.post("/api/query", content=whole + b"x"), 413)
    read = []

    def stream():
        for _ in range(1000):
            read.append(1)
            yield whole

    assert "MB" in said(small.post("/api/query", content=stream()), 413)  # without a length
    monkeypatch.setattr(pictures, "MAX_PIXELS", 64 * 64 - 1)
    assert "64 x 64" in refused(whole, 400)


def test_queries_are_forgotten_and_keys_cannot_be_guessed(made, photo, monkeypatch):
    monkeypatch.setattr("matryoshka.search_page.service.MAX_QUERIES", 2)
    few, _ = client_of(made)
    file = io.BytesIO()
    Image.fromarray(photo(40, 40)).save(file, "PNG")
    first, second = (
        few.post("/api/query", content=file.getvalue()).json()["query"] for _ in range(2)
    )
    assert few.get("/api/neighbours", params={"query": first}).status_code == 200  # used last
    third = few.post("/api/query", content=file.getvalue()).json()["query"]
    for key, status in ((first, 200), (third, 200), (second, 404), ("0", 404), ("", 404)):
        assert few.get("/api/neighbours", params={"query": key}).status_code == status
    assert min(map(len, (first, second, third))) >= 16, "keys are short enough to guess"
    assert "row" in said(few.get("/api/neighbours"), 400)
    assert "row" in said(few.get("/api/neighbours", params={"row": 1, "query": first}), 400)


def test_an_upload_that_does_not_arrive(client, monkeypatch):
    monkeypatch.setattr("matryoshka.search_page.app.UPLOAD_TIMEOUT", 0.05)
    begun = []

    async def receive():
        begun.append(1)
        if len(begun) > 1:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": b"\x89PNG", "more_body": True}

    status, content = as_it_is(client.app, "/api/query", "POST", receive=receive)
    assert (status, json.loads(content)) == (408, {"error": "the upload took too long"})
    monkeypatch.undo()
    assert client.post("/api/query", content=b"x").status_code == 415  # its place is free again


def test_too_many_uploads_at_once(made, monkeypatch):
    monkeypatch.setattr("matryoshka.search_page.app.MAX_CONCURRENT_UPLOADS", 0)
    none, _ = client_of(made)
    assert "uploads" in said(none.post("/api/query", content=b"x"), 503)


# ---------------------------------------------------------------- pictures


def test_pictures_are_small_jpegs_of_the_rows_image(made, client):
    names = open_embeddings(made / "embeddings").ids
    for row in (0, 3, 17, ROWS - 1):
        answer = client.get(f"/image/{row}", params={"size": 32})
        assert (answer.status_code, answer.headers["content-type"]) == (200, "image/jpeg")
        with (
            Image.open(io.BytesIO(answer.content)) as image,
            Image.open(made / "photos" / names[row]) as own,
        ):
            assert (image.format, max(image.size)) == ("JPEG", 32)
            assert image.size == tuple(round(side * 32 / max(own.size)) for side in own.size)
            there = np.asarray(own.convert("RGB").resize(image.size, Image.Resampling.BOX)).astype(
                float
            )
            assert np.abs(np.asarray(image) - there).mean() < 12, "another picture"
    version = client.get("/api/index").json()["version"]
    kept = client.get("/image/0", params={"version": version}).headers["cache-control"]
    assert "immutable" in kept
    assert "private" in kept
    assert client.get("/image/0").headers["cache-control"] == "no-store"
    assert "changed" in said(client.get("/image/0", params={"version": "another"}), 404)


def test_rows_that_are_not_there_and_tricks_with_paths(client):
    for row in (ROWS, -1, 10**30):
        assert "row" in said(client.get(f"/image/{row}"), 404)
        assert "row" in said(client.get("/api/neighbours", params={"row": row}), 404)
    tricks = (
        "../../etc/passwd",
        "/etc/passwd",
        "../0",
        "ant/0.png",
        "0.5",
        "",
        "0x1",
        "..\\0",
        "app.py",
        "../app.py",
    )
    for path in tricks:
        for start in ("/image/", "/static/"):
            status, content = as_it_is(client.app, start + path)
            assert status in (400, 404), path
            assert set(json.loads(content)) == {"error"}
            assert b"passwd" not in content
    for size in (0, 15, 1025, 10**9, "big"):
        said(client.get("/image/0", params={"size": size}), 400)
    for path in ("/docs", "/redoc", "/openapi.json"):
        assert client.get(path).status_code == 404


async def nothing_more():
    return {"type": "http.request", "body": b"", "more_body": False}


def as_it_is(app, path, method="GET", hosts=("127.0.0.1",), receive=nothing_more):
    """(status, body) of a request that no client has tidied up."""
    sent = []

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "client": ("127.0.0.1", 9),
        "headers": [(b"host", host.encode()) for host in hosts],
        "server": ("127.0.0.1", 8000),
    }
    asyncio.run(asyncio.wait_for(app(scope, receive, send), 20))
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent)


def test_a_folder_that_changed_since_shows_nothing_of_its_neighbours(made, tmp_path):
    def fresh():
        shutil.rmtree(tmp_path / "p", ignore_errors=True)
        shutil.copytree(made / "photos", tmp_path / "p")
        return tmp_path / "p"

    def image(row):
        return client_of(made, replaced={str(made / "photos"): str(tmp_path / "p")})[0].get(
            f"/image/{row}"
        )

    outside = tmp_path / "secret.png"
    shutil.copy(made / "photos" / "ant" / "0.png", outside)
    names = open_embeddings(made / "embeddings").ids
    folder = fresh()
    assert image(0).status_code == 200
    (folder / names[0]).unlink()
    (folder / names[0]).symlink_to(outside)
    assert "link" in said(image(0), 404)
    (folder / names[1]).unlink()
    (folder / names[1]).symlink_to(folder / names[2])  # inside it may
    assert image(1).status_code == 200
    (folder / "cat").rename(tmp_path / "elsewhere")
    (folder / "cat").symlink_to(tmp_path / "elsewhere")
    assert "link" in said(image(ROWS - 1), 404)
    (tmp_path / "elsewhere").rename(folder / "dog")
    fresh()
    (folder / names[0]).unlink()
    os.mkfifo(folder / names[0])  # to open it would wait for ever
    assert "regular" in said(image(0), 404)
    (folder / names[0]).unlink()
    assert "changed" in said(image(0), 404)  # number 0 is another image now
    (folder / names[0]).write_bytes(b"\xff\xd8 no picture")
    assert "damaged" in said(image(0), 404)
    shutil.rmtree(folder)
    assert "not exist" in said(image(0), 404)


def test_files_that_go_while_they_are_shown(made, tmp_path):
    shutil.copytree(made / "photos", tmp_path / "p")
    shown, service = client_of(made, replaced={str(made / "photos"): str(tmp_path / "p")})
    assert (shown.get("/image/0").status_code, service.missing_pictures()) == (
        200,
        {str(tmp_path / "p"): None},
    )
    shutil.rmtree(tmp_path / "p" / "ant")
    assert "read" in said(shown.get("/image/12"), 404)


@pytest.mark.parametrize("mode", ["jpg", "raw"])
def test_pictures_of_a_beton(made, tmp_path, photo, mode):
    (tmp_path / "a").mkdir()
    for sub, seed in (("x", 0), ("y", 1)):
        (tmp_path / "a" / sub).mkdir()
        for i in range(3):
            Image.fromarray(photo(50, 40, seed=10 * seed + i)).save(
                tmp_path / "a" / sub / f"{i}.png"
            )
    source = ImageFolder(tmp_path / "a")
    beton = tmp_path / "b.beton"
    write_beton(source, beton, write_mode=mode, max_resolution=64, names=mode == "raw")
    shutil.copy(made / "model.safetensors", tmp_path)
    embedded(tmp_path, beton, "e")
    with Writer(tmp_path / "b.index") as writer:
        writer.build(batch_of(tmp_path / "e"))
    shown, service = client_of(made, tmp_path / "b.index")
    with Image.open(io.BytesIO(shown.get("/image/4").content)) as image:
        assert np.abs(np.asarray(image).astype(int) - photo(50, 40, seed=11)).mean() < 12, (
            "another picture"
        )
    assert shown.get("/api/index").json()["pictures"] is True
    other = tmp_path / "other.beton"  # as many images, others
    write_beton(source, other, write_mode=mode, max_resolution=20, names=mode == "raw")
    moved, service = client_of(made, tmp_path / "b.index", {str(beton): str(other)})
    assert "not the one" in said(moved.get("/image/4"), 404)
    assert "not the one" in service.missing_pictures()[str(other)]
    assert moved.get("/api/index").json()["pictures"] is False
    assert len(moved.get("/api/neighbours", params={"row": 4}).json()["columns"][-1]["hits"]) == 5
    with Writer(tmp_path / "synced.index") as writer:  # from a table, which has no fingerprint
        writer.build(replace(batch_of(tmp_path / "e"), data=[{"path": str(beton)}]))
    synced, _ = client_of(made, tmp_path / "synced.index")
    if mode == "raw":
        assert synced.get("/image/4").status_code == 200  # told by its name
    else:
        assert "fingerprint" in said(synced.get("/image/4"), 404)
    cut, _ = client_of(made, tmp_path / "b.index")
    assert cut.get("/image/4").status_code == 200
    os.truncate(beton, 4096)
    assert "damaged" in said(cut.get("/image/4"), 404)


# ---------------------------------------------------------------- who may ask


def test_only_the_page_itself_may_ask(made, client):
    for host in ("localhost", "127.0.0.1", "[::1]", "LOCALHOST:8000", "[::1]:8000"):
        assert client.get("/api/index", headers={"Host": host}).status_code == 200
    for host in (
        "evil.example",
        "evil.example:8000",
        "127.0.0.1.evil.example",
        "127.0.0.1@evil.example",
        "",
        "a b",
        "192.168.1.7",
        "localhost:8000:1",
        "[::2]",
        "[",
        "x" * 9000,
    ):
        assert "address" in said(client.get("/api/index", headers={"Host": host}), 403)
    for hosts, status in (
        (["127.0.0.1"], 200),
        (["127.0.0.1", "127.0.0.1"], 403),
        (["localhost", "evil"], 403),
        ([], 403),
    ):
        assert as_it_is(client.app, "/api/index", hosts=hosts)[0] == status
    lan, _ = client_of(made, hosts=["Photos.example"], any_address=True)
    for host, status in (
        ("photos.example:80", 200),
        ("192.168.1.7:8000", 200),
        ("[fe80::1]", 200),
        ("evil", 403),
    ):
        assert lan.get("/", headers={"Host": host}).status_code == status
    for headers in (
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Origin": "http://127.0.0.1:9000"},
        {"Sec-Fetch-Site": "same-site"},
    ):
        assert "site" in said(client.post("/api/query", content=b"x", headers=headers), 403)
        assert "site" in said(client.get("/image/0", headers=headers), 403)
    assert (
        client.get("/", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 200
    )  # a link to the page
    assert (
        client.get(
            "/image/0", headers={"Sec-Fetch-Site": "same-origin", "Origin": HOST}
        ).status_code
        == 200
    )


def test_every_answer_has_the_headers(client):
    for path in ("/", "/static/behaviour.js", "/api/index", "/image/0", "/image/99", "/nothing"):
        headers = client.get(path, headers={"Origin": HOST}).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert "cache-control" in headers
        assert not [name for name in headers if name.startswith("access-control")]
    assert client.options("/api/query", headers={"Origin": HOST}).status_code == 405
    page = client.get("/").text
    for word in ("http:", "https:", "//", "style=", "onclick"):
        assert word not in page.removeprefix("<!doctype html>")


def test_faults_of_our_own_say_nothing(made, monkeypatch, caplog):
    broken, service = client_of(made)
    monkeypatch.setattr(service, "index_info", lambda: 1 / 0)
    answer = broken.get("/api/index")
    assert "output" in said(answer, 500)
    assert "default-src" in answer.headers["content-security-policy"]
