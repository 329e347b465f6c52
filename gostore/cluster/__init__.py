"""The cluster model: members, rings, views, watchers. Pure."""
