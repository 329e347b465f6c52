"""The simulated world: the unmodified node on virtual time, a network, disks and clocks that fail as they are told to.

Start with :class:`gostore.sim.world.World`.
"""
