"""Images without classes: embedded, indexed, searched; metrics that need labels are left out."""

import numpy as np
import pytest
from beton_files import photo
from matryoshka.inference import embed, index, retrieve
from PIL import Image

from matryoshka.checkpoint import save_model
from matryoshka.embeddings import labels_like, open_embeddings
from matryoshka.models import ModelSpec, build
from matryoshka.retrieval.store import Index


@pytest.fixture(scope="module")
def flat(tmp_path_factory):
    """A folder with images at two depths, and a model."""
    root = tmp_path_factory.mktemp("flat")
    (root / "photos" / "deeper").mkdir(parents=True)
    names = ["a.jpg", "b.png", "deeper/c.jpg", "deeper/d.webp"]
    for number, name in enumerate(names):
        photo(40 + number, 36).save(root / "photos" / name)
    save_model(build(ModelSpec("resnet10", 3, (8, 512))), root / "model.safetensors")
    words = [f"--path={root / 'model.safetensors'}", "--device=cpu"]
    embed.main([*words, f"--output={root / 'e'}", "--data", str(root / "photos")])
    return root, names


def test_rows_have_names_and_no_labels(flat, capsys):
    root, names = flat
    embeddings = open_embeddings(root / "e")
    assert list(embeddings.ids) == names
    assert np.array_equal(embeddings.y, np.full(4, -1))
    assert embeddings.classes is None


def test_a_list_of_files(flat, capsys):
    root, names = flat
    files = [str(root / "photos" / name) for name in names[:2]]
    words = [f"--path={root / 'model.safetensors'}", "--device=cpu", f"--output={root / 'two'}"]
    embed.main([*words, "--data", *files])
    assert "2 images without classes" in capsys.readouterr().out
    two, all_of_them = open_embeddings(root / "two"), open_embeddings(root / "e")
    assert list(two.ids) == names[:2]
    np.testing.assert_allclose(two.X, all_of_them.X[:2], rtol=1e-4, atol=1e-5)


def test_an_index_and_a_search(flat, capsys):
    root, names = flat
    index.main(["build", str(root / "index"), f"--embeddings={root / 'e'}"])
    built = Index(root / "index")
    assert [built.name(row) for row in range(4)] == names
    assert built.class_name(0) is None
    capsys.readouterr()
    for number, database in enumerate(("e", "index")):
        words = [f"--database={root / database}", f"--queries={root / 'e'}", "--no-speed"]
        retrieve.main([*words, "--at=1", f"--output={root / f'hits{number}'}"])
        assert "no labels" in capsys.readouterr().out


def test_one_side_without_classes(flat, tmp_path, capsys):
    """Labelled queries in a database without labels, and the reverse: no metric of labels."""
    root, _ = flat
    for name in ("ant", "bee"):
        (tmp_path / "labelled" / name).mkdir(parents=True)
        Image.fromarray(photo_of(name)).save(tmp_path / "labelled" / name / "1.jpg")
    words = [f"--path={root / 'model.safetensors'}", "--device=cpu"]
    labelled = tmp_path / "e"
    embed.main([*words, f"--output={labelled}", "--data", str(tmp_path / "labelled")])
    sides = open_embeddings(labelled), open_embeddings(root / "e")
    assert np.array_equal(labels_like(*sides), [-1, -1])
    assert np.array_equal(labels_like(*sides[::-1]), [-1] * 4)
    capsys.readouterr()
    for number, (database, queries) in enumerate([(root / "e", labelled), (labelled, root / "e")]):
        words = [f"--database={database}", f"--queries={queries}", "--no-speed", "--at=1"]
        retrieve.main([*words, f"--output={tmp_path / f'hits{number}'}"])
        assert "no labels" in capsys.readouterr().out


def photo_of(name: str) -> np.ndarray:
    """Noise, uint8 [40, 40, 3]; another one for each name."""
    rng = np.random.default_rng(len(name) + ord(name[0]))
    return rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
