"""The search page of a small index as a program of its own, without a model, to be attacked.

python page_server.py DIR DESCRIPTORS HEADER_TIMEOUT MEMORY     prints the port, then answers
"""

import resource
import sys
from pathlib import Path

import numpy as np
from matryoshka.inference.serve import open_socket, run_server
from stored_indexes import MODEL, built, random_rows

from matryoshka.search_page import Pictures, Service, app, connections, make_app, memory


def main(folder: Path, descriptors: int, header_timeout: float, budget: int) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))
    connections.HEADER_TIMEOUT = header_timeout
    app.UPLOAD_TIMEOUT = header_timeout
    pictures = Pictures()
    pictures.memory = memory.PixelMemory(budget, wait=1.0)

    def encode(pixels):
        return np.resize(pixels[::64, ::64].mean((0, 1)), 24).astype(np.float32) + 1

    index = built(folder, random_rows(50))
    service = Service(index, encode, MODEL["weights_sha256"], pictures)
    with open_socket("127.0.0.1", 0) as server_socket:
        print(server_socket.getsockname()[1], flush=True)
        run_server(make_app(service), server_socket)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]))
