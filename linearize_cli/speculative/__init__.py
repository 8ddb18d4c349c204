"""Speculative decoding of linearized models.

A drafter proposes a token tree. One forward of the model verifies the tree against the constant state. The accepted
path is then committed to the state.
"""
