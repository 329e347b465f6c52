"""What a node serves."""
