"""Fields beside image and label, in files built with struct, then with false records."""

import json
import struct
from contextlib import suppress

import numpy as np
import pytest
from beton_files import PAGE, build
from hypothesis import given
from hypothesis import strategies as st

from matryoshka.data import BetonError, BetonFile
from matryoshka.data.fields import array_type

IMAGE = (1, 2, 1, b"abcdef")  # raw, 2 x 1
FIELDS = [
    (2, b"image"),
    (1, b"label"),
    (0, b"weight"),
    (3, b"blob"),
    (5, b"info"),
    (4, b"array"),
    (6, b"tensor"),
]
RECORD = "<BHHQ3xqdQQQQQQ"
BLOBS = [b"xyz", b"", b"\0\xff\0"]
OBJECTS = [{"a": [1, 2.5, None]}, "Grüße", []]
ARRAYS = np.arange(-9, 9, dtype="<i4").reshape(3, 2, 3)
TENSORS = np.linspace(0, 1, 3, dtype="<f8")
ROWS = np.array([2, 0, 2, 1])
DESCRIPTORS, RECORDS = 24, 24 + 7 * 1041
SIZE = struct.calcsize(RECORD)


def arguments(shape, text):
    return struct.pack("<32QQ", *shape, *[0] * (32 - len(shape)), len(text)) + text


def with_arguments(content, k, data):
    """The file with other arguments in descriptor k."""
    place = DESCRIPTORS + 1041 * k + 17
    return content[:place] + data.ljust(1024, b"\0") + content[place + 1024 :]


def content_of(path, table=list):
    samples = []
    for i in range(3):
        info = json.dumps(OBJECTS[i], ensure_ascii=False).encode() + b"\0"
        blob = BLOBS[i]
        array, tensor = ARRAYS[i].tobytes(), TENSORS[i].tobytes()
        samples.append((*IMAGE, 10 + i, i / 4, blob, len(blob), info, len(info), array, tensor))
    content = build(path, FIELDS, RECORD, samples, table).read_bytes()
    content = with_arguments(content, 5, arguments((2, 3), b'[["", "<i4"]]'))
    return with_arguments(content, 6, arguments((1,), b'[["", "<f8"]]'))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return content_of(tmp_path_factory.mktemp("fields") / "x")


@pytest.fixture
def opened(tmp_path):
    def make(content):
        (tmp_path / "x").write_bytes(content)
        return BetonFile(tmp_path / "x")

    return make


def test_every_field_comes_back(whole, opened, tmp_path):
    backwards = content_of(tmp_path / "y", lambda rows: rows[::-1])
    for data in (opened(whole), opened(backwards)):
        assert data.labels.tolist() == [10, 11, 12]
        label, weight = data.field("label", ROWS), data.field("weight", ROWS)
        assert (label.dtype, label.tolist()) == (np.int64, [12, 10, 12, 11])
        assert (weight.dtype, weight.tolist()) == (np.float64, [0.5, 0, 0.5, 0.25])
        blobs = data.field("blob", ROWS)
        assert all(b.dtype == np.uint8 and not b.flags.writeable for b in blobs)
        assert [b.tobytes() for b in blobs] == [BLOBS[i] for i in ROWS]
        assert data.field("info", ROWS) == [OBJECTS[i] for i in ROWS]
        array, tensor = data.field("array", ROWS), data.field("tensor", ROWS)
        assert (array.dtype, tensor.dtype, tensor.shape) == (np.int32, np.float64, (4, 1))
        np.testing.assert_array_equal(array, ARRAYS[ROWS])
        np.testing.assert_array_equal(tensor[:, 0], TENSORS[ROWS])
        assert data.field("weight", np.array([-1])).tolist() == [0.5]
        assert data.field("array", ROWS[:0]).shape == (0, 2, 3)
        assert data.field("blob", ROWS[:0]) == []


def test_what_cannot_be_returned(whole, opened):
    data = opened(whole)
    with pytest.raises(
        BetonError,
        match=r"x: has no field 'nothing'; it has 'image', 'label', 'weight', .*'tensor'",
    ):
        data.field("nothing", ROWS)
    with pytest.raises(BetonError, match=r"'image' holds images: fetch\(\)"):
        data.field("image", ROWS)
    for name in ("weight", "blob", "array"):
        with pytest.raises(IndexError):
            data.field(name, np.array([3]))
    kept = data.field("blob", ROWS)
    data.close()
    assert kept[1].tobytes() == b"xyz"  # a view outlives the file
    with pytest.raises(BetonError, match="closed"):
        data.field("weight", ROWS)


LIES = [  # field, place in the records, value, message
    ("blob", 32, PAGE + 1, "sample 0 records 3 bytes"),
    ("blob", 32, 2**64 - 1, "sample 0 records 3 bytes"),
    ("blob", 40, 4, "sample 0 records 4 bytes"),
    ("blob", 40, 2, "sample 0 records 2 bytes"),
    ("blob", 40, 2**64 - 1, "sample 0 records 18446744073709551615 bytes"),
    ("blob", SIZE + 40, 1, "sample 1 records 1 bytes"),
    ("info", SIZE + 48, 2**50, "sample 1 records"),
    ("info", 2 * SIZE + 56, 0, "sample 2 is not JSON"),
    ("array", 64, 2**50, "sample 0 has a region of 0 bytes"),
    ("array", 64, 2**64 - 24, "sample 0 has a region of 0"),
    ("tensor", SIZE + 72, PAGE, "sample 1 has a region of 0 bytes"),
]
NO_NUMBERS = [
    b"",
    b"{",
    b"\xff",
    b"[" * 700,
    b'[["", "|O"]]',
    b'[["", "|V8"]]',
    b'[["", "<U4"]]',
    b'[["a", "<f4"]]',
    b'[["", "<f4"], ["", "<f4"]]',
    b'[["", "<f4", [2]]]',
    b'"<f4"',
    b'[["", "<M8[s]"]]',
    b'[["", "<i3"]]',
    b'[["", 4]]',
    b"null",
    b"1" * 700,
]


@pytest.mark.parametrize(("name", "place", "value", "message"), LIES)
def test_a_record_that_lies(*, whole, opened, name, place, value, message):
    content = bytearray(whole)
    struct.pack_into("<Q", content, RECORDS + place, value)
    data = opened(bytes(content))
    with pytest.raises(BetonError, match=f"x: field '{name}': {message}"):
        data.field(name, np.arange(3))
    assert data.field("weight", np.arange(3)).tolist() == [0, 0.25, 0.5]


def test_a_value_of_another_sample_is_refused(whole, opened):
    content = bytearray(whole)
    for at in (64, 72):  # array, tensor: sample 0 points to the numbers of sample 1
        content[RECORDS + at : RECORDS + at + 8] = whole[
            RECORDS + SIZE + at : RECORDS + SIZE + at + 8
        ]
    data = opened(bytes(content))
    for name in ("array", "tensor"):
        with pytest.raises(BetonError, match="sample 0 has a region of 0 bytes"):
            data.field(name, np.arange(3))
        assert len(data.field(name, np.array([1, 2]))) == 2, f"{name}: not one value per sample"


@pytest.mark.parametrize("text", NO_NUMBERS)
def test_a_type_that_is_no_plain_number(whole, opened, text):
    data = opened(with_arguments(whole, 5, arguments((2, 3), text)))
    for rows in (ROWS, ROWS[:0]):
        with pytest.raises(
            BetonError, match=r"x: field 'array': (describes its type|has elements)"
        ):
            data.field("array", rows)


@pytest.mark.parametrize(
    "shape", [(2, 4), (1,), (), (2**63,), (2**39,) * 32, (2**20, 2**20), (2, 0, 3), (24,)]
)
def test_a_shape_that_does_not_fit(whole, opened, shape):
    data = opened(with_arguments(whole, 5, arguments(shape, b'[["", "<i4"]]')))
    with pytest.raises(
        BetonError, match=r"x: field 'array': (sample 0 has a region of 24 bytes|has an impossible)"
    ):
        data.field("array", np.arange(3))
    if 2**63 not in shape and 0 not in shape:
        assert len(data.field("array", ROWS[:0])) == 0, "values of no samples"


@pytest.mark.parametrize("name", ["|b1", "|u1", "<i2", ">i8", "<f2", ">f4", "<c16"])
def test_plain_numbers(name):
    text = json.dumps(np.dtype(name).descr).encode()
    assert array_type(arguments((5, 7), text).ljust(1024, b"\0")) == (np.dtype(name), (5, 7))


@given(
    st.binary(min_size=1024, max_size=1024)
    | st.binary(max_size=60).map(lambda b: arguments((3,), b)[:1024])
)
def test_arguments_of_any_kind(data):
    with suppress(ValueError):
        dtype, shape = array_type(data.ljust(1024, b"\0"))
        assert dtype.kind in "biufc"
        assert len(shape) <= 32, f"{len(shape)} axes"


def test_control_characters_stay_out_of_messages(whole, opened):
    content = bytearray(whole)
    content[DESCRIPTORS + 1041 * 3 + 1 : DESCRIPTORS + 1041 * 3 + 5] = b"\x1b[2J"
    with pytest.raises(BetonError) as caught:
        opened(bytes(content)).field("nothing", ROWS)
    assert str(caught.value).isprintable()
