"""All webhooks of a central: made from the settings, each in a thread of its own.

In: settings, the source of news. Out: tellers; figures of them. Guarantees: what cannot work is
refused before central serves, in words without a secret.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from central.errors import SettingsError
from central.operations_settings import WebhookSettings
from central.webhooks.messages import read_secret
from central.webhooks.place import PlaceFile
from central.webhooks.sending import send
from central.webhooks.teller import Source, Teller

CLOSE_TIMEOUT_S = 2.0


def make_tellers(settings: WebhookSettings, data_dir: Path, source: Source) -> list[Teller]:
    """None without addresses; raises SettingsError, StorageError."""
    if not settings.urls:
        return []
    secret = _secret(settings.secret_file)
    return [
        Teller(
            url,
            PlaceFile(data_dir, url),
            source,
            frozenset(settings.events),
            partial(send, url, secret=secret),
        )
        for url in settings.urls
    ]


@contextmanager
def telling(tellers: list[Teller]) -> Iterator[None]:
    """They tell until the block ends; a request that is under way is left."""
    stop = threading.Event()
    threads = [
        threading.Thread(target=teller.run, args=(stop,), name=f"webhook-{number}", daemon=True)
        for number, teller in enumerate(tellers)
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for teller in tellers:
            teller.wake()
        for thread in threads:
            thread.join(CLOSE_TIMEOUT_S)


def _secret(file: Path | None) -> bytes:
    if file is None:
        raise SettingsError(
            "CENTRAL_WEBHOOKS__URLS is set, and CENTRAL_WEBHOOKS__SECRET_FILE is not. Expected the "
            "file of the secret that signs what they are told."
        )
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is no text"
        raise SettingsError(
            f"CENTRAL_WEBHOOKS__SECRET_FILE {file} cannot be read: {why}. Expected a file that "
            "central's user can read."
        ) from error
    return read_secret(text, f"CENTRAL_WEBHOOKS__SECRET_FILE {file}")
