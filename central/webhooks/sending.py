"""One request to one address.

In: a message, a secret. Out: nothing when it was taken (a 2xx), else why not, in words without the
address, the secret or what the receiver said: an address may hold a token, and the log must not.
"""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from urllib.parse import urlsplit

from central.webhooks.messages import Message, headers

TIMEOUT_S = 10.0
AGENT = "lorikeet-central"


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: object) -> None:
        """None: a redirect is an answer like any other, and no 2xx."""


_OPENER = urllib.request.build_opener(_NoRedirect)


def send(
    url: str, message: Message, secret: bytes, clock: Callable[[], float] = time.time
) -> str | None:
    """Why it was not taken; None when it was."""
    request = urllib.request.Request(
        url,
        data=message.body,
        method="POST",
        headers=headers(message, secret, int(clock())) | {"user-agent": AGENT},
    )
    try:
        with _OPENER.open(request, timeout=TIMEOUT_S) as answer:
            status = int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            status = error.code
    except urllib.error.URLError as error:
        reason = error.reason
        known = isinstance(reason, OSError) and reason.strerror
        return str(known or type(reason).__name__)
    except (OSError, HTTPException, ValueError) as error:
        return type(error).__name__
    return None if 200 <= status < 300 else f"it answered with HTTP {status}"


def shown(url: str) -> str:
    """What may be logged of an address: no path, query or credentials."""
    return urlsplit(url).hostname or "?"
