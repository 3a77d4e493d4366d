"""Puts the rooms together into processes: the only room that knows every other.

`coordinator` and `shard` are apart so that a coordinator starts without torch. May import
everything of the server but the commands above it.
"""
