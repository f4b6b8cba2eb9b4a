"""A page to try an index: neighbours of a picture at every prefix, beside the fast search.

comparison.py  one query: exact at each prefix, and the index's fast search
pictures.py    uploads and pictures of data sets, decoded and checked
service.py     answers: the index, the model, what was asked before
app.py         the same over HTTP, and access control
page.html, style.css, behaviour.js, icon.svg: the files that a browser gets; it loads no others

Needs fastapi (the extra [serve]). The program is inference/serve.py.
"""

from typing import TYPE_CHECKING

from matryoshka import lazy

if TYPE_CHECKING:
    from matryoshka.search_page.app import make_app
    from matryoshka.search_page.pictures import Pictures, Refusal
    from matryoshka.search_page.service import Service

__all__ = ["Pictures", "Refusal", "Service", "make_app"]

__getattr__ = lazy.attribute(
    __name__,
    {"app": ("make_app",), "pictures": ("Pictures", "Refusal"), "service": ("Service",)},
)
