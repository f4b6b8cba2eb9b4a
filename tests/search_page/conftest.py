"""The small index that all tests of the page search, and a client of it."""

import pytest
from served import client_of, made_once


@pytest.fixture(scope="module")
def made(tmp_path_factory, photo):
    return made_once(tmp_path_factory, photo)


@pytest.fixture(scope="module")
def client(made):
    return client_of(made)[0]
