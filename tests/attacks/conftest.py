"""Inputs of small commands, made once for all attacks."""

import pytest
import small_commands


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """The folder of small_commands.write_inputs."""
    root = tmp_path_factory.mktemp("inputs")
    small_commands.write_inputs(root)
    return root
