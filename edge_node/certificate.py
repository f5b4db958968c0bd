"""The node's certificate: what is wrong with it now, and the one next step.

In: the certificate in PEM and the time. Out: two sentences for `status`, `doctor` and central.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from cryptography import x509

NEAR_END = timedelta(days=30)
ENROL_ANEW = (
    "get a join token (`central tokens create`), stop the node, remove identity/identity.json in "
    "EDGE_DATA_DIR and run `edge-node enroll` with it: key and name stay."
)


def certificate_problem(certificate_pem: bytes, now: datetime) -> tuple[str, str] | None:
    """Text and next step; None for a certificate that is valid for a while."""
    if (wrong := invalidity(certificate_pem, now)) is not None:
        return wrong
    certificate = x509.load_pem_x509_certificate(certificate_pem)
    ends = certificate.not_valid_after_utc
    if ends - now >= NEAR_END:
        return None
    return (
        f"This node's certificate ends on {ends:%Y-%m-%d}; central refuses the node from then on.",
        f"Enrol anew: {ENROL_ANEW}",
    )


def invalidity(certificate_pem: bytes, now: datetime) -> tuple[str, str] | None:
    """Text and next step of a certificate that is not valid at `now`."""
    certificate = x509.load_pem_x509_certificate(certificate_pem)
    begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if begins <= now < ends:
        return None
    return (
        f"{validity(certificate_pem)}, and this node's clock says {now:%Y-%m-%d %H:%M} UTC.",
        f"Set the clock if it is wrong. Otherwise enrol anew: {ENROL_ANEW}",
    )


def validity(certificate_pem: bytes) -> str:
    """When the certificate is valid; a sentence without its full stop."""
    certificate = x509.load_pem_x509_certificate(certificate_pem)
    begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return (
        f"This node's certificate is valid from {begins:%Y-%m-%d %H:%M} to "
        f"{ends:%Y-%m-%d %H:%M} UTC"
    )
