"""The shared kernel: what plugins and hosts rely on, and nothing that knows one of them."""
