"""A program: a .beton and a file of an index, mapped in one process and cut off in turn.

    python cut_both.py FOLDER "IMPORTS" "ORDER" TAKEN

IMPORTS: modules of matryoshka, imported first; ORDER: names of the two files, cut off one after the
other. TAKEN: "taken" if other code takes the signal before each. Then a map of nobody is cut off.
"""

import importlib
import mmap
import os
import signal
import sys
from pathlib import Path

import numpy as np

PHOTOS, ROWS = "photos.beton", "rows.f16"


def main():
    folder, imports, order, taken = sys.argv[1:]
    for name in imports.split():
        importlib.import_module(f"matryoshka.{name}")
    from matryoshka.data import BetonError, BetonFile
    from matryoshka.retrieval import RetrievalError
    from matryoshka.retrieval.checked_file import CheckedFile

    os.chdir(folder)
    beton = BetonFile(PHOTOS)
    (samples,) = beton.fetch(np.arange(2))
    rows = CheckedFile(Path(ROWS), os.path.getsize(ROWS), None, 1)
    readers = {
        PHOTOS: (samples.data, samples.check, BetonError),
        ROWS: (rows.bytes, rows.check_whole, RetrievalError),
    }
    cut = []
    for name in order.split():
        if taken == "taken":
            signal.signal(signal.SIGBUS, signal.SIG_DFL)
            # The look of one reader guards the maps of all.
            next(check for other, (_, check, _) in readers.items() if other not in cut)()
        content, check, error_type = readers[name]
        assert content[8192:].any()
        os.truncate(name, 10)
        assert not content[8192:].any(), "zeros in place of what is lost"
        cut.append(name)
        try:
            check()
        except error_type as error:
            print(str(error).partition(":")[0], flush=True)
    with open("other", "w+b") as file:
        file.write(bytes(100_000))
        file.flush()
        other = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        os.truncate("other", 10)
        print(other[50_000])


if __name__ == "__main__":
    main()
