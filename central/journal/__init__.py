"""The journal: events enter, a durable hash-chained record and the state it implies leave."""

from central.journal.events import (
    Event,
    EventKind,
    JournalConflict,
    JournalCorrupt,
    NewEvent,
    utc_now,
)
from central.journal.isolation import Isolation
from central.journal.journal import Journal
from central.journal.lock import WriterLock
from central.journal.plan import LeftOut, MergePlan, PlannedUpdate
from central.journal.records import (
    CanaryReport,
    ChannelChange,
    CollectedBlob,
    EvaluationRecord,
    EvaluationReport,
    NodeRecord,
    PlanRecord,
    ReleaseRecord,
    Suite,
    TokenRecord,
    TrainOfferRecord,
    UpdateRecord,
    VerdictRecord,
)
from central.journal.state import State
from central.journal.stored import (
    count_events,
    import_journal,
    read_journal,
    verify_journal,
)

__all__ = [
    "CanaryReport",
    "ChannelChange",
    "CollectedBlob",
    "EvaluationRecord",
    "EvaluationReport",
    "Event",
    "EventKind",
    "Isolation",
    "Journal",
    "JournalConflict",
    "JournalCorrupt",
    "LeftOut",
    "MergePlan",
    "NewEvent",
    "NodeRecord",
    "PlanRecord",
    "PlannedUpdate",
    "ReleaseRecord",
    "State",
    "Suite",
    "TokenRecord",
    "TrainOfferRecord",
    "UpdateRecord",
    "VerdictRecord",
    "WriterLock",
    "count_events",
    "import_journal",
    "read_journal",
    "utc_now",
    "verify_journal",
]
