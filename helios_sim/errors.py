"""What a user's mistake becomes: one sentence that names the place and what is allowed."""

from __future__ import annotations


class InputError(ValueError):
    """A scenario, profile, trace or run that cannot be used as given.

    `where` names the file and, if known, the place in it ("scenario.toml, workload.rate_per_s").
    """

    def __init__(self, message: str, where: str | None = None) -> None:
        self.message = message
        self.where = where
        super().__init__(f"{where}: {message}" if where else message)

    def __reduce__(self) -> tuple[type[InputError], tuple[str, str | None]]:
        """Travel between processes whole."""
        return type(self), (self.message, self.where)
