"""The Hub over HTTP: the commit of a branch, its files with sizes and checksums, and their content from any byte on.

Three kinds of GET, written here and not taken from huggingface_hub: that library is switched offline in this program, so that no model loader
ever asks the network, and the switch is one for the whole process; its listings have no time limit and no bound, and follow a link with the
token to whatever host it names. Here every answer is bounded in size and time, and the token goes to the endpoint alone.
Forms: Hugging Face Hub API, `/api/models/…/revision/…`, `/api/models/…/tree/…`, `/…/resolve/…`.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

import httpx

from modules.connections import checked_url, is_loopback, origin, retry_after, why
from modules.downloads.files import RemoteFile
from modules.errors import AccessDenied, Busy, DataError, NotFound, SettingsError

DEFAULT_ENDPOINT = "https://huggingface.co"
MAX_REDIRECTS = 5
MAX_ANSWER = 16 << 20
MAX_FILES = 20_000
LISTING_SECONDS = 90.0
_TIMEOUT = httpx.Timeout(20.0, connect=10.0)
_TRANSIENT = {408, 425, 429, 500, 502, 503, 504}
_HEX = {40: "git_sha1", 64: "sha256"}


def endpoint_of(environment: Mapping[str, str] = os.environ) -> str:
    """The Hub in use: HF_ENDPOINT, or the usual one. Raises SettingsError."""
    return checked_url(environment.get("HF_ENDPOINT") or DEFAULT_ENDPOINT, "HF_ENDPOINT", False)


def token_of(environment: Mapping[str, str] = os.environ) -> str:
    """The access token: HF_TOKEN, or the file that `hf auth login` writes; "" when there is none."""
    if given := environment.get("HF_TOKEN") or environment.get("HUGGING_FACE_HUB_TOKEN"):
        return given.strip()
    cache = environment.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    home = environment.get("HF_HOME") or Path(cache, "huggingface")
    try:
        with Path(environment.get("HF_TOKEN_PATH") or Path(home, "token")).expanduser().open(encoding="ascii") as file:
            return file.read(1000).strip()
    except (OSError, ValueError):
        return ""


class Hub:
    """One endpoint. Methods may be called from any thread."""

    def __init__(self, endpoint: str, token: str = "") -> None:
        self.endpoint = checked_url(endpoint, "The address of the Hub", False)
        self._token = token if re.fullmatch(r"[!-~]{1,1000}", token) else ""
        self._client = httpx.Client(
            headers={"User-Agent": "text-generation-webui"},
            timeout=_TIMEOUT,
            limits=httpx.Limits(max_connections=32),
            trust_env=not is_loopback(urlsplit(self.endpoint).hostname or ""),  # a proxy of the environment is no way to this machine
        )

    @property
    def host(self) -> str:
        """For messages and links."""
        return urlsplit(self.endpoint).netloc

    def close(self) -> None:
        """Close all connections."""
        self._client.close()

    def commit(self, repo: str, branch: str) -> str:
        """The commit that `branch` is now."""
        found, _ = self._json(f"{self.endpoint}/api/models/{repo}/revision/{quote(branch, safe='')}", repo, time.monotonic() + LISTING_SECONDS)
        commit = found.get("sha") if isinstance(found, dict) else None
        if not isinstance(commit, str) or not re.fullmatch(r"[0-9a-f]{40}", commit):
            raise DataError(f"{self.host} does not say which commit {branch} is. Try again later.")
        return commit

    def files(self, repo: str, commit: str) -> list[RemoteFile]:
        """All files of a commit. Names are as the server tells them."""
        deadline = time.monotonic() + LISTING_SECONDS
        url: str | None = f"{self.endpoint}/api/models/{repo}/tree/{commit}?recursive=true"
        found: list[RemoteFile] = []
        while url:
            page, url = self._json(url, repo, deadline)
            if not isinstance(page, list):
                raise DataError(f"{self.host} sent a list of files that cannot be read. Try again later.")
            found += [file for entry in page if (file := _file(entry))]
            if len(found) > MAX_FILES:
                raise DataError(f"{repo} has more than {MAX_FILES} files. Give the link of the file that you want.")
        return found

    @contextmanager
    def open(self, repo: str, commit: str, name: str, headers: Mapping[str, str]) -> Iterator[httpx.Response]:
        """The content of a file, to be read with `iter_raw`; `headers` ask for a range. Its status is 200, 206 or 416.

        Raises Busy for what may pass, AccessDenied, NotFound, DataError for what does not.
        """
        url = f"{self.endpoint}/{repo}/resolve/{commit}/{quote(name)}"
        with self._get(url, repo, {"Accept-Encoding": "identity", **headers}) as response:
            yield response

    def _json(self, url: str, repo: str, deadline: float) -> tuple[Any, str | None]:
        """The answer's JSON and the address of the next page."""
        body = bytearray()
        with self._get(url, repo, {"Accept": "application/json"}) as response:
            for piece in response.iter_bytes():
                body += piece
                if len(body) > MAX_ANSWER or time.monotonic() > deadline:
                    raise DataError(f"The list of files of {repo} is too long or comes too slowly. Give the link of the file that you want.")
            following = response.links.get("next", {}).get("url")
            following = urljoin(str(response.url), following) if following else None
        if following and origin(following) != origin(self.endpoint):
            raise DataError(f"{self.host} sends us elsewhere for the list of files. Check HF_ENDPOINT.")
        try:
            return json.loads(body), following
        except (ValueError, RecursionError):
            raise DataError(f"{self.host} sent something that is no JSON. Check HF_ENDPOINT, or the proxy between.") from None

    @contextmanager
    def _get(self, url: str, repo: str, headers: Mapping[str, str]) -> Iterator[httpx.Response]:
        try:
            for _ in range(MAX_REDIRECTS + 1):
                secret = {"Authorization": f"Bearer {self._token}"} if self._token and origin(url) == origin(self.endpoint) else {}
                request = self._client.build_request("GET", url, headers={**headers, **secret})
                response = self._client.send(request, stream=True)
                try:
                    if response.has_redirect_location:
                        url = self._next(url, response.headers["location"])
                        continue
                    if response.status_code not in (200, 206, 416):
                        raise self._refused(response, repo)
                    yield response
                    return
                finally:
                    response.close()
        except httpx.InvalidURL:
            raise DataError(f"{self.host} sends us to an address that cannot be. Try again later.") from None
        except httpx.TransportError as error:
            raise Busy(f"{urlsplit(url).hostname}: {why(error)}. Check the connection to the network and try again.", retry_after=0) from None
        raise DataError(f"{self.host} sends us from address to address. Try again later.")

    def _next(self, url: str, location: str) -> str:
        following = urljoin(url, location)
        plain = urlsplit(self.endpoint).scheme == "http"
        try:
            checked_url(following.partition("?")[0].partition("#")[0], "An address that the Hub sends us to", False)
            if not plain and urlsplit(following).scheme != "https":
                raise SettingsError("not encrypted")
        except SettingsError:
            raise DataError(f"{self.host} sends us to an address that is not encrypted. Nothing was loaded from there.") from None
        return following

    def _refused(self, response: httpx.Response, repo: str) -> Exception:
        """The error that tells what to do. Codes: the Hub's X-Error-Code."""
        status, code = response.status_code, response.headers.get("x-error-code", "")
        if status in _TRANSIENT:
            return Busy(
                f"{self.host} is busy or out of order (status {status}). Try again later.", retry_after(response.headers.get("retry-after"), 0)
            )
        where = f"{self.endpoint}/{repo}"
        if code == "GatedRepo" or (status == 403 and self._token):
            asked = "your token has no access to it" if self._token else "it wants to know who you are"
            return AccessDenied(
                f"{repo} is gated: {asked}. Accept its conditions at {where} with your account, then give a token of that account "
                "(HF_TOKEN, or `hf auth login`) and try again."
            )
        if code == "RevisionNotFound":
            return NotFound(f"{repo} has no such branch. Look at {where}/tree/main, or leave the branch empty.")
        if code == "EntryNotFound":
            return NotFound(f"{repo} does not have this file any more. Ask for the list of files again.")
        if status == 401 and self._token:
            return AccessDenied(f"{self.host} does not know the token. Make a new one and set HF_TOKEN, or run `hf auth login`.")
        if status in (401, 403, 404) or code == "RepoNotFound":
            return NotFound(f"There is no repository {repo} at {self.host}, or it is private. Check the name; for a private one set HF_TOKEN.")
        return DataError(f"{self.host} answered with status {status}. Try again later.")


def _file(entry: Any) -> RemoteFile | None:
    """A file of a listing; None for a folder and for what cannot be checked."""
    if not isinstance(entry, dict) or entry.get("type") != "file":
        return None
    large = entry.get("lfs")
    large = large if isinstance(large, dict) else {}
    name, size, digest = entry.get("path"), large.get("size", entry.get("size")), large.get("oid") or entry.get("oid")
    if not isinstance(name, str) or not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < 2**50:
        return None
    if not isinstance(digest, str) or not re.fullmatch(r"[0-9a-f]+", digest) or len(digest) not in _HEX:
        return None
    return RemoteFile(name, size, **{_HEX[len(digest)]: digest})
