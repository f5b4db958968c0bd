from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from central.journal.events import Event, EventKind
from edge_node.experience import ExperienceStore, Feedback, Interaction
from examples.quickstart.durability import _experience_finding, _merged_once, _outbox_findings
from examples.quickstart.steady_client import Acknowledged


def make_event(kind: EventKind, subject: str, body: dict[str, Any]) -> Event:
    return Event(1, "2026-11-22T00:00:00Z", kind, "shared", subject, body, "0" * 64, "0" * 64)


def make_merge(number: int, *updates: str, accepted: bool) -> list[Event]:
    plan = json.dumps({"updates": [{"update_id": update} for update in updates]})
    return [
        make_event(EventKind.MERGE_PLANNED, f"plan-{number}", {"plan": plan}),
        make_event(EventKind.CANDIDATE_BUILT, f"release-{number}", {"plan_id": f"plan-{number}"}),
        make_event(EventKind.VERDICT, f"release-{number}", {"accepted": accepted}),
    ]


def test_an_update_in_two_accepted_releases_is_found() -> None:
    once = [*make_merge(1, "u1", "u2", accepted=False), *make_merge(2, "u1", "u3", accepted=True)]
    assert _merged_once(once).holds
    finding = _merged_once([*once, *make_merge(3, "u3", accepted=True)])
    assert not finding.holds
    assert finding.seen == "2 merged, 1 twice"


def make_node(root: Path) -> ExperienceStore:
    (root / "nodes" / "a").mkdir(parents=True)
    store = ExperienceStore(root / "nodes" / "a" / "experience.db")
    message = {"role": "user", "content": "x"}
    store.add_interactions(
        [
            Interaction(
                "i1",
                "2026-11-22T00:00:00Z",
                "lorikeet@v0-00000000",
                [message],
                "y",
                "stop",
                "/v1/chat/completions",
                prompt_ids=(1,),
                answer_ids=(2,),
            )
        ]
    )
    return store


def test_what_a_node_lost_is_found(tmp_path: Path) -> None:
    feedback_id = make_node(tmp_path).add_feedback(Feedback("i1", score=1.0), max_tokens=9).id
    assert _experience_finding(
        tmp_path, "a", Acknowledged(answers=["i1"], feedback=[feedback_id])
    ).holds
    assert not _experience_finding(
        tmp_path, "a", Acknowledged(answers=["i1", "i2"], feedback=[feedback_id])
    ).holds
    assert not _experience_finding(
        tmp_path, "a", Acknowledged(answers=["i1"], feedback=["f9"])
    ).holds
    unexpected = Acknowledged(
        answers=["i1"], feedback=[feedback_id], unexpected=["/v1/feedback 404"]
    )
    assert not _experience_finding(tmp_path, "a", unexpected).holds


def test_updates_that_no_node_made_are_found(tmp_path: Path) -> None:
    make_node(tmp_path)
    holds = {
        f.promise: f.holds for f in _outbox_findings(tmp_path, {"a": None}, Counter({"u1": 1}))
    }
    assert holds["no update in the journal that no node made"] is False
    assert holds["every update with a receipt is in the journal exactly once"] is False
