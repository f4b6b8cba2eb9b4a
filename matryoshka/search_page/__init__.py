"""Web page that compares the exact neighbours of an image at every prefix with the fast search.

comparison.py  one query: exact search at each prefix, and the index's fast search
pictures.py    uploads and pictures of data sets, checked and decoded
classes.py     rows of each class, as a filter
download.py    neighbours as JSON and CSV
service.py     answers without HTTP: the index, the model, recent queries
app.py         the HTTP interface and its access rules
page.html, style.css, behaviour.js (with dom.js, viewer.js, map.js), icon.svg: all that the browser
loads

inference/serve.py is the program.
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
