"""Starts a cluster's processes on this machine, and brings back those that die.

`restarts` decides (pure), `keeper` carries out, `processes` are those of the command, `spare` has
one started ahead; `threads` is for clusters inside one process. May import what `app` may, and
`app`.
"""
