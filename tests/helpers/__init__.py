"""What several test folders share: starting ranks, devices, conformance suites."""
