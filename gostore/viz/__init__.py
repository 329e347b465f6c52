"""Pictures fed by real events."""
