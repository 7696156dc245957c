"""The login page and its two actions. Plain HTML: no script, nothing loaded, so it works before anything else may be served."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from urllib.parse import parse_qs

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse, Response

from modules.auth import Auth, Cookie
from modules.errors import Busy, NotFound, UserError

MAX_FORM_BYTES = 32_768


def login_router(auth: Auth, on_adopt: Callable[[str, str], None]) -> APIRouter:
    """GET and POST /login, POST /logout.

    `on_adopt(old, new)` is called, in a worker thread, when a browser that was used without login logs in: give what `old` owns to `new`.
    A client that does not ask for HTML (gradio_client) gets JSON and a status instead of pages and redirects.
    """
    router = APIRouter()

    @router.get("/login", include_in_schema=False)
    def show(request: Request, next: str = "/") -> Response:
        if not auth.login_required or auth.who(request):
            return _redirect(request, local_path(next))
        return HTMLResponse(login_page(local_path(next)))

    @router.post("/login", include_in_schema=False)
    async def log_in(request: Request) -> Response:
        form = await _form(request)
        user, target = form.get("username", ""), local_path(form.get("next", "/"))
        try:
            cookies = await run_in_threadpool(_log_in, auth, request, user, form.get("password", ""), on_adopt)
        except UserError as error:
            return _failed(request, error, user, target)
        response = _redirect(request, target) if _wants_html(request) else JSONResponse({"success": True})
        return _with_cookies(response, *cookies)

    @router.post("/logout", include_in_schema=False)
    async def log_out(request: Request) -> Response:
        cookie = await run_in_threadpool(auth.logout, request)
        response = _redirect(request, "/login") if _wants_html(request) else JSONResponse({"success": True})
        return _with_cookies(response, cookie)

    return router


def local_path(target: str) -> str:
    """`target` if it is a path on this server, else "/": browsers read "//host", "/\\host" and "/<tab>/host" as another host."""
    local = target.startswith("/") and not target.startswith("//") and "\\" not in target and target.isascii() and target.isprintable()
    return target if local else "/"


def login_page(target: str, user: str = "", error: str = "") -> str:
    """The whole page. `target`: where to go afterwards; `user` and `error`: what the last attempt gave."""
    return _PAGE.format(
        target=escape(target),
        user=escape(user),
        error=f'<p class="error" role="alert">{escape(error)}</p>' if error else "",
        focus_user="" if user else " autofocus",
        focus_password=" autofocus" if user else "",
    )


def _log_in(auth: Auth, request: Request, user: str, password: str, on_adopt: Callable[[str, str], None]) -> list[Cookie]:
    if not auth.login_required:
        raise NotFound("This server has no logins. Open the page itself.")
    session = auth.login(user, password)
    new = auth.identify({session.name: session.value})
    old = auth.browser_owner(request)
    if not old or not new:
        return [session]
    on_adopt(old, new.owner)
    return [session, auth.forget_browser()]


def _failed(request: Request, error: UserError, user: str, target: str) -> Response:
    headers = {"Retry-After": str(int(error.retry_after))} if isinstance(error, Busy) else {}
    if _wants_html(request):
        return HTMLResponse(login_page(target, user[:200], str(error)), error.status, headers)
    return JSONResponse({"error": {"code": error.code, "message": str(error)}}, error.status, headers)


async def _form(request: Request) -> dict[str, str]:
    """The first value of each field of a small urlencoded form; what is larger or of another type has no fields."""
    body = b""
    async for piece in request.stream():
        body += piece
        if len(body) > MAX_FORM_BYTES:
            return {}
    try:
        return {name: values[0] for name, values in parse_qs(body.decode("ascii", "replace"), keep_blank_values=True, max_num_fields=10).items()}
    except ValueError:
        return {}


def _wants_html(request: Request) -> bool:
    return "text/html" in request.headers.get("accept", "")


def _redirect(request: Request, target: str) -> Response:
    return RedirectResponse(request.scope.get("root_path", "") + target, status_code=303)


def _with_cookies(response: Response, *cookies: Cookie) -> Response:
    for cookie in cookies:
        response.headers.append("set-cookie", cookie.header)
    return response


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="robots" content="noindex">
<title>Log in · Text Generation Web UI</title>
<style>
:root {{
  --page: #f4f5f7; --card: #ffffff; --text: #1b1f27; --muted: #5b6472; --line: #cfd5de; --field: #ffffff;
  --accent: #2f5fd0; --accent-hover: #274fb0; --on-accent: #ffffff; --error: #a3271f; --error-page: #fdeceb; --shadow: 0 8px 30px rgb(20 30 60 / 10%);
}}
@media (prefers-color-scheme: dark) {{
  :root {{
    --page: #12151b; --card: #1b2029; --text: #e8ebf0; --muted: #a0a9b8; --line: #3a4250; --field: #14181f;
    --accent: #7ea2ff; --accent-hover: #9db8ff; --on-accent: #0e1420; --error: #ffb4ab; --error-page: #3a1d1c; --shadow: 0 8px 30px rgb(0 0 0 / 40%);
  }}
}}
* {{ box-sizing: border-box; }}
body {{
  margin: 0; min-height: 100vh; min-height: 100dvh; display: grid; place-items: center; padding: 1rem;
  background: var(--page); color: var(--text); font: 1rem/1.5 system-ui, sans-serif;
}}
main {{
  width: 100%; max-width: 23rem; padding: 2rem;
  background: var(--card); border: 1px solid var(--line); border-radius: 1rem; box-shadow: var(--shadow);
}}
h1 {{ margin: 0; font-size: 1.35rem; line-height: 1.3; letter-spacing: -0.01em; }}
.what {{ margin: .25rem 0 1.5rem; color: var(--muted); }}
label {{ display: block; margin: 0 0 .35rem; font-weight: 600; font-size: .9rem; }}
input {{
  width: 100%; margin: 0 0 1.1rem; padding: .65rem .75rem; font: inherit; color: inherit;
  background: var(--field); border: 1px solid var(--line); border-radius: .6rem;
}}
button {{
  width: 100%; margin: .3rem 0 0; padding: .7rem; font: inherit; font-weight: 600; cursor: pointer;
  color: var(--on-accent); background: var(--accent); border: 0; border-radius: .6rem;
}}
button:hover {{ background: var(--accent-hover); }}
input:focus-visible, button:focus-visible {{ outline: 2px solid var(--accent); outline-offset: 2px; }}
.error {{ margin: 0 0 1.25rem; padding: .6rem .75rem; color: var(--error); background: var(--error-page); border-radius: .6rem; }}
</style>
</head>
<body>
<main>
<h1>Text Generation Web UI</h1>
<p class="what">Log in to go on.</p>
{error}
<form method="post" action="login">
<input type="hidden" name="next" value="{target}">
<label for="username">Name</label>
<input id="username" name="username" value="{user}" required maxlength="1024"
 autocomplete="username" autocapitalize="none" spellcheck="false"{focus_user}>
<label for="password">Password</label>
<input id="password" name="password" type="password" required maxlength="1024" autocomplete="current-password"{focus_password}>
<button>Log in</button>
</form>
</main>
</body>
</html>
"""
