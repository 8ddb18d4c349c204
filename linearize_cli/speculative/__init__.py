"""Speculative decoding of linearized models: a drafter proposes a tree of tokens, one forward verifies it against the
constant state, the accepted path is committed.
"""
