"""Reference of `lutra.scan`."""
