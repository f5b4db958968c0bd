"""The fleet: enrolment of nodes, their identities, and what they say of themselves."""
