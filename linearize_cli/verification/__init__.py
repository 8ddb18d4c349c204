"""The checks of `verify`: each takes a `Subject` and returns a `Finding`."""
