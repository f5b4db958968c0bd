"""Central's certificates and join tokens."""

from __future__ import annotations

import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from central.errors import Refused, SettingsError, StorageError
from central.fleet.identity import Peer, parse_certificate
from central.fleet.pki import Pki, public_pem
from central.fleet.tokens import create_token, expect_sensible, expect_usable, find_token
from central.journal import Journal
from edge_node.identity import JoinToken
from tests.unit.central import builders as make


def test_the_second_start_finds_the_same_keys(tmp_path: Path) -> None:
    first = Pki.load_or_create(tmp_path, ["central.example"])
    again = Pki.load_or_create(tmp_path, ["central.example"])
    assert (again.ca_pem, again.server_certificate_pem) == (
        first.ca_pem,
        first.server_certificate_pem,
    )
    assert (
        again.release_key_pem
        == first.release_key_pem
        == (tmp_path / "pki" / "release.pub.pem").read_bytes()
    )
    for path in (tmp_path / "pki").glob("*.key"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_half_made_directory_is_completed(tmp_path: Path) -> None:
    first = Pki.load_or_create(tmp_path, [])
    for name in ("server.pem", "release.pub.pem", "operator.pem"):
        (tmp_path / "pki" / name).unlink()
    (tmp_path / "pki" / "operator.pem.1234.tmp").write_bytes(b"half")
    again = Pki.load_or_create(tmp_path, [])
    assert again.ca_pem == first.ca_pem
    assert {path.name for path in (tmp_path / "pki").iterdir()} == {
        "ca.key", "ca.pem", "server.key", "server.pem", "release.key", "release.pub.pem",
        "operator.key", "operator.pem",
    }  # fmt: skip


def test_new_names_make_a_new_server_certificate(tmp_path: Path) -> None:
    first = Pki.load_or_create(tmp_path, [])
    again = Pki.load_or_create(tmp_path, ["10.1.2.3", "central.example"])
    assert again.ca_pem == first.ca_pem
    certificate = x509.load_pem_x509_certificate(again.server_certificate_pem)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost", "central.example"]
    assert [str(ip) for ip in names.get_values_for_type(x509.IPAddress)] == [
        "127.0.0.1",
        "10.1.2.3",
    ]
    certificate.verify_directly_issued_by(again.ca_certificate)


def test_certificates_name_node_cohort_and_operator(tmp_path: Path) -> None:
    pki = Pki.load_or_create(tmp_path, [])
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    pem = pki.issue_node_certificate("a-00000000", "zeta", key)
    end = x509.load_pem_x509_certificate(pem).not_valid_after_utc
    assert parse_certificate(pem) == Peer(
        "node", "a-00000000", "zeta", public_pem(key).decode(), end
    )
    operator = parse_certificate((tmp_path / "pki" / "operator.pem").read_bytes())
    assert (operator.kind, operator.name) == ("operator", "operator")
    with pytest.raises(ValueError, match="not enough values"):
        parse_certificate(pki.server_certificate_pem)


def test_a_name_that_no_certificate_can_carry_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="CENTRAL_LISTEN__NAMES: 'é' is not a DNS name"):
        Pki.load_or_create(tmp_path, ["é"])


def test_a_damaged_key_is_named(tmp_path: Path) -> None:
    Pki.load_or_create(tmp_path, [])
    (tmp_path / "pki" / "ca.key").write_bytes(b"no")
    with pytest.raises(StorageError, match=r"ca\.key"):
        Pki.load_or_create(tmp_path, [])


def test_a_token_is_read_by_the_node_and_its_secret_is_not_in_the_journal(tmp_path: Path) -> None:
    journal = Journal(f"sqlite:///{tmp_path}/journal.db")
    ca = Pki.load_or_create(tmp_path, []).ca_pem
    token = JoinToken.parse(create_token(journal, ca, "shared", 1, 60, "tests")[0])
    assert token.ca_pem == ca
    assert token.secret not in str(journal.events())
    now = datetime.now(UTC)
    with journal.read() as state:
        record = find_token(state, token.token_id, token.secret)
        with pytest.raises(Refused, match="not known"):
            find_token(state, token.token_id, token.secret + "x")
    expect_usable(record, now)
    with pytest.raises(Refused, match="expired"):
        expect_usable(record, now + timedelta(seconds=61))
    for uses, valid_s in ((0, 60), (1, 59)):
        with pytest.raises(Refused, match="of no use"):
            expect_sensible(uses, valid_s)
    assert make.digest_of(token.secret) == record.secret_sha256


NOW = datetime(2026, 11, 26, 12, tzinfo=UTC)


def set_clock(monkeypatch: pytest.MonkeyPatch, now: datetime) -> None:
    monkeypatch.setattr("central.fleet.pki.wall_time", lambda: now)


def test_a_clock_that_was_a_day_ahead_leaves_nobody_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_clock(monkeypatch, NOW + timedelta(days=1))
    ahead = Pki.load_or_create(tmp_path, [])
    node = ahead.issue_node_certificate(
        "a-00000000", "shared", ec.generate_private_key(ec.SECP256R1()).public_key()
    )
    set_clock(monkeypatch, NOW)
    corrected = Pki.load_or_create(tmp_path, [])
    assert (corrected.ca_pem, corrected.server_certificate_pem) == (
        ahead.ca_pem,
        ahead.server_certificate_pem,
    )
    operator = (tmp_path / "pki" / "operator.pem").read_bytes()
    for pem in (ahead.ca_pem, ahead.server_certificate_pem, node, operator):
        certificate = x509.load_pem_x509_certificate(pem)
        assert certificate.not_valid_before_utc <= NOW < certificate.not_valid_after_utc


def test_certificates_of_a_clock_that_was_years_ahead_are_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_clock(monkeypatch, NOW)
    first = Pki.load_or_create(tmp_path, [])
    set_clock(monkeypatch, NOW + timedelta(days=3000))
    ahead = Pki.load_or_create(tmp_path, ["central.example"])
    set_clock(monkeypatch, NOW)
    corrected = Pki.load_or_create(tmp_path, ["central.example"])
    assert corrected.ca_pem == ahead.ca_pem == first.ca_pem
    operator = (tmp_path / "pki" / "operator.pem").read_bytes()
    for pem in (corrected.server_certificate_pem, operator):
        assert x509.load_pem_x509_certificate(pem).not_valid_before_utc <= NOW


@pytest.mark.parametrize("made", [timedelta(days=400), timedelta(days=-4000)])
def test_a_ca_that_nobody_can_trust_now_is_refused_with_both_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: timedelta
) -> None:
    set_clock(monkeypatch, NOW + made)
    Pki.load_or_create(tmp_path, [])
    set_clock(monkeypatch, NOW)
    with pytest.raises(
        StorageError,
        match=r"clock says 2026-11-26 12:00: no node would trust central\. Set the clock",
    ) as e:
        Pki.load_or_create(tmp_path, [])
    assert f"{NOW + made - timedelta(days=30):%Y-%m-%d %H:%M}" in str(e.value)


def test_a_key_that_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Pki.load_or_create(tmp_path, [])
    read = Path.read_bytes

    def refuse(path: Path) -> bytes:
        if path.name == "release.key":
            raise PermissionError(13, "Permission denied")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(StorageError, match=r"release\.key cannot be used: Permission denied"):
        Pki.load_or_create(tmp_path, [])
