"""JSON objects under a checksum, in files that decide something.

    write_atomically(path, encode(content))
    content, is_sealed = decode(path.read_bytes())      # JsonFileError if it was changed

The checksum is the last entry of the object. Someone who edits such a file on purpose removes the
entry: a file without one is read as it is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

KEY = "checksum"
KIND = "blake2b:"
DIGEST_BYTES = 16


class JsonFileError(ValueError):
    """A text that is not whole; the message has no path."""


def seal(content: Mapping[str, Any]) -> dict[str, Any]:
    """`content` with its checksum as the last entry."""
    # Through JSON, as a reader will see it: tuples become lists, numbers as names become text.
    rest = json.loads(json.dumps(dict(content)))
    rest.pop(KEY, None)
    return rest | {KEY: _checksum(rest)}


def encode(content: Mapping[str, Any], indent: int | None = 1) -> bytes:
    """The text of a file with its checksum. Names that are no text are kept (surrogateescape)."""
    text = json.dumps(seal(content), indent=indent, ensure_ascii=False) + "\n"
    return text.encode(errors="surrogateescape")


def decode(text: bytes) -> tuple[Any, bool]:
    """(the value without its checksum, whether it had one). JsonFileError names the reason.

    The value is an object, unless it had no checksum: that of another program may be anything.
    """
    try:
        content = json.loads(text.decode(errors="surrogateescape"))
    except (ValueError, RecursionError):
        raise JsonFileError("not valid JSON") from None
    if not isinstance(content, dict):
        return content, False
    # Two signs, the name and the kind: damage in one of them must not hide that there is a
    # checksum.
    sealed = KEY in content
    if not sealed:
        sealed = any(isinstance(v, str) and v.startswith(KIND) for v in content.values())
    stored = content.pop(KEY, None)
    if sealed and stored != _checksum(content):
        raise JsonFileError(
            "its checksum does not match its contents; if it was edited on purpose, remove "
            f'its entry "{KEY}"'
        )
    return content, sealed


def _checksum(content: Mapping[str, Any]) -> str:
    # Sorted, without spaces: of the values, not of their layout.
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return KIND + hashlib.blake2b(text.encode(), digest_size=DIGEST_BYTES).hexdigest()
