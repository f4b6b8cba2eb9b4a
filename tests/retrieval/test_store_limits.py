"""What a writer refuses: settings that an index cannot search, a certificate of other rows, too
many parts.
"""

import os

import pytest
from stored_indexes import batch, built, random_rows

from matryoshka.retrieval import RetrievalError, SearchParams, Stage, store_part, store_writer
from matryoshka.retrieval.store import Index
from matryoshka.retrieval.store_writer import Writer

CHOSEN = SearchParams("scan", 8, 20, (Stage(24, 5),))


@pytest.fixture(autouse=True)
def _without_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)


def state(folder):
    return sorted(os.listdir(folder)), (folder / "index.json").read_bytes()


def test_a_certificate_is_only_for_the_index_that_was_measured(tmp_path):
    measured = built(tmp_path, random_rows(30), dim=8).manifest
    changes = (
        lambda w: w.add(batch(random_rows(1), ["new"])),
        lambda w: w.delete(["photos/3"]),
        lambda w: w.compact(),
        lambda w: w.build(batch(random_rows(30)), dim=8, overwrite=True),
        lambda w: w.build(batch(random_rows(30)), dim=16, overwrite=True),
        lambda w: w.build(batch(random_rows(30, 25)), dim=8, overwrite=True),
    )
    for change in changes:
        with Writer(tmp_path, 1) as writer:
            assert writer.choose(CHOSEN, {"text": "0.99"}, measured).certificate[1]
            change(writer)
            before = state(tmp_path)
            with pytest.raises(
                RetrievalError, match=r"has changed since it was measured; start the sweep again$"
            ):
                writer.choose(CHOSEN, {"text": "0.99"}, measured)
            assert state(tmp_path) == before
            measured = writer.build(batch(random_rows(30)), dim=8, overwrite=True).manifest
    with Writer(tmp_path, 1) as writer:  # another default is no other index
        writer.choose(SearchParams("exact", 24, 5), None, measured)
        assert writer.choose(CHOSEN, {"text": "0.99"}, measured).params == CHOSEN
        for key in ("dim", "columns"):
            with pytest.raises(RetrievalError, match="has changed"):
                writer.choose(CHOSEN, {"text": "0.99"}, measured | {key: 3})


def test_a_setting_that_the_index_cannot_search_is_no_default(tmp_path):
    index = built(tmp_path, random_rows(5), dim=8)
    before = state(tmp_path)
    for setting, words in (
        (SearchParams("scan", 16, 20, (Stage(24, 5),)), "codes of 8 dimensions"),
        (SearchParams("ivf", 9, 20), "codes of 8 dimensions"),
        (SearchParams("binary", 8, 20), "use index ivf, scan or exact"),
        (SearchParams("hnsw", 8, 20), "use index ivf, scan or exact"),
        (
            SearchParams("scan", 8, 20, (Stage(16, 9), Stage(25, 5))),
            "24 dimensions, .* prefix of 25",
        ),
        (SearchParams("exact", 25, 20), "24 dimensions, .* prefix of 25"),
    ):
        with Writer(tmp_path, 1) as writer, pytest.raises(RetrievalError, match=words):
            writer.choose(setting, None)
        with pytest.raises(RetrievalError, match=words):
            index.search(random_rows(1), setting, k=3)
    assert state(tmp_path) == before


def test_so_many_parts_and_no_more(tmp_path, monkeypatch):
    assert store_writer.MAX_PARTS == 128
    monkeypatch.setattr(store_writer, "MAX_PARTS", 3)
    built(tmp_path, random_rows(5))
    with Writer(tmp_path, 1) as writer:
        for i in range(2):
            writer.add(batch(random_rows(1), [f"{i}"]))
        before = state(tmp_path)
        with pytest.raises(
            RetrievalError,
            match=r"has 3 parts, the maximum; run `matryoshka index compact`, then add again$",
        ):
            writer.add(batch(random_rows(1), ["new"]))
        assert state(tmp_path) == before
        writer.compact()
        assert len(writer.add(batch(random_rows(1), ["new"]))) == 8


def test_the_index_of_before_is_closed_when_that_of_after_is_opened(tmp_path, monkeypatch):
    """Every file mapped: a writer never has the maps of two indexes."""
    monkeypatch.setattr(store_part, "MMAP_MIN_BYTES", 1)
    most, opened = 0, store_part.Part.__init__

    def counted(part, *args, **options):
        nonlocal most
        opened(part, *args, **options)
        with open("/proc/self/maps") as maps:
            most = max(most, sum(str(tmp_path) in line for line in maps))

    monkeypatch.setattr(store_part.Part, "__init__", counted)
    built(tmp_path, random_rows(90), lists=2)
    index = Index(tmp_path, 1)
    one = most
    del index
    with Writer(tmp_path, 1) as writer:
        for change, parts in (
            (lambda: writer.add(batch(random_rows(1), ["new"])), 2),
            (lambda: writer.delete(["photos/3"]), 2),
            (writer.compact, 2),
            (lambda: writer.choose(SearchParams("exact", 24, 5), None), 1),
        ):
            most = 0
            change()
            assert most <= one * parts, f"{most} maps are open, one part has {one}"
