"""Embeddings that were changed after they were written: found by whoever reads all of them."""

import json
import random
import time

import numpy as np
import pytest
from attacks.scale import scaled
from matryoshka.inference import index, retrieve
from matryoshka.train import check_data

from matryoshka import json_files
from matryoshka.embeddings.reading import ARRAYS, EmbeddingError, open_embeddings
from matryoshka.embeddings.writing import EmbeddingWriter, RowWriter
from matryoshka.training import adapter_data

ROWS, COLUMNS = 40, 6
META = {
    "format": "matryoshka-embeddings-1",
    "rows": ROWS,
    "columns": COLUMNS,
    "dtype": "float16",
    "normalised": False,
    "model": {"file": "a.pt", "weights_sha256": "00", "width": COLUMNS, "dims": [2, COLUMNS]},
    "preprocessing": {"name": "checkpoint"},
    "code": {"version": "1"},
    "data": {"path": "x", "fingerprint": "ff", "num_classes": 2, "classes": ["ant", "bee"]},
}


def write(folder):
    with EmbeddingWriter(folder) as writer:
        plan = writer.begin(META, np.arange(ROWS) % 2, "photo {}.jpg".format)
        assert plan is not None
        rows = RowWriter(folder, plan)
        values = np.random.default_rng(0).normal(size=(ROWS, COLUMNS)).astype(np.float16)
        rows.write(np.arange(ROWS), values)
        rows.flush()
        rows.close()
        writer.finish()


@pytest.fixture
def sound(tmp_path):
    write(tmp_path / "embeddings")
    return tmp_path / "embeddings"


def everything(folder):
    """All that readers are given. EmbeddingError."""
    found = open_embeddings(folder)
    found.verify()
    return found.X.tobytes(), found.y.tobytes(), list(found.ids), found.meta


def test_no_flipped_bit_is_accepted(sound):
    rng = random.Random(scaled(3, time.time_ns()))
    expected = everything(sound)
    for _ in range(scaled(300, 100_000)):
        file = sound / rng.choice((*ARRAYS, "meta.json", "meta.json"))
        good = file.read_bytes()
        bit = rng.randrange(8 * len(good))
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        file.write_bytes(bad)
        found = message = None
        try:
            found = everything(sound)
        except EmbeddingError as error:
            message = str(error)
        if message is not None:
            assert message.startswith(str(sound))
            assert "\n" not in message
        else:
            # White space between the entries of a JSON object has no meaning.
            assert file.name == "meta.json"
            assert found == expected, (file, bit)
        file.write_bytes(good)
    assert everything(sound) == expected


def change_a_row(folder):
    file = folder / "X.npy"
    content = bytearray(file.read_bytes())
    content[-3] ^= 0x40
    file.write_bytes(content)


def test_programs_refuse_a_changed_row(sound, tmp_path, capsys):
    assert check_data.main(["verify", str(sound)]) == 0
    assert "sound: " in capsys.readouterr().out
    change_a_row(sound)
    for main, words in (
        (check_data.main, ["verify", str(sound)]),
        (index.main, ["build", "--embeddings", str(sound), str(tmp_path / "i")]),
        (
            retrieve.main,
            ["--database", str(sound), "--queries", str(sound), "--output", str(tmp_path / "r")],
        ),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(words)
        assert stopped.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line == (
            f"error: {sound / 'X.npy'}: its bytes are not those that were written; embed again, "
            "with --overwrite"
        )
    assert [path.name for path in tmp_path.iterdir()] == [sound.name]
    with pytest.raises(EmbeddingError, match="its bytes are not"):
        adapter_data.read_input(str(sound))


def test_embeddings_of_an_older_version_are_read(sound, capsys):
    meta, sealed = json_files.decode((sound / "meta.json").read_bytes())
    assert sealed
    del meta["hashes"]
    (sound / "meta.json").write_text(json.dumps(meta))
    change_a_row(sound)
    assert check_data.main(["verify", str(sound), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["checksum"], found["rows"]) == ("none", ROWS)
    assert check_data.main(["verify", str(sound)]) == 0
    assert "without hashes" in capsys.readouterr().out


def test_a_damaged_record_of_progress_embeds_again(tmp_path):
    """A changed number in it would leave rows of zeros."""
    folder = tmp_path / "e"
    with EmbeddingWriter(folder) as writer:

        def begin():
            plan = writer.begin(META, np.zeros(ROWS), str)
            assert plan is not None
            return plan

        rows = RowWriter(folder, begin())
        rows.write(np.arange(10), np.ones((10, COLUMNS), np.float16))
        rows.flush()
        rows.close()
        assert begin().missing_rows == [(10, ROWS)]
        (record,) = (folder / ".unfinished").glob("progress*.json")
        text = record.read_text()
        assert "10" in text
        record.write_text(text.replace("10", "30"))
        assert begin().missing_rows == [(0, ROWS)]
