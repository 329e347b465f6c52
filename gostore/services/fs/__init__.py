"""The distributed file system and its REST face."""
