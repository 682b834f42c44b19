"""The console's HTTP: login, which page a path means, headers that let nothing execute, errors as pages."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from aiohttp import web
from sqlalchemy import Connection

from lorapool_api.openai import ApiError, PayloadTooLargeError, RequestTimeoutError, UnauthenticatedError
from lorapool_gateway.routing.key_guard import KeyGuard
from lorapool_gateway.routing.live_tables import KeySource
from lorapool_ledger.api.signing import Signer
from lorapool_ledger.console import pages, tables
from lorapool_ledger.console.live import Live, NothingLive
from lorapool_ledger.console.periods import choices, shown, with_query
from lorapool_ledger.console.render import environment, render
from lorapool_ledger.console.session import COOKIE, SESSION_S, LoginLimit, Session, Sessions
from lorapool_ledger.reports.scope import scope_of
from lorapool_ledger.store.database import Database, DatabaseAwayError

log = logging.getLogger(__name__)

PREFIX = "/console"
STYLE = f"{PREFIX}/static/console.css"
THEME_COOKIE = "lorapool_theme"
THEMES = ("auto", "light", "dark")
YEAR_S = 365 * 86400
MAX_FORM_BYTES = 4096
FORM_TIMEOUT_S = 10.0

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'self'; img-src 'self'; form-action 'self'; base-uri 'none'; "
        "frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}

INVOICE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; frame-ancestors 'none'"
"""An invoice brings its own style, so that it can be saved as one file. It has no scripts and no forms."""

Page = Callable[[Connection, pages.View], pages.Context]

OWNER_MENU = (
    ("", "Overview"),
    ("bases", "Bases"),
    ("adapters", "Adapters"),
    ("tenants", "Tenants"),
    ("bill", "Bill"),
    ("reconciliation", "Reconciliation"),
    ("failures", "Failures"),
    ("quotas", "Quotas"),
    ("jobs", "Fine-tuning"),
    ("requests", "Requests"),
    ("prices", "Prices"),
    ("export", "Export"),
)
TENANT_MENU = (
    ("", "Overview"),
    ("adapters", "Adapters"),
    ("bill", "Bill"),
    ("failures", "Not completed"),
    ("quotas", "Limits"),
    ("jobs", "Fine-tuning"),
    ("requests", "Requests"),
    ("prices", "Prices"),
    ("export", "Export"),
)
PAGES: dict[str, Page] = {
    "bases": pages.bases,
    "adapters": pages.adapters,
    "tenants": pages.tenants,
    "bill": pages.bill,
    "reconciliation": pages.reconciliation,
    "failures": pages.failures,
    "quotas": pages.quotas,
    "jobs": pages.jobs,
    "requests": pages.requests,
    "prices": pages.prices,
    "export": pages.export,
}


@dataclass(frozen=True, slots=True)
class _Found:
    """A page, with what its path names."""

    template: str
    menu: str
    page: Page


class Console:
    def __init__(
        self,
        database: Database,
        keys: KeySource,
        guard: KeyGuard,
        sessions: Signer,
        live: Live | None = None,
        *,
        now_unix_s: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._database = database
        self._sessions = Sessions(keys, guard, sessions, now_unix_s=now_unix_s)
        self._live: Live = live if live is not None else NothingLive()
        self._now_unix_s = now_unix_s
        self._limit = LoginLimit(clock)
        self._templates = environment()
        self._style = files("lorapool_ledger.console").joinpath("static", "console.css").read_bytes()

    def add_routes(self, app: web.Application) -> None:
        """Adds the console's paths."""
        app.router.add_route("*", PREFIX, self.handle)
        app.router.add_route("*", PREFIX + "/{path:.*}", self.handle)

    async def handle(self, request: web.BaseRequest) -> web.Response:
        """Answers a request whose path is `PREFIX` or below it."""
        try:
            response = await self._answer(request)
        except pages.NoSuchPageError:
            response = self._error(
                request, 404, "There is no such page", "It does not exist, or your key may not see it."
            )
        except ApiError as error:
            response = self._error(request, error.status, "That did not work", error.message)
        except DatabaseAwayError:
            response = self._error(request, 503, "The database does not answer", "Try again in some seconds.")
        except Exception:
            log.exception("unexpected error", extra={"route": request.path[:200]})
            response = self._error(request, 500, "The ledger made an error", "Its log has the details.")
        response.headers.update({name: value for name, value in HEADERS.items() if name not in response.headers})
        return response

    async def _answer(self, request: web.BaseRequest) -> web.Response:
        path = request.path.removeprefix(PREFIX)
        if path == "":
            return _redirect(f"{PREFIX}/")
        if request.path == STYLE and request.method in ("GET", "HEAD"):
            headers = {"Content-Type": "text/css; charset=utf-8", "Cache-Control": "public, max-age=300"}
            return web.Response(body=self._style, headers=headers)
        if request.method == "POST":
            return await self._post(request, path)
        if request.method not in ("GET", "HEAD"):
            return self._error(request, 405, "That did not work", "Pages are read with GET.")
        session = self._session(request)
        if path == "/login":
            return _redirect(f"{PREFIX}/") if session is not None else self._login_page(request)
        if session is None:
            return _redirect(with_query(f"{PREFIX}/login", [("next", request.path_qs)]))
        return await self._page(request, path, session)

    # --- pages

    async def _page(self, request: web.BaseRequest, path: str, session: Session) -> web.Response:
        query = {name: value for name, value in request.query.items() if len(value) <= 400}
        scope, now = scope_of(session.key), self._now_unix_s()
        invoice = path.removeprefix("/invoice/") if path.startswith("/invoice/") else None
        found = None if path in tables.TABLES or invoice is not None else _find(path, owner=scope.owner)
        view = pages.View(
            key=session.key,
            scope=scope,
            shown=shown(query.get("period", ""), now),
            now_unix_s=now,
            query=query,
            limits=await self._live.limits(scope),
            adapter=self._live.adapter,
            jobs=self._live.jobs(scope.projects) if scope.keys is None else (),
        )
        if invoice is not None:
            return await self._invoice(view, invoice)
        if found is None:
            rows = await self._database.read(lambda connection: tables.TABLES[path](connection, view))
            return _csv(rows, f"lorapool-{path.strip('/').removesuffix('.csv')}-{view.shown.name}.csv")
        context = await self._database.read(lambda connection: found.page(connection, view))
        menu = OWNER_MENU if scope.owner else TENANT_MENU
        response = self._html(request, found.template, session, view=view, menu=menu, here=found.menu, **context)
        if (renewed := self._sessions.renewed(session)) is not None:
            self._keep(request, response, renewed)
        return response

    async def _invoice(self, view: pages.View, path: str) -> web.Response:
        """The invoice of `<project>/<month>.html` or `.csv`. Raises NoSuchPageError."""
        project, _, file = path.partition("/")
        month, _, form = file.rpartition(".")
        text = await self._database.read(lambda connection: tables.invoice(connection, view, project, month, form))
        if form == "csv":
            return _csv(text, f"invoice-{project}-{month}.csv")
        headers = {"Content-Security-Policy": INVOICE_POLICY}
        return web.Response(text=text, content_type="text/html", charset="utf-8", headers=headers)

    def _html(
        self, request: web.BaseRequest, template: str, session: Session | None, status: int = 200, **values: Any
    ) -> web.Response:
        theme = request.cookies.get(THEME_COOKIE, "auto")
        now = self._now_unix_s()
        context = {
            "prefix": PREFIX,
            "theme": theme if theme in THEMES else "auto",
            "themes": THEMES,
            "session": session,
            "csrf": session.csrf if session is not None else "",
            "here_url": request.path_qs,
            "periods": choices(now),
            "link": partial(_link, values["view"].shown.name)
            if "view" in values
            else lambda path, **_: f"{PREFIX}/{path}",
            **values,
        }
        text = render(self._templates, template, context)
        return web.Response(text=text, status=status, content_type="text/html", charset="utf-8")

    def _error(self, request: web.BaseRequest, status: int, title: str, message: str) -> web.Response:
        return self._html(request, "error.html", None, status, title=title, message=message)

    # --- login and the forms

    def _session(self, request: web.BaseRequest) -> Session | None:
        try:
            return self._sessions.read(request.cookies.get(COOKIE, ""))
        except UnauthenticatedError:
            return None

    def _login_page(self, request: web.BaseRequest, status: int = 200, problem: str = "") -> web.Response:
        return self._html(request, "login.html", None, status, problem=problem, next=request.query.get("next", ""))

    async def _post(self, request: web.BaseRequest, path: str) -> web.Response:
        if not _same_origin(request):
            return self._error(request, 403, "That did not work", "The form was sent by a page of another site.")
        form = await _form(request)
        if path == "/login":
            return self._log_in(request, form)
        if path == "/theme":
            theme = form.get("theme", "auto")
            response = _redirect(_local(form.get("next", "")))
            if theme in THEMES:
                response.set_cookie(
                    THEME_COOKIE,
                    theme,
                    max_age=YEAR_S,
                    path=PREFIX,
                    samesite="Strict",
                    httponly=True,
                    secure=_tls(request),
                )
            return response
        session = self._session(request)
        if path == "/logout":
            if session is not None and not hmac.compare_digest(session.csrf, form.get("csrf", "")):
                return self._error(request, 403, "That did not work", "Open the page again and repeat it.")
            response = _redirect(f"{PREFIX}/login")
            response.del_cookie(COOKIE, path=PREFIX)
            return response
        raise pages.NoSuchPageError

    def _log_in(self, request: web.BaseRequest, form: dict[str, str]) -> web.Response:
        address = request.remote or ""
        if (wait_s := self._limit.wait_s(address)) > 0:
            response = self._login_page(request, 429, "Too many failed logins. Wait some minutes and try again.")
            response.headers["Retry-After"] = str(max(1, round(wait_s)))
            return response
        try:
            session = self._sessions.begin(form.get("key", ""))
        except UnauthenticatedError as error:
            self._limit.failed(address)
            return self._login_page(request, 401, error.message)
        response = _redirect(_local(form.get("next", "")))
        self._keep(request, response, session)
        return response

    def _keep(self, request: web.BaseRequest, response: web.Response, session: Session) -> None:
        response.set_cookie(
            COOKIE,
            self._sessions.cookie(session),
            max_age=SESSION_S,
            path=PREFIX,
            httponly=True,
            samesite="Strict",
            secure=_tls(request),
        )


def _find(path: str, *, owner: bool) -> _Found:
    """Raises NoSuchPageError."""
    first, _, rest = path.strip("/").partition("/")
    name = unquote(rest)[:400]
    if first == "":
        return _Found("overview.html", "", pages.overview) if owner else _Found("project.html", "", pages.project)
    if first == "adapter" and name:
        return _Found("adapter.html", "adapters", partial(pages.adapter, model=name))
    if first == "project" and name:
        return _Found("project.html", "tenants" if owner else "", partial(pages.project, name=name))
    if first == "bill" and name:
        return _Found("bill.html", "bill", partial(pages.bill, name=name))
    if first in PAGES and not rest:
        return _Found(f"{first}.html", first, PAGES[first])
    raise pages.NoSuchPageError


def _link(shown_period: str, path: str, /, **query: str) -> str:
    """A URL of the console in the same period."""
    return with_query(f"{PREFIX}/{path}", {"period": shown_period, **query}.items())


def _redirect(url: str) -> web.Response:
    return web.Response(status=303, headers={"Location": url})


def _local(url: str) -> str:
    """The URL if it is a page of the console, else the first page: a login leads nowhere else."""
    parts = urlsplit(url)
    inside = not parts.scheme and not parts.netloc and parts.path.startswith(f"{PREFIX}/") and "\\" not in url
    return url if inside and url.isascii() and url.isprintable() else f"{PREFIX}/"


def _tls(request: web.BaseRequest) -> bool:
    """Whether the browser speaks TLS, with this process or with a proxy in front of it."""
    return request.secure or request.headers.get("X-Forwarded-Proto", "").lower() == "https"


def _same_origin(request: web.BaseRequest) -> bool:
    """Whether a form was sent by a page of this console. Browsers send one of the two headers."""
    site, origin = request.headers.get("Sec-Fetch-Site"), request.headers.get("Origin")
    if site is not None and site not in ("same-origin", "none"):
        return False
    if origin is None:
        return True
    hosts = {request.host, request.headers.get("X-Forwarded-Host", request.host)}
    return urlsplit(origin).netloc in hosts


async def _form(request: web.BaseRequest) -> dict[str, str]:
    """The fields of a form. Raises ApiError for a body that no form of the console has."""
    body = bytearray()
    try:
        async with asyncio.timeout(FORM_TIMEOUT_S):
            async for chunk in request.content.iter_any():
                body += chunk
                if len(body) > MAX_FORM_BYTES:
                    raise PayloadTooLargeError(f"A form has at most {MAX_FORM_BYTES} bytes.")
    except TimeoutError:
        raise RequestTimeoutError("The form did not arrive in time.") from None
    return dict(parse_qsl(body.decode(errors="replace"), keep_blank_values=True))


def _csv(text: str, name: str) -> web.Response:
    return web.Response(
        body=text.encode(),
        headers={"Content-Type": "text/csv; charset=utf-8", "Content-Disposition": f'attachment; filename="{name}"'},
    )
