"""Intake: signed updates of enrolled nodes enter; admitted updates and signed receipts leave."""
