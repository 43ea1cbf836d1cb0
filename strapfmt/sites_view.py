"""The sites of a dataset by name, and how they print."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from strapfmt.errors import ArgumentError, SiteNotFoundError
from strapfmt.report import shape_text
from strapfmt.site import Site
from strapfmt.text import table_of

__all__ = ["SitesView"]


class SitesView(Mapping[str, Site]):
    """The sites of a dataset by name; prints as a table."""

    def __init__(self, sites: Mapping[str, Site]) -> None:
        self._sites = sites

    def __contains__(self, name: object) -> bool:
        return name in self._sites

    def __getitem__(self, name: str) -> Site:
        if not isinstance(name, str):
            raise ArgumentError(f"expected the name of a site, got {name!r}; rows are counted in each site")
        if name not in self._sites:
            raise SiteNotFoundError(name, self._sites)
        return self._sites[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)

    def __repr__(self) -> str:
        rows = [
            (site.name, str(site.n_rows), shape_text(site.shape), site.dtype, site.codec, site.row_space)
            for site in self._sites.values()
        ]
        return table_of(("site", "rows", "shape", "dtype", "codec", "row space"), rows)
