"""What the hosts know about ranks."""
