"""A small index of photos with evil names, for the tests of the page that shows one."""

from functools import cache

import numpy as np
import pytest
import torch
from matryoshka.inference import embed, serve
from PIL import Image

from matryoshka.checkpoint.model_file import save_model
from matryoshka.data.augment import Preprocessing
from matryoshka.embeddings.reading import open_embeddings, trunk_sha256
from matryoshka.evaluation import embedding
from matryoshka.models import ModelSpec, build
from matryoshka.retrieval.store import Index
from matryoshka.retrieval.store_writer import IndexRows, Writer

pytest.importorskip("fastapi", reason="fastapi is not installed (requirements-dev.txt)")
from fastapi.testclient import TestClient

from matryoshka.search_page import Pictures, Service, make_app

DIMS = [8, 32, 512]
ROWS = 35
EVIL = '"><script>alert(1)<script>'  # a file's name may be this
HOST = "http://127.0.0.1:8000"


def made_once(tmp_path_factory, photo):
    """The session's folder with model.safetensors (of DIMS), photos/, their embeddings and
    photos.index.

    Rows 0 to 11 are of the class EVIL, row 0 has the name EVIL, too; 12 to 25 of ant, the rest of
    cat.
    """
    folder = tmp_path_factory.getbasetemp() / "served"
    if folder.exists():
        return folder
    folder.mkdir()
    torch.manual_seed(7)
    model = build(ModelSpec("resnet10", 3, tuple(DIMS))).eval()
    model.preprocessing = Preprocessing(size=32, ratio=0.875)
    model.classes = sorted(("ant", EVIL, "cat"))
    save_model(model, folder / "model.safetensors")
    for label, (name, count) in enumerate((("ant", 14), (EVIL, 12), ("cat", 9))):
        (folder / "photos" / name).mkdir(parents=True)
        for i in range(count):
            file = f"{EVIL}{i}.png" if i == 3 else f"{i}.{('png', 'jpg')[i % 2]}"
            Image.fromarray(photo(40 + 3 * i, 64 - i, seed=100 * label + i)).save(
                folder / "photos" / name / file
            )
    embedded(folder, folder / "photos", "embeddings")
    with Writer(folder / "photos.index") as writer:
        writer.build(batch_of(folder / "embeddings"), dim=8)
    return folder


def embedded(folder, data, name, *more):
    """`name` in `folder`: the embeddings of a data set by the model in `folder`."""
    argv = [
        f"--path={folder / 'model.safetensors'}",
        f"--data={data}",
        f"--output={folder / name}",
        "--device=cpu",
    ]
    assert embed.main([*argv, "--workers=1", "--batch-size=8", *more]) == 0
    return folder / name


def batch_of(path):
    found = open_embeddings(path)
    data = dict(found.meta["data"])
    classes = data.pop("classes")
    return IndexRows(
        np.asarray(found.X),
        found.ids,
        np.asarray(found.y),
        found.meta["model"],
        found.meta["preprocessing"],
        classes=classes,
        data=[data],
    )


@cache
def loaded(folder):
    """(model, hash of its weights)"""
    index = Index(folder / "photos.index", 1)
    args = serve.parser().parse_args(
        [str(index.path), f"--model={folder / 'model.safetensors'}", "--device=cpu"]
    )
    model = serve.load(args, index)
    return model, trunk_sha256(model)


def client_of(folder, path=None, replaced=None, **options):
    """(client, service) of an index of the model in `folder`."""
    index = Index(path or folder / "photos.index", 1)
    model, digest = loaded(folder)
    pictures = Pictures(replaced, lambda data: embedding.fingerprint(data, data.labels))
    service = Service(
        index,
        serve.encoder(model, index.preprocessing),
        digest,
        pictures,
        classify=serve.classifier(model),
    )
    return TestClient(make_app(service, **options), HOST, raise_server_exceptions=False), service


def said(answer, status):
    """The message of an error: one line without any path of this machine."""
    assert answer.status_code == status, answer.text[:300]
    assert list(answer.json()) == ["error"]
    text = answer.json()["error"]
    assert "\n" not in text
    assert "/" not in text
    return text
