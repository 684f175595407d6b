"""How requests to a URL are sent: for real, recorded, or replayed without a network."""

from __future__ import annotations

import base64
import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from lowtide.core.errors import DataError, EndpointError, EndpointTimeoutError
from lowtide.evaluation.tasks.items import canonical_hash

RESPONSE_BYTES = 64 << 20
"""Longest response that is read."""
_SECRET = frozenset({"authorization", "api-key", "x-api-key", "cookie"})


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpRequest:
    """One POST of JSON."""

    url: str
    body: str
    headers: Mapping[str, str] = field(default_factory=dict)
    timeout_s: float = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpResponse:
    """What came back, whatever its status."""

    status: int
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


class Transport(Protocol):
    """Sends requests."""

    def send(self, request: HttpRequest) -> HttpResponse:
        """Return the response.

        Raises:
            EndpointTimeoutError: none came in time.
            EndpointError: there is no connection.
        """


class UrlTransport:
    """Sends requests over the network, with the standard library."""

    def send(self, request: HttpRequest) -> HttpResponse:
        """Return the response; redirections are not followed, as they would take the key along."""
        if not request.url.startswith(("http://", "https://")):
            raise DataError(f"url: got {request.url}, allowed is http:// or https://")
        made = urllib.request.Request(
            request.url, data=request.body.encode(), headers=dict(request.headers), method="POST"
        )
        opener = urllib.request.build_opener(_NoRedirection)
        try:
            with opener.open(made, timeout=request.timeout_s) as response:
                return _read(response)
        except urllib.error.HTTPError as error:
            with error:
                return _read(error)
        except TimeoutError as error:
            raise EndpointTimeoutError(_late(request)) from error
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError):
                raise EndpointTimeoutError(_late(request)) from error
            raise EndpointError(
                f"{request.url}: no connection ({error.reason}); is the server up?"
            ) from error
        except OSError as error:
            raise EndpointError(f"{request.url}: the connection broke ({error})") from error


class _NoRedirection(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: object) -> None:
        return None


def _late(request: HttpRequest) -> str:
    return f"{request.url}: no answer within {request.timeout_s:g} s; raise timeout_s"


def _read(response: object) -> HttpResponse:
    body = response.read(RESPONSE_BYTES + 1)  # type: ignore[attr-defined]
    if len(body) > RESPONSE_BYTES:
        raise EndpointError(f"the answer is longer than {RESPONSE_BYTES} bytes")
    headers = {name.lower(): value for name, value in response.headers.items()}  # type: ignore[attr-defined]
    return HttpResponse(status=response.status, body=body, headers=headers)  # type: ignore[attr-defined]


def request_key(request: HttpRequest) -> str:
    """Return a hash of URL and body: what decides the answer, without keys and timeouts."""
    return canonical_hash({"url": request.url, "body": request.body})


class RecordingTransport:
    """Sends through another transport and appends request and response to a file.

    Headers that carry secrets are left out.

    Args:
        inner: What sends.
        path: A JSONL file.
    """

    def __init__(self, inner: Transport, path: str | Path) -> None:
        self._inner, self._path = inner, Path(path)

    def send(self, request: HttpRequest) -> HttpResponse:
        """Return the response of the other transport."""
        response = self._inner.send(request)
        headers = {k: v for k, v in response.headers.items() if k.lower() not in _SECRET}
        entry = {
            "key": request_key(request), "url": request.url, "body": request.body,
            "status": response.status, "headers": headers,
            "response": base64.b64encode(response.body).decode(),
        }  # fmt: skip
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        return response


class ReplayTransport:
    """Answers from a file that `RecordingTransport` wrote; never touches the network.

    Equal requests get the recorded responses in their order, and the last one again after that.

    Args:
        path: The JSONL file.

    Raises:
        DataError: the file cannot be read, or is none of these.
    """

    def __init__(self, path: str | Path) -> None:
        self._responses: dict[str, list[HttpResponse]] = {}
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
            for line in lines:
                entry = json.loads(line)
                body = base64.b64decode(entry["response"])
                response = HttpResponse(status=entry["status"], body=body, headers=entry["headers"])
                self._responses.setdefault(entry["key"], []).append(response)
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{path}: holds no recorded requests ({error})") from error

    def send(self, request: HttpRequest) -> HttpResponse:
        """Return what was recorded."""
        found = self._responses.get(request_key(request))
        if found is None:
            raise EndpointError(
                f"{request.url}: this request was not recorded; record it, or change nothing that "
                f"decides it: {request.body[:200]}"
            )
        return found.pop(0) if len(found) > 1 else found[0]
