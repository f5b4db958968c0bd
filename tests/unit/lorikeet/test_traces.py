"""Spans: which trace they are in, what they may say, and that they cost nothing while off."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import pytest

from lorikeet import traces
from tests.fakes.spans import recorded_spans

UPDATE, RELEASE = (hashlib.sha256(word).hexdigest() for word in (b"update", b"release"))


def trace_of(subject: str) -> int:
    return int(subject[:32], 16)


def test_spans_about_one_update_meet_in_its_trace() -> None:
    with recorded_spans() as spans:
        traces.after("round", UPDATE, 2.5, first=True, links=[RELEASE], method="sft")
        traces.after("upload", UPDATE, 0.5, result="admitted")
    round_, upload = spans.one("round"), spans.one("upload")
    assert round_.context.trace_id == upload.context.trace_id == trace_of(UPDATE)
    assert round_.parent is None
    assert upload.parent is not None
    assert upload.parent.span_id == round_.context.span_id == int(UPDATE[32:48], 16)
    assert upload.context.span_id != round_.context.span_id
    [link] = round_.links
    assert link.context.trace_id == trace_of(RELEASE)
    assert round_.start_time is not None
    assert round_.end_time is not None
    assert 2.4 < (round_.end_time - round_.start_time) / 1e9 < 2.6
    assert dict(round_.attributes or {}) == {"lorikeet.method": "sft"}


def test_what_is_no_id_has_a_trace_of_its_own() -> None:
    with recorded_spans() as spans:
        traces.after("switch", "no id", 0.0)
        traces.after("switch", "", 0.0, first=True)
    first, second = spans
    assert first.context.trace_id != second.context.trace_id
    assert (first.parent, second.parent) == (None, None)


def test_an_attribute_that_nobody_allowed_is_refused_and_texts_are_cut() -> None:
    with recorded_spans() as spans:
        with pytest.raises(ValueError, match="prompt"):
            traces.after("round", UPDATE, 0.0, prompt="what a customer wrote")
        traces.after("round", UPDATE, 0.0, release="v" * 500, cohort=None)
    [span] = spans
    assert dict(span.attributes or {}) == {"lorikeet.release": "v" * traces.MAX_TEXT}


def test_a_request_is_below_the_clients_span_and_its_parts_below_it() -> None:
    sent = b"00-" + b"ab" * 16 + b"-" + b"cd" * 8 + b"-00"
    with recorded_spans() as spans:
        with traces.request(sent), traces.part("capture"):
            traces.say(route="/v1/completions", status=200)
        with traces.request(b"00-nonsense"):
            pass
        with traces.part("capture"):  # in no request
            pass
    first, *others = [span for span in spans if span.name == "request"]
    capture = spans.one("capture")
    assert first.context.trace_id == capture.context.trace_id == int("ab" * 16, 16)
    assert first.parent is not None
    assert first.parent.span_id == int("cd" * 8, 16)
    assert capture.parent is not None
    assert capture.parent.span_id == first.context.span_id
    assert [other.parent for other in others] == [None]


def test_only_a_share_of_the_requests_is_traced_whatever_clients_ask() -> None:
    with recorded_spans(sample=0.0) as spans:
        with traces.request(b"00-" + b"ab" * 16 + b"-" + b"cd" * 8 + b"-01"):
            traces.say(status=200)
            with traces.part("capture"):
                pass
        traces.after("upload", UPDATE, 0.0)
    assert spans.names == ["upload"]


def test_an_error_inside_a_request_is_raised_and_not_recorded() -> None:
    with recorded_spans() as spans:
        with pytest.raises(KeyError), traces.request(None), traces.part("capture"):
            raise KeyError("what a customer wrote")
        assert not [event for span in spans for event in span.events]


def test_nothing_is_imported_while_traces_are_off() -> None:
    program = (
        "import sys\nfrom lorikeet import traces\ntraces.after('x', '0' * 64, 1.0)\n"
        "with traces.request(None), traces.part('y'):\n    traces.say(status=200)\n"
        "traces.stop()\nsys.exit('opentelemetry' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize(
    "endpoint",
    [
        "collector:4318",
        "ftp://collector",
        "https://?x",
        "http://a:b@c",
        "http://c/?k=v",
        "http://c d",
    ],
)
def test_a_bad_collector_is_refused_and_not_quoted(endpoint: str) -> None:
    wrong = traces.wrong_endpoint(endpoint)
    assert wrong
    assert endpoint not in wrong
    assert not traces.wrong_endpoint("http://collector:4318")
