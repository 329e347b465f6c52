"""Membership: who is here, who is in trouble."""
