"""The server: a few addresses that only read. Every answer carries the policy that forbids what the pages do not need."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from pipeline.store import Store, StoreError
from pipeline.view.filters import FilterError, Filters, Selection
from pipeline.view.library import Library, Place
from pipeline.view.models import Doubts
from pipeline.view.pages import Pages

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
_TITLES = {400: "That cannot be asked", 404: "Not here", 405: "Only reading is possible", 503: "The run cannot be read"}


class Shelf:
    """The library of a run that may still be going on: opened anew when an output has come or changed."""

    def __init__(self, store: Store) -> None:
        self._store, self._lock = store, threading.Lock()
        self._checked: dict[tuple[int, str, int], str | None] = {}
        self._stand = self._now()
        self._library = Library(store, self._damage)

    def library(self) -> Library:
        """
        Raises:
            StoreError: the run has become unreadable.
        """
        with self._lock:
            now = self._now()
            if now != self._stand:
                self._library, self._stand = Library(self._store, self._damage), now
            return self._library

    def _now(self) -> tuple[tuple[str, int], ...]:
        found = []
        for file in sorted(self._store.root.glob("[0-9]*/*/manifest.json")):
            try:
                found.append((str(file), file.stat().st_mtime_ns))
            except OSError:  # it is being replaced
                continue
        return tuple(found)

    def _damage(self, round: int, stage: str) -> str | None:
        """As `Store.check`, once for each time that an output was written."""
        manifest = self._store.path(round, stage) / "manifest.json"
        key = (round, stage, manifest.stat().st_mtime_ns if manifest.exists() else 0)
        if key not in self._checked:
            self._checked[key] = self._store.check(round, stage)
        return self._checked[key]


def application(shelf: Shelf, doubts: Doubts, name: str, hosts: Sequence[str] = LOOPBACK) -> Starlette:
    """The server of one run, called `name`, for browsers that ask for one of `hosts`: pages of other sites whose name was made to
    point here are turned away."""
    view = _View(shelf, doubts, name)
    routes = [
        Route("/", view.listed),
        Route("/rollout/{round:int}/{stage:str}/{at:int}", view.single),
        Route("/trees", view.trees),
        Route("/tree/{round:int}/{at:int}", view.tree),
    ]
    trusted = Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)
    said = {FilterError: view.wrong, StoreError: view.damaged, HTTPException: view.refused, Exception: view.failed}
    return Starlette(routes=routes, middleware=[trusted], exception_handlers=said)


class _View:
    # Plain functions, not coroutines: starlette runs each in a thread, so that a slow one does not hold up the others.

    def __init__(self, shelf: Shelf, doubts: Doubts, name: str) -> None:
        self._shelf, self._doubts, self._name, self._pages = shelf, doubts, name, Pages()

    def listed(self, request: Request) -> Response:
        library = self._shelf.library()
        return self._page(self._pages.listed(library, _selected(library, dict(request.query_params))))

    def single(self, request: Request) -> Response:
        library = self._shelf.library()
        query = dict(request.query_params)
        wanted = query.pop("p_undo", "")
        if wanted not in ("", "0", "1"):
            raise FilterError(f"p_undo={wanted[:60]!r}: allowed are 0 and 1")
        selection = _selected(library, query)
        path = request.path_params
        number = library.number(Place(path["round"], path["stage"], path["at"]))
        if number is None:
            raise HTTPException(404, f"There is no rollout {path['at']} in round {path['round']}, stage {path['stage']}.")
        ask = library.ask(number)
        found: list[float] | str | None = None
        if wanted == "1":
            try:
                found = self._doubts.of(ask) if ask else "the model that wrote this is not in the run any more"
            except StoreError as error:
                found = str(error)
        return self._page(self._pages.single(library, selection, number, ask, found))

    def trees(self, request: Request) -> Response:
        library = self._shelf.library()
        page = Filters.parse({"page": request.query_params.get("page", "")}, library.table).page
        return self._page(self._pages.trees(library, page))

    def tree(self, request: Request) -> Response:
        library = self._shelf.library()
        round, at = request.path_params["round"], request.path_params["at"]
        if round not in library.trees or at >= len(library.trees[round]):
            raise HTTPException(404, f"There is no search tree {at} in round {round}.")
        return self._page(self._pages.tree(library, round, at))

    def wrong(self, request: Request, error: Exception) -> Response:
        return self._say(400, f"{error}.")

    def damaged(self, request: Request, error: Exception) -> Response:
        return self._say(503, f"{error}.")

    def refused(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        plain = error.detail in ("Not Found", "Method Not Allowed")
        return self._say(error.status_code, "There is no such page." if plain else error.detail)

    def failed(self, request: Request, error: Exception) -> Response:
        return self._say(500, "Something went wrong; the terminal in which the server runs says what.")

    def _say(self, status: int, text: str) -> Response:
        return self._page(self._pages.message(self._name, _TITLES.get(status, "That went wrong"), text), status)

    def _page(self, html: str, status: int = 200) -> Response:
        headers = {
            "Content-Security-Policy": self._pages.policy,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Cross-Origin-Opener-Policy": "same-origin",
            "Cache-Control": "no-store",
        }
        return HTMLResponse(html, status, headers)


def _selected(library: Library, query: dict[str, str]) -> Selection:
    return Selection(library.table, Filters.parse(query, library.table), library.search)
