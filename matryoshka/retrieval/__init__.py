"""Nested retrieval: short prefixes find candidates, longer ones put them in order.

scan.py       every row: int8 or binary codes of a prefix              <- shortlists
ivf.py        the same codes in an inverted file
rerank.py     the shortlist by cosine of longer prefixes, in stages
exact.py      every row in full: the truth
graph.py      faiss' HNSW, for comparison
pipeline.py   all of these by one description
sweep.py      the fastest of many whose recall is certain
device.py     exhaustive and funnel search on a GPU
store.py      an index as a folder; store_writer.py changes it, lance.py lets it follow a table
metrics.py    ids -> numbers

Rows are embeddings, float32 or float16 [N, D], any array or memory map, never changed. Similarity
is the cosine of prefixes: normalised after they were cut off. A zero vector has cosine 0; rows with
NaN or infinity are never found; equal scores go by rising id; where fewer than k are found, ids are
-1. Source: Kusupati et al., arXiv 2205.13147, section 4.3.1 and appendix E.
"""

from typing import TYPE_CHECKING

from matryoshka import lazy

# not lazily: the module of this name would hide the function
from matryoshka.retrieval.rerank import Stage, rerank

if TYPE_CHECKING:
    from matryoshka.retrieval.exact import exact_search
    from matryoshka.retrieval.hits import Hits, RetrievalError
    from matryoshka.retrieval.ivf import InvertedFile
    from matryoshka.retrieval.pipeline import Searcher, Setting
    from matryoshka.retrieval.scan import BinaryScan, PrefixScan

__all__ = [
    "BinaryScan",
    "Hits",
    "InvertedFile",
    "PrefixScan",
    "RetrievalError",
    "Searcher",
    "Setting",
    "Stage",
    "exact_search",
    "rerank",
]

__getattr__ = lazy.attribute(
    __name__,
    {
        "exact": ("exact_search",),
        "hits": ("Hits", "RetrievalError"),
        "ivf": ("InvertedFile",),
        "pipeline": ("Searcher", "Setting"),
        "scan": ("BinaryScan", "PrefixScan"),
    },
)
