"""The fleet: join tokens and certificate requests enter; identities, offers and node status leave."""
