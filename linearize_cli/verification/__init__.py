"""The checks of `verify`. Each takes a `Subject` (model and test inputs) and returns a `Finding` (the
result).
"""
