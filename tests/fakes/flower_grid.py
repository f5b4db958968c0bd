"""A Flower Grid in this process: each node runs the same ClientApp, one message after another."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid


class InProcessGrid(Grid):  # type: ignore[misc]
    """`nodes` virtual nodes with arbitrary ids, as in Flower's simulation.

    `broken` ones reply with an error.
    """

    def __init__(self, app: ClientApp, nodes: int, broken: frozenset[int] = frozenset()) -> None:
        self._app = app
        self._broken = broken
        self.asked: list[tuple[str, int]] = []
        self._replies: list[Message] = []
        self._contexts = {
            (node * 7919 + 13) % 1000003: Context(
                run_id=1,
                node_id=node,
                node_config={"partition-id": node, "num-partitions": nodes},
                state=RecordDict(),
                run_config={},
            )
            for node in range(nodes)
        }

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for number, message in enumerate(messages):
            message.metadata.__dict__["_message_id"] = (
                f"{number}"  # Flower's own grid does the same
            )
            self._replies.append(self._answer(message))
            ids.append(f"{number}")
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Two at a time, so that whoever asks has to ask again."""
        came, self._replies = self._replies[:2], self._replies[2:]
        return came

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        raise NotImplementedError

    def _answer(self, message: Message) -> Message:
        context = self._contexts[message.metadata.dst_node_id]
        node = int(context.node_config["partition-id"])
        self.asked.append((message.metadata.message_type, node))
        if node in self._broken:
            return Message(Error(1, f"node {node} is out of memory"), reply_to=message)
        return self._app(message, context)
