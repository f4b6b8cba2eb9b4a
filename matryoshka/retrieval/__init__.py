"""Nested retrieval: short prefixes find candidates, longer prefixes order them.

params.py           what a search does: index, shortlist, stages
pipeline.py         a whole search in arrays; the interface of all engines
scan.py             shortlists: int8 or binary codes of a prefix, every row
ivf.py              shortlists: the same codes in an inverted file
graph.py            shortlists: faiss' HNSW, for comparison
rerank.py           candidates in the order of longer prefixes, in stages
exact.py            exact search of every row: the ground truth
device.py           exhaustive and funnel search on a GPU
store.py            an index as a folder: store_part.py reads its parts, store_writer.py changes it,
                    lance.py makes it follow a LanceDB table
tables.py           opens what `matryoshka retrieve` searches
sweep.py            the fastest parameters that meet a recall bound; sweep_report.py prints them
ranking_metrics.py  mAP@k, recall and its bounds, MFLOPs

Rows are embeddings, float32 or float16 [N, D], any array or memory map; a search never changes
them. Similarity is the cosine of prefixes, which are normalised after truncation. A zero vector has
cosine 0. Rows with NaN or infinity are never found. Rows of equal score are ordered by id. Missing
results have id -1. Source: Kusupati et al., arXiv 2205.13147, section 4.3.1 and appendix E.
"""

from typing import TYPE_CHECKING

from matryoshka import lazy

# not lazily: the module of this name would hide the function
from matryoshka.retrieval.rerank import Stage, rerank

if TYPE_CHECKING:
    from matryoshka.retrieval.exact import exact_search
    from matryoshka.retrieval.hits import Hits, RetrievalError
    from matryoshka.retrieval.ivf import InvertedFile
    from matryoshka.retrieval.params import SearchParams
    from matryoshka.retrieval.pipeline import Engine, Searcher
    from matryoshka.retrieval.scan import BinaryScan, PrefixScan

__all__ = [
    "BinaryScan",
    "Engine",
    "Hits",
    "InvertedFile",
    "PrefixScan",
    "RetrievalError",
    "SearchParams",
    "Searcher",
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
        "params": ("SearchParams",),
        "pipeline": ("Engine", "Searcher"),
        "scan": ("BinaryScan", "PrefixScan"),
    },
)
