"""Where the private interfaces of the hosts are touched."""
