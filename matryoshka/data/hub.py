"""The hub of Hugging Face: its cache where there is no network, and not a line for each retry."""

from __future__ import annotations

import logging
from collections.abc import Generator
from contextlib import contextmanager

from matryoshka.data.downloads import NETWORK_SECONDS, within


@contextmanager
def offline_without_network() -> Generator[None]:
    """Without a network, use the cache at once: each request would be tried for half a minute."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    def ask() -> None:
        get_session().head(constants.ENDPOINT, timeout=NETWORK_SECONDS)

    before = constants.HF_HUB_OFFLINE
    try:
        is_reached = before or within(NETWORK_SECONDS, ask)
    except Exception:  # the client's own types, which change with its back end
        is_reached = False
    constants.HF_HUB_OFFLINE = before or not is_reached
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@contextmanager
def quiet_hub() -> Generator[None]:
    """Only errors in its log, which otherwise has a line for every retry."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
