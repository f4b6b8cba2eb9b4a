"""The reader on files built by hand, and on damaged ones."""

import json
import random
import struct
import time
import tracemalloc
from contextlib import suppress

import numpy as np
import pytest
from beton_files import PAGE, build, encoded, photo

from matryoshka.data import BetonError, BetonFile

IMAGE = (1, 2, 1, b"abcdef")  # raw, 2 x 1
TABLE = 2 * PAGE  # of `whole`: header, two descriptors, three records, one page, table
RECORDS = 24 + 2 * 1041


def shuffled(rows):
    return random.Random(0).sample(rows, len(rows))


def test_other_fields_and_orders_are_read(tmp_path):
    jpeg = encoded(photo(20, 10), "JPEG")
    fields = [(0, b"weight"), (1, b"other"), (5, b"json"), (3, b"sixteen_letters_"), (1, b"label")]
    fields += [(2, b"picture"), (4, b"array"), (6, b"tensor")]
    samples = []
    for i in range(50):
        blob = b"" if i % 2 else b"xyz"
        image = IMAGE if i % 3 else (0, 20, 10, jpeg)
        samples.append((0.5, -i, b"{}\0", 3, blob, len(blob), i, *image, b"12345678", b"1234"))
    data = BetonFile(build(tmp_path / "x", fields, "<dqQQQQqBHHQ3xQQ", samples, shuffled))
    assert data.fields == [(name.decode(), kind) for kind, name in fields]
    assert data.labels.tolist() == list(range(50))
    assert (data.num_classes, data.classes, data.manifest) == (50, None, None)
    (batch,) = data.fetch(np.array([4, 3]))
    assert (batch.width.dtype, batch.offset.dtype, batch.mode.tolist()) == (
        np.int32,
        np.uint64,
        [1, 0],
    )
    stored = [
        batch.data[o : o + s].tobytes() for o, s in zip(batch.offset, batch.size, strict=True)
    ]
    assert stored == [b"abcdef", jpeg]
    data.preload()
    data.close()
    assert batch.data[batch.offset[0]] == ord("a")  # a batch in flight outlives the file
    with pytest.raises(BetonError, match="closed"):
        data.fetch(np.array([0]))
    label_first = build(tmp_path / "y", [(1, b"label"), (2, b"image")], "<qBHHQ3x", [(7, *IMAGE)])
    assert BetonFile(label_first).labels.tolist() == [7]
    alone = BetonFile(build(tmp_path / "z", [(2, b"image")], "<BHHQ", [IMAGE]))
    with pytest.raises(BetonError, match="no integer field"):
        _ = alone.labels


DAMAGE = [  # struct code, place, value(s), message
    ("H", 0, 1, "version 2"),
    ("I", 0, 0xE0FFD8FF, "version 2"),
    ("H", 2, 0, "is empty"),
    ("H", 2, 65535, "descriptors"),
    ("I", 4, 0, "page size"),
    ("I", 4, PAGE // 2, "page size"),
    ("I", 4, PAGE + 1, "page size"),
    ("Q", 8, 0, "is empty"),
    ("Q", 8, 2**63, "allocation table"),
    ("Q", 8, 4, "sample 3"),
    ("Q", 16, 0, "never finished"),
    ("Q", 16, 2**63, "cut off"),
    ("Q", 16, TABLE + 72, "never finished"),
    ("Q", 16, 24, "allocation table"),
    ("B", 24, 255, "custom"),
    ("B", 24, 77, "unknown type 77"),
    ("B", 24, 3, "no image field"),
    ("B", RECORDS + 24, 2, "sample 1 .*mode"),
    ("H", RECORDS + 1, 0, "sample 0 .*no pixels"),
    ("H", RECORDS + 3, 7, "sample 0 .*raw"),
    ("Q", RECORDS + 53, PAGE + 1, "sample 2 points"),
    ("Q", RECORDS + 5, 2**63, "sample 0 points"),
    ("Q", RECORDS + 5, PAGE + 6, "sample 0 points"),
    ("Q", TABLE, 3, "sample 3 .*not exist"),
    ("Q", TABLE, 1, "sample 0 points"),
    ("Q", TABLE + 8, PAGE + 1, "sample 0"),
    ("Q", TABLE + 8, 0, "outside the pages"),
    ("Q", TABLE + 8, 2**64 - 1, "outside the pages"),
    ("Q", TABLE + 16, 2**64 - 1, "outside the pages"),
    ("Q", TABLE + 64, 5, "sample 2 .*raw"),
    ("Q", TABLE + 16, 7, "overlaps"),
    ("Q", TABLE + 56, TABLE - 3, "outside the pages"),
    ("Q", TABLE + 16, 0, "sample 0 points"),
]
CUTS = [
    0,
    1,
    23,
    24,
    1065,
    RECORDS,
    RECORDS + 71,
    RECORDS + 72,
    PAGE,
    PAGE + 6,
    TABLE,
    TABLE + 1,
    TABLE + 24,
    TABLE + 48,
    TABLE + 71,
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "x"
    build(path, [(2, b"image"), (1, b"label")], "<BHHQ3xq", [(*IMAGE, i) for i in range(3)])
    assert len(BetonFile(path)) == 3, "samples in the file"
    return path.read_bytes()


@pytest.mark.parametrize("damage", [*DAMAGE, *CUTS])
def test_damage_is_an_error_that_names_the_file(tmp_path, whole, damage):
    data, message = bytearray(whole), "x"
    if isinstance(damage, int):
        del data[damage:]
    else:
        code, place, value, message = damage
        struct.pack_into("<" + code, data, place, value)
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(BetonError, match=message) as caught:
        BetonFile(tmp_path / "x")
    assert str(tmp_path / "x") in str(caught.value)


def test_a_region_over_the_end_of_a_page(tmp_path):
    samples = [(1, 1024, 682, bytes(2095104)), (1, 819, 1, bytes(2457))]
    path = build(tmp_path / "x", [(2, b"image")], "<BHHQ", samples)
    with pytest.raises(BetonError, match="sample 1 has a region that crosses"):
        BetonFile(path)


def test_random_damage_never_leads_out_of_the_file(tmp_path, whole):
    rng, path = random.Random(0), tmp_path / "x"
    places = [*range(24), 24, 1065, *range(RECORDS, RECORDS + 72), *range(TABLE, TABLE + 72)]
    for _ in range(200):
        data = bytearray(whole)
        for place in rng.sample(places, rng.randint(1, 3)):
            data[place] = rng.choice([0, 1, 2, 255, rng.randrange(256)])
        path.write_bytes(data)
        with suppress(BetonError):
            (batch,) = BetonFile(path).fetch(np.arange(1))
            assert batch.offset[0] + batch.size[0] <= len(data), "a sample ends outside the file"


@pytest.mark.parametrize("key", ["classes", "names", "num_samples", "num_bytes", "{"])
def test_a_wrong_side_file(tmp_path, whole, key):
    (tmp_path / "x").write_bytes(whole)
    for value in (["a"], 3.5, None if key == "{" else {}):
        (tmp_path / "x.json").write_text(key if key == "{" else json.dumps({key: value}))
        with pytest.raises(BetonError, match=r"x\.json"):
            BetonFile(tmp_path / "x")


@pytest.mark.parametrize("order", ["sorted", "shuffled"])
def test_a_million_samples_open_quickly(tmp_path, order):
    n, path = 1_281_167, tmp_path / "x"
    start = -(-(24 + 2 * 1041 + 24 * n) >> 23) << 23
    place = np.arange(n) if order == "sorted" else np.random.default_rng(0).permutation(n)
    records = np.ones(
        n, [("m", "u1"), ("w", "<u2"), ("h", "<u2"), ("p", "<u8"), ("pad", "V3"), ("l", "<i8")]
    )
    records["p"] = start + 3 * place
    rows = np.stack([np.arange(n), records["p"], np.full(n, 3)], 1).astype("<u8")
    with path.open("wb") as file:
        file.write(struct.pack("<HHIQQ", 2, 2, 1 << 23, n, start + (1 << 23)))
        file.write(
            struct.pack("<B16s1024sB16s1024s", 2, b"image", b"", 1, b"label", b"")
            + records.tobytes()
        )
        file.seek(start + (1 << 23))
        file.write(rows[::-1].tobytes() if order == "shuffled" else rows.tobytes())
    begin = time.perf_counter()
    data = BetonFile(path)
    assert time.perf_counter() - begin < 5, (
        "opening takes 5 seconds"
    )  # 0.1 to 0.4 s on a quiet machine
    assert (data.offset == records["p"]).all()
    tracemalloc.start()
    try:
        BetonFile(path)
        assert tracemalloc.get_traced_memory()[1] < 100e6, "opening takes 100 MB"
    finally:
        tracemalloc.stop()
