"""Two runs that want one port: the second is refused in one line, before it starts a process."""

import socket

import pytest
from matryoshka.train import train_cifar10, train_imagenet, train_ssl
from training_commands import refused

from matryoshka import distributed
from matryoshka.runtime import DistConfig

PROGRAMS = {
    "train": (train_imagenet.main, []),
    "ssl": (train_ssl.main, ["--method=simclr"]),
    "cifar": (train_cifar10.main, []),
}


@pytest.fixture
def port():
    """A port at which another process listens."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        yield other.getsockname()[1]


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_port_that_is_taken(program, digits, tmp_path, capsys, port):
    main, more = PROGRAMS[program]
    words = [f"--data.train_dataset={digits['train']}", f"--data.val_dataset={digits['val']}"]
    if program == "cifar":
        words = [f"--cifar.data={digits['train']},{digits['val']}"]
    words += [f"--logging.folder={tmp_path}", "--logging.run_id=run", "--training.device=cpu"]
    words += ["--training.distributed=1", "--dist.world_size=2", f"--dist.port={port}"]
    line = refused(main, [*words, "--dist.address=127.0.0.1", *more], capsys)
    assert f"dist.port={port}: another process of this machine uses it" in line
    assert "0 for any" in line
    assert list(tmp_path.iterdir()) == []


def test_addresses(port):
    config = DistConfig(address="no-such-host.invalid", port=port)
    with pytest.raises(distributed.DistributedError, match=r"no-such-host\.invalid: no such host"):
        distributed._check_port(config)
    distributed._check_port(DistConfig(address="192.0.2.1", port=port))  # of another machine
    with socket.create_server(("127.0.0.1", 0)) as free:
        other = free.getsockname()[1]
    distributed._check_port(DistConfig(address="localhost", port=other))
