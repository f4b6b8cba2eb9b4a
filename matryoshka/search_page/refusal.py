"""Requests that the search page refuses."""


class Refusal(ValueError):
    """A request that is refused. status: of HTTP; the message reveals no paths of this machine."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
