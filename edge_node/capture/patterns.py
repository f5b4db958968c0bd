"""The default redactor: finds e-mail addresses, phone and card numbers, IBANs, keys and tokens.

In: a text. Out: spans with their kind. Offline and pure. Guarantees: time grows with the length of
the text alone, because every expression begins at a literal or a digit and has bounded repeats; no
single call looks at more than WINDOW characters, so that other threads go on meanwhile.

It is a net with holes: names, addresses of streets and what is written in words stay. Its precision
and recall on a test set of our own stand in `docs/privacy.md`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from string import ascii_letters, digits

WINDOW = 1 << 16
LONGEST = 1 << 13
"""Nothing that is found is longer: windows overlap by as much."""

SHORTEST = 6
"""Nothing that is found is shorter."""

EMAIL, PHONE, CARD, IBAN, SECRET = "EMAIL", "PHONE", "CARD", "IBAN", "SECRET"

_ODD = ".!#$%&'*/=?^_`{|}~-"
"""Of an address, but not as its first character: there they are the sentence's."""
_LETTERS = "".join(chr(code) for code in range(0xC0, 0x250) if chr(code).isalpha())
_LOCAL = ascii_letters + digits + _LETTERS + _ODD + "+"
_DOMAIN = re.compile(r"(?:[^\W_](?:[^\W_]|-){0,62}\.){1,8}[^\W\d_]{2,24}(?![^\W_])")
_LONGEST_LOCAL = 64
_AT_WORDS = re.compile(
    r"[\[({] ?(?:at|AT|ät|arroba) ?[\])}] ?"
    r"([^\W_](?:[^\W_]|-){0,62}(?: ?(?:\.|[\[({] ?(?:dot|DOT|punkt|punto) ?[\])}]) ?"
    r"[^\W_](?:[^\W_]|-){0,62}){1,4})"
)

_DIGITS = re.compile(r"[0-9](?:[ .\-/()\u00a0\u2011\u2013]{0,2}[0-9]){6,40}")
_TWO_DIGITS = re.compile(r"[0-9][0-9]")
_IBAN = re.compile(r"[A-Za-z]{2}[0-9]{2}(?:[ \u00a0-]?[A-Za-z0-9]){11,30}")
_IBAN_LENGTHS = {
    "AD": 24, "AE": 23, "AL": 28, "AT": 20, "AZ": 28, "BA": 20, "BE": 16, "BG": 22, "BH": 22,
    "BR": 29, "BY": 28, "CH": 21, "CR": 22, "CY": 24, "CZ": 24, "DE": 22, "DK": 18, "DO": 28,
    "EE": 20, "EG": 29, "ES": 24, "FI": 18, "FO": 18, "FR": 27, "GB": 22, "GE": 22, "GI": 23,
    "GL": 18, "GR": 27, "GT": 28, "HR": 21, "HU": 28, "IE": 22, "IL": 23, "IQ": 23, "IS": 26,
    "IT": 27, "JO": 30, "KW": 30, "KZ": 20, "LB": 28, "LC": 32, "LI": 21, "LT": 20, "LU": 20,
    "LV": 21, "LY": 25, "MC": 27, "MD": 24, "ME": 22, "MK": 19, "MR": 27, "MT": 31, "MU": 30,
    "NL": 18, "NO": 15, "PK": 24, "PL": 28, "PS": 29, "PT": 25, "QA": 29, "RO": 24, "RS": 22,
    "SA": 24, "SC": 31, "SE": 24, "SI": 19, "SK": 24, "SM": 27, "ST": 25, "SV": 28, "TL": 23,
    "TN": 24, "TR": 26, "UA": 29, "VA": 22, "VG": 24, "XK": 20,
}  # fmt: skip
"""Characters of an IBAN by country (SWIFT IBAN registry)."""

_CARDS = re.compile(
    r"3[47]\d{13}|3(?:0[0-5]|[68]\d)\d{11}|4\d{12}(?:\d{3}){0,2}|"
    r"(?:5[1-5]|2[2-7])\d{14}|(?:35|6[0-9]|81)\d{14,17}|5[06-8]\d{10,17}"
)
"""Numbers of card schemes: Amex, Diners, Visa, Mastercard, JCB, Discover, UnionPay, Maestro."""

_CARD_FORMS = tuple(
    re.compile(form)
    for form in (
        r"\d{12,19}(?!\d)",
        r"\d{4}([ .\u00a0-])\d{4}\1\d{4}\1\d{4}\1\d{1,3}(?!\d)",
        r"\d{4}([ .\u00a0-])\d{4}\1\d{4}\1\d{1,4}(?!\d)",
        r"\d{4}([ .\u00a0-])\d{6}\1\d{4,5}(?!\d)",
    )
)
"""How such a number is written."""

_DATE = re.compile(
    r"\d{4}([-./])\d{1,2}\1\d{1,2}(?![\d./-])|\d{1,2}([-./])\d{1,2}\2\d{2}(?:\d{2})?(?![\d./-])"
)
_COUNTED = frozenset({"0123456789", "01234567890"})
_US = re.compile(
    r"(?:1[-. ]?)?\(?[2-9]\d\d\)?[-. \u2011\u2013]{1,2}[2-9]\d\d[-. \u2011\u2013]\d{4}"
)
_SPOKEN_OF = re.compile(
    r"(?:phone|tel|telefon\w{0,4}|mobile?|cell|fax|call(?: \w{1,4})?|ring(?: \w{1,4})?|whatsapp|"
    r"sms|text(?: me| us)(?: \w{1,2})?|handy(?:nummer)?|rufnummer|durchwahl|t[ée]l[ée]phone|"
    r"portable|m[óo]vil|celular|tel[ée]fono|telefone|cellulare|telefono|"
    r"contact|hotline|dial|reach \w{2,4}|电话|手机|電話)"
    r"(?: (?:number|no\.?|nr\.?|nummer|is|on|at|auf|al|au|unter|número|numero)){0,2}"
    r"[:.=#]{0,2} ?$",
    re.IGNORECASE,
)
_CONTEXT = 40
"""Characters before a number in which a word may say what it is."""

_END = r"(?![A-Za-z0-9_])"
_PREFIXED: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (prefix, re.compile(re.escape(prefix) + rest))
    for prefix, rest in (
        ("sk-", r"[A-Za-z0-9_-]{16,200}"),
        ("sk_live_", r"[A-Za-z0-9]{16,120}"),
        ("sk_test_", r"[A-Za-z0-9]{16,120}"),
        ("rk_live_", r"[A-Za-z0-9]{16,120}"),
        ("pk_live_", r"[A-Za-z0-9]{16,120}"),
        ("whsec_", r"[A-Za-z0-9+/=]{20,120}"),
        ("lk-", r"[A-Za-z0-9_-]{43}" + _END),
        ("ghp_", r"[A-Za-z0-9]{30,255}"),
        ("gho_", r"[A-Za-z0-9]{30,255}"),
        ("ghu_", r"[A-Za-z0-9]{30,255}"),
        ("ghs_", r"[A-Za-z0-9]{30,255}"),
        ("ghr_", r"[A-Za-z0-9]{30,255}"),
        ("github_pat_", r"[A-Za-z0-9_]{30,255}"),
        ("glpat-", r"[A-Za-z0-9_.-]{18,120}"),
        ("xoxb-", r"[A-Za-z0-9-]{10,255}"),
        ("xoxp-", r"[A-Za-z0-9-]{10,255}"),
        ("xoxa-", r"[A-Za-z0-9-]{10,255}"),
        ("xapp-", r"[A-Za-z0-9-]{10,255}"),
        ("hooks.slack.com/services/", r"[A-Za-z0-9/]{20,120}"),
        ("AKIA", r"[A-Z0-9]{16}" + _END),
        ("ASIA", r"[A-Z0-9]{16}" + _END),
        ("AIza", r"[A-Za-z0-9_-]{35}" + _END),
        ("ya29.", r"[A-Za-z0-9_-]{20,500}"),
        ("GOCSPX-", r"[A-Za-z0-9_-]{20,60}"),
        ("hf_", r"[A-Za-z0-9]{30,60}" + _END),
        ("npm_", r"[A-Za-z0-9]{30,60}" + _END),
        ("pypi-", r"[A-Za-z0-9_-]{50,300}"),
        ("dop_v1_", r"[a-f0-9]{60,70}"),
        ("SG.", r"[A-Za-z0-9_-]{16,40}\.[A-Za-z0-9_-]{30,60}"),
        ("shpat_", r"[a-fA-F0-9]{32}" + _END),
        ("AGE-SECRET-KEY-1", r"[A-Z0-9]{40,80}"),
        ("eyJ", r"[A-Za-z0-9_-]{8,2000}\.eyJ[A-Za-z0-9_-]{8,4000}(?:\.[A-Za-z0-9_-]{0,1000})?"),
        ("Bearer ", r"[A-Za-z0-9._~+/-]{16,2000}={0,2}"),
        ("Basic ", r"[A-Za-z0-9+/]{12,500}={1,2}"),
        (
            "-----BEGIN ",
            r"[A-Z ]{0,30}PRIVATE KEY(?: BLOCK)?-----"
            r"(?:[^-]|-(?!----)){1,7900}(?:-----END[A-Z ]{0,50}-----)?",
        ),
    )
)
"""A literal with which a key or token begins -> the whole of it."""
_MARKED = {
    marker: tuple(one for one in _PREFIXED if marker in one[0])
    for marker in ("_", "-", "A", ".", "eyJ", "Bearer ", "Basic ")
}
"""A part of these literals -> them: most texts have few of the parts, and are soon done with."""
_URL_PASSWORD = re.compile(r"://[^\s:/@]{1,100}:([^\s/@]{1,200})@")
_NAMES = {
    "pass": ("password", "passwd", "passwort", "mot de passe"),
    "pwd": ("pwd",),
    "wort": ("kennwort",),
    "contrase": ("contraseña",),
    "senha": ("senha",),
    "secret": ("secret",),
    "key": ("api_key", "apikey", "api-key", "api key", "access_key", "private_key"),
    "token": ("token",),
}
"""Words, in lower case, after which `:`, `=` or `is` a secret stands, by a part of them."""
_ASSIGNED = re.compile(
    r"[\"'`]{0,2}(?: {0,3}[:=]{1,2} {0,3}| (?:is|ist|es|est|é):? )[\"'`]{0,2}"
    r"([^\s\"'`,;<>(){}\[\]]{6,200})"
)
_ATTRIBUTE = re.compile(r"[A-Za-z_]\w{0,63}(?:\.[A-Za-z_]\w{0,63}){1,8}")


@dataclass(frozen=True, order=True)
class Span:
    """Characters [start, end) of a text, and what they are: the word in the placeholder."""

    start: int
    end: int
    kind: str


class Patterns:
    """The redactor named `default`."""

    def find(self, text: str) -> list[Span]:
        """Spans of what should not be kept, in any order; they may overlap."""
        found: list[Span] = []
        if len(text) < SHORTEST:
            return found
        for start in range(0, len(text), WINDOW):
            end = min(start + WINDOW, len(text))
            reach = min(end + LONGEST, len(text))
            for finder in (_emails, _ibans, _numbers, _secrets):
                found += (span for span in finder(text, start, reach) if span.start < end)
        return found


def _emails(text: str, start: int, reach: int) -> Iterator[Span]:
    at = text.find("@", start, reach)
    while at >= 0:
        begins = _local_begins(text, at)
        domain = _DOMAIN.match(text, at + 1, reach)
        if begins < at and domain:
            yield Span(begins, domain.end(), EMAIL)
        at = text.find("@", at + 1, reach)
    for bracket in "[({":
        at = text.find(bracket, start, reach)
        while at >= 0:
            if domain := _AT_WORDS.match(text, at, reach):
                end = at - 1 if at and text[at - 1] == " " else at
                if (begins := _local_begins(text, end)) < end:
                    yield Span(begins, domain.end(), EMAIL)
            at = text.find(bracket, at + 1, reach)


def _local_begins(text: str, at: int) -> int:
    """Where the part of an address before `at` begins; `at` when there is none."""
    piece = text[max(0, at - _LONGEST_LOCAL) : at]
    begins = at - len(piece) + len(piece.rstrip(_LOCAL))
    while begins < at and text[begins] in _ODD:
        begins += 1
    return begins


def _ibans(text: str, start: int, reach: int) -> Iterator[Span]:
    for pair in _TWO_DIGITS.finditer(text, start, reach):
        begins = pair.start() - 2
        if begins < 0 or (begins and text[begins - 1].isalnum()):
            continue
        length = _IBAN_LENGTHS.get(text[begins : begins + 2].upper())
        if length is None or not (match := _IBAN.match(text, begins, reach)):
            continue
        end, characters = begins, ""
        for end in range(begins, match.end()):
            if text[end].isalnum():
                characters += text[end].upper()
                if len(characters) == length:
                    break
        ends_there = end + 1 == len(text) or not text[end + 1].isalnum()
        if len(characters) == length and ends_there and _mod_97(characters) == 1:
            yield Span(begins, end + 1, IBAN)


def _mod_97(iban: str) -> int:
    """ISO 7064 MOD 97-10 of an IBAN; 1 for a right one."""
    turned = iban[4:] + iban[:4]
    return int("".join(str(int(character, 36)) for character in turned)) % 97


def _numbers(text: str, start: int, reach: int) -> Iterator[Span]:
    """Cards, and phone numbers."""
    for match in _DIGITS.finditer(text, start, reach):
        begins, end = match.span()
        before = text[begins - 1] if begins else " "
        after = text[end : end + 1]
        if before.isalnum() or (before in "_.,:" and text[begins - 2 : begins - 1].isdigit()):
            continue  # part of a word, a fraction or a time
        if after.isalnum() or after == "_" or (after == "." and text[end + 1 : end + 2].isdigit()):
            continue
        written = match.group()
        if card := _card(written):
            yield Span(begins, begins + card, CARD)
            continue
        begins -= before == "("
        begins -= begins > 0 and text[begins - 1] == "+"
        if _is_phone(text[begins:end], text[max(0, begins - _CONTEXT) : begins]):
            yield Span(begins, end, PHONE)


def _card(written: str) -> int:
    """How many characters of digits with separators are a card's number; 0: none. Others, such as
    its date of expiry, may follow.
    """
    for form in _CARD_FORMS:
        if match := form.match(written):
            number = "".join(filter(str.isdigit, match.group()))
            if _CARDS.fullmatch(number) and _luhn(number):
                return match.end()
    return 0


def _luhn(number: str) -> bool:
    """ISO/IEC 7812-1, annex B."""
    total = 0
    for place, digit in enumerate(reversed(number)):
        value = int(digit) * (1 + place % 2)
        total += value - 9 if value > 9 else value
    return total % 10 == 0


def _is_phone(written: str, before: str) -> bool:
    count, plain = sum(map(str.isdigit, written)), written.isdigit()
    if written[0] == "+":
        return 8 <= count <= 15 and written[1] != "0" and not before[-1:].isalnum()
    if written.startswith("00"):
        return not plain and written[2] in "123456789" and 10 <= count <= 15
    if _DATE.match(written) or count > 15 or written in _COUNTED:
        return False
    if _SPOKEN_OF.search(before):
        return True
    if _US.fullmatch(written):
        return True
    if written[0] == "(":
        return ")" in written and 9 <= count <= 12
    if written[0] == "0" and written[1:2] != ".":
        return 10 <= count <= 11 if plain else 9 <= count <= 12 and "(" not in written[:3]
    return False


def _secrets(text: str, start: int, reach: int) -> Iterator[Span]:
    for marker, prefixed in _MARKED.items():
        if text.find(marker, start, reach) >= 0:
            for prefix, pattern in prefixed:
                yield from _prefixed(text, prefix, pattern, start, reach)
    at = text.find("://", start, reach)
    while at >= 0:
        if password := _URL_PASSWORD.match(text, at, reach):
            yield Span(*password.span(1), SECRET)
        at = text.find("://", at + 3, reach)
    lower = text[start:reach].lower()
    if len(lower) != reach - start:  # a letter whose lower case has two: places would not agree
        lower = text[start:reach]
    for part, names in _NAMES.items():
        if part in lower:
            for name in names:
                at = lower.find(name)
                while at >= 0:
                    assigned = _ASSIGNED.match(text, start + at + len(name), reach)
                    if assigned and _looks_secret(assigned.group(1)):
                        yield Span(*assigned.span(1), SECRET)
                    at = lower.find(name, at + 1)


def _prefixed(
    text: str, prefix: str, pattern: re.Pattern[str], start: int, reach: int
) -> Iterator[Span]:
    at = text.find(prefix, start, reach)
    while at >= 0:
        match = None
        if not (at and (text[at - 1].isalnum() or text[at - 1] == "_")):
            match = pattern.match(text, at, reach)
        if match:
            yield Span(at, match.end(), SECRET)
        at = text.find(prefix, match.end() if match else at + 1, reach)


def _looks_secret(value: str) -> bool:
    """A word of letters alone is a sentence's next word, or a name in a program."""
    value = value.rstrip(".!?")
    if _ATTRIBUTE.fullmatch(value):
        return False
    return len(value) >= 6 and any(one.isdigit() or one in "!@#$%^&*+~?" for one in value)
