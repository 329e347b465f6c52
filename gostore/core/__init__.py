"""Pure foundations: ports, events, stamps, errors, addresses and the registry of policy slots."""
