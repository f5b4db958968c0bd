"""Errors of the edge node.

EdgeError
+-- SettingsError (ValueError)       exit 2: the environment variables are not usable
+-- EnrollmentError (RuntimeError)   exit 3: central refused, or the node is not enrolled
+-- CentralUnreachable (ConnectionError)  exit 4: central did not answer
+-- StorageError (OSError)           exit 5: a path cannot be written or read
+-- ServingError (RuntimeError)      exit 6: vLLM cannot start or a port is taken
|   +-- NotHeld                    a worker of vLLM holds other weights than the adapter has
+-- AdapterError (ValueError)        a payload is not usable here
|   +-- NothingToMeasure           an evaluation asks for no environment of this node
|   +-- NotProved                  vLLM does not serve the release that it was given
+-- EnvironmentFault (RuntimeError)  a plug-in raised, hung or broke its contract; not its words,
|                                    which may quote a task
+-- UnknownInteraction (LookupError) feedback for an id that the node does not hold
|   +-- UnknownEpisode             feedback for an episode without answers
+-- UnknownFeedback (LookupError)    feedback is asked for that the node does not hold
|   +-- FeedbackWithdrawn          it was deleted
+-- KeyReused (ValueError)           an idempotency key came with another body before
+-- UpdateRefused (RuntimeError)     central refused an update; its `reason` is central's code

`edge-node status` exits with 0 for a node that is ready and has no problem, 1 for one that is not
ready, and IN_TROUBLE (7) for one that is ready while a room of it fails. `status --live` looks at
the supervisor alone.
"""

from __future__ import annotations

IN_TROUBLE = 7
"""Exit code of `edge-node status` when the node answers requests, but something else fails."""


class EdgeError(Exception):
    """Every error of ours.

    Its message says what happened, the value seen, what was expected and the next step.
    """

    exit_code = 1


class SettingsError(EdgeError, ValueError):
    """The environment variables are not usable."""

    exit_code = 2


class EnrollmentError(EdgeError, RuntimeError):
    """Central refused the node, or the node is not enrolled."""

    exit_code = 3


class CentralUnreachable(EdgeError, ConnectionError):
    """Central did not answer."""

    exit_code = 4


class StorageError(EdgeError, OSError):
    """A path cannot be written or read."""

    exit_code = 5


class ServingError(EdgeError, RuntimeError):
    """vLLM cannot start, or a port is taken."""

    exit_code = 6


class NotHeld(ServingError):
    """A worker of vLLM holds other weights than the adapter that it loaded."""


class AdapterError(EdgeError, ValueError):
    pass


class NotProved(AdapterError):
    """vLLM loaded a release and does not serve it: the alias must not point at it."""


class Damaged(NotProved):
    """A version directory is not what central signed; it was not loaded."""


class NothingToMeasure(AdapterError):
    """No trouble: other nodes measure what the evaluation asks for."""


class NoLikelihood(EdgeError, ValueError):
    """A document's log-probability cannot be had, however often it is tried."""


class EnvironmentFault(EdgeError, RuntimeError):
    """An environment hung, crashed, needed too much memory or broke its contract.

    `raised`: it only raised an exception, and works on.
    """

    def __init__(self, environment: str, text: str, *, raised: bool = False) -> None:
        super().__init__(text)
        self.environment = environment
        self.raised = raised


class UnknownInteraction(EdgeError, LookupError):
    def __init__(self, interaction_id: str) -> None:
        super().__init__(
            f"No interaction {interaction_id!r} on this node. Expected the `id` of an answer that "
            "this node gave and kept."
        )
        self.interaction_id = interaction_id


class UnknownEpisode(UnknownInteraction):
    def __init__(self, episode: str) -> None:
        super().__init__(episode)
        self.args = (
            f"No answer of episode {episode!r} on this node. Expected the value of the header "
            "x-lorikeet-episode of a request that this node answered and kept.",
        )


class UnknownFeedback(EdgeError, LookupError):
    def __init__(self, feedback_id: str) -> None:
        super().__init__(
            f"No feedback {feedback_id!r} on this node. Expected the `id` in an answer of POST "
            "/v1/feedback."
        )
        self.feedback_id = feedback_id


class FeedbackWithdrawn(UnknownFeedback):
    def __init__(self, feedback_id: str, at: str) -> None:
        super().__init__(feedback_id)
        self.args = (f"Feedback {feedback_id} was deleted at {at}. Send it again if it is meant.",)
        self.at = at


class KeyReused(EdgeError, ValueError):
    def __init__(self, key: str) -> None:
        super().__init__(
            f"The idempotency key {key!r} came with another body before, and nothing was written "
            "now. Expected a new key for new feedback, or the same body again."
        )


class UpdateRefused(EdgeError, RuntimeError):
    def __init__(self, update_id: str, reason: str, message: str) -> None:
        super().__init__(message)
        self.update_id = update_id
        self.reason = reason
