"""Models behind an OpenAI-compatible URL: completions with log-probabilities, and chat."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lowtide.core.errors import ConfigError, DataError, EndpointError
from lowtide.evaluation.models.protocol import (
    Continuation,
    Generation,
    LogLikelihood,
    cut_at_stop,
)
from lowtide.evaluation.models.transport import (
    HttpRequest,
    HttpResponse,
    Transport,
    UrlTransport,
)
from lowtide.evaluation.tasks.items import canonical_hash

_AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504})


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where a model is, and how patiently it is asked.

    Attributes:
        url: Up to and with the version, such as "http://127.0.0.1:8000/v1".
        model: Its name there.
        api: "chat" or "completions". Log-probabilities come from completions alone.
        key_variable: Environment variable with the key; the key itself is stored nowhere.
        timeout_s: Of one request.
        retries: After errors that may pass, with growing pauses.
        longest_pause_s: Between two tries; a longer Retry-After is taken to be a refusal.
    """

    url: str
    model: str
    api: Literal["chat", "completions"] = "completions"
    key_variable: str = "OPENAI_API_KEY"
    timeout_s: float = 120.0
    retries: int = 5
    longest_pause_s: float = 60.0

    def __post_init__(self) -> None:
        if self.api not in ("chat", "completions"):
            raise ConfigError(f'api: got "{self.api}", allowed is "chat" or "completions"')
        if not self.url.startswith(("http://", "https://")):
            raise ConfigError(f"url: got {self.url}, allowed is http://... or https://...")


class OpenAiModel:
    """Asks an endpoint; one request for each prompt or text.

    Args:
        endpoint: Where.
        transport: How; left out, the network.
        sleep: How pauses are made; tests do not.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        transport: Transport | None = None,
        *,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.endpoint = endpoint
        self._transport = transport or UrlTransport()
        self._sleep = sleep

    @property
    def name(self) -> str:
        """The model's name at the endpoint."""
        return self.endpoint.model

    def fingerprint(self) -> str:
        """Return a hash of URL, name and interface: the weights behind them cannot be seen."""
        seen = {"url": self.endpoint.url, "model": self.endpoint.model, "api": self.endpoint.api}
        return canonical_hash(seen)

    def generate(self, prompts: Sequence[str], options: Generation) -> list[str]:
        """Return an answer to each prompt.

        Raises:
            EndpointError: the endpoint refuses, cannot be reached, or answers something else.
        """
        return [self._generate(prompt, options) for prompt in prompts]

    def _generate(self, prompt: str, options: Generation) -> str:
        body: dict[str, Any] = {
            "model": self.endpoint.model, "max_tokens": options.max_tokens,
            "temperature": options.temperature, "seed": options.seed,
        }  # fmt: skip
        if options.stop:
            body["stop"] = list(options.stop)
        if self.endpoint.api == "chat":
            body["messages"] = [{"role": "user", "content": prompt}]
            choice = self._choice("/chat/completions", body)
            text = _field(choice, "message", "content")
        else:
            choice = self._choice("/completions", {**body, "prompt": prompt})
            text = _field(choice, "text")
        if not isinstance(text, str):
            raise EndpointError(f"{self.endpoint.url}: the answer's text is {text!r}")
        return cut_at_stop(text, options.stop)

    def loglikelihood(self, requests: Sequence[Continuation]) -> list[LogLikelihood]:
        """Return how likely each text is, from the echoed prompt's log-probabilities.

        Raises:
            DataError: the endpoint is a chat, which gives none, or there is nothing to score.
            EndpointError: as `generate`.
        """
        if self.endpoint.api == "chat":
            raise DataError(
                f'model "{self.name}": a chat endpoint gives no log-probabilities of a given '
                'text; use api "completions" of a server that can echo, or an "open" task'
            )
        return [self._loglikelihood(request) for request in requests]

    def _loglikelihood(self, request: Continuation) -> LogLikelihood:
        whole = request.context + request.text
        body = {
            "model": self.endpoint.model, "prompt": whole, "max_tokens": 1, "temperature": 0,
            "logprobs": 1, "echo": True,
        }  # fmt: skip
        choice = self._choice("/completions", body)
        scores = _field(choice, "logprobs", "token_logprobs")
        offsets = _field(choice, "logprobs", "text_offset")
        best = choice["logprobs"].get("top_logprobs") or [None] * len(scores)
        # Tokens that reach into the text, without the one that was generated after it.
        ends = [*offsets[1:], len(whole)]
        chosen = [
            index
            for index, (begin, end) in enumerate(zip(offsets, ends, strict=True))
            if end > len(request.context) and begin < len(whole) and scores[index] is not None
        ]
        if not chosen:
            raise DataError(
                f"{self.endpoint.url}: no log-probability for {request.text[:60]!r}; a text at "
                "the start has none for its first token, so give it a context"
            )
        is_greedy = all(
            best[i] is not None and scores[i] >= max(best[i].values()) - 1e-9 for i in chosen
        )
        return LogLikelihood(float(sum(scores[i] for i in chosen)), len(chosen), is_greedy)

    # -- requests ---------------------------------------------------------------------------

    def _choice(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        response = self._send(path, body)
        try:
            choice = json.loads(response.body)["choices"][0]
        except (ValueError, KeyError, IndexError, TypeError) as error:
            said = response.body[:200].decode(errors="replace")
            raise EndpointError(
                f"{self.endpoint.url}{path}: the answer has no choice ({said}); is it an "
                "OpenAI-compatible endpoint?"
            ) from error
        if not isinstance(choice, dict):
            raise EndpointError(f"{self.endpoint.url}{path}: the choice is {choice!r}")
        return choice

    def _send(self, path: str, body: dict[str, Any]) -> HttpResponse:
        headers = {"Content-Type": "application/json"}
        key = os.environ.get(self.endpoint.key_variable)
        if key:
            headers["Authorization"] = f"Bearer {key}"
        url = self.endpoint.url.rstrip("/") + path
        request = HttpRequest(
            url=url, body=json.dumps(body, sort_keys=True), headers=headers,
            timeout_s=self.endpoint.timeout_s,
        )  # fmt: skip
        pause_s = 1.0
        for attempt in range(self.endpoint.retries + 1):
            is_last = attempt == self.endpoint.retries
            try:
                response = self._transport.send(request)
            except EndpointError:  # no connection, or no answer in time
                if is_last:
                    raise
                after_s = None
            else:
                if response.status == 200:
                    return response
                after_s = _retry_after_s(response)
                too_long = after_s is not None and after_s > self.endpoint.longest_pause_s
                if response.status not in _AGAIN or is_last or too_long:
                    raise EndpointError(_refusal(url, response, attempt, self.endpoint))
            # Other clients were turned away at the same moment: do not come back together.
            jitter = random.Random(f"{url}{body}{attempt}").uniform(0.5, 1.0)
            self._sleep(min(self.endpoint.longest_pause_s, after_s or pause_s * jitter))
            pause_s *= 2
        raise EndpointError(f"{url}: no answer")


def _field(choice: dict[str, Any], *path: str) -> Any:
    node: Any = choice
    for name in path:
        if not isinstance(node, dict) or node.get(name) is None:
            raise EndpointError(
                f'the answer has no "{".".join(path)}"; found {sorted(choice)}: is the endpoint '
                "of the right kind, and can it echo log-probabilities?"
            )
        node = node[name]
    return node


def _retry_after_s(response: HttpResponse) -> float | None:
    try:
        return max(0.0, float(response.headers.get("retry-after", "")))
    except ValueError:
        return None


def _refusal(url: str, response: HttpResponse, attempt: int, endpoint: Endpoint) -> str:
    said = " ".join(response.body[:300].decode(errors="replace").split())
    advice = {
        401: f"put a valid key into ${endpoint.key_variable}",
        403: f"put a valid key into ${endpoint.key_variable}",
        404: "check the URL and the model's name",
        429: "wait, or ask for a higher limit",
    }.get(response.status, "see the server's log")
    tries = f" after {attempt + 1} tries" if attempt else ""
    return f"{url}: status {response.status}{tries}: {said}; {advice}"
