"""A page on which an index is tried: neighbours of a picture at every prefix, side by side, beside
the fast search.

comparison.py  one query: exact at each prefix, and the index's fast search
pictures.py    uploads and pictures of data sets, decoded and checked
service.py     answers: the index, the model, what was asked before
app.py         the same over HTTP, and who may ask
page.html, style.css, behaviour.js, icon.svg: what the browser gets; nothing comes from anywhere else

Needs fastapi (the extra [serve]). The program is inference/serve.py.
"""

from matryoshka.search_page.app import make_app
from matryoshka.search_page.pictures import Pictures, Refusal
from matryoshka.search_page.service import Service

__all__ = ["Pictures", "Refusal", "Service", "make_app"]
