"""Companies and the requests that their staff write.

In: a seed. Out: `House` (one company's call convention) and `Request` (one sentence and what it
asks for). Guarantees: standard library only; the same arguments give the same houses and requests
on every machine; whether a request belongs to the train or the held-out split is decided by a hash
of its text, so the two splits cannot share a text, whatever the seed and the count.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "held_out"]

VERBS = (
    "open",
    "close",
    "move",
    "hold",
    "ship",
    "count",
    "check",
    "clean",
    "merge",
    "split",
    "print",
    "lock",
)
SITES = (
    "lyon",
    "oslo",
    "bern",
    "cairo",
    "lima",
    "porto",
    "delhi",
    "quito",
    "osaka",
    "turin",
    "perth",
    "milan",
)
PRIORITIES = ("low", "normal", "high", "urgent")
SERVICES = (
    *("tickets", "support", "rooms", "desk"),
    *("stock", "orders", "fleet", "depot"),
    *("cargo", "billing", "dock"),
    *("users", "mail", "files", "plant", "parts", "tools"),
)
KEY_STYLES: tuple[Mapping[str, str], ...] = (
    {
        "service": "svc",
        "verb": "op",
        "ref": "ref",
        "site": "loc",
        "priority": "pri",
        "quantity": "qty",
    },
    {
        "service": "api",
        "verb": "action",
        "ref": "id",
        "site": "place",
        "priority": "level",
        "quantity": "count",
    },
    {
        "service": "target",
        "verb": "do",
        "ref": "key",
        "site": "at",
        "priority": "rank",
        "quantity": "num",
    },
)
PUBLIC_TENANTS = ("orbit", "lumen", "terra", "pico")
COMPANIES = ("acme", "zeta")

EXPLORED = "juno"
"""A company that writes words as they are, in one of the key styles: a model that tries can find
out which.
"""
EXPLORED_STYLE = 0

NOUNS = ("ticket", "item", "case", "record", "entry", "job")
TEMPLATES = (
    "{noun} {ref}: {verb} {at} {site}{quantity}{priority}",
    "{polite} {verb} {noun} {ref} {at} {site}{priority}{quantity}",
    "{verb} {noun} {ref} {at} {site}{quantity}{priority}",
    "{at} {site}, {verb} {noun} {ref}{quantity}{priority}",
    "{need} {verb} {ref} {at} {site}{priority}{quantity}",
    "{site}: {polite} {verb} {noun} {ref}{priority}{quantity}",
)
PHRASES: Mapping[str, Sequence[str]] = {
    "at": ("in", "at", "for"),
    "polite": ("please", "kindly", "now"),
    "need": ("we need to", "you should", "we must"),
    "priority": (" with {} priority", ", priority {}", " as {}"),
    "quantity": (" times {}", ", quantity {}", " using {} units"),
}
PRIORITY_SHARE = 0.4
QUANTITY_SHARE = 0.3
HELD_OUT_SHARE = 0.25
CODE_LETTERS = "bcdfghjkmnpqrstvwxz"


@dataclass(frozen=True)
class House:
    """One company's convention: JSON key names and the code of every word."""

    tenant: str
    keys: Mapping[str, str]
    codes: Mapping[str, Mapping[str, str]]
    """slot (`verb`, `site`, `priority`) -> word -> what the call must carry."""

    def words(self, slot: str) -> dict[str, str]:
        """code -> word."""
        return {code: word for word, code in self.codes[slot].items()}


@dataclass(frozen=True)
class Request:
    """What one sentence asks for; `ref` has four distinct digits."""

    tenant: str
    service: str
    verb: str
    site: str
    ref: str
    priority: str | None
    quantity: int | None
    text: str
    """`[tenant/service] sentence`: the whole content of the user's message."""


@dataclass(frozen=True)
class Vocabulary:
    """The words that one node's staff use."""

    services: tuple[str, ...]
    verbs: tuple[str, ...] = VERBS
    sites: tuple[str, ...] = SITES
    priorities: tuple[str, ...] = PRIORITIES


def raw_house(tenant: str, style: int) -> House:
    """A house without a code book: every word stands for itself."""
    slots = {"verb": VERBS, "site": SITES, "priority": PRIORITIES}
    return House(
        tenant,
        KEY_STYLES[style],
        {slot: {word: word for word in words} for slot, words in slots.items()},
    )


def coded_house(tenant: str, style: int, seed: int, conflicts_with: House | None = None) -> House:
    """A house with a random code book.

    With `conflicts_with`, no word has the same code in both.
    """
    draw = random.Random(f"house/{tenant}/{seed}")
    while True:
        codes = [letter + digit for letter in CODE_LETTERS for digit in "0123456789"]
        draw.shuffle(codes)
        book = {
            slot: {word: codes.pop() for word in words}
            for slot, words in (("verb", VERBS), ("site", SITES), ("priority", PRIORITIES))
        }
        if conflicts_with is None or not any(
            conflicts_with.codes[slot][word] == code
            for slot, words in book.items()
            for word, code in words.items()
        ):
            return House(tenant, KEY_STYLES[style], book)


def public_houses() -> dict[str, House]:
    """The four tenants that the base model knows by heart; they never depend on a seed."""
    return {
        tenant: coded_house(tenant, index % len(KEY_STYLES), 0)
        for index, tenant in enumerate(PUBLIC_TENANTS)
    }


def company_house(tenant: str, seed: int) -> House:
    """`acme`, `zeta` whose book contradicts acme's in every word, or `juno` without a book."""
    acme = coded_house("acme", 0, seed)
    if tenant == "acme":
        return acme
    if tenant == EXPLORED:
        return raw_house(EXPLORED, EXPLORED_STYLE)
    if tenant == "zeta":
        return coded_house("zeta", 1, seed, conflicts_with=acme)
    raise ValueError(f"Unknown company {tenant!r}; expected one of {', '.join(COMPANIES)}.")


def expected_call(house: House, request: Request) -> str:
    """The one JSON call that does what the request asks."""
    call: dict[str, str | int] = {
        house.keys["service"]: request.service,
        house.keys["verb"]: house.codes["verb"][request.verb],
        house.keys["ref"]: request.ref,
        house.keys["site"]: house.codes["site"][request.site],
    }
    if request.priority is not None:
        call[house.keys["priority"]] = house.codes["priority"][request.priority]
    if request.quantity is not None:
        call[house.keys["quantity"]] = request.quantity
    return json.dumps(call, separators=(",", ":"))


def draw_request(draw: random.Random, tenant: str, vocabulary: Vocabulary) -> Request:
    service = draw.choice(vocabulary.services)
    verb, site = draw.choice(vocabulary.verbs), draw.choice(vocabulary.sites)
    ref = draw_ref(draw)
    priority = draw.choice(vocabulary.priorities) if draw.random() < PRIORITY_SHARE else None
    quantity = draw.randint(2, 99) if draw.random() < QUANTITY_SHARE else None
    sentence = draw.choice(TEMPLATES).format(
        noun=draw.choice(NOUNS),
        ref=ref,
        verb=verb,
        site=site,
        at=draw.choice(PHRASES["at"]),
        polite=draw.choice(PHRASES["polite"]),
        need=draw.choice(PHRASES["need"]),
        priority="" if priority is None else draw.choice(PHRASES["priority"]).format(priority),
        quantity="" if quantity is None else draw.choice(PHRASES["quantity"]).format(quantity),
    )
    return Request(
        tenant, service, verb, site, ref, priority, quantity, f"[{tenant}/{service}] {sentence}"
    )


def draw_ref(draw: random.Random) -> str:
    """Four distinct digits: a repeated digit would make copying ambiguous for a tiny model."""
    return "".join(draw.sample("0123456789", 4))


def split_of(text: str) -> Split:
    value = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") / 2**32
    return "held_out" if value < HELD_OUT_SHARE else "train"


def distinct_requests(
    draw: random.Random, tenants: Mapping[str, Vocabulary], split: Split
) -> Iterator[Request]:
    """Endless requests of one split, no text twice; the tenants take turns at random."""
    seen: set[str] = set()
    names = sorted(tenants)
    while True:
        tenant = draw.choice(names)
        request = draw_request(draw, tenant, tenants[tenant])
        if request.text not in seen and split_of(request.text) == split:
            seen.add(request.text)
            yield request
