"""Lists come in pages: the first holds its own records, and iterating goes on through those that follow."""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar, final

T = TypeVar("T")


@final
@dataclass(frozen=True)
class AsyncPage(Generic[T]):
    """`async for record in page` runs over this page and all that follow; `.data` is this page alone."""

    data: list[T]
    following: Callable[[], Awaitable["AsyncPage[T]"]] | None = field(default=None, repr=False, compare=False)
    """Fetches the next page; None for the last."""

    @property
    def has_more(self) -> bool:
        """Whether a page follows."""
        return self.following is not None

    async def __aiter__(self) -> AsyncIterator[T]:
        page = self
        while True:
            for record in page.data:
                yield record
            if page.following is None:
                return
            page = await page.following()


@final
@dataclass(frozen=True)
class Page(Generic[T]):
    """`for record in page` runs over this page and all that follow; `.data` is this page alone."""

    data: list[T]
    following: Callable[[], "Page[T]"] | None = field(default=None, repr=False, compare=False)
    """Fetches the next page; None for the last."""

    @property
    def has_more(self) -> bool:
        """Whether a page follows."""
        return self.following is not None

    def __iter__(self) -> Iterator[T]:
        page = self
        while True:
            yield from page.data
            if page.following is None:
                return
            page = page.following()
