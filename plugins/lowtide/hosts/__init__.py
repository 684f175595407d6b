"""One adapter per host: each fires the lifecycle events and touches its host's private API."""
