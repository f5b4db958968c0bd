"""Access: keys and requests enter; who asks, and whether the node answers, leaves."""

from edge_node.access.keyring import Keyring, describe_access
from edge_node.access.keys import (
    Key,
    Scope,
    create_key,
    keys_file,
    read_keys,
    revoke_key,
)
from edge_node.access.quotas import Quotas

__all__ = [
    "Key",
    "Keyring",
    "Quotas",
    "Scope",
    "create_key",
    "describe_access",
    "keys_file",
    "read_keys",
    "revoke_key",
]
