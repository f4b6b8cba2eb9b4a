"""Inputs of small commands, made once for all attacks."""

import pytest
import small_commands
from faulty_disk import FaultyDisk


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """The folder of small_commands.write_inputs."""
    root = tmp_path_factory.mktemp("inputs")
    small_commands.write_inputs(root)
    return root


@pytest.fixture(scope="session")
def disk(tmp_path_factory):
    """A process that runs programs on a disk that fails at a chosen call."""
    with FaultyDisk(tmp_path_factory.mktemp("disk")) as disk:
        yield disk
