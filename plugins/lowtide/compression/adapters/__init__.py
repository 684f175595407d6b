"""What touches a host's private API."""
