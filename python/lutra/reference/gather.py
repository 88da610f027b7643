"""Reference of `lutra.gather`."""
