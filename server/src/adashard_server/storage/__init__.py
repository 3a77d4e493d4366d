"""What outlives the processes: snapshots of shards, and checkpoints, the committed sets of them.

A checkpoint is a folder `<directory>/<job>/step-<version>` with each shard's files and a manifest,
which is written last: what has no manifest is no checkpoint. `manifest` says what one is,
`checkpoints` keeps the directory of them, `snapshot` writes one shard's files and `reading` reads
slices back, at any number of shards. When one is cut and which are kept is decided elsewhere
(`cluster/checkpoints.py`).

May import `adashard.wire` and safetensors, and no other room. `manifest` and `checkpoints` load no
torch, since a coordinator starts without it.
"""
